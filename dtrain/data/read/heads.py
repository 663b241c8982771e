"""What stored chunks claim to hold, looked at before zarrs decodes them.

zarrs allocates what a frame claims, and compares it with the size of a chunk afterwards: 20 bytes of zstd that claim
2^40 end the process. Here the heads of many chunks are read together. A chunk of another size is left to zarr, whose
codecs are bounded (`dtrain.data.read.bounded`), and so is one of which nobody knows what it decodes to.
"""

from __future__ import annotations

import math
import os

import numpy as np
import numpy.typing as npt

from dtrain.data.read.bounded import KEEPS_SIZE
from dtrain.data.read.codecs import chunk_format, encoded_most, plain_name
from dtrain.data.read.frames import BLOCK, zstd_bounds
from dtrain.data.read.shards import ArrayLike

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

CHECKSUM = "crc32c"
CHECKSUM_BYTES = 4
HEAD = 21
"""Bytes: the longest header of a frame of zstd, and that of its first block."""
TAIL = 4
"""Bytes: gzip ends with its decoded size, modulo 2^32."""
DEFLATE_RATIO = 1032
"""Deflate makes at most so many bytes of one."""
GZIP_SPARE = 16 << 20
"""Bytes that gzip may hold beside a chunk: the size at its end may be wrong, but its length limits what comes out."""
TOGETHER = 4096
"""Heads that are no farther apart on average are read with all that lies between them."""


class Claims:
    """Looks at what stored chunks of an array claim to hold. Threads may share it.

    Parameters
    ----------
    array : zarr.Array
        Without an obstacle (`dtrain.data.plan.readers.zarrs_obstacle`).
    """

    def __init__(self, array: ArrayLike) -> None:
        names = [name for name in map(plain_name, chunk_format(array).codecs) if name not in KEEPS_SIZE]
        compressors = [name for name in names if name != CHECKSUM]
        inside = names.index(compressors[0]) if compressors else len(names)
        self._codec = "several" if len(compressors) > 1 else "".join(compressors)
        self._size = math.prod(array.chunks) * np.dtype(array.dtype).itemsize + CHECKSUM_BYTES * inside
        self._behind = CHECKSUM_BYTES * (len(names) - inside - 1) if compressors else 0

    def are_right(self, path: str, entries: Ints) -> bool:
        """Return True if chunks are known to decode to the size of a chunk, with the memory of a chunk.

        Parameters
        ----------
        path : str
            Of the file.
        entries : int64[chunk, 2]
            Offset and length of each chunk in the file.
        """
        starts, lengths = entries[:, 0], entries[:, 1] - self._behind
        if not len(entries) or not self._codec:
            return bool((lengths == self._size).all())
        if (starts < 0).any() or (lengths < TAIL).any() or (lengths > encoded_most(self._size)).any():
            return False
        if self._codec not in ("blosc", "zstd", "gzip"):
            return False
        with open(path, "rb", buffering=0) as file:
            heads = _parts(file.fileno(), starts, HEAD)
            if self._codec == "blosc":
                return bool(((_numbers(heads, 4, 4) == self._size) & (_numbers(heads, 12, 4) <= lengths)).all())
            if self._codec == "gzip":
                ends = _numbers(_parts(file.fileno(), starts + lengths - TAIL, TAIL), 0, TAIL)
                is_short = lengths * DEFLATE_RATIO <= self._size + GZIP_SPARE
                return bool(((ends == self._size % (1 << 32)) & is_short).all())
            known = _single_blocks(heads, lengths, self._size)
            frames = zip(starts[~known].tolist(), lengths[~known].tolist(), strict=True)
            return all(
                zstd_bounds(memoryview(os.pread(file.fileno(), length, start))) == (self._size, True)
                for start, length in frames
            )


def _single_blocks(heads: Bytes, lengths: Ints, size: int) -> npt.NDArray[np.bool_]:
    """Return which frames of zstd state a size, have a single block, and end behind it."""
    known = np.zeros(len(heads), bool)
    if size > BLOCK:
        return known
    is_frame = _numbers(heads, 0, 4) == 0xFD2FB528
    for flags in np.unique(heads[:, 4]).tolist():
        single, width = flags >> 5 & 1, (flags >> 5 & 1, 2, 4, 8)[flags >> 6]
        at = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
        rows = is_frame & (heads[:, 4] == flags)
        stated = _numbers(heads[rows], at, width) + (256 if width == 2 else 0)
        block = _numbers(heads[rows], at + width, 3)
        end = at + width + 3 + np.where(block >> 1 & 3 == 1, 1, block >> 3) + 4 * (flags >> 2 & 1)
        known[rows] = bool(width) & (stated == size) & (block & 1 == 1) & (end == lengths[rows])
    return known


def _numbers(rows: Bytes, start: int, width: int) -> Ints:
    """Return the little-endian number that each row has from a place on; negative if it has 2^63 or more."""
    shifts = 8 * np.arange(width, dtype=np.int64)
    numbers: Ints = (rows[:, start : start + width].astype(np.int64) << shifts).sum(axis=1)
    return numbers


def _parts(file: int, starts: Ints, width: int) -> Bytes:
    """Return so many bytes of a file from each of some places on; zeros where it has ended."""
    first, span = int(starts.min()), int(starts.max() - starts.min()) + width
    if span > TOGETHER * len(starts):
        each = (os.pread(file, width, start).ljust(width, b"\0") for start in starts.tolist())
        return np.frombuffer(b"".join(each), np.uint8).reshape(-1, width)
    value = np.frombuffer(os.pread(file, span, first).ljust(span, b"\0"), np.uint8)
    parts: Bytes = value[(starts - first)[:, None] + np.arange(width)]
    return parts
