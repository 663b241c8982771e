"""A call that is refused leaves nothing behind: neither a run's directory nor runs/."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import dtrain
from dtrain.directory import made_directory
from dtrain.errors import (
    ChunkMissing,
    DtrainError,
    FirstLossNotFinite,
    InvalidConfig,
    NotAModule,
    OutOfMemory,
    RunDamaged,
    ShapesDiffer,
    TooFewSamples,
    UserCodeFailed,
)
from dtrain_cli import main
from tests.runtime import models


def build() -> nn.Module:
    return nn.Linear(6, 3)


def narrow() -> nn.Module:
    return nn.Linear(5, 3)


def nothing() -> None:
    return None


def failing() -> nn.Module:
    raise ValueError("no model today")


LOSS = {"loss": "cross_entropy", "rounds": 1}
REFUSED: list[tuple[Any, dict[str, Any], type[DtrainError]]] = [
    (narrow, {}, ShapesDiffer),
    (nothing, {}, NotAModule),
    (failing, {}, UserCodeFailed),
    (models.nan_once, {"model_args": {"threshold": -99.0}}, FirstLossNotFinite),
    (build, {"average": {"replicas": 10_000}}, TooFewSamples),
    (build, {"stop": {"metric": "val_f1", "target": 1.0}}, InvalidConfig),
    (build, {"train": {**LOSS, "metrics": ["mse"]}}, ShapesDiffer),
    (build, {"train": {**LOSS, "loss": lambda outputs, targets: outputs}}, ShapesDiffer),
    (build, {"train": {**LOSS, "optimizer": "adam", "optimizer_args": {"larning_rate": 1}}}, UserCodeFailed),
    (build, {"train": {**LOSS, "init": "nothing.safetensors"}}, DtrainError),
]


@pytest.mark.sampled(13)
@pytest.mark.parametrize("run", [None, "named"])
@pytest.mark.parametrize(("model", "tables", "error"), REFUSED)
def test_python(
    samples: dtrain.Samples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    tables: dict[str, Any],
    error: type[DtrainError],
    run: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        dtrain.train(model, samples, run=run, cluster="serial", progress=False, **{"train": LOSS, **tables})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    with pytest.raises(error):
        dtrain.train(model, samples, run=run, cluster="serial", progress=False, **{"train": LOSS, **tables})
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_data_that_are_missing_or_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blobs: Path, chunk_files: Callable[..., list[str]]
) -> None:
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(blobs, "blobs.zarr")
    small = dtrain.open_samples("blobs.zarr", inputs=["x"], targets=["y"], memory="10kB")
    with pytest.raises(OutOfMemory):
        dtrain.train(build, small, train=LOSS, cluster="serial", progress=False)
    Path("blobs.zarr", chunk_files(Path("blobs.zarr"), "x")[0]).unlink()
    holes = dtrain.open_samples("blobs.zarr", inputs=["x"], targets=["y"], missing="error")
    with pytest.raises(ChunkMissing):
        dtrain.train(build, holes, train=LOSS, cluster="serial", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["blobs.zarr"]


def test_a_run_that_is_there_is_kept(samples: dtrain.Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = dtrain.train(build, samples, train=LOSS, run="r", cluster="serial", progress=False)
    before = {path: path.stat().st_mtime_ns for path in run.directory.rglob("*")}
    (run.directory / "plan.json").write_text("{")
    with pytest.raises(RunDamaged):
        dtrain.train(build, samples, train=LOSS, run="r", cluster="serial", progress=False)
    assert set(run.directory.rglob("*")) == before.keys()


def test_an_interrupt_before_the_first_round_leaves_nothing(
    samples: dtrain.Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> nn.Module:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        dtrain.train(interrupted, samples, train=LOSS, cluster="serial", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_what_somebody_else_has_put_there_stays(tmp_path: Path) -> None:
    run = tmp_path / "a/runs/r"

    def begin() -> None:
        with made_directory(run):
            (run.parent / "notes.txt").write_text("mine")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        begin()
    assert [path.name for path in run.parent.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("tables", "code"),
    [
        ({"model": "model:narrow"}, 3),
        ({"cluster": {"scheduler": "nothing.json"}}, 6),
        ({"average": {"replicas": 10_000}}, 3),
        ({"data": {"path": "elsewhere.zarr"}}, 5),
        ({"run": {"dir": "deep/er/runs"}, "model": "model:narrow"}, 3),
    ],
)
def test_the_command_line(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: dict[str, Any], code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(
        "from torch import nn\ndef build(): return nn.Linear(6, 3)\ndef narrow(): return nn.Linear(5, 3)\n"
    )
    config: dict[str, Any] = {
        "model": "model:build",
        "data": {"path": str(blobs), "inputs": ["x"], "targets": ["y"]},
        "train": LOSS,
        "cluster": {"scheduler": "serial"},
    }
    merged = {
        key: {**config.get(key, {}), **value} if isinstance(value, dict) else value for key, value in tables.items()
    }
    (tmp_path / "dtrain.json").write_text(json.dumps({**config, **merged}))
    assert main.run(["train", "dtrain.json"]) == code
    assert {path.name for path in tmp_path.iterdir()} <= {"model.py", "dtrain.json", "__pycache__"}
