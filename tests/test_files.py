"""Whole files or none, at every failing call; synced in order; the umask honoured."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from dtrain.errors import DiskFull
from dtrain.files import append_line, remove_directory, write_directory, write_text
from tests.disks import CALLS, Disk, Killed

OLD, NEW = {"a": b"old", "b": b"old, and longer"}, {"b": b"new", "c": b""}


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write(parent, files):
    write_directory(parent / "whole", files.items(), "the whole")


# Files --------------------------------------------------------------------------------------------------------------


def test_write_text_replaces_the_whole_file_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    write_text(path, "old, and longer\n")
    write_text(path, "é\n")
    assert path.read_text(encoding="utf-8") == "é\n"
    for fail_at in range(4):  # open, write, fsync, close of the temporary file
        with monkeypatch.context() as patch:
            Disk(patch, fail_at, errno.ENOSPC)
            with pytest.raises(DiskFull, match=r"config\.toml could not be written"):
                write_text(path, "new\n")
        assert path.read_text(encoding="utf-8") == "é\n"
        assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


def test_append_line_appends(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    append_line(path, '{"round": 1}')
    append_line(path, '{"round": 2}')
    assert path.read_text() == '{"round": 1}\n{"round": 2}\n'
    for fail_at in range(4):
        with monkeypatch.context() as patch:
            Disk(patch, fail_at, errno.ENOSPC)
            with pytest.raises(DiskFull, match=r"history\.jsonl could not be written"):
                append_line(path, "{}")
    assert path.read_text().startswith('{"round": 1}\n{"round": 2}\n')


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    append_line(tmp_path / "history.jsonl", "a line of some length")
    assert (tmp_path / "history.jsonl").read_text() == "a line of some length\n"


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "set run.dir to another place"),
        (errno.EACCES, "set run.dir to a place that you may write to"),
        (errno.EIO, "Look at the disk"),
    ],
)
def test_each_fault_of_a_disk_has_its_hint(tmp_path, monkeypatch, error, hint):
    Disk(monkeypatch, 0, error)
    with pytest.raises(DiskFull) as caught:
        append_line(tmp_path / "history.jsonl", "{}")
    assert os.strerror(error) in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.code == 8


# Directories --------------------------------------------------------------------------------------------------------


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    write(tmp_path, OLD)
    assert contents(tmp_path / "whole") == OLD
    write(tmp_path, NEW)
    assert contents(tmp_path / "whole") == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def calls_of(monkeypatch, parent):
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        write(parent, NEW)
    return disk.calls


@pytest.mark.parametrize("before", [None, OLD])
@pytest.mark.parametrize("error", [errno.ENOSPC, Killed])
def test_a_directory_is_whole_wherever_writing_fails(tmp_path, monkeypatch, before, error):
    def parent(name):
        made = tmp_path / name
        made.mkdir()
        if before:
            write(made, before)
        return made

    calls = calls_of(monkeypatch, parent("counted"))
    assert set(calls) == set(CALLS)
    ends = []
    for fail_at, name in enumerate(calls):
        place = parent(str(fail_at))
        with monkeypatch.context() as patch:
            Disk(patch, fail_at, error)
            try:
                write(place, NEW)
            except (DiskFull, Killed):
                failed = True
            else:
                failed = False
        assert failed or (name, fail_at) == ("mkdir", 0)  # of the parent, which was there
        whole = contents(place / "whole") if (place / "whole").exists() else None
        visible = [path.name for path in place.iterdir() if not path.name.startswith(".")]
        aside = before is not None and error is Killed and whole is None  # killed between its two renames
        assert whole in (before, NEW) or aside
        assert visible == (["whole"] if whole is not None else [])
        assert error is Killed or [path.name for path in place.iterdir()] == visible
        ends.append(whole)
    assert before in ends
    assert NEW in ends


def test_every_file_is_synced_before_the_rename_and_the_rename_after(tmp_path, monkeypatch):
    log, names = [], {}
    opened, synced, renamed = os.open, os.fsync, os.rename

    def spy_open(path, *arguments, **options):
        descriptor = opened(path, *arguments, **options)
        names[descriptor] = Path(path).name
        return descriptor

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced(descriptor), log.append(names[descriptor])))
    monkeypatch.setattr(os, "rename", lambda a, b: (renamed(a, b), log.append("rename")))
    write(tmp_path, OLD)
    assert log[:2] == ["a", "b"]
    assert log[2].startswith(".whole-")
    assert log[3:] == ["rename", tmp_path.name]


def test_the_files_may_come_one_at_a_time(tmp_path):
    seen = []

    def files():
        yield "a", b"1"
        seen.extend(path.name for path in tmp_path.glob(".whole-*/*"))  # the first is written before the second is made
        yield "b", b"2"

    write_directory(tmp_path / "whole", files(), "the whole")
    assert seen == ["a"]
    assert contents(tmp_path / "whole") == {"a": b"1", "b": b"2"}


def test_a_directory_whose_parents_parent_is_gone_is_exit_code_8(tmp_path):
    with pytest.raises(DiskFull, match="the whole could not be written"):
        write(tmp_path / "gone" / "too", OLD)


def test_a_half_removed_directory_is_hidden(tmp_path, monkeypatch):
    write(tmp_path, OLD)

    def refuse(path, ignore_errors):
        assert ignore_errors

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        remove_directory(tmp_path / "whole")
    (hidden,) = tmp_path.iterdir()
    assert hidden.name.startswith(".whole-")
    remove_directory(hidden)
    assert list(tmp_path.iterdir()) == []


# Permissions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "file_mode", "directory_mode"), [(0o027, 0o640, 0o750), (0o002, 0o664, 0o775)])
def test_the_umask_is_honoured(tmp_path, mask, file_mode, directory_mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "config.toml", "a = 1\n")
        append_line(tmp_path / "history.jsonl", "{}")
        write(tmp_path, OLD)
    finally:
        os.umask(before)

    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    files = [tmp_path / "config.toml", tmp_path / "history.jsonl", *(tmp_path / "whole").iterdir()]
    assert {mode(path) for path in files} == {file_mode}
    assert mode(tmp_path / "whole") == directory_mode
