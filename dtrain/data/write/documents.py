"""Describe arrays as Zarr v3, and encode parts of them: zarr writes into memory, nothing is stored here."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from dtrain.data.encoding import Array

Objects: TypeAlias = dict[str, bytes]
"""By key from the root of the store: an object."""
ROOT = "zarr.json"
LEVEL = 3
"""Of zstd."""
CHECKSUM_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """An array to be written."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    """``str`` for texts."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    fill_value: Any = 0

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of chunks along each dimension."""
        return tuple(-(-n // size) for n, size in zip(self.shape, self.chunks, strict=True))


def documents(attributes: Mapping[str, Any], arrays: Sequence[ArraySpec], *, consolidated: bool) -> Objects:
    """Return the metadata documents of a group, the root's first.

    Parameters
    ----------
    attributes : mapping
        Of the group.
    arrays : sequence of ArraySpec
    consolidated : bool
        Whether the root's document also holds those of all arrays: servers cannot list them.
    """
    kept: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(kept), attributes=dict(attributes), zarr_format=3)
    for spec in arrays:
        _create(group, spec)
    objects = {key: kept[key].to_bytes() for key in sorted(kept)}
    if consolidated:
        root = json.loads(objects[ROOT])
        inside = {spec.name: json.loads(objects[f"{spec.name}/{ROOT}"]) for spec in arrays}
        root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": inside}
        objects[ROOT] = json.dumps(root, indent=2).encode()
    return {ROOT: objects.pop(ROOT), **objects}


def encode(spec: ArraySpec, region: Sequence[slice], values: Array) -> Iterator[tuple[str, bytes]]:
    """Yield key and content of each chunk of a part of an array that holds them whole, one at a time, in C order.

    Parameters
    ----------
    spec : ArraySpec
    region : sequence of slice
        It begins at chunks, and ends there or with the array.
    values : array
        Of the region.
    """
    kept: dict[str, Buffer] = {}
    array = _create(zarr.create_group(MemoryStore(kept), zarr_format=3), spec)
    kept.clear()
    steps = (range(part.start, part.stop, size) for part, size in zip(region, spec.chunks, strict=True))
    for at in itertools.product(*steps):
        ends = (min(n + size, part.stop) for n, size, part in zip(at, spec.chunks, region, strict=True))
        chunk = tuple(itertools.starmap(slice, zip(at, ends, strict=True)))
        own = (slice(one.start - part.start, one.stop - part.start) for one, part in zip(chunk, region, strict=True))
        array[chunk] = values[tuple(own)]
        for key in list(kept):
            yield key, kept.pop(key).to_bytes()


def _create(group: zarr.Group, spec: ArraySpec) -> zarr.Array[Any]:
    options: dict[str, Any] = {
        "shape": spec.shape,
        "chunks": spec.chunks,
        "dtype": str if spec.dtype == "str" else np.dtype(spec.dtype),
        "compressors": [ZstdCodec(level=LEVEL), Crc32cCodec()],
        "filters": None,
        "fill_value": "" if spec.dtype == "str" else spec.fill_value,
        "dimension_names": spec.dims,
        "attributes": dict(spec.attributes),
        "config": {"write_empty_chunks": True},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts, which version 3 does not specify
        return group.create_array(spec.name, **options)


def keys_of(spec: ArraySpec, region: Sequence[slice]) -> list[str]:
    """Return the keys of the chunks of a part of an array, in C order."""
    along = [range(part.start // size, -(-part.stop // size)) for part, size in zip(region, spec.chunks, strict=True)]
    keys = [f"{spec.name}/c"]
    for numbers in along:
        keys = [f"{key}/{number}" for key in keys for number in numbers]
    return keys


def whole(spec: ArraySpec) -> tuple[slice, ...]:
    """Return the region of all of an array."""
    return tuple(slice(0, n) for n in spec.shape)


def is_whole(data: bytes | None) -> bool:
    """Return True if an object is a chunk as `encode` gives it, by its checksum."""
    if data is None or len(data) < CHECKSUM_BYTES:
        return False
    return bool(google_crc32c.value(data[:-CHECKSUM_BYTES]) == int.from_bytes(data[-CHECKSUM_BYTES:], "little"))


def buffer(data: bytes) -> Any:
    """Return bytes as zarr stores take them."""
    return default_buffer_prototype().buffer.from_bytes(data)
