"""A Zarr array that samples are read from, as its metadata describe it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from dtrain.data.encoding import DType, Encoding, unpack

ROW_START_BYTES = 8
"""For each row of a sparse matrix: where it begins."""
Select: TypeAlias = tuple[tuple[int, int, int], ...]
"""Start, stop and step along each dimension of a stored array; never empty."""
AngleUnit: TypeAlias = Literal["", "degrees", "radians"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFormat:
    """How the chunks of an array are encoded: facts from its metadata. `dtrain.data.plan.readers` draws conclusions."""

    codecs: tuple[str, ...] = ()
    """Names of the codecs in the order in which they encode a chunk; of a sharded array, an inner chunk.

    A codec of the package numcodecs has the prefix ``numcodecs.``, as have all codecs of Zarr v2.
    """
    endian: str = ""
    """Byte order that the codec ``bytes`` writes: ``little``, ``big``, or empty for single bytes and Zarr v2."""
    order: str = "C"
    """Order of the values in a chunk: ``C`` or ``F``."""
    has_fill_value: bool = True
    """False for a Zarr v2 array whose fill value is null."""
    has_plain_index: bool = True
    """False for a sharded array whose index is encoded by other codecs than ``bytes`` and ``crc32c``."""


@dataclass(frozen=True, slots=True)
class Categories:
    """What the codes of a categorical stand for: code i is category i."""

    count: int
    names: tuple[str, ...]
    """Of the first categories; of all, unless there are very many."""


MISSING_CATEGORY = -1
"""The code of a value without a category."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """The arrays of a sparse matrix (CSR; CSC, where samples are columns): values that are stored, row after row."""

    indptr: Variable
    """Where each row begins among the values, and where the last one ends: integers[rows + 1]."""
    indices: Variable
    """The column of each value."""
    data: Variable

    @property
    def arrays(self) -> tuple[Variable, ...]:
        """All three; the first says which parts of the others are read."""
        return self.indptr, self.indices, self.data

    @property
    def count(self) -> int:
        """Number of values that are stored."""
        return self.data.shape[0]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.indptr.shape[0] - 1

    @property
    def columns_dtype(self) -> DType:
        """Dtype of columns in memory: it is signed, so that a number that is too large is one outside of the row."""
        return np.dtype(np.int32 if np.dtype(self.indices.dtype).itemsize <= 4 else np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A Zarr array, as its metadata describe it."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    """Stored dtype, for example ``float64``."""
    chunks: tuple[int, ...]
    """Shape of a chunk: it is decoded at once. A sharded array has inner chunks."""
    objects: tuple[int, ...]
    """Shape of a stored object: a shard if the array is sharded, else a chunk. Ownership follows objects."""
    sample_axis: int
    """-1 if the variable has no sample dimension: then it is the same for all samples."""
    checksums: bool
    """True if a codec of the array detects flipped bits."""
    select: Select
    """The selected part of each dimension (``data.isel``), in stored rows and columns."""
    dropped: tuple[int, ...] = ()
    """Dimensions with a single selected place; rows do not have them."""
    encoding: Encoding | None = None
    """How values are packed; None if they are stored as they are."""
    chunk_format: ChunkFormat = ChunkFormat()
    """Decides who can read the variable, and nothing else; not part of the fingerprint."""
    fill_value: float | None = 0
    """The stored value that Zarr gives for a chunk which is not stored; None: NaN. Not part of the fingerprint."""
    means_bool: bool = False
    """True for integers that xarray reads as bools (their attribute ``dtype``). Not part of the fingerprint."""
    mean_axes: tuple[int, ...] | None = None
    """The axes of a row of which each index has a mean of its own (``data.normalize``); none: one mean of all values.

    None: the variable is not standardised. Not part of the fingerprint: plan.json keeps the means.
    """
    path: str = ""
    """Path of the array below the group, where that is not the name: the codes of a categorical."""
    categories: Categories | None = None
    """The categories of a categorical. Not part of the fingerprint: plan.json keeps them."""
    sparse: Sparse | None = None
    """The arrays of a sparse matrix. Its own `chunks` are the runs of rows that are read at once."""
    part_of: str = ""
    """Name of the sparse matrix of which this is an array; its rows are not those of samples."""
    angle: AngleUnit = ""
    """The unit of a coordinate of which samples are weighted by the cosine; empty for other variables."""

    @property
    def array_path(self) -> str:
        """Path of the array below the group."""
        return self.path or self.name

    @property
    def arrays(self) -> tuple[Variable, ...]:
        """The arrays of the store that hold the variable."""
        return (self,) if self.sparse is None else self.sparse.arrays

    @property
    def is_static(self) -> bool:
        """True if the variable has no sample dimension; it is then read once."""
        return self.sample_axis < 0

    @property
    def row_axes(self) -> tuple[int, ...]:
        """The stored axes that a row has, in stored order."""
        return tuple(axis for axis in range(len(self.shape)) if axis != self.sample_axis and axis not in self.dropped)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row: the selected length of `row_axes`."""
        return tuple(len(range(*self.select[axis])) for axis in self.row_axes)

    @property
    def row_dims(self) -> tuple[str, ...]:
        """Names of the dimensions of a row."""
        return tuple(self.dims[axis] for axis in self.row_axes)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory, of a sparse one in the mean; 0 if the variable has no sample dimension."""
        if self.sparse is not None:
            each = self.kept_dtype.itemsize + self.sparse.columns_dtype.itemsize
            return math.ceil(self.sparse.count * each / max(1, self.sparse.rows)) + ROW_START_BYTES
        return 0 if self.is_static else math.prod(self.row_shape) * self.kept_dtype.itemsize

    @property
    def kept_dtype(self) -> DType:
        """Dtype in memory: the stored one in native byte order; float64 becomes float32, which the model sees.

        A variable that is standardised stays float64: its mean is subtracted first.
        """
        stored = np.dtype(self.dtype).newbyteorder("=")
        is_cast = stored.kind == "f" and stored.itemsize > 4 and not self.encoding and not self.is_standardised
        return np.dtype(np.float32) if is_cast else stored

    @property
    def is_standardised(self) -> bool:
        """True if ``data.normalize`` names the variable."""
        return self.mean_axes is not None

    @property
    def mean_dims(self) -> tuple[str, ...]:
        """The dimensions of `mean_axes`."""
        return tuple(self.dims[self.row_axes[axis]] for axis in self.mean_axes or ())

    @property
    def num_means(self) -> int:
        """Number of means, if the variable is standardised."""
        return math.prod(self.row_shape[axis] for axis in self.mean_axes or ())

    @property
    def decoded_dtype(self) -> DType:
        """Dtype of unpacked values."""
        if self.encoding is None:
            return np.dtype(self.dtype)
        if self.encoding.ignored is not None:
            return np.dtype(self.encoding.unsigned or self.dtype)
        return np.dtype(self.encoding.dtype)

    @property
    def absent_value(self) -> float:
        """What a chunk that is not stored decodes to."""
        stored = np.full(1, math.nan if self.fill_value is None else self.fill_value, np.dtype(self.dtype))
        with np.errstate(all="ignore"):
            value: float = unpack(stored.astype(stored.dtype.newbyteorder("=")), self.encoding)[0].item()
        return value

    @property
    def model_dtype(self) -> DType:
        """Dtype that the model sees: int64 for integers and bools; float32 for floats, and what is standardised.

        The values of a sparse matrix are measured or counted, and never labels: float32 whatever is stored.
        """
        is_float = self.is_standardised or self.sparse is not None or self.decoded_dtype.kind == "f"
        return np.dtype(np.float32 if is_float else np.int64)

    @property
    def object_rows(self) -> int:
        """Rows of one stored object."""
        return self.objects[self.sample_axis]

    @property
    def chunk_rows(self) -> int:
        """Rows that are decoded at once."""
        return self.chunks[self.sample_axis]

    @property
    def chunk_bytes(self) -> int:
        """Decoded bytes of one chunk."""
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize

    @property
    def has_inner_chunks(self) -> bool:
        """True if a stored object holds several chunks."""
        return self.objects != self.chunks

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of stored objects along each dimension of the array."""
        return tuple(math.ceil(n / size) for n, size in zip(self.shape, self.objects, strict=True))

    @property
    def num_objects(self) -> int:
        """Number of stored objects of the array."""
        return math.prod(self.grid)

    def selection(self, start: int, stop: int) -> Select:
        """Return the selection of rows ``start:stop``."""
        return tuple((start, stop, 1) if axis == self.sample_axis else part for axis, part in enumerate(self.select))
