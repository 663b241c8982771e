"""Which variables make up a sample, how many samples there are, and how they are stored."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape

import numpy as np

from dtrain.config import DataConfig, Offsets, Slice


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
    checksums: bool
    """Whether a codec of the array detects flipped bits."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one row: the other dimensions, in stored order."""
        return self.shape[: self.sample_axis] + self.shape[self.sample_axis + 1 :]

    @property
    def row_bytes(self) -> int:
        """Decoded bytes of one row of the sample dimension."""
        return math.prod(self.sample_shape) * np.dtype(self.dtype).itemsize

    @property
    def object_rows(self) -> int:
        """Samples that one stored object spans."""
        return self.objects[self.sample_axis]

    @property
    def chunk_bytes(self) -> int:
        """Decoded bytes of one chunk."""
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize

    @property
    def num_objects(self) -> int:
        """Stored objects of the whole array."""
        return math.prod(math.ceil(n / size) for n, size in zip(self.shape, self.objects, strict=True))


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a sample: a variable, read at offsets from the sample's anchor."""

    name: str
    """Of the variable."""
    offsets: tuple[int, ...]
    """In rows along the sample dimension."""
    window: bool
    """Whether the offsets are an axis of the tensor; without it there is one offset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The samples of a Zarr group: metadata only, nothing is read before training.

    Made by `open_samples`.
    """

    path: str
    """Absolute path of the store."""
    config: DataConfig
    sample_dim: str
    num_samples: int
    """Rows along the sample dimension. Without windows and stride each is a sample."""
    variables: tuple[Variable, ...]
    """Inputs, then targets; a variable that is both stands once."""

    @property
    def row_bytes(self) -> int:
        """Decoded bytes of one row of the sample dimension over all variables."""
        return sum(variable.row_bytes for variable in self.variables)

    @property
    def fields(self) -> tuple[Field, ...]:
        """The tensors of a sample: the inputs, then the targets."""
        config = self.config
        inputs = [_field(name, config.input_offsets) for name in config.inputs]
        return (*inputs, *(_field(name, config.target_offsets) for name in config.targets))

    def reach(self, name: str | None = None) -> tuple[int, int]:
        """Return the smallest and the largest offset from an anchor at which a variable (or any) is read."""
        offsets = [o for field in self.fields if name in (None, field.name) for o in field.offsets]
        return min(offsets), max(offsets)

    @property
    def has_windows(self) -> bool:
        """Whether a sample is more than one row."""
        low, high = self.reach()
        return low != high

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what the metadata says of shape, dtype and chunking; not over the path."""
        described = [self.sample_dim, [asdict(v) for v in self.variables], [asdict(f) for f in self.fields]]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def variable(self, name: str) -> Variable:
        """Return the variable of that name."""
        return next(variable for variable in self.variables if variable.name == name)

    def rows(self) -> list[tuple[str, str]]:
        """Return label and text of each line of the printed table."""
        lines = [("rows", f"{self.num_samples:,} along {self.sample_dim}")]
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
        return [*lines, ("store", self.path)]

    def __repr__(self) -> str:
        return "<dtrain.Samples>\n" + "\n".join(f"  {label:<16} {text}" for label, text in self.rows())

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{escape(label)}</th><td style='text-align:left'>{escape(text)}</td></tr>"
            for label, text in self.rows()
        )
        return f"<table><caption>dtrain.Samples</caption>{cells}</table>"


def _field(name: str, offsets: Offsets) -> Field:
    if isinstance(offsets, int):
        return Field(name, (offsets,), window=False)
    if isinstance(offsets, Slice):
        offsets = tuple(range(offsets.start, offsets.stop, offsets.step))
    return Field(name, offsets, window=True)


def model_dtype(stored: str) -> np.dtype[np.generic]:
    """Return the dtype that the model sees: float32 for floats, int64 for integers and bools."""
    return np.dtype(np.float32 if np.dtype(stored).kind == "f" else np.int64)


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
