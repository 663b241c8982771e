"""The central directory of zip archives is read as Python's zipfile does, and members by several threads at once."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.read import archive as archive_module
from dtrain.data.read.archive import BLOCK, Archive, entries_of
from dtrain.data.read.codecs import Undecodable
from dtrain.data.read.local import new_buffer
from dtrain.errors import DataChanged, NotZarr

METHODS = pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
LONG = random.Random(0).randbytes(3 * BLOCK) + bytes(2 * BLOCK)  # half of it can be deflated


def pack(path, files, method=zipfile.ZIP_STORED, **options):
    with zipfile.ZipFile(path, "w", method, **options) as packed:
        for name, content in files:
            packed.writestr(name, content)
    return str(path)


def read(archive, name, start=0, stop=None, **options):
    member = archive.find(name)
    stop = member.size if stop is None else stop
    return bytes(archive.read(name, member, new_buffer, start, stop, **options))


names = st.text(st.characters(codec="utf-8", exclude_characters="\0\\"), min_size=1, max_size=9)
contents = st.lists(st.tuples(names.filter(lambda name: not name.endswith("/")), st.binary(max_size=99)), max_size=9)


@METHODS
@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(
    files=contents,
    comment=st.binary(max_size=30).filter(lambda comment: b"PK" not in comment),
    before=st.binary(max_size=50),
)
def test_members_are_those_of_zipfile(tmp_path_factory, method, files, comment, before):
    path = tmp_path_factory.mktemp("zip") / "a.zip"
    with open(path, "wb") as file:
        file.write(before)  # as a program that unpacks itself
        with zipfile.ZipFile(file, "w", method) as packed:
            for name, content in files:
                packed.writestr(name, content)
            packed.comment = comment
    archive = Archive(str(path))
    with zipfile.ZipFile(path) as packed:
        assert [entry.name for entry in entries_of(str(path))] == packed.namelist()
        for name in packed.namelist():
            assert read(archive, name) == packed.read(name)
    assert archive.find("no such name") is None


def test_folders_are_no_members_and_the_last_of_a_name_counts(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("x/", b"")
        packed.writestr("x/zarr.json", b"old")
        with pytest.warns(UserWarning, match="Duplicate name"):
            packed.writestr("x/zarr.json", b"new")
    archive = Archive(str(tmp_path / "a.zip"))
    assert archive.find("x/") is None
    assert read(archive, "x/zarr.json") == b"new"
    assert archive.documents == ("x/zarr.json",)


def test_numbers_of_zip64(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    path = pack(tmp_path / "a.zip", [(f"x/{number}", bytes([number]) * 60) for number in range(5)])
    assert b"PK\6\6" in (tmp_path / "a.zip").read_bytes()
    archive = Archive(path)
    assert [read(archive, f"x/{number}") for number in range(5)] == [bytes([number]) * 60 for number in range(5)]


@METHODS
@pytest.mark.parametrize("verify", [True, False])
def test_parts(tmp_path, method, verify):
    archive = Archive(pack(tmp_path / "a.zip", [("x", LONG)], method))
    for start, stop in ((0, 10), (BLOCK - 5, BLOCK + 5), (5, 5), (len(LONG) - 3, len(LONG)), (1, 4 * BLOCK)):
        assert read(archive, "x", start, stop, verify=verify) == LONG[start:stop]
    assert read(archive, "x") == LONG


@METHODS
def test_threads_read_at_once(tmp_path, method):
    files = [(f"x/{number}", LONG[number:]) for number in range(8)]
    archive = Archive(pack(tmp_path / "a.zip", files, method))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda file: read(archive, file[0]), files * 4)) == [content for _, content in files] * 4


# Faults -----------------------------------------------------------------------------------------------------


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def content_at(path, name):
    """Where the bytes of a member begin."""
    with zipfile.ZipFile(path) as packed:
        info = packed.getinfo(name)
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        return info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))


@METHODS
def test_a_flipped_bit_is_seen_in_the_whole_and_before_the_first_part(tmp_path, method):
    path = pack(tmp_path / "a.zip", [("x", LONG), ("y", LONG)], method)
    flip(path, content_at(path, "x") + 2 * BLOCK)
    with pytest.raises(Undecodable, match="CRC-32 in the archive is wrong|cannot be inflated"):
        read(Archive(path), "x")
    archive = Archive(path)
    for _ in range(2):
        with pytest.raises(Undecodable, match="CRC-32 in the archive is wrong|cannot be inflated"):
            read(archive, "x", 0, 10)
    assert read(archive, "y", 0, 10) == LONG[:10]


def test_a_part_is_verified_once(tmp_path, monkeypatch):
    sums, crc32 = [], archive_module.zlib.crc32
    path = pack(tmp_path / "a.zip", [("x", LONG)])
    monkeypatch.setattr(archive_module.zlib, "crc32", lambda data, *seed: sums.append(len(data)) or crc32(data, *seed))
    archive = Archive(path)
    read(archive, "x", 7, 9)
    assert sum(sums) == len(LONG)
    read(archive, "x", 8, 80)
    assert sum(sums) == len(LONG)


def test_a_damaged_header_of_a_member(tmp_path):
    path = pack(tmp_path / "a.zip", [("x", b"1"), ("y", b"2")])
    with zipfile.ZipFile(path) as packed:
        flip(path, packed.getinfo("x").header_offset + 30)  # its name
    with pytest.raises(Undecodable, match="its header in the archive is damaged"):
        read(Archive(path), "x")
    assert read(Archive(path), "y") == b"2"


def test_a_member_that_is_longer_than_the_archive_says(tmp_path):
    path = pack(tmp_path / "a.zip", [("x", bytes(1000))], zipfile.ZIP_DEFLATED)
    archive = Archive(path)
    member = archive.find("x")
    with pytest.raises(Undecodable, match="longer than the archive says"):
        archive.read("x", member._replace(size=10), new_buffer, 0, 10)
    with pytest.raises(Undecodable, match="truncated"):
        archive.read("x", member._replace(packed=3), new_buffer, 0, 1000)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\5\6", b"PK\3\4" + bytes(200)])
def test_what_is_no_archive(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(NotZarr, match=r"a\.zip is no zip archive, or its end is missing") as caught:
        Archive(str(tmp_path / "a.zip"))
    assert caught.value.hint


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_an_archive_whose_end_is_missing(tmp_path, share):
    path = pack(tmp_path / "a.zip", [(f"x/{number}", b"1" * 50) for number in range(20)])
    os.truncate(path, int(os.path.getsize(path) * share))
    with pytest.raises(NotZarr, match="or its end is missing"):
        Archive(path)


def test_methods_that_are_not_read(tmp_path):
    path = pack(tmp_path / "a.zip", [("x", b"1")], zipfile.ZIP_LZMA)
    with pytest.raises(NotZarr, match="x is compressed by method 14; stored and deflated members are read") as caught:
        Archive(path)
    assert "zip -0" in caught.value.hint
    path = pack(tmp_path / "b.zip", [("x", b"1")])
    with zipfile.ZipFile(path) as packed:
        flip(path, packed.start_dir + 8)
    with pytest.raises(NotZarr, match="x is encrypted"):
        Archive(path)


def test_an_archive_that_is_written_while_it_is_read(tmp_path):
    path = pack(tmp_path / "a.zip", [("x", b"1")])
    archive = Archive(path)
    assert read(archive, "x") == b"1"
    pack(tmp_path / "a.zip", [("x", b"22")])
    with pytest.raises(DataChanged, match="has been modified since it was opened"):
        read(archive, "x")


def test_little_memory_is_kept(tmp_path):
    path = pack(tmp_path / "a.zip", [(f"x/c/{number}/0/0", b"") for number in range(5000)])
    tracemalloc.start()
    try:
        archive = Archive(path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 40 * 5000 + 50_000
    assert 0.8 * peak < archive.nbytes == 95 * 5000
    assert peak < archive.nbytes + 50_000
