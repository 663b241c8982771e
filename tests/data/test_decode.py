"""Chunks as numcodecs decodes them: which ones a selection touches, what is in them, and what is wrong with them."""

from __future__ import annotations

import gzip
import math
import warnings
from pathlib import Path

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)
from zarr.codecs import numcodecs as old

from dtrain.data.read import decode
from dtrain.data.read.decode import Chunk, Decoder, Undecodable, chunks_of, entry_of, runs_of, why_not
from dtrain.data.read.store import NO_CHUNK, shard_layout

# Which chunks ---------------------------------------------------------------------------------------------------


@st.composite
def selected(draw):
    """Draw (shape, sizes of chunks, selection) of up to three dimensions; no selection is empty."""
    shape, sizes, select = [], [], []
    for _ in range(draw(st.integers(0, 3))):
        n = draw(st.integers(1, 11))
        start = draw(st.integers(0, n - 1))
        shape.append(n)
        sizes.append(draw(st.integers(1, n + 2)))
        select.append((start, draw(st.integers(start + 1, n)), draw(st.integers(1, n + 1))))
    return tuple(shape), tuple(sizes), tuple(select)


@given(selected())
def test_chunks_put_together_are_the_selection(drawn):
    shape, sizes, select = drawn
    array = np.arange(math.prod(shape)).reshape(shape)
    grid = tuple(-(-n // size) for n, size in zip(shape, sizes, strict=True))
    padded = np.full(tuple(count * size for count, size in zip(grid, sizes, strict=True)), -1)
    padded[tuple(slice(n) for n in shape)] = array
    taken = np.zeros(padded.shape, bool)
    taken[tuple(slice(*part) for part in select)] = True
    expected = array[tuple(slice(*part) for part in select)]
    out, written = np.full(expected.shape, -1), np.zeros(expected.shape, int)
    places = []
    for chunk in chunks_of(sizes, select):
        where = tuple(slice(p * size, (p + 1) * size) for p, size in zip(chunk.place, sizes, strict=True))
        out[chunk.target] = padded[where][chunk.source]
        written[chunk.target] += 1
        assert written[chunk.target].size
        assert chunk.whole == taken[where].all()
        places.append(chunk.place)
    np.testing.assert_array_equal(out, expected)
    assert (written == 1).all()
    assert places == sorted(set(places))


def test_a_chunk_says_which_part_of_it_goes_where():
    assert list(chunks_of((4, 3), ((3, 9, 1), (1, 6, 2)))) == [
        Chunk((0, 0), (slice(3, 4, 1), slice(1, 3, 2)), (slice(0, 1), slice(0, 1)), False),
        Chunk((0, 1), (slice(3, 4, 1), slice(0, 3, 2)), (slice(0, 1), slice(1, 3)), False),
        Chunk((1, 0), (slice(0, 4, 1), slice(1, 3, 2)), (slice(1, 5), slice(0, 1)), False),
        Chunk((1, 1), (slice(0, 4, 1), slice(0, 3, 2)), (slice(1, 5), slice(1, 3)), False),
        Chunk((2, 0), (slice(0, 1, 1), slice(1, 3, 2)), (slice(5, 6), slice(0, 1)), False),
        Chunk((2, 1), (slice(0, 1, 1), slice(0, 3, 2)), (slice(5, 6), slice(1, 3)), False),
    ]


# Which bytes of a shard -------------------------------------------------------------------------------------------


def one(place):
    """A chunk of which nothing but the place matters."""
    return Chunk((place,), (slice(0, 1),), (slice(0, 1),), True)


def runs(entries, density, corner=0):
    """What `runs_of` finds of chunks at (offset, length), with the places of the chunks."""
    index = np.array(entries, np.uint64)
    wanted = [one(corner + i) for i in range(len(entries))]
    return [
        (begin, end, [chunk.place[0] for chunk in chunks])
        for begin, end, chunks in runs_of(index, wanted, (corner,), density)
    ]


@pytest.mark.parametrize(
    ("entries", "density", "expected"),
    [
        ([], 0.5, []),
        ([(7, 3)], 0.5, [(7, 10, [0])]),
        ([(0, 10), (10, 10), (20, 10)], 1.0, [(0, 30, [0, 1, 2])]),
        ([(20, 10), (0, 10), (10, 10)], 1.0, [(0, 30, [1, 2, 0])]),  # in the order of the file
        ([(0, 10), (11, 10)], 1.0, [(0, 10, [0]), (11, 21, [1])]),
        ([(0, 10), (30, 10)], 0.5, [(0, 40, [0, 1])]),  # just dense enough
        ([(0, 10), (31, 10)], 0.5, [(0, 10, [0]), (31, 41, [1])]),
        ([(100, 10), (130, 10)], 0.5, [(100, 140, [0, 1])]),
        ([(0, 10), (100, 10), (110, 10), (140, 10)], 0.5, [(0, 10, [0]), (100, 150, [1, 2, 3])]),
        ([(0, 10), (30, 10), (61, 10), (70, 10)], 0.5, [(0, 40, [0, 1]), (61, 80, [2, 3])]),  # greedy
        ([(0, 10), (10, 0), (12, 0)], 0.5, [(0, 12, [0, 1, 2])]),
        ([(0, 30), (5, 10), (12, 4)], 0.5, [(0, 30, [0, 1, 2])]),  # one within the other
        ([(5, 10), (5, 10)], 1.0, [(5, 15, [0, 1])]),  # the same for two
    ],
)
def test_chunks_of_a_shard_that_lie_close_together_are_read_together(entries, density, expected):
    assert runs(np.reshape(entries, (-1, 2)).tolist(), density) == expected


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=8), st.sampled_from([0.3, 0.5, 1.0]))
def test_each_chunk_lies_in_the_run_that_is_read_for_it_and_runs_are_dense(entries, density):
    found = runs(np.reshape(entries, (-1, 2)).tolist(), density)
    assert sorted(i for _, _, chunks in found for i in chunks) == list(range(len(entries)))
    for begin, end, chunks in found:
        assert begin == min(entries[i][0] for i in chunks)
        assert end == max(sum(entries[i]) for i in chunks)
        assert sum(entries[i][1] for i in chunks) >= density * (end - begin)
    offsets = [entries[i][0] for _, _, chunks in found for i in chunks]
    assert offsets == sorted(offsets)


