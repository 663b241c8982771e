"""Which variables make up a sample, how many samples there are, and how they are stored."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from dtrain.config.schema import DataConfig, Offsets, Slice
from dtrain.data.encoding import Encoding
from dtrain.display import html_table

Select: TypeAlias = tuple[tuple[int, int, int], ...]
"""Start, stop and step along each dimension; never empty."""


WHOLE_OBJECT_BYTES = 8 << 20
"""Shards up to this size are read whole; larger ones hold several units."""
SMALL_SHARE = 16
SMALL_BYTES = 64 << 20
"""A variable is small if it has this share of the bytes of all, and not more bytes than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One Zarr array, as its metadata describes it."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    """As stored, for example ``float64``."""
    chunks: tuple[int, ...]
    """What is decoded at once."""
    objects: tuple[int, ...]
    """What is stored at once: the shard where the array is sharded, else the chunk. Always ask this one for
    ownership; a sharded array's ``chunks`` are its inner chunks."""
    sample_axis: int
    """-1: it has none, and is the same for all samples."""
    checksums: bool
    """Whether a codec of the array detects flipped bits."""
    select: Select
    """What is used of each dimension (``data.isel``), in stored rows and columns."""
    dropped: tuple[int, ...] = ()
    """Dimensions of which one place is selected; a row does not have them."""
    encoding: Encoding | None = None
    """How values are packed; None if they are as they are."""
    not_zarrs: str = ""
    """Why zarrs does not read it right; empty if it does."""
    not_numcodecs: str = ""
    """Why it is not decoded by numcodecs alone; empty if it is."""

    @property
    def is_static(self) -> bool:
        """Whether it has no sample dimension: it is loaded once."""
        return self.sample_axis < 0

    @property
    def row_axes(self) -> tuple[int, ...]:
        """The stored axes that a row has, in stored order."""
        return tuple(axis for axis in range(len(self.shape)) if axis != self.sample_axis and axis not in self.dropped)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row: the other dimensions, as selected, in stored order."""
        return tuple(len(range(*self.select[axis])) for axis in self.row_axes)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the sample dimension as it is kept in memory; 0 if it has none."""
        return 0 if self.is_static else math.prod(self.row_shape) * self.kept_dtype.itemsize

    @property
    def kept_dtype(self) -> np.dtype[Any]:
        """Dtype in which units are kept: as stored, in native byte order; float64 as the float32 of the model."""
        stored = np.dtype(self.dtype).newbyteorder("=")
        return np.dtype(np.float32) if stored.kind == "f" and stored.itemsize > 4 and not self.encoding else stored

    @property
    def decoded_dtype(self) -> np.dtype[Any]:
        """Dtype of unpacked values."""
        return np.dtype(self.encoding.dtype if self.encoding else self.dtype)

    @property
    def model_dtype(self) -> np.dtype[Any]:
        """Dtype that the model sees: float32 for floats, int64 for integers and bools."""
        return np.dtype(np.float32 if self.decoded_dtype.kind == "f" else np.int64)

    @property
    def object_rows(self) -> int:
        """Samples that one stored object spans."""
        return self.objects[self.sample_axis]

    @property
    def chunk_rows(self) -> int:
        """Samples that are decoded at once."""
        return self.chunks[self.sample_axis]

    @property
    def chunk_bytes(self) -> int:
        """Decoded bytes of one chunk."""
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Stored objects of the whole array along each dimension."""
        return tuple(math.ceil(n / size) for n, size in zip(self.shape, self.objects, strict=True))

    @property
    def num_objects(self) -> int:
        """Stored objects of the whole array."""
        return math.prod(self.grid)

    def selection(self, start: int, stop: int) -> Select:
        """Return the selection of rows ``start:stop``."""
        return tuple((start, stop, 1) if axis == self.sample_axis else part for axis, part in enumerate(self.select))


@dataclass(frozen=True, slots=True)
class Tile:
    """A patch: what a sample is cut to along some dimensions."""

    ranges: tuple[tuple[str, int, int], ...]
    """Dimension, start and stop, counted in what is selected of it."""

    def slices(self, variable: Variable) -> tuple[slice, ...]:
        """Return the slice of each axis of a row."""
        found = {dim: slice(start, stop) for dim, start, stop in self.ranges}
        return tuple(found.get(variable.dims[axis], slice(None)) for axis in variable.row_axes)

    def shape_of(self, variable: Variable) -> tuple[int, ...]:
        """Return the shape of what it leaves of a row."""
        pairs = zip(variable.row_shape, self.slices(variable), strict=True)
        return tuple(len(range(length)[part]) for length, part in pairs)


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a sample: a variable, read at offsets from the sample's anchor."""

    name: str
    """Of the variable."""
    offsets: tuple[int, ...]
    """In rows along the sample dimension."""
    window: bool
    """Whether the offsets are an axis of the tensor; without it there is one offset."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of a Zarr group: metadata only, nothing is read before training.

    Made by `open_samples`.
    """

    path: str
    """Absolute path or URL of the store."""
    config: DataConfig
    sample_dim: str
    first_row: int = 0
    """Rows before it are not selected."""
    num_samples: int
    """The row after the last along the sample dimension. Without windows and stride each row is a sample."""
    variables: tuple[Variable, ...]
    """Inputs, then targets; a variable that is both stands once."""
    tiles: tuple[Tile, ...] = (Tile(()),)
    """The patches that every row is cut into; one that is everything if it is not cut."""

    @property
    def row_bytes(self) -> int:
        """Bytes in memory of one row of the sample dimension over all variables."""
        return sum(variable.row_bytes for variable in self.variables)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """The tensors of a sample: the inputs, then the targets."""
        config = self.config
        inputs = [self._field(name, config.input_offsets) for name in config.inputs]
        return (*inputs, *(self._field(name, config.target_offsets) for name in config.targets))

    def _field(self, name: str, offsets: Offsets) -> Field:
        if self.variable(name).is_static:
            return Field(name, (), window=False)
        if isinstance(offsets, int):
            return Field(name, (offsets,), window=False)
        if isinstance(offsets, Slice):
            offsets = tuple(range(offsets.start, offsets.stop, offsets.step))
        return Field(name, offsets, window=True)

    def reach(self, name: str | None = None) -> tuple[int, int]:
        """Return the smallest and the largest offset from an anchor at which a variable (or any) is read."""
        offsets = [o for field in self.fields if name in (None, field.name) for o in field.offsets]
        return min(offsets), max(offsets)

    @property
    def moving(self) -> tuple[Variable, ...]:
        """The variables that have the sample dimension."""
        return tuple(variable for variable in self.variables if not variable.is_static)

    @cached_property
    def kept_whole(self) -> tuple[Variable, ...]:
        """The variables with the sample dimension that are read once and kept.

        Those that are next to nothing beside the others, but stored in so long chunks (all labels in one, for
        example) that units would have to be as long.
        """
        rows = self.num_samples - self.first_row
        total = sum(v.row_bytes for v in self.moving)
        small = [v for v in self.moving if v.row_bytes * SMALL_SHARE <= total and v.row_bytes * rows <= SMALL_BYTES]
        large = [v for v in self.moving if v not in small]
        if not large:
            return ()
        objects, chunks = common_rows([v.object_rows for v in large]), common_rows([v.chunk_rows for v in large])
        return tuple(v for v in small if objects % v.object_rows or chunks % v.chunk_rows)

    @cached_property
    def streamed(self) -> tuple[Variable, ...]:
        """The variables that are read unit by unit."""
        return tuple(variable for variable in self.moving if variable not in self.kept_whole)

    def field_shape(self, field: Field) -> tuple[int, ...]:
        """Return the shape of a field of one sample."""
        variable = self.variable(field.name)
        return (*((len(field.offsets),) if field.window else ()), *self.tiles[0].shape_of(variable))

    @property
    def has_windows(self) -> bool:
        """Whether a sample is more than one row."""
        low, high = self.reach()
        return low != high

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what the metadata says of shape, dtype and chunking; not over the path."""
        described = [
            self.sample_dim,
            self.first_row,
            self.num_samples,
            [asdict(replace(v, not_zarrs="", not_numcodecs="")) for v in self.variables],
            [asdict(f) for f in self.fields],
            [asdict(tile) for tile in self.tiles],
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def variable(self, name: str) -> Variable:
        """Return the variable of that name."""
        return next(variable for variable in self.variables if variable.name == name)

    def rows(self) -> list[tuple[str, str]]:
        """Return label and text of each line of the printed table."""
        lines = [("rows", f"{self.num_samples - self.first_row:,} along {self.sample_dim}")]
        for role, names in (("input", self.config.inputs), ("target", self.config.targets)):
            for name in names:
                v = self.variable(name)
                stored = "x".join(map(str, v.chunks))
                if v.objects != v.chunks:
                    stored += " in shards of " + "x".join(map(str, v.objects))
                lines.append((f"{role} {name}", f"{v.dtype}[{', '.join(v.dims)}] {v.shape}, chunks {stored}"))
        if self.has_windows or self.config.stride > 1:
            low, high = self.reach()
            lines.append(("windows", f"rows {low:+d} to {high:+d} around every multiple of {self.config.stride}"))
        if len(self.tiles) > 1:
            size = " x ".join(f"{dim} {stop - start}" for dim, start, stop in self.tiles[0].ranges)
            lines.append(("patches", f"{len(self.tiles):,} a row, of {size}"))
        return [*lines, ("store", self.path)]

    def __repr__(self) -> str:
        return "<dtrain.Samples>\n" + "\n".join(f"  {label:<16} {text}" for label, text in self.rows())

    def _repr_html_(self) -> str:
        return html_table("dtrain.Samples", self.rows())


def common_rows(object_rows: Sequence[int]) -> int:
    """Return the rows at which variables with different object lengths are cut together.

    Their least common multiple, unless that is more than 4 times the longest: then the longest, and objects of
    the others that straddle a cut are decoded on both sides of it.

    >>> common_rows([6, 4]), common_rows([100, 7])
    (12, 100)
    """
    longest = max(object_rows)
    common = math.lcm(*object_rows)
    return common if common <= 4 * longest else longest
