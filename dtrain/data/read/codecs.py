"""Codecs of stored chunks: their names as facts of an array, their decoders, and the sizes in their headers."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

from dtrain.data.read.shards import ArrayLike, crc32c, shard_layout
from dtrain.data.variable import ChunkFormat

Stage: TypeAlias = Callable[[memoryview], memoryview]
"""Undoes one codec."""

CHECKSUM_CODECS = frozenset(
    {"crc32c", "crc32", "adler32", "fletcher32", "jenkins_lookup3", "gzip", "zlib", "bz2"}  # the last three hold one
)
TRUNCATED = "the file is truncated"


class Undecodable(Exception):
    """A stored chunk cannot be decoded by its array's codecs; the message says why."""


# Facts of an array --------------------------------------------------------------------------------------


def chunk_format(array: ArrayLike) -> ChunkFormat:
    """Return how the chunks of an array are encoded, from its metadata."""
    described = _described_codecs(array)
    prefix = "numcodecs." if array.metadata.zarr_format == 2 else ""
    endian = next((options.get("endian") for name, options in described if name == "bytes"), None)
    return ChunkFormat(
        codecs=tuple(prefix + name for name, _ in described),
        endian=str(endian or ""),
        order=array.metadata.order if array.metadata.zarr_format == 2 else "C",
        has_fill_value=array.fill_value is not None,
        has_plain_index=array.shards is None or shard_layout(array) is not None,
    )


def has_checksums(array: ArrayLike) -> bool:
    """Return True if a codec of the array detects flipped bits."""
    described = _described_codecs(array)
    return any(plain_name(name) in CHECKSUM_CODECS or options.get("checksum") for name, options in described)


def ends_in_blosc(array: ArrayLike) -> bool:
    """Return True if a stored object of the array is a blosc frame."""
    return array.shards is None and [plain_name(name) for name, _ in _described_codecs(array)][-1:] == ["blosc"]


def plain_name(name: str) -> str:
    """Return the name of a codec without the package that it comes from."""
    return name.removeprefix("numcodecs.")


def _described_codecs(array: ArrayLike) -> list[tuple[str, dict[str, Any]]]:
    """Return name and options of the codecs that a chunk goes through when it is written, in order."""
    described = []
    todo: list[Any] = [*(array.filters or ()), *array.compressors]
    if array.metadata.zarr_format == 3:
        todo = list(array.metadata.codecs)
    while todo:
        codec = todo.pop(0)
        if hasattr(codec, "codecs"):  # a shard's own checksum covers its index alone: the inner codecs count
            todo = [*codec.codecs, *todo]
            continue
        said = codec.to_dict() if hasattr(codec, "to_dict") else codec.get_config()
        described.append((str(said.get("name") or said.get("id")), said.get("configuration", said)))
    return described


# Decoding -----------------------------------------------------------------------------------------------


_BLOSC, _ZSTD = Blosc(), Zstd()


def check_size(size: int, expected: int) -> None:
    """Raise if a decoded chunk has another size than the chunks of its array."""
    if size != expected:
        raise Undecodable(f"it holds {size:,} bytes; a chunk has {expected:,}")


def is_truncated_blosc(head: bytes, size: int) -> bool:
    """Return True if an object of `size` bytes is shorter than blosc's header (its first 16 bytes) says."""
    return len(head) < 16 or int.from_bytes(head[12:16], "little") > size


def _check_blosc(stored: memoryview) -> int:
    """Return the decoded bytes that the header of a blosc frame states."""
    if is_truncated_blosc(bytes(stored[:16]), len(stored)):  # blosc would read beyond its input
        raise Undecodable(TRUNCATED)
    return int.from_bytes(stored[4:8], "little")


def _into_blosc(stored: memoryview, out: npt.NDArray[np.uint8]) -> None:
    check_size(_check_blosc(stored), len(out))
    _BLOSC.decode(stored, out)


def _from_blosc(stored: memoryview) -> memoryview:
    _check_blosc(stored)
    return memoryview(_BLOSC.decode(stored))


def _into_zstd(stored: memoryview, out: npt.NDArray[np.uint8]) -> None:
    if _zstd_size(stored) == len(out):
        _ZSTD.decode(stored, out)
        return
    decoded = _from_zstd(stored)  # some writers state no size, or write several frames
    check_size(len(decoded), len(out))
    out[:] = np.frombuffer(decoded, np.uint8)


def _from_zstd(stored: memoryview) -> memoryview:
    return memoryview(_ZSTD.decode(stored)).cast("B")


def _zstd_size(stored: memoryview) -> int | None:
    """Return the decoded bytes that the header of a zstd frame states; None if it does not (RFC 8878, 3.1.1.1)."""
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


STAGES: dict[str, Stage] = {
    "blosc": _from_blosc,
    "crc32c": _without_crc32c,
    "gzip": _from_gzip,
    "zlib": _from_zlib,
    "zstd": _from_zstd,
}
"""How each codec is undone, by its plain name; `dtrain.data.plan.readers.NUMCODECS_CODECS` lists the same names."""
INTO: dict[str, Callable[[memoryview, npt.NDArray[np.uint8]], None]] = {"blosc": _into_blosc, "zstd": _into_zstd}
"""The codecs that can decode straight into the memory of a chunk."""
