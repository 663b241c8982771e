"""What is no Zarr group says where the way to one is, and that way works."""

from __future__ import annotations

import re
import zipfile

import numpy as np
import pytest
import zarr

from dtrain.data.plan.units import Box
from dtrain.data.read.presence import check_presence
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import DataNotFound, InvalidConfig, NotZarr

FORMATS = pytest.mark.parametrize("zarr_format", [2, 3])
VALUES = np.arange(20, dtype="float32").reshape(10, 2)


@pytest.fixture
def store(write_store, tmp_path):
    """A function that writes x(n, k) and y(n), and returns the path."""

    def write(name="a.zarr", zarr_format=3):
        arrays = {
            "x": {"dims": ("n", "k"), "values": VALUES, "chunks": (4, 2)},
            "y": {"dims": ("n",), "values": np.arange(10), "chunks": (3,)},
        }
        return write_store(tmp_path / name, arrays, zarr_format=zarr_format)

    return write


def open_xy(path, **data):
    return open_samples(path, inputs=["x"], targets=["y"], **data)


def quoted(hint):
    """The path or URL that a hint tells to give."""
    return re.search(r'"(.+)"', hint)[1]


@FORMATS
@pytest.mark.parametrize("folder", ["", "a.zarr/", "deep/a.zarr/"])
def test_a_zip_archive_of_another_name_is_read_as_the_message_says(store, tmp_path, zarr_format, folder, monkeypatch):
    path = store(zarr_format=zarr_format)
    (tmp_path / "with space").mkdir()
    with zipfile.ZipFile(tmp_path / "with space/packed.archive", "w") as archive:
        for file in sorted(path.rglob("*")):
            if file.is_file():
                archive.write(file, folder + file.relative_to(path).as_posix())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotZarr, match="packed.archive is a zip archive") as caught:
        open_xy("with space/packed.archive")
    assert caught.value.code == 5
    monkeypatch.chdir("/")
    samples = open_xy(quoted(caught.value.hint))
    check_presence(samples)
    np.testing.assert_array_equal(UnitReader(samples).read(Box(0, 10))["x"][1], VALUES)


def test_a_zip_archive_whose_missing_files_are_key_errors(store, tmp_path, monkeypatch):
    from fsspec.implementations.zip import ZipFileSystem

    opened = ZipFileSystem._open

    def older(self, path, *args, **options):
        try:
            return opened(self, path, *args, **options)
        except FileNotFoundError:
            raise KeyError(path) from None

    monkeypatch.setattr(ZipFileSystem, "_open", older)
    path = store()
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        for file in sorted(path.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(path).as_posix())
    samples = open_xy(f"zip://::{tmp_path}/packed.zip")
    check_presence(samples)
    np.testing.assert_array_equal(UnitReader(samples).read(Box(0, 10))["x"][1], VALUES)


def test_a_zip_archive_without_a_group(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(NotZarr, match="a zip archive without a Zarr group"):
        open_xy(tmp_path / "a.zip")


def test_the_url_of_a_zip_archive_is_said(tmp_path):
    with pytest.raises(InvalidConfig) as caught:
        open_xy(f"zip://{tmp_path}/a.zip")
    assert caught.value.hint == f'The URL of a zip archive is "zip://::{tmp_path}/a.zip".'


@pytest.mark.parametrize("name", ["a.nc", "a.h5", "a.tif", "a.tar.gz"])
def test_another_file_is_to_be_converted(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89HDF\r\n")
    with pytest.raises(NotZarr, match=f"{name} is a file; a Zarr store is a directory, or a zip archive") as caught:
        open_xy(tmp_path / name)
    assert "to_zarr" in caught.value.hint


@FORMATS
def test_a_folder_of_stores_names_them(store, tmp_path, zarr_format):
    paths = [store(name, zarr_format) for name in ("train.zarr", "test.zarr")]
    (tmp_path / "more").mkdir()
    with pytest.raises(NotZarr, match=r"is not a Zarr group; it holds test\.zarr, train\.zarr\.") as caught:
        open_xy(tmp_path)
    assert quoted(caught.value.hint) == str(paths[1])
    assert open_xy(quoted(caught.value.hint)).num_samples == 10


def test_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(NotZarr, match="it has none of zarr.json, .zgroup, .zmetadata") as caught:
        open_xy(tmp_path)
    assert "to_zarr" in caught.value.hint
    with pytest.raises(DataNotFound) as gone:
        open_xy(tmp_path / "nowhere")
    assert gone.value.hint == f"Looked for {tmp_path}/nowhere"


@FORMATS
def test_an_array_says_how_it_is_named_in_its_group(store, zarr_format):
    path = store(zarr_format=zarr_format)
    with pytest.raises(NotZarr, match="x is a single Zarr array") as caught:
        open_xy(path / "x")
    assert "give the path of the group, and its name in data.inputs" in caught.value.hint
    zarr.create_array(path.parent / "alone.zarr", data=VALUES, zarr_format=zarr_format)
    with pytest.raises(NotZarr, match=r"alone\.zarr is a single Zarr array"):
        open_xy(path.parent / "alone.zarr")


def test_a_path_with_a_slip_of_the_pen_names_the_right_one(store, tmp_path):
    store("train.zarr")
    with pytest.raises(DataNotFound, match=r'trian\.zarr: no such file or directory; did you mean "train\.zarr"\?'):
        open_xy(tmp_path / "trian.zarr")
    with pytest.raises(DataNotFound, match=r"no such file or directory\.\n"):
        open_xy(tmp_path / "nowhere" / "train.zarr")