def test_offsets_count_from_the_first_chunk_of_the_shard():
    assert runs([(3, 4), (9, 2)], 0.9, corner=6) == [(3, 7, [6]), (9, 11, [7])]
    index = np.arange(24, dtype=np.uint64).reshape(2, 3, 2, 2)
    chunk = Chunk((5, 8, 2), (), (), False)
    assert entry_of(index, chunk, (4, 6, 2)) == tuple(index[1, 2, 0].tolist())
    assert all(type(number) is int for number in entry_of(index, chunk, (4, 6, 2)))


# Codecs -----------------------------------------------------------------------------------------------------------

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
CHECKED = [kind for kind in KINDS if any(name in kind for name in ("crc32c", "gzip", "zlib", "checksum"))]
RAGGED = ((7, 5), (3, 2))
SELECTIONS = [
    ((0, 7, 1), (0, 5, 1)),
    ((1, 6, 1), (1, 4, 1)),
    ((0, 7, 3), (1, 5, 2)),
    ((3, 6, 1), (2, 4, 1)),
    ((6, 7, 1), (4, 5, 1)),
]


@pytest.fixture
def create(tmp_path):
    """A function that writes an array into a folder of its own, and opens it."""

    def write(values, chunks, kind="v3 zstd", **changes):
        zarr_format, options = KINDS[kind]
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with warnings.catch_warnings(), zarr.config.set({"array.write_empty_chunks": True}):
            if "old" in kind:
                warnings.simplefilter("ignore")
                options = {"compressors": options["compressors"]()}
            array = zarr.create_array(
                folder,
                shape=values.shape,
                dtype=values.dtype,
                chunks=chunks,
                zarr_format=zarr_format,
                **{"fill_value": 0, **options, **changes},
            )
            array[...] = values
        return array

    return write


