"""Shards: where the index of a shard says that its chunks lie, which parts to read, and the indices that are kept.

References
----------
Zarr v3, ``sharding_indexed``: offset and length of each inner chunk as uint64, in C order.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeAlias

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import Buffer
from zarr.core.metadata import ArrayV3Metadata

from dtrain.data.plan.footprint import INDEX_CACHE_BYTES
from dtrain.data.plan.grid import Chunk, ShardPart

ArrayLike: TypeAlias = "zarr.Array[Any]"  # older versions of zarr cannot be subscripted
Index: TypeAlias = npt.NDArray[np.uint64]
"""Offset and length of each chunk of a shard, uint64[*counts, 2]; both are `NO_CHUNK` where there is no chunk."""

NO_CHUNK = 2**64 - 1
FAR = 2**60
"""No file is that long: two such numbers can be added."""
Stored: TypeAlias = tuple[int, int, Chunk]
"""Offset and length of a chunk that a shard has, and the chunk."""


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """How the index of a shard is encoded, and where it lies."""

    counts: tuple[int, ...]
    """Inner chunks of a shard along each dimension."""
    dtype: str
    """Dtype of the numbers, with their byte order."""
    has_checksum: bool
    """True if a CRC32C follows the numbers."""
    at_end: bool
    """True if the index is at the end of a shard, False if it is at the start."""

    @property
    def index_bytes(self) -> int:
        """Bytes of the index."""
        return 16 * math.prod(self.counts) + 4 * self.has_checksum

    @property
    def request(self) -> ByteRequest:
        """The request that reads the index alone."""
        return SuffixByteRequest(self.index_bytes) if self.at_end else RangeByteRequest(0, self.index_bytes)

    def index_slice(self, size: int) -> slice:
        """Return where the index lies in a shard of `size` bytes."""
        return slice(max(0, size - self.index_bytes), size) if self.at_end else slice(0, self.index_bytes)

    def is_index(self, byte_range: ByteRequest | None) -> bool:
        """Return True if a request asks for the index alone."""
        if self.at_end:
            return isinstance(byte_range, SuffixByteRequest) and byte_range.suffix == self.index_bytes
        return isinstance(byte_range, RangeByteRequest) and (byte_range.start, byte_range.end) == (0, self.index_bytes)

    def index_of(self, value: Buffer, byte_range: ByteRequest | None) -> Buffer | None:
        """Return the index, as a copy, from the answer to a request for the index or for the whole shard."""
        if self.is_index(byte_range):
            return value
        if byte_range is None and len(value) >= self.index_bytes:
            part = value[self.index_slice(len(value))]
            return type(value).from_bytes(part.to_bytes())
        return None

    def end(self, index: Buffer) -> int:
        """Return where the last inner chunk ends."""
        entries = self.parse(view_of(index)).reshape(-1, 2)
        there = entries[entries[:, 0] != NO_CHUNK]
        return int(there.sum(axis=1, dtype=np.uint64).max()) if len(there) else 0

    def checked(self, index: memoryview) -> Index | None:
        """Return the same as `parse`; None if the index is truncated or its checksum is wrong."""
        if len(index) < self.index_bytes:
            return None
        if self.has_checksum and int.from_bytes(index[-4:], "little") != crc32c(index[:-4]):
            return None
        return self.parse(index)

    def parse(self, index: memoryview) -> Index:
        """Return the numbers of an index."""
        numbers = np.frombuffer(index, self.dtype, count=2 * math.prod(self.counts))
        return numbers.astype(np.uint64, copy=False).reshape(*self.counts, 2)


def shard_layout(array: ArrayLike) -> ShardLayout | None:
    """Return how an array encodes the indices of its shards; None if it has no shards, or encodes them rarely."""
    metadata = array.metadata
    if array.shards is None or not isinstance(metadata, ArrayV3Metadata):
        return None
    codec = metadata.codecs[0]
    if not isinstance(codec, ShardingCodec):
        return None
    numbers, *checksums = codec.index_codecs
    if not isinstance(numbers, BytesCodec) or [type(other) for other in checksums] not in ([], [Crc32cCodec]):
        return None
    order = ">" if str(getattr(numbers.endian, "value", numbers.endian)) == "big" else "<"
    counts = tuple(shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True))
    at_end = str(getattr(codec.index_location, "value", codec.index_location)) == "end"
    return ShardLayout(counts, f"{order}u8", bool(checksums), at_end)


def crc32c(values: memoryview) -> int:
    """Return the checksum of RFC 3720."""
    return int(google_crc32c.value(np.frombuffer(values, np.uint8)))


def view_of(buffer: Buffer) -> memoryview:
    """Return the bytes of a zarr buffer, without a copy."""
    return buffer.as_numpy_array().data


# What to read of a shard --------------------------------------------------------------------------------


def entries_of(index: Index, chunks: Sequence[Chunk], origin: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return offset and length of each of some chunks in their shard; both are `NO_CHUNK` where there is no chunk.

    Parameters
    ----------
    index : uint64[*counts, 2]
    chunks : sequence of Chunk
    origin : tuple of int
        Place of the shard's first chunk in the grid of the array's chunks.
    """
    places = np.array([chunk.place for chunk in chunks]) - origin
    return [(start, length) for start, length in index[tuple(places.T)].tolist()]


