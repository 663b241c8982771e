"""Stored chunks -> rows in memory, by numcodecs: in the thread that asks, without a copy where a chunk is whole rows.

Zarr's own way from a selection to its values leads through an event loop, other threads and temporary arrays. That
costs as much again as decoding a chunk does. This one knows the codecs that nearly all stores use; `why_not` says
which it leaves to others.
"""

from __future__ import annotations

import gzip
import itertools
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd
from zarr.codecs import Crc32cCodec

from dtrain.data.read.store import ArrayLike, codecs_of, crc32c, is_short_blosc, shard_layout, unusual_order
from dtrain.data.samples import Select
from dtrain.errors import one_line

Array = npt.NDArray[Any]
Stage: TypeAlias = Callable[[memoryview], memoryview]
"""Undoes one codec."""


class Undecodable(Exception):
    """A stored chunk is not what its array's codecs write; the message says why."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk that a selection touches: which part of it, and where that goes."""

    place: tuple[int, ...]
    """In the grid of the array's chunks."""
    source: tuple[slice, ...]
    target: tuple[slice, ...]
    whole: bool
    """Whether all of it is selected, each value once."""

    @property
    def where(self) -> Any:
        """`target` as an index that gives a view, also of an array without dimensions."""
        return (*self.target, ...)


def why_not(array: ArrayLike) -> str:
    """Return why an array is not decoded here, or an empty string if it is."""
    if order := unusual_order(array):
        return order
    orders = {str(getattr(codec.endian, "value", codec.endian)) for name, codec in codecs_of(array) if name == "bytes"}
    if orders - {"None", sys.byteorder}:
        return f"its byte order is {orders.pop()}"
    if array.shards is not None and shard_layout(array) is None:
        return "the index of its shards is encoded in a rare way"
    odd = [name for name, codec in codecs_of(array) if _stage(name, codec) is None and name != "bytes"]
    return f"codec {odd[0]}" if odd else ""


class Decoder:
    """Decodes the chunks of one array. Threads may share it.

    Parameters
    ----------
    array : zarr.Array
        One of which `why_not` says nothing.
    """

    def __init__(self, array: ArrayLike) -> None:
        self.dtype = np.dtype(array.dtype)
        self.chunks: tuple[int, ...] = array.chunks
        self.nbytes = math.prod(self.chunks) * self.dtype.itemsize
        self.fill = np.zeros((), self.dtype) if array.fill_value is None else np.asarray(array.fill_value, self.dtype)
        names = [(name, codec) for name, codec in codecs_of(array) if name != "bytes"]
        stages = [stage for name, codec in reversed(names) if (stage := _stage(name, codec)) is not None]
        self._last = names[0][0] if names else ""
        self._before = stages[:-1] if self._last in ("blosc", "zstd") else stages

    def decode(self, stored: memoryview, chunk: Chunk, out: Array, room: Callable[[int], memoryview]) -> None:
        """Write what is selected of a stored chunk into ``out[chunk.target]``.

        Parameters
        ----------
        stored : memoryview
        chunk : Chunk
        out : array
            Axes as stored, any strides, of a dtype that values are cast to.
        room : callable
            Gives so many bytes of memory to decode into.

        Raises
        ------
        Undecodable
        """
        target = out[chunk.where]
        if chunk.whole and target.flags.c_contiguous and target.dtype == self.dtype:
            self._decode(stored, target.reshape(-1).view(np.uint8))
            return
        decoded = np.frombuffer(room(self.nbytes), np.uint8, self.nbytes)
        self._decode(stored, decoded)
        with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32 becomes infinite, and is then found
            target[...] = decoded.view(self.dtype).reshape(self.chunks)[chunk.source]

    def _decode(self, stored: memoryview, out: npt.NDArray[np.uint8]) -> None:
        try:
            for stage in self._before:
                stored = stage(stored)
            if self._last == "blosc":
                _into_blosc(stored, out)
            elif self._last == "zstd":
                _into_zstd(stored, out)
            else:
                _check_size(len(stored), len(out))
                out[:] = np.frombuffer(stored, np.uint8)
        except (Undecodable, MemoryError):
            raise
        except Exception as error:
            raise Undecodable(one_line(error)) from error


def chunks_of(sizes: tuple[int, ...], select: Select) -> Iterator[Chunk]:
    """Yield the chunks that a selection touches, in C order.

    Parameters
    ----------
    sizes : tuple of int
        The shape of a chunk.
    select : Select
    """
    along = [list(_along(size, *part)) for size, part in zip(sizes, select, strict=True)]
    for parts in itertools.product(*along):
        yield Chunk(
            tuple(part[0] for part in parts),
            tuple(part[1] for part in parts),
            tuple(part[2] for part in parts),
            all(part[3] for part in parts),
        )