def numbers(shape, dtype="float32"):
    """Values of which neighbours differ, and which can be compressed."""
    return (np.arange(math.prod(shape)).reshape(shape) % 23).astype(dtype)


def path_of(array, place):
    return Path(array.store.root, array.path, array.metadata.encode_chunk_key(place))


def stored(array, chunk):
    """The bytes of a chunk, found in its file by hand."""
    if array.shards is None:
        return memoryview(path_of(array, chunk.place).read_bytes())
    counts = [shard // inner for shard, inner in zip(array.shards, array.chunks, strict=True)]
    place = tuple(p // count for p, count in zip(chunk.place, counts, strict=True))
    shard, layout = memoryview(path_of(array, place).read_bytes()), shard_layout(array)
    index = layout.checked(shard[-layout.index_bytes :] if layout.at_end else shard[: layout.index_bytes])
    start, length = entry_of(index, chunk, tuple(p * count for p, count in zip(place, counts, strict=True)))
    return shard[start : start + length]


def room(size):
    return memoryview(bytearray(size))


def no_room(size):
    raise AssertionError("a whole chunk is decoded where it belongs")


def decoded(array, select, out, room=room):
    decoder = Decoder(array)
    for chunk in chunks_of(array.chunks, select):
        decoder.decode(stored(array, chunk), chunk, out, room)
    return out


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "uint8", "bool"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_decoded_to_the_same_bits_as_by_zarr(create, kind, dtype):
    array = create(numbers(RAGGED[0], dtype), RAGGED[1], kind)
    assert why_not(array) == ""
    for select in SELECTIONS:
        expected = array[tuple(slice(*part) for part in select)]
        plain = decoded(array, select, np.full(expected.shape, 99, dtype))
        turned = decoded(array, select, np.full(expected.shape[::-1], 99, dtype).T)
        apart = decoded(array, select, np.full((*expected.shape, 2), 99, dtype)[..., 1])
        backwards = decoded(array, select, np.full(expected.shape, 99, dtype)[::-1])
        for found in (plain, turned, apart, backwards):
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_whole_rows_are_decoded_where_they_belong(create, kind):
    shards = {"shards": (4, 5)} if "sharded" in kind else {}
    if "index first" in kind:
        shards = {"shards": {"shape": (4, 5), "index_location": "start"}}
    array = create(numbers((8, 5)), (2, 5), kind, **shards)
    out = np.full((10, 5), 99, "float32")
    decoded(array, ((0, 8, 1), (0, 5, 1)), out[1:9], no_room)
    np.testing.assert_array_equal(out[1:9], numbers((8, 5)))
    assert (out[[0, 9]] == 99).all()
    for other in (out[1:9].astype("float64"), np.empty((8, 10), "float32")[:, ::2], np.empty((5, 8), "float32").T):
        with pytest.raises(AssertionError, match="where it belongs"):
            decoded(array, ((0, 8, 1), (0, 5, 1)), other, no_room)
    with pytest.raises(AssertionError, match="where it belongs"):
        decoded(array, ((0, 7, 1), (0, 5, 1)), np.empty((7, 5), "float32"), no_room)


def test_the_room_that_is_asked_for_is_that_of_a_chunk_and_may_hold_anything(create):
    array = create(numbers((7, 5), "int16"), (3, 2))
    asked = []

    def used(size):
        asked.append(size)
        return memoryview(bytearray(b"\xff" * size))

    np.testing.assert_array_equal(
        decoded(array, ((1, 7, 1), (0, 5, 1)), np.empty((6, 5), "int16"), used), numbers((7, 5), "int16")[1:]
    )
    assert set(asked) == {3 * 2 * 2}


@pytest.mark.parametrize("dtype", ["int16", "float32", "float64"])
def test_an_array_without_dimensions_is_decoded(create, dtype):
    array = create(np.array(7, dtype), ())
    out = np.full((), 99, "float32" if dtype == "float64" else dtype)
    assert decoded(array, (), out)[()] == 7


@pytest.mark.parametrize("kind", ["v2 none", "v2 blosc", "v3 zstd", "sharded zstd"])
def test_float64_is_rounded_to_float32_on_the_way_and_warns_of_nothing(create, kind):
    values = numbers(RAGGED[0], "float64") / 3
    values[0, :3] = 1e300, -1e300, np.nan
    values[6, 4] = 1e-60
    values.view("uint64")[3, 2] = 0x7FF0000000000001  # a signalling NaN
    array = create(values, RAGGED[1], kind)
    for select in SELECTIONS:
        part = values[tuple(slice(*p) for p in select)]
        with np.errstate(all="ignore"):
            expected = part.astype("float32")
        np.testing.assert_array_equal(decoded(array, select, np.empty(part.shape, "float32")), expected)
    whole = create(values, (7, 5), "v3 zstd")  # contiguous and whole, but of another dtype
    with np.errstate(all="ignore"):
        expected = values.astype("float32")
    np.testing.assert_array_equal(decoded(whole, ((0, 7, 1), (0, 5, 1)), np.empty((7, 5), "float32")), expected)


@pytest.mark.parametrize(
    ("dtype", "fill", "expected"),
    [
        ("float32", None, 0.0),
        ("int16", None, 0),
        ("bool", None, False),
        ("float64", -7.5, -7.5),
        ("float32", np.nan, np.nan),
        ("float32", -np.inf, -np.inf),
        ("uint8", 255, 255),
        ("bool", True, True),
    ],
)
@pytest.mark.parametrize("kind", ["v2 zstd", "v3 zstd", "sharded zstd"])
def test_the_fill_value_has_the_dtype_of_the_array_and_is_zero_where_there_is_none(create, kind, dtype, fill, expected):
    fill = {} if fill is None and not kind.startswith("v2") else {"fill_value": fill}
    decoder = Decoder(create(numbers(RAGGED[0], dtype), RAGGED[1], kind, **fill))
    assert decoder.fill.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(decoder.fill, expected)


# Damaged ----------------------------------------------------------------------------------------------------------

WHOLE = next(chunks_of((3, 2), ((0, 3, 1), (0, 2, 1))))
PART = next(chunks_of((3, 2), ((0, 2, 1), (0, 2, 1))))


def decode_into(array, frame, chunk=WHOLE):
    out = np.full((3, 2), 99, array.dtype)
    Decoder(array).decode(memoryview(frame), chunk, out, room)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_that_is_cut_is_undecodable(create, kind):
    array = create(numbers(RAGGED[0]), RAGGED[1], kind)
    frame = bytes(stored(array, WHOLE))
    for size in range(len(frame)):
        for chunk in (WHOLE, PART):
            with pytest.raises(Undecodable, match="....") as caught:
                decode_into(array, frame[:size], chunk)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_with_a_flipped_bit_is_undecodable_or_of_the_right_size(create, kind):
    array = create(numbers(RAGGED[0]), RAGGED[1], kind)
    frame = bytes(stored(array, WHOLE))
    expected = decode_into(array, frame)
    found = 0
    for place in range(len(frame)):
        flipped = bytearray(frame)
        flipped[place] ^= 1 << place % 8
        try:
            other = decode_into(array, flipped)
        except Undecodable as error:
            assert len(str(error)) > 3  # noqa: PT017
            found += 1
        else:
            assert kind not in CHECKED or np.array_equal(other, expected)
    assert found or kind.endswith("none")


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "shard" not in kind and "index" not in kind])
def test_a_frame_that_holds_another_number_of_bytes_is_undecodable(create, kind, change):
    other = create(numbers((3 + change, 2)), (3 + change, 2), kind)
    array = create(numbers((3, 2)), (3, 2), kind)
    for chunk in (WHOLE, PART):
        with pytest.raises(Undecodable, match=rf"it holds {24 + 8 * change} bytes; a chunk has 24"):
            decode_into(array, path_of(other, (0, 0)).read_bytes(), chunk)


