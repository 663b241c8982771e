"""Chunks that claim to hold, or do hold, far more than a chunk: refused before there is memory for that, and named."""

from __future__ import annotations

import gzip
import lzma
import os
import warnings
import zipfile

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, GzipCodec, TransposeCodec, ZstdCodec
from zarr.codecs import numcodecs as old

from dtrain.data.plan.grid import chunks_of
from dtrain.data.plan.units import Box
from dtrain.data.read import zarr as through_zarr
from dtrain.data.read.bounded import bounded, most_bytes, object_most
from dtrain.data.read.codecs import SPARE, Undecodable
from dtrain.data.read.decode import Decoder
from dtrain.data.read.frames import BLOCK
from dtrain.data.read.heads import Claims
from dtrain.data.read.units import UnitReader
from dtrain.data.read.zarr import ZarrReader
from dtrain.errors import ChunkMissing, ChunkUndecodable, NonFiniteData, OutOfMemory
from tests.data.helpers import open_all, vector
from tests.data.read.helpers import KINDS, numbers
from tests.tracing import traced

BOMB = 1 << 22
"""Values in a chunk: 16 MB."""
pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not")
NEAR = 4 << 20
"""Bytes that may be allocated to refuse it."""
COMPRESSED = [kind for kind in KINDS if not kind.endswith(("none", "crc32c")) or "zstd" in kind or "blosc" in kind]

# What zarr alone decodes
OTHERS = {
    "v2 lz4": (2, {"compressors": numcodecs.LZ4()}),
    "v2 bz2": (2, {"compressors": numcodecs.BZ2()}),
    "v2 lzma": (2, {"compressors": numcodecs.LZMA(preset=1)}),
    "v2 lzma alone": (2, {"compressors": numcodecs.LZMA(format=lzma.FORMAT_ALONE, preset=1)}),
    "v2 lzma raw": (
        2,
        {"compressors": numcodecs.LZMA(format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 1}])},
    ),
    "v2 delta zstd": (2, {"filters": [numcodecs.Delta("<f4")], "compressors": numcodecs.Zstd()}),
    "v2 widened zlib": (2, {"filters": [numcodecs.AsType("<f8", "<f4")], "compressors": numcodecs.Zlib()}),
    "v2 scaled gzip": (2, {"filters": [numcodecs.FixedScaleOffset(0, 1, "<f4")], "compressors": numcodecs.GZip()}),
    "v2 shuffled bz2": (2, {"filters": [numcodecs.Shuffle(1)], "compressors": numcodecs.BZ2()}),
    "v2 checked zstd": (2, {"filters": [numcodecs.CRC32()], "compressors": numcodecs.Zstd()}),
    "v3 lz4": (3, {"compressors": lambda: [old.LZ4()]}),
    "v3 bz2": (3, {"compressors": lambda: [old.BZ2()]}),
    "v3 lzma": (3, {"compressors": lambda: [old.LZMA(preset=1)]}),
    "v3 shuffled zstd": (3, {"compressors": lambda: [old.Shuffle(elementsize=1), ZstdCodec()]}),
    "v3 transposed zstd": (3, {"filters": lambda: [TransposeCodec(order=(1, 0))], "compressors": [ZstdCodec()]}),
    "v3 big-endian gzip": (3, {"serializer": BytesCodec(endian="big"), "compressors": [GzipCodec()]}),
    "sharded lz4": (3, {"compressors": lambda: [old.LZ4()], "shards": (6, 4)}),
}
ALL = {**{kind: KINDS[kind] for kind in COMPRESSED}, **OTHERS}


def write_array(folder, values, chunks, kind, **changes):
    """Write an array of one kind, and open it as dtrain does."""
    zarr_format, options = ALL.get(kind) or KINDS[kind]
    with warnings.catch_warnings(), zarr.config.set({"array.write_empty_chunks": True}):
        warnings.simplefilter("ignore")
        options = {key: value() if callable(value) else value for key, value in options.items()}
        array = zarr.create_array(
            folder,
            shape=values.shape,
            dtype=values.dtype,
            chunks=chunks,
            zarr_format=zarr_format,
            **{"fill_value": 0, **options, **changes},
        )
        array[...] = values
        return bounded(zarr.open_array(folder, mode="r", zarr_format=zarr_format))


