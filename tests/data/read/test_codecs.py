"""The facts of an array's codecs, and why an array is left to other readers than numcodecs."""

from __future__ import annotations

import numcodecs
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.codecs import numcodecs as old

from dtrain.data.read.bounded import bounded
from dtrain.data.read.codecs import chunk_format
from dtrain.data.variable import ChunkFormat
from tests.data.read.helpers import numbers, numcodecs_obstacle_of, sharded

# Facts ---------------------------------------------------------------------------------------------------


def test_the_facts_of_an_array_are_those_of_its_metadata(create):
    plain = create(numbers((6, 4)), (3, 2), "v3 zstd crc32c")
    assert chunk_format(plain) == ChunkFormat(codecs=("bytes", "zstd", "crc32c"), endian="little")
    assert chunk_format(create(numbers((6, 4), "uint8"), (3, 2), "v3 none")) == ChunkFormat(codecs=("bytes",))
    v2 = create(numbers((6, 4)), (3, 2), "v2 gzip of zstd", order="F", fill_value=None)
    facts = ChunkFormat(codecs=("numcodecs.zstd", "numcodecs.gzip"), order="F", has_fill_value=False)
    assert chunk_format(v2) == facts
    inner = sharded(inner=[BytesCodec(endian="big"), ZstdCodec()])
    assert chunk_format(inner) == ChunkFormat(codecs=("bytes", "zstd"), endian="big")
    rare = sharded(index=[BytesCodec(), Crc32cCodec(), Crc32cCodec()])
    assert chunk_format(rare) == ChunkFormat(codecs=("bytes",), endian="little", has_plain_index=False)


# What is left to others ---------------------------------------------------------------------------------


LEFT = {
    "stored big-endian in v2": ("v2 zstd", ">f4", {}, "its byte order is >"),
    "stored big-endian in v3": (
        "v3 zstd",
        "float32",
        {"serializer": BytesCodec(endian="big")},
        "its byte order is big",
    ),
    "columns first": ("v2 zstd", "float32", {"order": "F"}, "its order is F"),
    "a compressor": ("v2 zstd", "float32", {"compressors": numcodecs.LZ4()}, "codec lz4"),
    "a filter": ("v2 zstd", "float32", {"filters": [numcodecs.Delta("<f4")]}, "codec delta"),
    "another checksum": ("v2 zstd", "float32", {"filters": [numcodecs.CRC32()]}, "codec crc32"),
    "transposed": ("v3 zstd", "float32", {"filters": [TransposeCodec(order=(1, 0))]}, "codec transpose"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_it_is_said_why_an_array_is_left_to_others(create, kind):
    of, dtype, options, said = LEFT[kind]
    assert numcodecs_obstacle_of(create(numbers((6, 4), dtype), (3, 2), of, **options)) == said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("crc32c" not in numcodecs.registry.codec_registry, reason="numcodecs lacks its package crc32c")
def test_a_checksum_that_is_stored_in_another_way_is_left_to_others(create):
    v3 = zarr.create_array(
        zarr.storage.MemoryStore(), shape=(6,), dtype="float32", chunks=(3,), compressors=old.CRC32C()
    )
    v2 = create(numbers((6,)), (3,), "v2 none", filters=[numcodecs.checksum32.CRC32C()])
    assert numcodecs_obstacle_of(v3) == numcodecs_obstacle_of(v2) == "codec crc32c"


def test_shards_of_which_the_index_is_encoded_in_a_rare_way_are_left_to_others():
    rare = "the index of its shards is encoded in a rare way"
    assert numcodecs_obstacle_of(sharded()) == ""
    assert numcodecs_obstacle_of(sharded(index=[BytesCodec()])) == ""
    assert numcodecs_obstacle_of(sharded(index=[BytesCodec(endian="big"), Crc32cCodec()])) == ""
    assert numcodecs_obstacle_of(sharded(index=[BytesCodec(), Crc32cCodec(), Crc32cCodec()])) == rare
    assert numcodecs_obstacle_of(sharded(inner=[BytesCodec(endian="big")])) == "its byte order is big"
    assert numcodecs_obstacle_of(sharded(inner=[TransposeCodec(order=(1, 0)), BytesCodec()])) == "codec transpose"
    assert numcodecs_obstacle_of(sharded("uint8")) == ""


@pytest.mark.filterwarnings("ignore:Combining a `sharding_indexed`")
def test_shards_that_are_compressed_or_in_shards_are_left_to_others():
    rare = "the index of its shards is encoded in a rare way"
    chunks = ShardingCodec(chunk_shape=(3, 2), codecs=[BytesCodec()])
    for codecs in ([chunks, GzipCodec()], [ShardingCodec(chunk_shape=(6, 2), codecs=[chunks])]):
        array = zarr.create(
            store=zarr.storage.MemoryStore(),
            shape=(6, 4),
            chunk_shape=(6, 4),
            dtype="float32",
            codecs=codecs,
            fill_value=0,
            zarr_format=3,
        )
        array[...] = numbers((6, 4))
        assert numcodecs_obstacle_of(array) == rare
        assert bounded(array)[...].tolist() == numbers((6, 4)).tolist()


def test_a_byte_has_no_order(create):
    for kind in ("v2 zstd", "v3 zstd", "sharded zstd"):
        for dtype in ("uint8", "int8", "bool"):
            assert numcodecs_obstacle_of(create(numbers((6, 4), dtype), (3, 2), kind)) == ""