def test_large_sizes_are_said_with_commas(create):
    array = create(numbers((500, 2)), (500, 2), "v3 none")
    (whole,) = chunks_of((500, 2), ((0, 500, 1), (0, 2, 1)))
    with pytest.raises(Undecodable, match="it holds 3,999 bytes; a chunk has 4,000"):
        Decoder(array).decode(memoryview(bytes(3999)), whole, np.empty((500, 2), "float32"), room)


@pytest.mark.parametrize("kind", ["v2 blosc", "v3 blosc", "sharded blosc", "v2 blosc of zlib", "v2 zstd of blosc"])
def test_blosc_does_not_read_beyond_a_frame(create, kind):
    array = create(numbers(RAGGED[0]), RAGGED[1], kind)
    frame = bytes(stored(array, WHOLE))
    if kind == "v2 zstd of blosc":
        inner = numcodecs.Zstd().decode(frame)
        cut = [numcodecs.Zstd().encode(bytes(inner)[:size]) for size in (5, 15, 16, len(inner) - 1)]
    else:
        cut = [frame[:size] for size in (0, 5, 15, 16, len(frame) - 1)]
    for short in cut:
        with pytest.raises(Undecodable, match="^the file is cut short$"):
            decode_into(array, short)
    if kind != "v2 zstd of blosc":
        np.testing.assert_array_equal(decode_into(array, frame + b"more"), decode_into(array, frame))


