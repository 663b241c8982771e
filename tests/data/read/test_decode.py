"""Chunks as numcodecs decodes them: what is in them, and what is wrong with them."""

from __future__ import annotations

import zlib
from pathlib import Path

import google_crc32c
import numcodecs
import numpy as np
import pytest

from dtrain.data.plan.grid import chunks_of
from dtrain.data.plan.readers import NUMCODECS_CODECS
from dtrain.data.read.codecs import STAGES, Undecodable
from dtrain.data.read.decode import Decoder
from dtrain.data.read.frames import zstd_bounds, zstd_size
from dtrain.data.read.shards import entries_of, shard_layout
from tests.data.read.helpers import KINDS, numbers, numcodecs_obstacle_of

# Codecs -----------------------------------------------------------------------------------------------------------

CHECKED = [kind for kind in KINDS if any(name in kind for name in ("crc32c", "gzip", "zlib", "checksum"))]
RAGGED = ((7, 5), (3, 2))
SELECTIONS = [
    ((0, 7, 1), (0, 5, 1)),
    ((1, 6, 1), (1, 4, 1)),
    ((0, 7, 3), (1, 5, 2)),
    ((3, 6, 1), (2, 4, 1)),
    ((6, 7, 1), (4, 5, 1)),
]


def test_plans_and_decoders_agree_which_codecs_are_decoded():
    assert {*STAGES, "bytes"} == NUMCODECS_CODECS


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
    origin = tuple(p * count for p, count in zip(place, counts, strict=True))
    ((start, length),) = entries_of(index, [chunk], origin)
    return shard[start : start + length]


def scratch(size):
    return memoryview(bytearray(size))


def no_scratch(size):
    raise AssertionError("a whole chunk is decoded where it belongs")


def decoded(array, select, out, scratch=scratch):
    decoder = Decoder(array)
    for chunk in chunks_of(array.chunks, select):
        decoder.decode(stored(array, chunk), chunk, out, scratch)
    return out


@pytest.mark.sampled(51)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "uint8", "bool"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_decoded_to_the_same_bits_as_by_zarr(create, kind, dtype):
    array = create(numbers(RAGGED[0], dtype), RAGGED[1], kind)
    assert numcodecs_obstacle_of(array) == ""
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
    decoded(array, ((0, 8, 1), (0, 5, 1)), out[1:9], no_scratch)
    np.testing.assert_array_equal(out[1:9], numbers((8, 5)))
    assert (out[[0, 9]] == 99).all()
    for other in (out[1:9].astype("float64"), np.empty((8, 10), "float32")[:, ::2], np.empty((5, 8), "float32").T):
        with pytest.raises(AssertionError, match="where it belongs"):
            decoded(array, ((0, 8, 1), (0, 5, 1)), other, no_scratch)
    with pytest.raises(AssertionError, match="where it belongs"):
        decoded(array, ((0, 7, 1), (0, 5, 1)), np.empty((7, 5), "float32"), no_scratch)


def test_the_scratch_buffer_has_the_size_of_a_chunk_and_may_hold_anything(create):
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
    Decoder(array).decode(memoryview(frame), chunk, out, scratch)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_frame_is_undecodable(create, kind):
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
    said = rf"it holds {24 + 8 * change} bytes; a chunk has 24"
    if change > 0 and any(name in kind for name in ("gzip", "zlib")):  # deflate states no size
        said = "it holds more than 24 bytes; a chunk has no more|" + said
    for chunk in (WHOLE, PART):
        with pytest.raises(Undecodable, match=said):
            decode_into(array, path_of(other, (0, 0)).read_bytes(), chunk)


def test_large_sizes_are_said_with_commas(create):
    array = create(numbers((500, 2)), (500, 2), "v3 none")
    (whole,) = chunks_of((500, 2), ((0, 500, 1), (0, 2, 1)))
    with pytest.raises(Undecodable, match="it holds 3,999 bytes; a chunk has 4,000"):
        Decoder(array).decode(memoryview(bytes(3999)), whole, np.empty((500, 2), "float32"), scratch)


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
        with pytest.raises(Undecodable, match="^the file is truncated$"):
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
        def new(wbits):
            raise ValueError(message)

        return new

    monkeypatch.setattr(zlib, "decompressobj", fail("of two\n   lines"))
    with pytest.raises(Undecodable, match="^of two lines$") as caught:
        decode_into(array, b"\x1f\x8bgarbage")
    assert isinstance(caught.value.__cause__, ValueError)
    monkeypatch.setattr(zlib, "decompressobj", fail(""))
    with pytest.raises(Undecodable, match="^ValueError$"):
        decode_into(array, b"\x1f\x8bgarbage")


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
    told = zstd_size(memoryview(frame))
    assert told == (size if form["width"] else None)
    assert zstd_bounds(memoryview(frame)) == (size, bool(form["width"]))
    array = create(np.frombuffer(values, np.uint8), (size,))
    (whole,) = chunks_of((size,), ((0, size, 1),))
    out = np.zeros(size, np.uint8)
    Decoder(array).decode(memoryview(frame), whole, out, scratch)
    assert out.tobytes() == values


def test_only_the_header_of_a_frame_tells_a_size():
    frame = zstd_frame(bytes(100), width=4)
    assert zstd_size(memoryview(frame)) == 100
    assert zstd_size(memoryview(frame[:10])) == 100
    for other in (b"", frame[:4], frame[:9], b"\x28\xb5\x2f\xfc" + frame[4:], b"\x50\x2a\x4d\x18" + frame[4:]):
        assert zstd_size(memoryview(other)) is None


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
        with pytest.raises(Undecodable, match="it does not hold a chunk of 24 bytes: "):
            decode_into(array, repeated(b"\x07", count))


def test_a_frame_of_zstd_that_holds_less_or_more_than_it_tells_is_undecodable(create):
    array = create(numbers((3, 2)), (3, 2))
    values = numbers((3, 2)).tobytes()
    for blocks in ((values[:-1],), (values, b"x"), (values, values)):
        with pytest.raises(Undecodable):
            decode_into(array, zstd_frame(*blocks, size=24, width=4))
    with pytest.raises(Undecodable, match="it holds 48 bytes"):
        decode_into(array, zstd_frame(values, values, width=4))
