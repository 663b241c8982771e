"""Codecs of stored chunks: their names as facts of an array, their decoders, and the sizes in their headers."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

from dtrain.data.read.frames import zstd_bounds, zstd_size
from dtrain.data.read.shards import ArrayLike, crc32c, shard_layout
from dtrain.data.variable import ChunkFormat
from dtrain.errors import one_line

Stage: TypeAlias = Callable[[memoryview, int], memoryview]
"""Undoes one codec; raises Undecodable, before there is memory for it, if that gives more bytes than a number."""

CHECKSUM_CODECS = frozenset(
    {"crc32c", "crc32", "adler32", "fletcher32", "jenkins_lookup3", "gzip", "zlib", "bz2"}  # the last three hold one
)
TRUNCATED = "the file is truncated"


class Undecodable(Exception):
    """A stored chunk cannot be decoded by its array's codecs; the message says why."""


# Facts of an array --------------------------------------------------------------------------------------


def chunk_format(array: ArrayLike) -> ChunkFormat:
    """Return how the chunks of an array are encoded, from its metadata."""
    described, shards = _described_codecs(array), _levels_of_shards(array)
    prefix = "numcodecs." if array.metadata.zarr_format == 2 else ""
    endian = next((options.get("endian") for name, options in described if name == "bytes"), None)
    return ChunkFormat(
        codecs=tuple(prefix + name for name, _ in described),
        endian=str(endian or ""),
        order=array.metadata.order if array.metadata.zarr_format == 2 else "C",
        has_fill_value=array.fill_value is not None,
        has_plain_index=shards == 0 or (shards == 1 and shard_layout(array) is not None),
    )


def _levels_of_shards(array: ArrayLike) -> int:
    """Return how many times the chunks of an array are put into shards."""
    levels, codecs = 0, list(getattr(array.metadata, "codecs", ()))
    while codecs:
        codec = codecs.pop()
        if hasattr(codec, "codecs"):
            levels, codecs = levels + 1, [*codecs, *codec.codecs]
    return levels


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
        described.append(described_codec(codec))
    return described


def described_codec(codec: Any) -> tuple[str, dict[str, Any]]:
    """Return name and options of a codec of Zarr v2 or v3."""
    said = codec.to_dict() if hasattr(codec, "to_dict") else codec.get_config()
    return str(said.get("name") or said.get("id")), said.get("configuration", said)


# Sizes --------------------------------------------------------------------------------------------------

SPARE = 1 << 20
"""Bytes that an encoded chunk may have beside twice its decoded size: codecs add far less than that."""


def encoded_most(nbytes: int) -> int:
    """Return the most bytes that a chunk of so many bytes has in any stage of its encoding.

    Codecs do not limit their output: a stored object of some kilobytes can decode to gigabytes. What is larger
    than this is no chunk of its array, and is refused before there is memory for it.
    """
    return 2 * nbytes + SPARE


def check_size(size: int, expected: int) -> None:
    """Raise if a decoded chunk has another size than the chunks of its array."""
    if size != expected:
        raise Undecodable(f"it holds {size:,} bytes; a chunk has {expected:,}")


def check_stored(size: int, most: int) -> None:
    """Raise if a stored object, or what is read of it, has more bytes than the chunks in it can have."""
    if size > most:
        raise Undecodable(f"it has {size:,} bytes; at most {most:,} are stored for such chunks")


def check_most(size: int, most: int) -> None:
    """Raise if something that is decoded has more bytes than a chunk of its array can have there."""
    if size > most:
        raise Undecodable(f"it holds {size:,} bytes; a chunk has at most {most:,}")


# Decoding -----------------------------------------------------------------------------------------------

_BLOSC, _ZSTD = Blosc(), Zstd()


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


def _from_blosc(stored: memoryview, most: int) -> memoryview:
    check_most(_check_blosc(stored), most)
    return memoryview(_BLOSC.decode(stored))


def _into_zstd(stored: memoryview, out: npt.NDArray[np.uint8]) -> None:
    if zstd_size(stored) != len(out):  # some writers state no size, or write several frames
        size, is_stated = zstd_bounds(stored)
        if is_stated:
            check_size(size, len(out))
    try:
        _ZSTD.decode(stored, out)  # it refuses what goes beyond `out`, or does not fill it while no size is stated
    except RuntimeError as error:
        raise Undecodable(f"it does not hold a chunk of {len(out):,} bytes: {one_line(error)}") from error


def _from_zstd(stored: memoryview, most: int) -> memoryview:
    size, is_stated = zstd_bounds(stored)
    if not is_stated and size > most:
        with suppress(RuntimeError):  # it may hold exactly that, as a chunk does
            return memoryview(_ZSTD.decode(stored, np.empty(most, np.uint8)))
    check_most(size, most)
    return memoryview(_ZSTD.decode(stored)).cast("B")


def _from_gzip(stored: memoryview, most: int) -> memoryview:
    _is_next_of_gzip(bytes(stored[:2]))
    return unpacked(partial(zlib.decompressobj, 16 + zlib.MAX_WBITS), stored, most, _is_next_of_gzip)


def _from_zlib(stored: memoryview, most: int) -> memoryview:
    return unpacked(zlib.decompressobj, stored, most)


def _is_next_of_gzip(rest: bytes) -> bool:
    """Return True if a further member of gzip follows, False if nothing does but padding."""
    if rest and not rest.startswith(b"\x1f\x8b"):
        raise Undecodable(f"Not a gzipped file ({rest[:2]!r})")
    return bool(rest)


def unpacked(
    new: Callable[[], Any],
    stored: memoryview,
    most: int,
    follows: Callable[[bytes], bool] | None = None,
) -> memoryview:
    """Return what one of Python's own modules has compressed, in one stream or several.

    Parameters
    ----------
    new : callable
        Returns a decompressor.
    stored : memoryview
    most : int
    follows : callable, optional
        Says if what follows a stream is a further one; without it, there is one stream.
    """
    parts: list[bytes] = []
    rest: bytes | memoryview = stored
    while True:
        stream, left = new(), most - sum(map(len, parts))
        parts.append(stream.decompress(rest, min(left + 1, sys.maxsize)))  # a byte more tells what is too long
        if len(parts[-1]) > left:
            raise Undecodable(f"it holds more than {most:,} bytes; a chunk has no more")
        if not stream.eof:
            raise Undecodable(TRUNCATED)
        rest = stream.unused_data.lstrip(b"\0") if follows else b""  # zeros are padding
        if follows is None or not follows(rest):
            return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))


def _without_crc32c(stored: memoryview, most: int) -> memoryview:
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