def test_a_checksum_is_that_of_all_bytes_before_it(create):
    array = create(numbers((3, 2)), (3, 2), "v3 crc32c")
    values = numbers((3, 2)).tobytes()
    checksum = google_crc32c.value(values).to_bytes(4, "little")
    assert decode_into(array, values + checksum).tobytes() == values
    for wrong in (values + checksum[::-1], values, values + checksum + b"\0", checksum + values, checksum[:3], b""):
        with pytest.raises(Undecodable, match="^its checksum is wrong$"):
            decode_into(array, wrong)
    nothing = bytes(4)  # what no bytes add up to
    with pytest.raises(Undecodable, match="it holds 0 bytes; a chunk has 24"):
        decode_into(array, nothing)


def test_what_a_codec_says_is_said_in_one_line(create, monkeypatch):
    array = create(numbers((3, 2)), (3, 2), "v3 gzip")
    with pytest.raises(Undecodable, match="Not a gzipped file"):
        decode_into(array, b"garbage" * 9)

    def fail(message):
        def decompress(stored):
            raise ValueError(message)

        return decompress

    monkeypatch.setattr(gzip, "decompress", fail("of two\n   lines"))
    with pytest.raises(Undecodable, match="^of two lines$") as caught:
        decode_into(array, b"garbage")
    assert isinstance(caught.value.__cause__, ValueError)
    monkeypatch.setattr(gzip, "decompress", fail(""))
    with pytest.raises(Undecodable, match="^ValueError$"):
        decode_into(array, b"garbage")


# Frames of zstd -----------------------------------------------------------------------------------------------------


def zstd_frame(*blocks, size=None, width=0, single=False, dictionary=0):
    """A frame of raw blocks, written by hand (RFC 8878): the content size has `width` bytes, or is left out."""
    flag = {0: 0, 1: 0, 2: 1, 4: 2, 8: 3}[width]
    head = b"\x28\xb5\x2f\xfd" + bytes([flag << 6 | single << 5 | {0: 0, 1: 1, 2: 2, 4: 3}[dictionary]])
    if not single:
        head += b"\x58"  # a window of 2 MiB
    head += bytes(dictionary)
    if width:
        size = sum(map(len, blocks)) if size is None else size
        head += (size - 256 * (width == 2)).to_bytes(width, "little")
    last = len(blocks) - 1
    return head + b"".join(((len(b) << 3) | (i == last)).to_bytes(3, "little") + b for i, b in enumerate(blocks))