def missing_chunks(part: ShardPart, index: Index) -> Iterator[tuple[int, ...]]:
    """Yield the places of the touched chunks of a shard that its index does not have."""
    for gone in np.argwhere(index[np.ix_(*part.inside)][..., 0] == NO_CHUNK).tolist():
        parts = zip(part.origin, part.inside, gone, strict=True)
        yield tuple(first + along[i] for first, along, i in parts)


def runs_of(stored: Iterable[Stored], density: float) -> list[tuple[int, int, list[Stored]]]:
    """Return the runs of bytes to read from a shard: first byte, the byte after the last, and the chunks between.

    Chunks are read together if they make up the share `density` of the bytes from the first to the last of them.
    """
    runs: list[tuple[int, int, list[Stored]]] = []
    needed = 0
    for entry in sorted(stored, key=itemgetter(0)):
        start, length, _ = entry
        if runs and needed + length >= density * (start + length - runs[-1][0]):
            begin, end, together = runs[-1]
            together.append(entry)
            runs[-1] = (begin, max(end, start + length), together)
            needed += length
        else:
            runs.append((start, start + length, [entry]))
            needed = length
    return runs


def stored_entries(index: Index, part: ShardPart) -> npt.NDArray[np.int64]:
    """Return offset and length of each touched chunk that a shard has; where they are beyond any file, they are -1."""
    wanted = index[np.ix_(*part.inside)].reshape(-1, 2)
    wanted = wanted[(wanted != NO_CHUNK).any(axis=1)]
    return np.where(wanted < FAR, wanted, np.uint64(NO_CHUNK)).astype(np.int64)


def dense_run(index: Index, part: ShardPart, density: float) -> tuple[int, int] | None:
    """Return first byte and end of a run that holds all stored chunks of a part; None if that would read too much."""
    wanted = stored_entries(index, part)
    if len(wanted) < 2 or wanted.min() < 0:
        return None
    begin, end = int(wanted[:, 0].min()), int(wanted.sum(axis=1).max())
    return (begin, end) if wanted[:, 1].sum() >= density * (end - begin) else None


class IndexCache:
    """The indices of the shards that were read last, up to `INDEX_CACHE_BYTES`. Threads may share it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Buffer] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Buffer | None:
        """Return the index of a shard, if it is kept."""
        return self._kept.get(key)

    def put(self, key: str, layout: ShardLayout, index: Buffer) -> None:
        """Keep an index, unless it is damaged, and let go of the oldest ones."""
        if layout.checked(view_of(index)) is None:
            return
        with self._lock:
            self._kept[key] = index
            while len(self._kept) * layout.index_bytes > INDEX_CACHE_BYTES:
                self._kept.popitem(last=False)