@pytest.fixture(scope="module")
def bomb_of(tmp_path_factory):
    """A function that returns the stored bytes of a chunk of 16 MB of zeros."""
    known = {}

    def make(kind):
        kind = kind.replace("sharded", "v3").replace("index first", "v3")
        if kind not in known:
            folder = tmp_path_factory.mktemp("bomb") / "a"
            array = write_array(folder, np.zeros((BOMB, 1), "float32"), (BOMB, 1), kind, shards=None)
            known[kind] = (folder / array.metadata.encode_chunk_key((0, 0))).read_bytes()
        return known[kind]

    return make


def peak_of(function):
    """Return the bytes that were allocated meanwhile, at most, and what was raised."""
    with traced() as peak:
        with pytest.raises(Undecodable) as caught:
            function()
        return peak(), caught.value


WHOLE = next(chunks_of((3, 2), ((0, 3, 1), (0, 2, 1))))
SAID = r"^it holds (more than )?[\d,]+ bytes; a chunk has |^it has [\d,]+ bytes; at most"


def scratch(size):
    return memoryview(bytearray(size))


# Each codec -----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(12)
@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_bomb_is_refused_by_numcodecs_before_there_is_memory_for_it(tmp_path, bomb_of, kind):
    array = write_array(tmp_path / "a", numbers((3, 2)), (3, 2), kind, shards=None)
    decoder, frame = Decoder(array), memoryview(bomb_of(kind))
    peak, error = peak_of(lambda: decoder.decode(frame, WHOLE, np.empty((3, 2), "float32"), scratch))
    assert peak < NEAR
    assert str(error).startswith("it holds ")


@pytest.mark.sampled(14)
@pytest.mark.parametrize("kind", ALL)
def test_a_bomb_is_refused_by_zarr_before_there_is_memory_for_it(tmp_path, bomb_of, kind):
    array = write_array(tmp_path / "a", numbers((6, 4)), (3, 2), kind, shards=None)
    np.testing.assert_array_equal(array[:], numbers((6, 4)))
    (tmp_path / "a" / array.metadata.encode_chunk_key((0, 1))).write_bytes(bomb_of(kind))
    peak, error = peak_of(lambda: array[:])
    assert peak < NEAR
    assert str(error).startswith("it holds ")
    np.testing.assert_array_equal(array[:, :2], numbers((6, 4))[:, :2])


OF_FLOATS = ("delta", "widened", "scaled")
OF_ANY = [kind for kind in ALL if not any(name in kind for name in OF_FLOATS)]


@pytest.mark.sampled(20)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, "float32") for kind in ALL), *((kind, d) for kind in OF_ANY for d in ("int16", "bool"))],
)
def test_bounded_codecs_give_the_bits_of_zarrs_own(tmp_path, kind, dtype):
    values = np.random.default_rng(3).integers(0, 50, (7, 5)).astype(dtype)
    array = write_array(tmp_path / "a", values, (3, 2), kind)
    plain = zarr.open_array(tmp_path / "a", mode="r")
    for place in (np.s_[:], np.s_[1:6:2, 3], np.s_[6]):
        assert array[place].tobytes() == plain[place].tobytes() == values[place].tobytes()
    assert array.metadata.to_dict() == plain.metadata.to_dict()
    assert (array.chunks, array.shards, array.shape) == (plain.chunks, plain.shards, plain.shape)


@pytest.mark.parametrize("kind", ["v2 none", "v3 none", "v3 crc32c"])
def test_an_array_without_a_compressor_is_left_as_it_is(create, kind):
    array = create(numbers((6, 4)), (3, 2), kind)
    assert bounded(array) is array