def repeated(byte, count):
    """A frame without a size, of one block that repeats a byte."""
    return b"\x28\xb5\x2f\xfd\x00\x58" + ((count << 3) | 0b011).to_bytes(3, "little") + byte


FORMS = [
    {"width": 0},
    {"width": 1, "single": True},
    {"width": 2},
    {"width": 2, "single": True},
    {"width": 4},
    {"width": 4, "single": True},
    {"width": 8},
    {"width": 8, "single": True},
    *({"width": 4, "dictionary": n} for n in (1, 2, 4)),
    *({"width": 8, "single": True, "dictionary": n} for n in (1, 2, 4)),
    {"width": 2, "dictionary": 2},
]


@pytest.mark.parametrize("size", [12, 255, 256, 300, 66_000])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_size_in_the_header_of_a_frame_is_found(create, form, size):
    if (form["width"] == 1 and size > 255) or (form["width"] == 2 and not 256 <= size < 65_792):
        return
    values = np.random.default_rng(0).bytes(size)
    frame = zstd_frame(values, **form)
    told = decode._zstd_size(memoryview(frame))
    assert told == (size if form["width"] and len(frame) >= 18 else None)
    array = create(np.frombuffer(values, np.uint8), (size,))
    (whole,) = chunks_of((size,), ((0, size, 1),))
    out = np.zeros(size, np.uint8)
    Decoder(array).decode(memoryview(frame), whole, out, room)
    assert out.tobytes() == values


def test_only_the_header_of_a_frame_tells_a_size():
    frame = zstd_frame(bytes(100), width=4)
    assert decode._zstd_size(memoryview(frame)) == 100
    assert decode._zstd_size(memoryview(frame[:18])) == 100
    for other in (b"", frame[:4], frame[:17], b"\x28\xb5\x2f\xfc" + frame[4:], b"\x50\x2a\x4d\x18" + frame[4:]):
        assert decode._zstd_size(memoryview(other)) is None


@pytest.mark.parametrize("kind", ["v2 zstd", "v3 zstd", "sharded zstd"])
def test_frames_of_zstd_that_tell_no_size_are_decoded(create, kind):
    array = create(numbers((6, 4)), (3, 2), kind)
    values = numbers((3, 2)).tobytes()
    parts = [values[start : start + 7] for start in range(0, 24, 7)]
    for frame in (zstd_frame(values), zstd_frame(*parts), zstd_frame(b"", values, b"")):
        np.testing.assert_array_equal(decode_into(array, frame), numbers((3, 2)))
        np.testing.assert_array_equal(decode_into(array, frame, PART)[:2], numbers((3, 2))[:2])
        for size in range(len(frame)):
            with pytest.raises(Undecodable):
                decode_into(array, frame[:size])
    assert (decode_into(array, repeated(b"\x07", 24)).view("uint8") == 7).all()
    for count in (0, 23, 25, 48, 100_000):
        with pytest.raises(Undecodable, match=rf"it holds {count:,} bytes; a chunk has 24"):
            decode_into(array, repeated(b"\x07", count))


def test_a_frame_of_zstd_that_holds_less_or_more_than_it_tells_is_undecodable(create):
    array = create(numbers((3, 2)), (3, 2))
    values = numbers((3, 2)).tobytes()
    for blocks in ((values[:-1],), (values, b"x"), (values, values)):
        with pytest.raises(Undecodable):
            decode_into(array, zstd_frame(*blocks, size=24, width=4))
    with pytest.raises(Undecodable, match="it holds 48 bytes"):
        decode_into(array, zstd_frame(values, values, width=4))


