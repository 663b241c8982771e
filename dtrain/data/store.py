"""The stored objects of a Zarr group: their keys, and whether they are there. Read through zarr, without xarray."""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeAlias

import zarr
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from dtrain.data.samples import Samples, Variable
from dtrain.errors import ChunkMissing

ArrayLike: TypeAlias = "zarr.Array[Any]"  # older versions of zarr cannot be subscripted

CHECKSUM_CODECS = frozenset(
    {"crc32c", "crc32", "adler32", "fletcher32", "jenkins_lookup3", "gzip", "zlib", "bz2"}  # the last three hold one
)


def open_group(path: str, group: str) -> zarr.Group:
    """Open a group for reading."""
    return zarr.open_group(path, path=group or None, mode="r")


def object_keys(array: ArrayLike, objects: tuple[int, ...], axis: int, start: int, stop: int) -> Iterator[str]:
    """Yield the store keys of the objects that rows ``start:stop`` of the sample axis touch."""
    prefix = f"{array.path}/" if array.path else ""
    ranges = [
        range(start // size, math.ceil(stop / size)) if dim == axis else range(math.ceil(length / size))
        for dim, (length, size) in enumerate(zip(array.shape, objects, strict=True))
    ]
    for index in itertools.product(*ranges):
        yield prefix + array.metadata.encode_chunk_key(index)


def first_missing(array: ArrayLike, keys: list[str]) -> str | None:
    """Return the first of the keys that is not stored; one look at the store for each."""

    async def look() -> str | None:
        for key in keys:
            if not await array.store.exists(key):
                return key
        return None

    return sync(look())


def first_truncated(array: ArrayLike, keys: list[str]) -> str | None:
    """Return the first of the keys whose object is cut short in a way that Zarr decodes without an error.

    There are two: an empty file of a sharded array reads as the fill value, and blosc reads beyond its input.
    """
    blosc = array.shards is None and _codecs(array)[-1:] and _codecs(array)[-1][0] == "blosc"

    async def look() -> str | None:
        for key in keys:
            if not await array.store.exists(key):
                continue
            size = await array.store.getsize(key)
            if size == 0:
                return key
            if blosc:
                head = await array.store.get(key, default_buffer_prototype(), RangeByteRequest(0, 16))
                if head is None or len(head) < 16 or int.from_bytes(head.to_bytes()[12:], "little") > size:
                    return key
        return None

    return sync(look()) if blosc or array.shards is not None else None


def check_presence(samples: Samples) -> None:
    """Check that every stored object of every variable is there, by listing the store once a variable.

    Raises
    ------
    ChunkMissing
        Names the array and the first missing object.
    """
    group = open_group(samples.path, samples.config.group)
    for variable in samples.variables:
        array: Any = group[variable.name]
        stored = set(sync(_collected(array.store.list_prefix(f"{array.path}/" if array.path else ""))))
        keys = object_keys(array, variable.objects, variable.sample_axis, 0, samples.num_samples)
        missing = [key for key in keys if key not in stored]
        if missing:
            raise chunk_missing(samples.path, variable, missing[0], len(missing))


def chunk_missing(path: str, variable: Variable, key: str, count: int = 1) -> ChunkMissing:
    """Return the error for an object that is not stored."""
    return ChunkMissing(
        f"{path}: chunk {key} of {variable.name} is missing"
        + (f" ({count:,} of {variable.num_objects:,} are)" if count > 1 else f" (1 of {variable.num_objects:,})")
        + "; Zarr would read it as the fill value.",
        'Repair the store. If it leaves out chunks that hold only the fill value: data.missing = "fill".',
    )


async def _collected(keys: AsyncIterator[str]) -> list[str]:
    return [key async for key in keys]


def has_checksums(array: ArrayLike) -> bool:
    """Whether a codec of the array detects flipped bits."""
    return any(name in CHECKSUM_CODECS or options.get("checksum") for name, options in _codecs(array))


def _codecs(array: ArrayLike) -> list[tuple[str, dict[str, Any]]]:
    """Return name and options of the codecs that a chunk goes through when it is written, in order."""
    found = []
    todo: list[Any] = [*(array.filters or ()), *array.compressors]
    if array.metadata.zarr_format == 3:
        todo = list(array.metadata.codecs)
    while todo:
        codec = todo.pop(0)
        if hasattr(codec, "codecs"):  # a shard's own checksum covers its index alone: the inner codecs count
            todo = [*codec.codecs, *todo]
            continue
        described = codec.to_dict() if hasattr(codec, "to_dict") else codec.get_config()
        name = str(described.get("name") or described.get("id"))
        found.append((name.removeprefix("numcodecs."), described.get("configuration", described)))
    return found