def test_texts_may_be_long(tmp_path):
    texts = np.array(["abc", "d" * 2000, ""] * 5, dtype=object)
    for number, zarr_format in enumerate((2, 3)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = zarr.create_array(
                tmp_path / str(number), shape=(15,), chunks=(4,), dtype=str, zarr_format=zarr_format
            )
            array[:] = texts
        assert bounded(array)[:].tolist() == texts.tolist()


def test_the_most_bytes_of_a_chunk():
    shape, four = (10,), np.dtype("float32")
    assert most_bytes([], shape, four) == [80 + SPARE]
    assert most_bytes(["bytes"], shape, four) == [40, 80 + SPARE]
    assert most_bytes(["transpose", "bytes", "zstd", "gzip"], shape, four) == [40, 40, 40, 80 + SPARE, 80 + SPARE]
    assert most_bytes(["crc32c", "zstd"], shape, four) == [40, 80 + SPARE, 80 + SPARE]
    assert most_bytes(["delta", "zstd"], shape, four) == [40, 1280 + SPARE, 1280 + SPARE]
    assert most_bytes(["vlen-utf8", "zstd"], shape, np.dtype(object))[0] > 64 << 20


# Frames that lie ------------------------------------------------------------------------------------------------

MAGIC = b"\x28\xb5\x2f\xfd"


def zstd(*counts, size=None, byte=b"\x07"):
    """A frame of blocks that repeat a byte; its header may state any size, or none."""
    head = MAGIC + (b"\x00\x58" if size is None else b"\xc0\x58" + size.to_bytes(8, "little"))
    last = len(counts) - 1
    return head + b"".join((n << 3 | 2 | (i == last)).to_bytes(3, "little") + byte for i, n in enumerate(counts))


def without_size(frame):
    """Return a frame of numcodecs without the size in its header."""
    flags = frame[4]
    at = 5 + (1 - (flags >> 5 & 1)) + (flags >> 5 & 1, 2, 4, 8)[flags >> 6]
    return MAGIC + bytes([flags & 0b100]) + b"\x58" + frame[at:]


BLOSC = numcodecs.Blosc("zstd").encode(np.zeros(6, "float32"))
FRAMES = {
    "states less than it holds": ("v3 zstd", zstd(*[BLOCK] * 400, size=24)),
    "states more than it holds": ("v3 zstd", zstd(24, size=1 << 40)),
    "states nearly all numbers": ("v3 zstd", zstd(24, size=1 << 62)),
    "states all numbers": ("v3 zstd", zstd(24, size=(1 << 64) - 1)),
    "states nothing": ("v3 zstd", zstd(*[BLOCK] * 400)),
    "a frame behind a right one": ("v3 zstd", zstd(24, size=24) + zstd(*[BLOCK] * 400)),
    "a claim behind a right one": ("v3 zstd", zstd(24, size=24) + zstd(24, size=1 << 60)),
    "many frames": ("v3 zstd", zstd(24, size=24) * 1000),
    "too little": ("v3 zstd", zstd(20, size=20)),
    "too little, unstated": ("v3 zstd", zstd(20)),
    "a long window": ("v3 zstd", MAGIC + b"\x00\xf8" + zstd(24)[6:]),
    "blosc states 2 GB": ("v3 blosc", BLOSC[:4] + (2**31 - 1).to_bytes(4, "little") + BLOSC[8:]),
    "blosc states 4 GB": ("v3 blosc", BLOSC[:4] + b"\xff" * 4 + BLOSC[8:]),
    "blosc has blocks of 4 GB": ("v3 blosc", BLOSC[:8] + b"\xff" * 4 + BLOSC[12:]),
    "gzip of many members": ("v3 gzip", gzip.compress(bytes(24)) * 1000),
    "gzip with a bomb behind": ("v3 gzip", gzip.compress(bytes(24)) + gzip.compress(bytes(1 << 24), 1)),
    "gzip states little": ("v3 gzip", gzip.compress(bytes(1 << 24), 1)[:-4] + (24).to_bytes(4, "little")),
    "gzip with something behind": ("v3 gzip", gzip.compress(bytes(24)) + b"more"),
    "gzip too little": ("v3 gzip", gzip.compress(bytes(20))),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_lies_is_refused_by_every_reader(write_store, tmp_path, name):
    kind, frame = FRAMES[name]
    path = write_pair(write_store, tmp_path, kind)
    (path / "v0" / "c" / "1" / "0").write_bytes(frame)
    for reader in ("numcodecs", "zarrs", "zarr"):
        for rows in ((0, 9), (4, 5)):
            with traced() as peak:
                with pytest.raises(ChunkUndecodable, match=r"chunk v0/c/1/0 of v0 cannot be decoded: .{4}") as caught:
                    UnitReader(open_all(path, ["v0"]), reader).read(Box(*rows))
                assert peak() < NEAR
            assert caught.value.code == 5


def write_pair(write_store, tmp_path, kind, **changes):
    """Write v0 of one kind, and what `open_all` needs beside it."""
    zarr_format, options = ALL.get(kind) or KINDS[kind]
    arrays = {
        "v0": {"dims": ("n", "k"), "values": numbers((9, 2)), "chunks": (3, 2), "fill_value": 0, **options, **changes}
    }
    return write_store(
        tmp_path / "s.zarr",
        {**arrays, "index": vector(np.arange(9, dtype="int32"), 9, fill_value=0)},
        zarr_format=zarr_format,
    )


@pytest.mark.parametrize("reader", ["numcodecs", "zarrs", "zarr"])
def test_right_frames_without_a_size_are_decoded(write_store, tmp_path, reader):
    path = write_pair(write_store, tmp_path, "v3 zstd")
    expected = numbers((9, 2))
    for name in ("0", "1", "2"):
        file = path / "v0" / "c" / name / "0"
        frame = without_size(file.read_bytes())
        file.write_bytes(frame if name != "2" else b"\x50\x2a\x4d\x18\x02\0\0\0ab" + frame)
    found = UnitReader(open_all(path, ["v0"]), reader).read(Box(0, 9))
    np.testing.assert_array_equal(found["v0"][1], expected)


# Whole stores ---------------------------------------------------------------------------------------------------


@pytest.mark.sampled(9)
@pytest.mark.parametrize("reader", ["numcodecs", "zarrs", "zarr"])
@pytest.mark.parametrize(
    "kind", ["v2 zstd", "v2 gzip", "v3 blosc", "v3 zstd of zstd", "v3 zstd crc32c", "sharded gzip"]
)
def test_a_bomb_in_a_store_is_named_by_every_reader(write_store, tmp_path, bomb_of, kind, reader, chunk_files):
    shards = {"shards": (3, 2), "chunks": (1, 2)} if "sharded" in kind else {}
    path = write_pair(write_store, tmp_path, kind, **shards)
    key = sorted(chunk_files(path, "v0"))[1]
    bomb = bomb_of(kind)
    if shards:
        index = np.array([[0, len(bomb)]] * 3, "<u8").tobytes()
        bomb += index + google_crc32c.value(index).to_bytes(4, "little")
    (path / key).write_bytes(bomb)
    samples = open_all(path, ["v0"])
    for rows in ((0, 9), (4, 5)):
        with traced() as peak:
            with pytest.raises(ChunkUndecodable, match=rf"{key} of v0 cannot be decoded: it (holds|has) ") as caught:
                UnitReader(samples, reader).read(Box(*rows))
            assert peak() < NEAR
        assert caught.value.code == 5


@pytest.mark.parametrize("reader", ["numcodecs", "zarrs", "zarr"])
@pytest.mark.parametrize("kind", ["v2 zstd", "v3 zstd", "sharded zstd"])
def test_a_stored_object_that_is_far_too_large_is_not_read(write_store, tmp_path, kind, reader, chunk_files):
    shards = {"shards": (3, 2), "chunks": (1, 2)} if "sharded" in kind else {}
    path = write_pair(write_store, tmp_path, kind, **shards)
    key = sorted(chunk_files(path, "v0"))[1]
    os.truncate(path / key, 1 << 40)  # a file with a hole
    with pytest.raises(ChunkUndecodable, match=rf"chunk {key} of v0 cannot be decoded: "):
        UnitReader(open_all(path, ["v0"]), reader).read(Box(0, 9))


@pytest.mark.parametrize("reader", ["numcodecs", "zarr"])
def test_a_member_of_an_archive_that_claims_far_too_much_is_not_read(write_store, tmp_path, reader, monkeypatch):
    path = write_pair(write_store, tmp_path, "v3 zstd")
    packed = tmp_path / "s.zarr.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(path.rglob("*")):
            if file.is_file():
                name = str(file.relative_to(path))
                content = file.read_bytes() if name != "v0/c/1/0" else bytes(1 << 24)
                archive.writestr(name, content)
    with traced() as peak:
        with pytest.raises(ChunkUndecodable, match=r"v0/c/1/0 of v0 cannot be decoded: it has 16,777,216 bytes; at"):
            UnitReader(open_all(packed, ["v0"]), reader).read(Box(0, 9))
        assert peak() < NEAR


def test_the_most_bytes_of_a_stored_object(create):
    plain = create(numbers((6, 4)), (3, 2), "v3 zstd")
    assert object_most(plain) == 2 * 24 + SPARE
    sharded = create(numbers((6, 4)), (3, 2), "sharded zstd")
    assert object_most(sharded) == 4 * (2 * 24 + 256) + SPARE
    incompressible = np.random.default_rng(0).bytes(48)
    for kind in KINDS:
        values = np.frombuffer(incompressible, "float32").reshape(6, 2)
        options = {"shards": (6, 2)} if "shard" in kind else {}
        if "index first" in kind:
            options = {"shards": {"shape": (6, 2), "index_location": "start"}}
        array = create(values, (1, 1), kind, **options)
        folder = array.store.root
        sizes = [len(p.read_bytes()) for p in folder.rglob("*") if p.is_file() and p.suffix != ".json"]
        assert max(sizes) < object_most(array)


NO_CHUNK = 2**64 - 1
ENTRIES = [(0, 2**62), (2**62, 40), (2**63, 2**63), (2**64 - 2, 3), (NO_CHUNK, 40), (0, NO_CHUNK), (0, 1 << 40), (5, 1)]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
@pytest.mark.parametrize("kind", ["sharded none", "sharded zstd", "sharded gzip"])
def test_an_entry_of_an_index_that_lies_is_refused_by_every_reader(write_store, tmp_path, kind, entry, chunk_files):
    path = write_pair(write_store, tmp_path, kind, shards=(3, 2), chunks=(1, 2))
    file = path / sorted(chunk_files(path, "v0"))[1]
    stored = file.read_bytes()
    index = np.frombuffer(stored[-52:-4], "<u8").copy()
    index[2:4] = entry
    file.write_bytes(stored[:-52] + index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little"))
    for reader in ("numcodecs", "zarrs", "zarr"):
        for rows in ((0, 9), (3, 6), (4, 5)):
            with pytest.raises(
                (ChunkUndecodable, ChunkMissing), match=f"chunk {file.relative_to(path)}|in shard v0"
            ) as one:
                UnitReader(open_all(path, ["v0"], missing="error"), reader).read(Box(*rows))
            assert one.value.code == 5


def test_a_panic_of_rust_is_an_error(write_store, tmp_path, monkeypatch):
    path = write_pair(write_store, tmp_path, "v3 zstd")
    units = UnitReader(open_all(path, ["v0"]), "zarrs")
    panic = type("PanicException", (BaseException,), {})

    def decode(*args):
        raise panic("index out of bounds")

    monkeypatch.setattr(through_zarr, "decode", decode)
    with pytest.raises(ChunkUndecodable, match=r"v0\[0:9\] could not be read: zarrs gave up: index out of bounds"):
        units.read(Box(0, 9))


def test_a_value_in_a_chunk_with_a_wrong_checksum_is_named(write_store, tmp_path):
    values = np.full((9, 2), np.nan, "float32")
    path = write_pair(write_store, tmp_path, "v3 zstd crc32c", values=values)
    file = path / "v0" / "c" / "1" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    for reader in ("numcodecs", "zarrs", "zarr"):
        with pytest.raises((ChunkUndecodable, NonFiniteData), match="chunk v0/c/1/0") as caught:
            UnitReader(open_all(path, ["v0"]), reader).read(Box(4, 5))
        assert caught.value.code == 5


# zarrs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["zarrs"])
@pytest.mark.parametrize(
    "kind", ["v2 zstd", "v2 blosc", "v2 gzip", "v3 none", "v3 zstd crc32c", "sharded zstd", "sharded gzip"]
)
def test_zarrs_reads_right_chunks_itself(write_store, tmp_path, kind, reader, monkeypatch):
    values = np.random.default_rng(0).integers(0, 9, (900, 40)).astype("float32")
    shards = {"shards": (300, 40)} if "sharded" in kind else {}
    zarr_format, options = KINDS[kind]
    array = {"dims": ("n", "k"), "values": values, "chunks": (30, 40), "fill_value": 0, **options, **shards}
    index = vector(np.arange(900, dtype="int32"), 900, fill_value=0)
    path = write_store(tmp_path / "s.zarr", {"v0": array, "index": index}, zarr_format=zarr_format)
    units = UnitReader(open_all(path, ["v0"]), "zarrs")

    def read(self, *args):
        raise AssertionError("zarr was asked")

    monkeypatch.setattr(ZarrReader, "read", read)
    for rows in ((0, 900), (31, 35), (299, 302)):
        np.testing.assert_array_equal(units.read(Box(*rows))["v0"][1], values[slice(*rows)])


@pytest.mark.parametrize("size", [12, 255, 256, 300, 66_000, BLOCK, BLOCK + 4, 500_000])
@pytest.mark.parametrize("level", [-3, 1, 19])
def test_the_claims_of_frames(tmp_path, size, level):
    values = (np.arange(size) % 251).astype("uint8")
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.create_array(
            tmp_path / "a", shape=(size,), chunks=(size,), dtype="uint8", compressors=[ZstdCodec()], fill_value=0
        )
    frame = numcodecs.Zstd(level, checksum=level > 1).encode(values)
    file = tmp_path / "f"
    file.write_bytes(b"front" + frame + b"between" + frame + b"behind")
    right = [[5, len(frame)], [12 + len(frame), len(frame)]]
    claims = Claims(array)
    assert claims.are_right(str(file), np.array(right))
    assert claims.are_right(str(file), np.empty((0, 2), np.int64))
    for wrong in ([4, len(frame)], [5, len(frame) - 1], [5, len(frame) + 1], [5, 3], [-1, len(frame)], [5, 1 << 40]):
        assert not claims.are_right(str(file), np.array([*right, wrong]))
    file.write_bytes(b"front" + frame + b"between" + without_size(frame))
    assert not claims.are_right(str(file), np.array(right))


# No memory ------------------------------------------------------------------------------------------------------


def test_a_chunk_that_there_is_no_memory_for_is_named_with_the_limit(write_store, tmp_path, monkeypatch):
    path = write_pair(write_store, tmp_path, "v2 delta zstd")
    units = UnitReader(open_all(path, ["v0"]))
    assert units.readers["v0"][0] == "zarr"

    def no_memory(self, buf, out=None):
        raise MemoryError

    monkeypatch.setattr(numcodecs.Delta, "decode", no_memory)
    with pytest.raises(OutOfMemory, match=r"no memory for v0\[4:5\], in chunk v0/1.0; a chunk should have 24 B") as one:
        units.read(Box(4, 5))
    assert "cluster.memory" in one.value.hint
    with pytest.raises(OutOfMemory, match=r"no memory for v0\[0:9\]"):
        units.read(Box(0, 9))
