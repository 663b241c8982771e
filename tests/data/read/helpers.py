"""Arrays of every codec that numcodecs decodes, and shards whose index is encoded in any way."""

from __future__ import annotations

import math

import numcodecs
import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec
from zarr.codecs import numcodecs as old

from dtrain.data.plan.readers import numcodecs_obstacle
from dtrain.data.read.codecs import chunk_format
from tests.data.helpers import variable

V2 = {
    "none": {"compressors": None},
    "blosc": {"compressors": numcodecs.Blosc("lz4", shuffle=numcodecs.Blosc.SHUFFLE)},
    "blosc bits": {"compressors": numcodecs.Blosc("zstd", shuffle=numcodecs.Blosc.BITSHUFFLE)},
    "zstd": {"compressors": numcodecs.Zstd()},
    "zstd checksum": {"compressors": numcodecs.Zstd(checksum=True)},
    "gzip": {"compressors": numcodecs.GZip()},
    "zlib": {"compressors": numcodecs.Zlib()},
    "gzip of zstd": {"filters": [numcodecs.Zstd()], "compressors": numcodecs.GZip()},
    "zstd of blosc": {"filters": [numcodecs.Blosc()], "compressors": numcodecs.Zstd()},
    "blosc of zlib": {"filters": [numcodecs.Zlib()], "compressors": numcodecs.Blosc()},
}
V3 = {
    "none": {"compressors": None},
    "blosc": {"compressors": BloscCodec()},
    "zstd": {"compressors": ZstdCodec()},
    "zstd checksum": {"compressors": ZstdCodec(checksum=True)},
    "gzip": {"compressors": GzipCodec()},
    "crc32c": {"compressors": Crc32cCodec()},
    "zstd crc32c": {"compressors": [ZstdCodec(), Crc32cCodec()]},
    "blosc crc32c": {"compressors": [BloscCodec(), Crc32cCodec()]},
    "crc32c gzip": {"compressors": [Crc32cCodec(), GzipCodec()]},
    "zstd of zstd": {"compressors": [ZstdCodec(), ZstdCodec()]},
    "old zlib": {"compressors": lambda: [old.Zlib()]},  # they warn when they are made
    "old zstd": {"compressors": lambda: [old.Zstd()]},
    "old gzip of blosc": {"compressors": lambda: [old.Blosc(), old.GZip()]},
}
KINDS = {
    **{f"v2 {name}": (2, options) for name, options in V2.items()},
    **{f"v3 {name}": (3, options) for name, options in V3.items()},
    **{f"sharded {name}": (3, {**options, "shards": (6, 4)}) for name, options in V3.items() if "old" not in name},
    "index first none": (3, {**V3["none"], "shards": {"shape": (6, 4), "index_location": "start"}}),
    "index first zstd": (3, {**V3["zstd"], "shards": {"shape": (6, 4), "index_location": "start"}}),
}


def numbers(shape, dtype="float32"):
    """Values of which neighbours differ, and which can be compressed."""
    return (np.arange(math.prod(shape)).reshape(shape) % 23).astype(dtype)


PLAIN, CHECKSUM = BytesCodec(), Crc32cCodec()


def sharded(dtype="float32", inner=(PLAIN,), index=(PLAIN, CHECKSUM), location="end"):
    codec = ShardingCodec(chunk_shape=(3, 2), codecs=list(inner), index_codecs=list(index), index_location=location)
    return zarr.create(
        store=zarr.storage.MemoryStore(),
        shape=(6, 4),
        chunk_shape=(6, 4),
        dtype=dtype,
        codecs=[codec],
        fill_value=0,
        zarr_format=3,
    )


def numcodecs_obstacle_of(array):
    """Return why numcodecs does not decode an array, as far as the facts of its metadata tell."""
    return numcodecs_obstacle(variable("x", 1, 1, dtype=str(array.dtype), chunk_format=chunk_format(array)))


class Scratch:
    """Gives the same memory again, filled with what was in it before, and records the sizes."""

    def __init__(self):
        self.sizes = []
        self._memory = bytearray(b"\xff" * 10_000)

    def __call__(self, size):
        assert size >= 0
        self.sizes.append(size)
        return memoryview(self._memory)[:size]
