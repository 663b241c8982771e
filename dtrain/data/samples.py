"""Describe samples: which variables they consist of, how many there are, how their chunks are stored. Metadata only."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from dtrain.config.functions import Function
from dtrain.config.names import IGNORED_CLASS
from dtrain.config.schema import DataConfig
from dtrain.config.slices import Offsets, Slice
from dtrain.data.encoding import DType, Scaling
from dtrain.data.members import with_values
from dtrain.data.sampletext import described
from dtrain.data.tiles import ONE_TILE, Tiles
from dtrain.data.variable import MISSING_CATEGORY, Variable
from dtrain.display import html_card, html_table
from dtrain.errors import InvalidConfig

MissingLabels: TypeAlias = Literal["ignored", "refused", "nan"]
"""A missing label is the ignored class; the same, but a fault unless ``data.non_finite`` is "allow"; or NaN."""


WHOLE_OBJECT_BYTES = 8 << 20
"""Shards up to this size are read whole; larger shards are split into several units."""
LISTED_TILES = 1 << 16
"""The fingerprint lists the tiles of a row one by one up to this number, as the first version did."""
SMALL_SHARE = 16
SMALL_BYTES = 64 << 20
"""A variable is small if it has at most 1 / `SMALL_SHARE` of all bytes, and at most `SMALL_BYTES`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """What the kind of a store allows: facts that planning and reading depend on (`dtrain.data.read.open`)."""

    is_local: bool = True
    """The store is a directory of this machine's file system: its objects can be read as files, by path."""
    can_list: bool = True
    """The store can list its objects."""
    read_ahead: bool = False
    """Requests take long: units are read further ahead, by more threads."""
    reads_parts: bool = False
    """Objects are read in the thread that asks for them, into given memory, as the files of a directory are."""
    has_marks: bool = False
    """The store tells versions of an object apart without reading it (`ReadStore.marks`)."""
    compared: str = (
        "the sizes of stored chunks are compared; a chunk overwritten by one of the same size is not noticed"
    )
    """What is compared of its objects when a run continues."""
    checksum: str = ""
    """Names the checksum that the store itself keeps of each object, and verifies."""
    kept_bytes: int = 0
    """Bytes in memory of what a process keeps of the store while it is open: where its objects lie."""
    snapshot: str = ""
    """The snapshot of a repository that is read, whatever is committed meanwhile."""
    notes: tuple[tuple[str, str], ...] = ()
    """Label and text of what a person should know of the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinate:
    """An array of one dimension beside the variables, mostly the coordinate of a dimension."""

    variable: Variable
    attributes: Mapping[str, object]
    """CF attributes that say what its values mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What ``data.sel`` chooses of a dimension."""

    dim: str
    first: str
    """The first value of the coordinate, in its own words."""
    last: str
    start: int
    stop: int
    step: int
    of: int
    """Length of the dimension."""
    is_dropped: bool
    """True for a single value: samples do not have the dimension."""

    def __str__(self) -> str:
        if self.is_dropped:
            return f"{self.dim} {self.first}"
        count = len(range(self.start, self.stop, self.step))
        return f"{self.dim} {self.first} to {self.last}, {count:,} of {self.of:,} places"


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a sample: a variable, read at offsets from the sample's anchor."""

    name: str
    """Name of the variable."""
    offsets: tuple[int, ...]
    """Rows along the sample dimension, counted from the anchor."""
    window: bool
    """True if the offsets are an axis of the tensor; without it there is one offset."""
    is_weight: bool = False
    """True for the weight of samples: float32, whatever is stored. Not part of the fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of a Zarr group: metadata only, nothing is read before training.

    Made by `open_samples`. It can be pickled; another process reads the same store, as far as it knows the store's
    kind (`dtrain.data.read.open.register_kind`).
    """

    path: str
    """Absolute path or URL of the store."""
    config: DataConfig
    sample_dim: str
    first_row: int = 0
    """The first selected row."""
    num_samples: int
    """The row after the last selected one. Without windows and stride each row is a sample."""
    variables: tuple[Variable, ...]
    """Inputs, then targets, then the weight; a variable that is several of them stands once."""
    tiles: Tiles = ONE_TILE
    """The patches that every row is cut into."""
    store: StoreFacts = StoreFacts()
    """They decide how the store is read, and change no bit; not part of the fingerprint."""
    transform: Function | None = None
    """The function of ``data.transform``, if it was given as such; the configuration holds its name."""
    coordinate: Coordinate | str = ""
    """Read to find jumps, if windows must not cross them; or why it cannot be; empty if it need not be. Not part of the
    fingerprint."""
    split_column: Coordinate | str = ""
    """What splits are given by: the coordinate of a dimension, or the variable of groups; or why it cannot be read;
    empty if splits are shares. Not part of the fingerprint."""
    class_column: Coordinate | str = ""
    """The variable of ``data.balance``, or why it cannot be read. Not part of the fingerprint."""
    chosen: tuple[Chosen, ...] = ()
    """What ``data.sel`` chooses. Not part of the fingerprint: the selection of each variable is."""
    members: tuple[Samples, ...] = ()
    """The stores, where several are one (`dtrain.data.members`); then rows are those of the common axis."""
    begins: tuple[int, ...] = ()
    """By store of `members`: the row that its first stored row is."""
    named: tuple[str, ...] = ()
    """The absolute path or URL of each store that was named, also of those of which no row is chosen."""

    @property
    def stores(self) -> tuple[Samples, ...]:
        """The samples of each store; the samples themselves if there is one."""
        return self.members or (self,)

    @property
    def location(self) -> str | tuple[str, ...]:
        """The absolute path or URL of the store, or of each."""
        return self.named or self.path

    @property
    def row_runs(self) -> tuple[tuple[int, int, int], ...]:
        """Of each of several stores: the row that it begins at, its first row in use, and the one after its last."""
        pairs = zip(self.members, self.begins, strict=True)
        return tuple((begin, begin + one.first_row, begin + one.num_samples) for one, begin in pairs)

    @property
    def num_rows(self) -> int:
        """Number of selected rows."""
        return sum(one.num_samples - one.first_row for one in self.stores)

    @property
    def row_bytes(self) -> int:
        """Bytes in memory of one row of all variables."""
        return sum(variable.row_bytes for variable in self.variables)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """The tensors of a sample: the inputs, then the targets, then the weight if there is one."""
        config = self.config
        inputs = [self._field(name, config.input_offsets) for name in config.inputs]
        targets = [self._field(name, config.target_offsets) for name in config.targets]
        weights = [self._field(config.weight, config.target_offsets)] if config.weight else []
        return (*inputs, *targets, *(replace(field, is_weight=True) for field in weights))

    @property
    def weight(self) -> Variable | None:
        """The variable of ``data.weight``."""
        return self.variable(self.config.weight) if self.config.weight else None

    def _field(self, name: str, offsets: Offsets) -> Field:
        if self.variable(name).is_static:
            return Field(name, (), window=False)
        if isinstance(offsets, int):
            return Field(name, (offsets,), window=False)
        if isinstance(offsets, Slice):
            offsets = tuple(range(offsets.start, offsets.stop, offsets.step))
        return Field(name, offsets, window=True)

    def reach(self, name: str | None = None) -> tuple[int, int]:
        """Return the smallest and the largest offset at which one variable is read, or any variable."""
        return self._reaches[name]

    @cached_property
    def _reaches(self) -> dict[str | None, tuple[int, int]]:
        """The smallest and the largest offset of each variable, and, under None, of all."""
        offsets: dict[str | None, list[int]] = {}
        for field in self.fields:
            for name in (field.name, None) if field.offsets else ():
                offsets.setdefault(name, []).extend(field.offsets)
        return {name: (min(listed), max(listed)) for name, listed in offsets.items()}

    @property
    def moving(self) -> tuple[Variable, ...]:
        """The variables that have the sample dimension."""
        return tuple(variable for variable in self.variables if not variable.is_static)

    @cached_property
    def preloaded(self) -> tuple[Variable, ...]:
        """The variables with the sample dimension that are read once and stay in memory.

        They are small beside the others, and their chunks so long (for example one chunk for all labels) that
        units would have to be as long.
        """
        rows = self.num_rows
        total = sum(v.row_bytes for v in self.moving)
        small = [v for v in self.moving if v.row_bytes * SMALL_SHARE <= total and v.row_bytes * rows <= SMALL_BYTES]
        large = [v for v in self.moving if v not in small]
        if not large:
            return ()
        objects, chunks = whole_rows(large), whole_rows(large, chunks=True)
        return tuple(v for v in small if objects % v.object_rows or chunks % v.chunk_rows)

    @cached_property
    def streamed(self) -> tuple[Variable, ...]:
        """The variables that are read unit by unit."""
        return tuple(variable for variable in self.moving if variable not in self.preloaded)

    @cached_property
    def stored(self) -> tuple[Variable, ...]:
        """The arrays of the store that are read: a sparse variable has three."""
        return tuple(array for variable in self.variables for array in variable.arrays)

    @cached_property
    def sparse(self) -> tuple[Variable, ...]:
        """The sparse variables."""
        return tuple(variable for variable in self.variables if variable.sparse is not None)

    def field_shape(self, field: Field) -> tuple[int, ...]:
        """Return the shape of a field of one sample."""
        variable = self.variable(field.name)
        return (*((len(field.offsets),) if field.window else ()), *self.tiles[0].shape_of(variable))

    def field_dtype(self, field: Field) -> DType:
        """Return the dtype of a field, where it is not standardised."""
        return np.dtype(np.float32) if field.is_weight else self.variable(field.name).model_dtype

    @property
    def has_windows(self) -> bool:
        """True if a sample is more than one row."""
        low, high = self.reach()
        return low != high

    @property
    def fingerprint(self) -> str:
        """SHA-256 over shapes, dtypes, chunks and selection, without the path.

        Every run stores it, so that it must never change: the fields that are hashed are listed one by one, and
        facts that are added later stay out.
        """
        described = [
            self.sample_dim,
            self.first_row,
            self.num_samples,
            [_hashed_variable(v) for v in self.variables],
            [{"name": field.name, "offsets": field.offsets, "window": field.window} for field in self.fields],
            [{"ranges": tile.ranges} for tile in self.tiles]
            if len(self.tiles) <= LISTED_TILES
            else [{"cut": (cut.dim, cut.length, cut.size)} for cut in self.tiles.cuts],
            *([[member.fingerprint for member in self.members], self.begins] if self.members else []),
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def variable(self, name: str) -> Variable:
        """Return the variable of that name, or the array of a sparse one."""
        return next(variable for variable in (*self.variables, *self.stored) if variable.name == name)

    def labelled(self, missing: MissingLabels) -> Samples:
        """Return the samples with another meaning of the values that mark missing labels.

        Labels are targets that are stored as integers or bools, neither packed nor standardised, and no inputs.
        """
        if self.members:
            return self._with_members(tuple(member.labelled(missing) for member in self.members))
        return replace(self, variables=tuple(_labelled(self.config, v, missing) for v in self.variables))

    def standardised_by(self, scalings: Mapping[str, Scaling]) -> Samples:
        """Return the samples as a run reads them: these variables are standardised, whatever ``normalize`` names."""
        if self.members:
            return self._with_members(tuple(member.standardised_by(scalings) for member in self.members))
        return replace(self, variables=tuple(_standardised(v, scalings.get(v.name)) for v in self.variables))

    def _with_members(self, members: tuple[Samples, ...]) -> Samples:
        """Return the samples of stores whose values mean something else than before."""
        by_name = ([member.variable(v.name) for member in members] for v in self.variables)
        variables = (with_values(v, own) for v, own in zip(self.variables, by_name, strict=True))
        return replace(self, members=members, variables=tuple(variables))

    def rows(self) -> list[tuple[str, str]]:
        """Return label and text of each line of the printed table."""
        return described(self)

    def __repr__(self) -> str:
        return "<dtrain.Samples>\n" + "\n".join(f"  {label:<16} {text}" for label, text in self.rows())

    def _repr_html_(self) -> str:
        return html_card("dtrain.Samples", [html_table("", self.rows())])


def not_samples(value: object) -> InvalidConfig:
    """Return the error for something in the place of samples."""
    return InvalidConfig(
        f"samples is a {type(value).__name__}, not what open_samples returns.",
        "Give dtrain.open_samples(path, inputs=[...], targets=[...]).",
    )


def _labelled(config: DataConfig, v: Variable, missing: MissingLabels) -> Variable:
    if v.encoding is None or not v.encoding.missing:
        return v
    is_whole = np.dtype(v.dtype).kind in "iub" and not v.encoding.is_packed and not v.is_standardised
    is_label = is_whole and v.name in config.targets and v.name not in config.inputs
    ignored = IGNORED_CLASS if is_label and missing != "nan" else None
    passes = ignored is not None and missing == "ignored"
    if v.categories is not None and is_whole and not is_label:
        ignored = MISSING_CATEGORY  # codes stay integers: as an input they choose a row of an embedding
    return replace(v, encoding=replace(v.encoding, ignored=ignored, passes=passes))


def _standardised(v: Variable, scaling: Scaling | None) -> Variable:
    if scaling is not None:
        return replace(v, mean_axes=scaling.axes)
    was_cast = v.is_standardised and v.encoding is not None and v.encoding.is_cast
    return replace(v, mean_axes=None, encoding=None if was_cast else v.encoding)


def _hashed_variable(v: Variable) -> dict[str, Any]:
    """Return the fields of a variable that the fingerprint covers: those of the first version, in their order."""
    if v.sparse is not None:  # how many rows are read at once is no fact of the store
        whole = _hashed_variable(replace(v, sparse=None, chunks=(), objects=()))
        return {**whole, "sparse": [_hashed_variable(array) for array in v.sparse.arrays]}
    packing = v.encoding
    return {
        "name": v.name,
        "dims": v.dims,
        "shape": v.shape,
        "dtype": v.dtype,
        "chunks": v.chunks,
        "objects": v.objects,
        "sample_axis": v.sample_axis,
        "checksums": v.checksums,
        "select": v.select,
        "dropped": v.dropped,
        "encoding": packing
        and {
            "dtype": packing.dtype,
            "scale": packing.scale,
            "offset": packing.offset,
            "missing": packing.missing,
            "unsigned": packing.unsigned,
        },
        "not_zarrs": "",
        "not_numcodecs": "",
        **({"angle": v.angle} if v.angle else {}),
    }


def whole_rows(variables: Sequence[Variable], *, chunks: bool = False) -> int:
    """Return the row interval at which variables are cut together: at their stored objects, or at chunks.

    A sparse variable asks for a least number of rows, wherever they begin.
    """
    dense = [v.chunk_rows if chunks else v.object_rows for v in variables if v.sparse is None]
    rows = common_rows(dense) if dense else 1
    return math.ceil(least_rows(variables) / rows) * rows


def least_rows(variables: Sequence[Variable]) -> int:
    """Return the least number of rows that sparse variables are read in."""
    return max((v.object_rows for v in variables if v.sparse is not None), default=1)


def common_rows(object_rows: Sequence[int]) -> int:
    """Return the row interval at which variables with different object lengths are cut together.

    It is their least common multiple if that is at most 4 times the longest length. Otherwise it is the longest
    length, and objects of the other variables that straddle a cut are decoded on both sides.

    >>> common_rows([6, 4]), common_rows([100, 7])
    (12, 100)
    """
    longest = max(object_rows)
    common = math.lcm(*object_rows)
    return common if common <= 4 * longest else longest
