"""Stores in zip archives are read like the directories that were packed, and faults name the chunk."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dtrain.data.plan.units import Box
from dtrain.data.read.presence import absent_rows, check_presence, content_digest
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import (
    ChunkMissing,
    ChunkUndecodable,
    DataChanged,
    DataNotFound,
    DtrainError,
    InvalidConfig,
    NotZarr,
    UnknownVariable,
)
from tests.data.helpers import batches, one_pass, only_partition, same_bits
from tests.data.read.test_archive import content_at, flip

ROWS = 48
LAYOUTS = {
    "v2": (2, {"chunks": (8, 3)}),
    "v3": (3, {"chunks": (8, 3)}),
    "plain": (3, {"chunks": (8, 3), "compressors": None}),
    "sharded": (3, {"chunks": (2, 3), "shards": (8, 3)}),
    "sharded plain": (3, {"chunks": (2, 3), "shards": (8, 3), "compressors": None}),
}
EVERY = pytest.mark.parametrize("layout", LAYOUTS)
METHODS = pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
READERS = pytest.mark.parametrize("reader", ["numcodecs", "zarr"])
BOXES = (Box(0, ROWS), Box(9, 13), Box(40, 48), Box(3, 30, (("k", 1, 5),)))


def pack(folder, path, method=zipfile.ZIP_STORED, without=(), halved=(), inside=""):
    """Pack a store into an archive; some files of it not, and of some the first half."""
    with zipfile.ZipFile(path, "w", method) as packed:
        for file in sorted(folder.rglob("*")):
            key = file.relative_to(folder).as_posix()
            if file.is_file() and key not in without:
                data = file.read_bytes()
                packed.writestr(inside + key, data[: len(data) // 2] if key in halved else data)
    return path


@pytest.fixture
def folder(write_store, tmp_path):
    """A function that writes x(n, k) and y(n) into a directory."""

    def write(layout, name="a.zarr"):
        zarr_format, options = LAYOUTS[layout]
        x = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("float32")
        arrays = {
            "x": {"dims": ("n", "k"), "values": x, **options},
            "y": {"dims": ("n",), "values": np.arange(ROWS), "chunks": (8,)},
        }
        return write_store(tmp_path / name, arrays, zarr_format=zarr_format)

    return write


def chunk(layout, number):
    return f"x/{number}.0" if layout == "v2" else f"x/c/{number}/0"


def open_xy(path, **data):
    return open_samples(path, inputs=["x"], targets=["y"], **{"split": {"val": 0.0, "test": 0.0}, **data})


# Reading ----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(8)
@READERS
@METHODS
@EVERY
def test_units_have_the_bits_of_the_directory(folder, tmp_path, layout, method, reader):
    path = folder(layout)
    here = open_xy(pack(path, tmp_path / "a.zarr.zip", method))
    assert here.fingerprint == open_xy(path).fingerprint
    check_presence(here)
    there, read = UnitReader(open_xy(path), "zarr"), UnitReader(here, reader)
    assert {chosen for chosen, _ in read.readers.values()} == {reader}
    for box in BOXES:
        for name, (first, rows) in there.read(box).items():
            start, values = read.read(box)[name]
            assert (start, values.tobytes(), values.shape) == (first, rows.tobytes(), rows.shape)


@EVERY
def test_batches_have_the_bits_of_the_directory(folder, tmp_path, layout):
    path = folder(layout)
    streams = []
    for samples in (open_xy(path), open_xy(pack(path, tmp_path / "a.zip"))):
        _, partition = only_partition(samples)
        streams.append(batches(UnitReader(samples), partition, one_pass(partition)))
    assert len(streams[0]) == 7
    assert same_bits(*streams)


def test_zarrs_is_refused_in_a_sentence(folder, tmp_path):
    with pytest.raises(InvalidConfig, match='"zarrs" does not read x: the store is not a local directory'):
        UnitReader(open_xy(pack(folder("v3"), tmp_path / "a.zip")), "zarrs")


@pytest.mark.parametrize("inside", ["a.zarr/", "deep/a.zarr/"])
def test_a_directory_that_was_packed_with_its_name(folder, tmp_path, inside):
    packed = pack(folder("v3"), tmp_path / "a.zip", inside=inside)
    samples = open_xy(packed)
    check_presence(samples)
    assert samples.path == str(packed)
    np.testing.assert_array_equal(UnitReader(samples).read(Box(0, ROWS))["y"][1], np.arange(ROWS))


def test_paths(folder, tmp_path, monkeypatch):
    (tmp_path / "with space").mkdir()
    pack(folder("v3"), tmp_path / "with space/A.ZIP")
    monkeypatch.chdir(tmp_path)
    for path in ("with space/A.ZIP", f"file://{tmp_path}/with%20space/A.ZIP", tmp_path / "with space" / "A.ZIP"):
        assert open_xy(path).path == f"{tmp_path}/with space/A.ZIP"
    assert open_xy(folder("v3", "b.zip")).store.is_local  # a directory with that name


def test_another_process_reads_the_samples(folder, tmp_path):
    path = folder("sharded")
    samples = open_xy(pack(path, tmp_path / "a.zip"))
    sent = pickle.dumps(samples)
    assert len(sent) < len(pickle.dumps(open_xy(path))) + 500
    code = (
        "import pickle, sys\nfrom dtrain.data.plan.units import Box\nfrom dtrain.data.read.units import UnitReader\n"
        "rows = UnitReader(pickle.load(sys.stdin.buffer)).read(Box(3, 9))['x'][1]\n"
        "sys.stdout.write(rows.tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert done.stdout.decode() == UnitReader(open_xy(path)).read(Box(3, 9))["x"][1].tobytes().hex()


def test_what_is_known_of_an_archive_is_shared_and_let_go(folder, tmp_path):
    from dtrain.data.read import zip as zip_module

    samples = open_xy(pack(folder("v3"), tmp_path / "a.zip"))
    first, second = UnitReader(samples), UnitReader(samples)
    assert first.store._store.archive is second.store._store.archive
    assert samples.store.kept_bytes == first.store._store.archive.nbytes > 0
    del first, second
    assert not any(path == samples.path for path, _ in zip_module._OPEN)


# Faults -----------------------------------------------------------------------------------------------------


@EVERY
def test_a_missing_chunk(folder, tmp_path, layout):
    key = chunk(layout, 2)
    packed = pack(folder(layout), tmp_path / "a.zip", without=[key])
    samples = open_xy(packed)
    said = f"{packed}: chunk {key} of x is missing"
    with pytest.raises(ChunkMissing, match=said):
        check_presence(samples)
    for reader in ("numcodecs", "zarr"):
        with pytest.raises(ChunkMissing, match=said):
            UnitReader(samples, reader).read(Box(16, 20))
    assert absent_rows(open_xy(packed, missing="skip")) == ((16, 24),)
    filled = UnitReader(open_xy(packed, missing="fill")).read(Box(16, 24))["x"][1]
    assert not filled[:, :3].any()
    assert filled[:, 3:].all()


@READERS
@METHODS
@EVERY
def test_a_truncated_chunk(folder, tmp_path, layout, method, reader):
    key = chunk(layout, 2)
    samples = open_xy(pack(folder(layout), tmp_path / "a.zip", method, halved=[key]))
    for box in (Box(16, 24), Box(18, 20)):
        with pytest.raises(ChunkUndecodable, match=f"chunk {key} of x cannot be decoded"):
            UnitReader(samples, reader).read(box)


@READERS
@METHODS
@EVERY
def test_a_flipped_bit_is_seen_without_a_checksum_of_zarr(folder, tmp_path, layout, method, reader):
    packed = pack(folder(layout), tmp_path / "a.zip", method)
    key = chunk(layout, 2)
    flip(packed, content_at(packed, key) + 20)
    samples = open_xy(packed)
    for box in (Box(16, 24), Box(22, 24)):  # also where another part of the shard is read
        with pytest.raises(ChunkUndecodable, match=f"chunk {key} of x cannot be decoded: (its|it) ") as caught:
            UnitReader(samples, reader).read(box)
        assert method == zipfile.ZIP_DEFLATED or "CRC-32 in the archive is wrong" in str(caught.value)
    assert UnitReader(samples, reader).read(Box(0, 16))


def test_damaged_metadata_are_named(folder, tmp_path):
    packed = pack(folder("v3"), tmp_path / "a.zip")
    flip(packed, content_at(packed, "x/zarr.json") + 20)
    with pytest.raises(NotZarr, match="x/zarr.json cannot be read: its CRC-32 in the archive is wrong"):
        open_xy(packed)


def test_a_damaged_document_at_the_root_is_named(folder, tmp_path):
    packed = pack(folder("v3"), tmp_path / "a.zip")
    flip(packed, content_at(packed, "zarr.json") + 20)
    with pytest.raises(
        NotZarr, match=r"a\.zip: zarr.json cannot be read: its CRC-32 in the archive is wrong"
    ) as caught:
        open_xy(packed)
    assert caught.value.code == 5


def test_a_member_that_begins_before_the_archive(folder, tmp_path):
    packed = pack(folder("v3"), tmp_path / "a.zip")
    data = bytearray(packed.read_bytes())
    end = data.rfind(b"PK\5\6")
    data[end + 16 : end + 20] = (2**31).to_bytes(4, "little")  # where the central directory should lie
    packed.write_bytes(data)
    with pytest.raises(NotZarr, match="is no zip archive, or its end is missing"):
        open_xy(packed)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_a_damaged_archive_ends_with_an_error_or_a_result(folder, tmp_path, first):
    path = folder("v3")
    whole = [pack(path, tmp_path / f"{method}.zip", method).read_bytes() for method in (0, zipfile.ZIP_DEFLATED)]
    for seed in range(first, first + 20):
        draw = random.Random(seed)
        data = bytearray(draw.choice(whole))
        end = data.rfind(b"PK\5\6")
        start = int.from_bytes(data[end + 16 : end + 20], "little")
        for _ in range(draw.choice([1, 1, 2, 5])):
            at = draw.choice([draw.randrange(start, end), draw.randrange(end, len(data)), draw.randrange(len(data))])
            width = draw.choice([1, 2, 4, 8])
            data[at : at + width] = draw.choice([b"\xff" * width, bytes(width), draw.randbytes(width)])
        (tmp_path / f"{seed}.zip").write_bytes(data[: draw.choice([len(data)] * 9 + [draw.randrange(len(data))])])
        try:
            samples = open_xy(tmp_path / f"{seed}.zip")
            check_presence(samples)
            UnitReader(samples).read(Box(0, ROWS))
        except DtrainError as error:
            assert error.code == 5, seed  # noqa: PT017


@READERS
def test_an_archive_that_is_replaced_while_it_is_read(folder, tmp_path, reader):
    path = folder("v3")
    samples = open_xy(pack(path, tmp_path / "a.zip"))
    units = UnitReader(samples, reader)
    units.read(Box(0, 8))
    pack(path, tmp_path / "a.zip")
    with pytest.raises(DataChanged, match=r"a\.zip has been modified since it was opened"):
        units.read(Box(8, 16))


@EVERY
def test_a_chunk_of_the_same_size_is_noticed_when_a_run_continues(folder, tmp_path, layout):
    path = folder(layout)
    before = content_digest(open_xy(pack(path, tmp_path / "a.zip")))
    assert before.keys() == {"x", "y"}
    assert content_digest(open_xy(pack(path, tmp_path / "b.zip", zipfile.ZIP_DEFLATED))) == before
    file = path / chunk(layout, 2)
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    after = content_digest(open_xy(pack(path, tmp_path / "a.zip")))
    assert (after["x"] != before["x"], after["y"]) == (True, before["y"])


# What is no store -------------------------------------------------------------------------------------------


def test_what_is_no_archive_of_a_group(folder, tmp_path):
    path = folder("v3")
    packed = pack(path, tmp_path / "a.zip")
    with pytest.raises(DataNotFound, match=r"b\.zip: no such file or directory"):
        open_xy(tmp_path / "b.zip")
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(NotZarr, match=r"text\.zip is no zip archive"):
        open_xy(tmp_path / "text.zip")
    with pytest.raises(NotZarr, match=r"empty\.zip is a zip archive without a Zarr group"):
        open_xy(pack(tmp_path / "nothing", tmp_path / "empty.zip"))
    with pytest.raises(NotZarr, match=r"array\.zip is a single Zarr array"):
        open_xy(pack(path / "x", tmp_path / "array.zip"))
    with pytest.raises(NotZarr, match=r"several Zarr groups: a\.zarr, b\.zarr") as caught:
        open_xy(two_groups(path, tmp_path / "two.zip"))
    assert f'"zip://a.zarr::{tmp_path}/two.zip"' in caught.value.hint
    assert open_xy(f"zip://a.zarr::{tmp_path}/two.zip").num_samples == ROWS
    with pytest.raises(UnknownVariable, match='variable "z" not found') as caught:
        open_samples(packed, inputs=["z"], targets=["y"])
    assert caught.value.hint == "It has x, y."


def two_groups(folder, path):
    pack(folder, path, inside="a.zarr/")
    with zipfile.ZipFile(path, "a") as packed:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                packed.write(file, f"b.zarr/{file.relative_to(folder).as_posix()}")
    return path


@pytest.mark.parametrize("url", ["s3://bucket/a.zarr.zip", "https://example.org/a.zip", "memory://a.ZIP"])
def test_an_archive_on_a_server_is_refused_with_the_cure(url):
    with pytest.raises(InvalidConfig, match="a zip archive is read from a file system, not from a server") as caught:
        open_xy(url)
    assert "Copy it to a disk that all workers see" in caught.value.hint


def test_threads_and_readers_share_an_archive(folder, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    path = folder("sharded")
    reader = UnitReader(open_xy(pack(path, tmp_path / "a.zip")))
    boxes = [Box(start, start + 6) for start in range(0, ROWS - 6)] * 3
    with ThreadPoolExecutor(8) as pool:
        found = [units["y"][1][0] for units in pool.map(reader.read, boxes)]
    assert found == [box.start for box in boxes]


def test_archives_of_other_programs(tmp_path):
    """What `shutil` and zarr itself pack."""
    import shutil

    import zarr
    from zarr.storage import ZipStore

    path = Path(tmp_path, "zarr.zip")
    with ZipStore(path, mode="w") as store:
        group = zarr.create_group(store)
        for name in ("x", "y"):
            group.create_array(name, shape=(8,), chunks=(2,), dtype="int64", dimension_names=("n",))[:] = np.arange(8)
    check_presence(open_xy(path, missing="fill"))
    with zipfile.ZipFile(path) as packed:
        packed.extractall(tmp_path / "unpacked")
    shutil.make_archive(str(tmp_path / "again"), "zip", tmp_path / "unpacked")
    for archive in (path, tmp_path / "again.zip"):
        rows = UnitReader(open_xy(archive, missing="fill")).read(Box(0, 8))
        np.testing.assert_array_equal(rows["x"][1], np.arange(8))
