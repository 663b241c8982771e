"""A new kind of store touches one room: this file adds packed stores, and nothing below dtrain/ is edited for it.

A kind of store is a value, `StoreKind`, and one call of `register_kind`. Another process reads the same samples as
far as it has imported the module that registers the kind, as the last tests show.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from zarr.core.sync import sync
from zarr.storage import ZipStore

import dtrain
from dtrain.data.plan.units import Box
from dtrain.data.read.kind import StoreKind
from dtrain.data.read.open import KINDS, register_kind
from dtrain.data.read.presence import absent_rows, check_presence, content_digest
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import StoreFacts
from dtrain.errors import ChunkMissing, ChunkUndecodable, DataNotFound, InvalidConfig, NotZarr, UnknownVariable

# The new kind -----------------------------------------------------------------------------------------------


def open_packed(path, storage_options):
    """Open an archive for reading."""
    try:
        return sync(ZipStore.open(path, mode="r"))
    except (OSError, zipfile.BadZipFile) as error:
        raise InvalidConfig(f"{path}: cannot be opened: {error}", "Look at data.path.") from None


PACKED = StoreKind(
    matches=lambda path: path.endswith(".pack"),
    open=open_packed,
    facts=StoreFacts(is_local=False),
)


@pytest.fixture(autouse=True)
def _registered():
    register_kind(PACKED)
    yield
    KINDS.remove(PACKED)


# Stores -----------------------------------------------------------------------------------------------------

ROWS = 48
KINDS_OF_ARRAYS = {
    "v2": (2, {"chunks": (8, 3)}),
    "v3": (3, {"chunks": (8, 3)}),
    "sharded": (3, {"chunks": (2, 3), "shards": (8, 3)}),
}
EVERY = pytest.mark.parametrize("kind", KINDS_OF_ARRAYS)


@pytest.fixture
def pair(write_store, tmp_path):
    """A function that writes x(n, k) and y(n) into a directory and an archive of it; (directory, archive)."""

    def write(kind, without=()):
        zarr_format, options = KINDS_OF_ARRAYS[kind]
        x = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("float32")
        arrays = {
            "x": {"dims": ("n", "k"), "values": x, **options},
            "y": {"dims": ("n",), "values": np.arange(ROWS), "chunks": (8,)},
        }
        folder = write_store(tmp_path / "a.zarr", arrays, zarr_format=zarr_format)
        return folder, archive(folder, tmp_path / "a.zarr.pack", without)

    return write


def archive(folder: Path, path: Path, without=(), damaged=()):
    """Pack a store into an archive, some files of it not, and of some the first half."""
    with zipfile.ZipFile(path, "w") as packed:
        for file in sorted(folder.rglob("*")):
            key = file.relative_to(folder).as_posix()
            if file.is_file() and key not in without:
                data = file.read_bytes()
                packed.writestr(key, data[: len(data) // 2] if key in damaged else data)
    return path


def chunk(kind, number):
    return f"x/{number}.0" if kind == "v2" else f"x/c/{number}/0"


def open_xy(path, **data):
    return dtrain.open_samples(path, inputs=["x"], targets=["y"], **{"split": {"val": 0.0, "test": 0.0}, **data})


# Reading ----------------------------------------------------------------------------------------------------


@EVERY
def test_an_archive_is_described_as_the_directory_is(pair, kind):
    folder, packed = pair(kind)
    there, here = open_xy(folder), open_xy(packed)
    assert here.fingerprint == there.fingerprint
    assert (here.path, here.store) == (str(packed), PACKED.facts)
    check_presence(here)
    assert content_digest(here) == {}
    assert {reader for reader, _ in UnitReader(here).readers.values()} == {"zarr"}


@EVERY
def test_units_of_an_archive_have_the_bits_of_the_directory(pair, kind):
    folder, packed = pair(kind)
    there, here = UnitReader(open_xy(folder)), UnitReader(open_xy(packed))
    for box in (Box(0, ROWS), Box(9, 13), Box(40, 48), Box(3, 30, (("k", 1, 5),))):
        for name, (first, rows) in there.read(box).items():
            start, values = here.read(box)[name]
            assert (start, values.tobytes(), values.shape) == (first, rows.tobytes(), rows.shape)


@EVERY
def test_batches_of_an_archive_have_the_bits_of_the_directory(pair, kind):
    folder, packed = pair(kind)
    options = {"batch_size": 7, "epochs": 2, "seed": 3}
    streams = [list(dtrain.batches(open_xy(path, normalize=["x"]), **options)) for path in (folder, packed)]
    assert len(streams[0]) == 14
    for a, b in zip(*streams, strict=True):
        assert a.inputs[0].numpy().tobytes() == b.inputs[0].numpy().tobytes()
        assert a.targets.tolist() == b.targets.tolist()


# Faults -----------------------------------------------------------------------------------------------------


@EVERY
def test_a_chunk_that_an_archive_does_not_hold_is_named(pair, kind):
    key = chunk(kind, 2)
    _, packed = pair(kind, without=[key])
    samples = open_xy(packed)
    said = f"{packed}: chunk {key} of x is missing"
    with pytest.raises(ChunkMissing, match=said):
        check_presence(samples)
    with pytest.raises(ChunkMissing, match=said):
        UnitReader(samples).read(Box(16, 20))
    with pytest.raises(ChunkMissing, match=said):
        list(dtrain.batches(samples))
    assert absent_rows(open_xy(packed, missing="skip")) == ((16, 24),)
    filled = UnitReader(open_xy(packed, missing="fill")).read(Box(16, 24))["x"][1]
    assert not filled[:, :3].any()
    assert filled[:, 3:].all()


@EVERY
def test_a_chunk_that_is_truncated_in_an_archive_is_named(pair, tmp_path, kind):
    folder, _ = pair(kind)
    key = chunk(kind, 2)
    packed = archive(folder, tmp_path / "damaged.pack", damaged=[key])
    with pytest.raises(ChunkUndecodable, match=f"chunk {key} of x cannot be decoded"):
        UnitReader(open_xy(packed)).read(Box(16, 24))


def test_what_is_no_archive_of_a_group_is_refused(pair, tmp_path):
    folder, packed = pair("v3")
    with pytest.raises(DataNotFound, match=r"b\.pack: no such file or directory"):
        open_xy(tmp_path / "b.pack")
    (tmp_path / "text.pack").write_text("no archive")
    with pytest.raises(InvalidConfig, match=r"text\.pack: cannot be opened"):
        open_xy(tmp_path / "text.pack")
    with pytest.raises(NotZarr, match=r"empty\.pack is not a Zarr group"):
        open_xy(archive(tmp_path / "nothing", tmp_path / "empty.pack"))
    with pytest.raises(NotZarr, match=r"array\.pack is a single Zarr array"):
        open_xy(archive(folder / "x", tmp_path / "array.pack"))
    with pytest.raises(UnknownVariable, match='variable "z" not found') as caught:
        dtrain.open_samples(packed, inputs=["z"], targets=["y"])
    assert caught.value.hint == "It has x, y."


# Other processes --------------------------------------------------------------------------------------------

READ = (
    "import pickle, sys\n"
    "{register}"
    "from dtrain.data.plan.units import Box\n"
    "from dtrain.data.read.units import UnitReader\n"
    "samples = pickle.load(sys.stdin.buffer)\n"
    "rows = UnitReader(samples).read(Box(3, 9))['x'][1]\n"
    "sys.stdout.write(rows.tobytes().hex())\n"
)
REGISTER = (
    "from tests.rooms.test_store_kind import PACKED\n"
    "from dtrain.data.read.open import register_kind\n"
    "register_kind(PACKED)\n"
)


def read_elsewhere(samples, register):
    code = READ.format(register=register)
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(samples), capture_output=True, check=False, cwd=root
    )


def test_a_process_that_registers_the_kind_reads_the_samples(pair):
    folder, packed = pair("v3")
    done = read_elsewhere(open_xy(packed), REGISTER)
    assert done.stderr.decode() == ""
    assert done.stdout.decode() == UnitReader(open_xy(folder)).read(Box(3, 9))["x"][1].tobytes().hex()


def test_a_process_that_does_not_know_the_kind_says_that_there_is_no_group(pair):
    _, packed = pair("v3")
    done = read_elsewhere(open_xy(packed), "")
    assert done.returncode == 1
    assert "DataNotFound" in done.stderr.decode()