def _along(size: int, start: int, stop: int, step: int) -> Iterator[tuple[int, slice, slice, bool]]:
    """Yield the chunks along one dimension: number, part of it, where that goes, and whether it is all of it."""
    done, place = 0, start
    while place < stop:
        number, first = divmod(place, size)
        end = min(stop - number * size, size)
        count = -(-(end - first) // step)
        yield number, slice(first, end, step), slice(done, done + count), count == size
        done, place = done + count, place + count * step


def runs_of(
    index: npt.NDArray[np.uint64], wanted: Iterable[Chunk], corner: tuple[int, ...], density: float
) -> list[tuple[int, int, list[Chunk]]]:
    """Return what to read of a shard: first byte, the one after the last, and the chunks that lie between.

    Chunks are read together if they make up the share `density` of the bytes from the first to the last of them.

    Parameters
    ----------
    index : uint64[*counts, 2]
        Offset and length of each chunk.
    wanted : iterable of Chunk
        Those that are stored.
    corner : tuple of int
        The place of the shard's first chunk.
    density : float
    """
    found: list[tuple[int, int, list[Chunk]]] = []
    needed = 0
    entries = [(*entry_of(index, chunk, corner), chunk) for chunk in wanted]
    for start, length, chunk in sorted(entries, key=itemgetter(0)):
        if found and needed + length >= density * (start + length - found[-1][0]):
            begin, end, chunks = found.pop()
            found.append((begin, max(end, start + length), [*chunks, chunk]))
            needed += length
        else:
            found.append((start, start + length, [chunk]))
            needed = length
    return found


def entry_of(index: npt.NDArray[np.uint64], chunk: Chunk, corner: tuple[int, ...]) -> tuple[int, int]:
    """Return offset and length of a chunk in its shard."""
    entry = index[tuple(place - first for place, first in zip(chunk.place, corner, strict=True))]
    return int(entry[0]), int(entry[1])


# Codecs -------------------------------------------------------------------------------------------------


_BLOSC, _ZSTD = Blosc(), Zstd()


def _stage(name: str, codec: Any) -> Stage | None:
    if name == "crc32c":
        return _without_crc32c if isinstance(codec, Crc32cCodec) else None
    return {"blosc": _from_blosc, "zstd": _from_zstd, "gzip": _from_gzip, "zlib": _from_zlib}.get(name)


def _check_size(found: int, expected: int) -> None:
    if found != expected:
        raise Undecodable(f"it holds {found:,} bytes; a chunk has {expected:,}")


def _check_blosc(stored: memoryview) -> int:
    """Return the decoded bytes that the header of a blosc frame tells."""
    if is_short_blosc(bytes(stored[:16]), len(stored)):
        raise Undecodable("the file is cut short")
    return int.from_bytes(stored[4:8], "little")


def _into_blosc(stored: memoryview, out: npt.NDArray[np.uint8]) -> None:
    _check_size(_check_blosc(stored), len(out))
    _BLOSC.decode(stored, out)


def _from_blosc(stored: memoryview) -> memoryview:
    _check_blosc(stored)
    return memoryview(_BLOSC.decode(stored))


def _into_zstd(stored: memoryview, out: npt.NDArray[np.uint8]) -> None:
    if _zstd_size(stored) == len(out):
        _ZSTD.decode(stored, out)
        return
    decoded = _from_zstd(stored)  # some write no size, or several frames
    _check_size(len(decoded), len(out))
    out[:] = np.frombuffer(decoded, np.uint8)


def _from_zstd(stored: memoryview) -> memoryview:
    return memoryview(_ZSTD.decode(stored)).cast("B")


def _zstd_size(stored: memoryview) -> int | None:
    """Return the decoded bytes that the header of a zstd frame tells; None if it does not (RFC 8878, 3.1.1.1)."""
    if len(stored) < 18 or bytes(stored[:4]) != b"\x28\xb5\x2f\xfd":
        return None
    flags = stored[4]
    single = flags >> 5 & 1
    length = (single, 2, 4, 8)[flags >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    if not length:
        return None
    return int.from_bytes(stored[start : start + length], "little") + (256 if length == 2 else 0)


def _from_gzip(stored: memoryview) -> memoryview:
    return memoryview(gzip.decompress(stored))


def _from_zlib(stored: memoryview) -> memoryview:
    return memoryview(zlib.decompress(stored))


def _without_crc32c(stored: memoryview) -> memoryview:
    if len(stored) < 4 or int.from_bytes(stored[-4:], "little") != crc32c(stored[:-4]):
        raise Undecodable("its checksum is wrong")
    return stored[:-4]