# What is left to others ---------------------------------------------------------------------------------------------


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
    assert why_not(create(numbers((6, 4), dtype), (3, 2), of, **options)) == said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("crc32c" not in numcodecs.registry.codec_registry, reason="numcodecs lacks its package crc32c")
def test_a_checksum_that_is_stored_in_another_way_is_left_to_others(create):
    v3 = zarr.create_array(
        zarr.storage.MemoryStore(), shape=(6,), dtype="float32", chunks=(3,), compressors=old.CRC32C()
    )
    v2 = create(numbers((6,)), (3,), "v2 none", filters=[numcodecs.checksum32.CRC32C()])
    assert why_not(v3) == why_not(v2) == "codec crc32c"


def test_shards_of_which_the_index_is_encoded_in_a_rare_way_are_left_to_others():
    rare = "the index of its shards is encoded in a rare way"
    assert why_not(sharded()) == ""
    assert why_not(sharded(index=[BytesCodec()])) == ""
    assert why_not(sharded(index=[BytesCodec(endian="big"), Crc32cCodec()])) == ""
    assert why_not(sharded(index=[BytesCodec(), Crc32cCodec(), Crc32cCodec()])) == rare
    assert why_not(sharded(inner=[BytesCodec(endian="big")])) == "its byte order is big"
    assert why_not(sharded(inner=[TransposeCodec(order=(1, 0)), BytesCodec()])) == "codec transpose"
    assert why_not(sharded("uint8")) == ""


def test_a_byte_has_no_order(create):
    for kind in ("v2 zstd", "v3 zstd", "sharded zstd"):
        for dtype in ("uint8", "int8", "bool"):
            assert why_not(create(numbers((6, 4), dtype), (3, 2), kind)) == ""


# Indices of shards --------------------------------------------------------------------------------------------------

INDICES = [
    (location, endian, checked) for location in ("start", "end") for endian in ("little", "big") for checked in (0, 1)
]


@pytest.mark.parametrize(("location", "endian", "checked"), INDICES)
def test_the_index_of_a_shard_is_read_as_it_is_written(location, endian, checked):
    array = sharded(index=[BytesCodec(endian=endian), Crc32cCodec()][: 1 + checked], location=location)
    with zarr.config.set({"array.write_empty_chunks": False}):
        array[...] = np.pad(numbers((3, 4)) + 1, ((0, 3), (0, 0)))  # two chunks of four are there
    (stored,) = (value.to_bytes() for key, value in array.store._store_dict.items() if key.startswith("c"))
    layout = shard_layout(array)
    assert (layout.counts, layout.at_end, layout.has_checksum) == ((2, 2), location == "end", bool(checked))
    assert layout.index_bytes == 4 * 16 + 4 * checked
    assert len(stored) == 2 * 24 + layout.index_bytes
    part = stored[-layout.index_bytes :] if location == "end" else stored[: layout.index_bytes]
    index = layout.checked(memoryview(part))
    assert index.dtype == np.uint64
    assert (index[1] == NO_CHUNK).all()
    first = 0 if location == "end" else layout.index_bytes
    assert sorted(index[0].tolist()) == [[first, 24], [first + 24, 24]]
    for i, (start, length) in enumerate(index[0].tolist()):
        values = np.frombuffer(stored[start : start + length], "float32").reshape(3, 2)
        np.testing.assert_array_equal(values, numbers((3, 4))[:, 2 * i : 2 * i + 2] + 1)
    for size in range(len(part)):
        assert layout.checked(memoryview(part[:size])) is None
    for place in range(len(part)) if checked else ():
        flipped = bytearray(part)
        flipped[place] ^= 4
        assert layout.checked(memoryview(flipped)) is None
    buffer = zarr.core.buffer.default_buffer_prototype().buffer
    assert layout.end(buffer.from_bytes(part)) == first + 48
    nothing = np.full(8, NO_CHUNK).tobytes() + bytes(4 * checked)
    assert layout.end(buffer.from_bytes(nothing)) == 0
