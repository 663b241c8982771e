"""Where predictions are written: nothing is overwritten, everything goes on after a kill, whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import icechunk
import numpy as np
import pytest
import xarray as xr
import zarr

import dtrain
from dtrain.data.write import local
from dtrain.errors import DiskFull, OutputExists, RunConflict, RunLocked, UsageError
from dtrain.events import PredictionStarted, SamplesPredicted
from dtrain.lock import locked
from dtrain.predict import write
from tests import foreign
from tests.predict import models


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture
def run(blobs: Path, run_of: Callable[..., dtrain.Run]) -> dtrain.Run:
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"])
    return run_of(models.linear, samples, loss="cross_entropy")


@pytest.fixture
def calm(run: dtrain.Run, tmp_path: Path) -> dict[str, bytes]:
    run.predict_to(tmp_path / "calm.zarr")
    return contents(tmp_path / "calm.zarr")


def test_chunks_are_those_of_the_inputs_with_a_checksum_each(
    run: dtrain.Run, calm: dict[str, bytes], tmp_path: Path
) -> None:
    group = zarr.open_group(tmp_path / "calm.zarr", mode="r")
    assert group.metadata.zarr_format == 3
    for name in ("y", "y_probability"):
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert array.chunks == (40,)
        assert [type(codec).__name__ for codec in array.metadata.codecs] == ["BytesCodec", "ZstdCodec", "Crc32cCodec"]
        assert array.metadata.dimension_names == ("n",)
        assert sum(name_of.startswith(f"{name}/c/") for name_of in calm) == 16
    attributes = dict(group.attrs)
    assert attributes["dtrain_params_sha256"] == run.rows[-1]["params_sha256"]
    assert attributes["dtrain_round"] == 1
    assert not any(name.startswith(local.ASIDE) for name in calm)


def test_what_is_there_is_not_touched(run: dtrain.Run, calm: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(OutputExists, match="is there already, and nothing is overwritten"):
        run.predict_to(tmp_path / "calm.zarr")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputExists):
        run.predict_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    for resume in (False, True):
        with pytest.raises(OutputExists):
            run.predict_to(tmp_path / "folder", resume=resume)
    foreign.write(xr.Dataset({"mine": ("n", [1, 2])}), tmp_path / "other.zarr")
    before = contents(tmp_path / "other.zarr")
    with pytest.raises(OutputExists, match="holds something else than predictions of dtrain"):
        run.predict_to(tmp_path / "other.zarr", resume=True)
    assert contents(tmp_path / "other.zarr") == before
    assert contents(tmp_path / "calm.zarr") == calm
    (tmp_path / "empty").mkdir()
    run.predict_to(tmp_path / "empty")
    assert contents(tmp_path / "empty") == calm


def test_a_complete_one_has_nothing_left_to_do(run: dtrain.Run, calm: dict[str, bytes], tmp_path: Path) -> None:
    done = run.predict_to(tmp_path / "calm.zarr", resume=True)
    assert (done.new, done.samples, done.written) == (0, 611, 0)
    assert contents(tmp_path / "calm.zarr") == calm


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"round": "1", "values": "classes"}, "values was auto, is classes"),
        ({"data": "part"}, "data was .*; data_contents was .*; data_fingerprint was"),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    run: dtrain.Run, calm: dict[str, bytes], blobs: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    options = dict(change)
    if options.pop("data", None):
        part = xr.open_zarr(blobs, consolidated=False).isel(n=slice(0, 80)).load().drop_encoding()
        options["samples"] = foreign.write(part, tmp_path / "part.zarr")
    with pytest.raises(RunConflict, match=f"was begun with other settings: {said}"):
        run.predict_to(tmp_path / "calm.zarr", resume=True, **options)
    assert contents(tmp_path / "calm.zarr") == calm


@pytest.mark.sampled(2)
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "empty"])
def test_chunks_that_are_not_whole_are_written_anew(
    run: dtrain.Run, calm: dict[str, bytes], tmp_path: Path, damage: str
) -> None:
    chunk = tmp_path / "calm.zarr/y/c/3"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    new = {"gone": None, "cut": data[:-3], "flipped": data, "empty": b""}[damage]
    chunk.unlink() if new is None else chunk.write_bytes(bytes(new))
    done = run.predict_to(tmp_path / "calm.zarr", resume=True)
    assert done.new == 40
    assert contents(tmp_path / "calm.zarr") == calm


class Killed(BaseException):
    """Stands for a process that is gone."""


class Steps:
    """Counts writes and renames, and does something else in place of one and of all after it."""

    def __init__(
        self, patch: pytest.MonkeyPatch, at: int | None = None, fails: Callable[..., None] | None = None
    ) -> None:
        self.count = 0
        for where, name in ((local, "write_synced"), (os, "rename")):
            patch.setattr(where, name, self.counted(getattr(where, name), at, fails))

    def counted(self, real: Any, at: int | None, fails: Callable[..., None] | None) -> Any:
        def call(*arguments: Any) -> None:
            self.count += 1
            if at is not None and fails is not None and self.count > at:
                fails(*arguments)
            real(*arguments)

        return call


def killed(target: Path, data: bytes | Path) -> None:
    if isinstance(data, bytes):
        target.write_bytes(data[: len(data) // 2])
    raise Killed


def test_killed_at_any_step_it_goes_on_to_the_same_bytes(
    run: dtrain.Run, calm: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        counted = Steps(patched)
        run.predict_to(tmp_path / "counted.zarr")
    steps = counted.count
    assert contents(tmp_path / "counted.zarr") == calm
    assert steps == 2 * len(calm) + 1  # the token is not renamed
    for place in sorted({0, 1, 2, 3, steps // 2, steps // 2 + 1, steps - 1}):
        out = tmp_path / f"killed-{place}.zarr"
        with monkeypatch.context() as patched:
            Steps(patched, place, killed)
            patched.setattr(Path, "unlink", lambda path, missing_ok=False: None)  # nothing is tidied up
            with pytest.raises(Killed):
                run.predict_to(out)
        there = contents(out) if out.exists() else {}
        assert {name: data for name, data in there.items() if not name.startswith(local.ASIDE)}.items() <= calm.items()
        run.predict_to(out, resume=True)
        assert contents(out) == calm, place


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_says_what_to_do(
    run: dtrain.Run, calm: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    out = tmp_path / "full.zarr"
    with monkeypatch.context() as patched:
        Steps(patched, 20, fails)
        with pytest.raises(DiskFull, match=f"could not be written to {out}: {os.strerror(code)}") as caught:
            run.predict_to(out)
    assert "with --continue: what is written stays" in caught.value.hint
    run.predict_to(out, resume=True)
    assert contents(out) == calm


def test_a_disk_that_cannot_hold_it_is_refused_first(
    run: dtrain.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local.LocalSink, "free_bytes", lambda sink: 500)
    with pytest.raises(DiskFull, match="predictions take 4.9 kB before they are compressed, .* 500 B are free"):
        run.predict_to(tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()


def test_two_processes_do_not_write_to_one(run: dtrain.Run, calm: dict[str, bytes], tmp_path: Path) -> None:
    aside = tmp_path / "calm.zarr" / local.ASIDE
    aside.mkdir()
    with locked(aside), pytest.raises(RunLocked, match="calm.zarr is being written to by process"):
        run.predict_to(tmp_path / "calm.zarr", resume=True)


@pytest.mark.parametrize("out", ["a.zip", "a.parq", "http://127.0.0.1/a.zarr"])
def test_what_cannot_be_written_to_is_refused(run: dtrain.Run, out: str) -> None:
    with pytest.raises(UsageError, match=f"--out {out}"):
        run.predict_to(out)


def test_progress_is_told_and_ends_with_all(run: dtrain.Run, tmp_path: Path) -> None:
    told: list[Any] = []
    run.predict_to(tmp_path / "out.zarr", report=told.append)
    assert isinstance(told[0], PredictionStarted)
    assert (told[0].samples, told[0].done) == (611, 0)
    advances = [event for event in told if isinstance(event, SamplesPredicted)]
    assert [event.done for event in advances] == sorted(event.done for event in advances)
    assert (advances[-1].done, advances[-1].samples) == (611, 611)


# Other sinks ------------------------------------------------------------------------------------------------


def test_objects_behind_a_url(run: dtrain.Run, calm: dict[str, bytes]) -> None:
    fs = fsspec.filesystem("memory")
    url = "memory://predicted/out.zarr"
    run.predict_to(url)
    found = {name.removeprefix("/predicted/out.zarr/"): fs.cat_file(name) for name in fs.find("/predicted/out.zarr")}
    assert found == calm
    with pytest.raises(OutputExists):
        run.predict_to(url)
    fs.rm_file("/predicted/out.zarr/y/c/2")
    assert run.predict_to(url, resume=True).new == 40
    assert fs.cat_file("/predicted/out.zarr/y/c/2") == calm["y/c/2"]
    fs.rm("/predicted", recursive=True)


def test_a_repository_gets_one_transaction(run: dtrain.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.icechunk"

    def broken(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(write._Totals, "add", broken)
        with pytest.raises(KeyboardInterrupt):
            run.predict_to(path)
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    assert [one.message for one in repository.ancestry(branch="main")] == ["Repository initialized"]
    run.predict_to(path, resume=True)
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    assert repository.list_branches() == {"main"}
    found = xr.open_zarr(repository.readonly_session("main").store, consolidated=False).load()
    wanted = run.predict().load()
    np.testing.assert_array_equal(found.y.values, wanted.y.values)
    np.testing.assert_array_equal(found.y_probability.values, wanted.y_probability.values)
    assert not list(path.glob(".dtrain*"))
    with pytest.raises(OutputExists):
        run.predict_to(path)
    assert run.predict_to(path, resume=True).new == 0
    assert len(list(repository.ancestry(branch="main"))) == 3
