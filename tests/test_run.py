"""A run, opened: its files, its model, its evaluations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import dtrain
from dtrain.algorithm.params import flatten, layout_of, params_sha256
from dtrain.data.samples import Samples
from dtrain.directory import find_run, next_run_directory, run_directory
from dtrain.errors import InvalidConfig, RoundNotFound, RunDamaged, RunNotFound, TooFewSamples, UsageError
from dtrain.job import job_from_python
from dtrain.run import load_run
from tests.runtime import models


@pytest.fixture(scope="module")
def trained(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> dtrain.Run:
    return dtrain.train(
        models.small,
        samples,
        config=dtrain.TrainConfig(
            train={"loss": "cross_entropy", "metrics": ["accuracy"], "rounds": 4, "batch_size": 16},
            average={"replicas": 2},
            run={"commit_every": 1},
        ),
        cluster="serial",
        run="blobs",
        run_dir=tmp_path_factory.mktemp("project") / "runs",
        progress=False,
    )


@pytest.fixture
def run(trained: dtrain.Run, tmp_path: Path) -> dtrain.Run:
    """The same run, by its files alone, in a copy that may be damaged."""
    shutil.copytree(trained.directory, tmp_path / "project/runs/blobs")
    return load_run(tmp_path / "project/runs/blobs", model=models.small)


def test_the_model_has_the_parameters_of_the_last_round(run: dtrain.Run) -> None:
    model = run.model
    assert not model.training
    assert params_sha256(flatten(model, layout_of(model))) == run.rows[-1]["params_sha256"]
    third = run.model_of("3")
    assert params_sha256(flatten(third, layout_of(third))) == run.rows[2]["params_sha256"]
    with pytest.raises(RoundNotFound, match='keeps no round "9"'):
        run.model_of("9")


def test_the_history_is_a_dataset_over_rounds(run: dtrain.Run) -> None:
    assert run.history.sizes == {"round": 4, "replica": 2}
    assert run.history.val_loss.values.tolist() == [row["val_loss"] for row in run.rows]
    best = min(run.rows, key=lambda row: row["val_loss"])
    kept = sorted(int(path.name[-6:]) for path in (run.directory / "rounds").iterdir())
    assert run.best_round == best["round"]
    assert best["round"] in kept
    assert "4 of 4 rounds" in repr(run)
    assert f"{run.rows[-1]['val_loss']:.4g}</td>" in run._repr_html_()


def test_the_validation_split_gives_the_figures_of_the_history(run: dtrain.Run, samples: Samples) -> None:
    values = run.evaluate(split="val", round="last")
    assert values["loss"] == run.rows[-1]["val_loss"]
    assert values["accuracy"] == run.rows[-1]["val_accuracy"]
    whole, number, count = run.evaluation(samples, split="all", round="last", cluster="serial")
    assert (number, count) == (4, 611)
    assert whole.keys() == {"loss", "accuracy"}


def test_an_empty_split_is_refused(run: dtrain.Run, blobs: Path) -> None:
    without = dtrain.open_samples(blobs, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})
    with pytest.raises(TooFewSamples, match='The split "test" holds no samples'):
        run.evaluate(without, split="test")


def test_settings_change_where_and_how_fast_but_not_which_run(run: dtrain.Run) -> None:
    changed = load_run(run.directory, settings=("data.memory=1GB", "cluster.workers=3"))
    assert (changed.config.data.memory, changed.config.cluster.workers) == ("1GB", 3)
    with pytest.raises(InvalidConfig, match="--set train.rounds"):
        load_run(run.directory, settings=("train.rounds=9",))


def test_damaged_files_are_named(run: dtrain.Run) -> None:
    with pytest.raises(RunNotFound, match="is not a run"):
        load_run(run.directory / "rounds")
    (run.directory / "env.json").write_text("{")
    with pytest.raises(RunDamaged, match="env.json cannot be read"):
        load_run(run.directory)
    (run.directory / "config.toml").write_text("rounds = = 3")
    with pytest.raises(RunDamaged, match="config.toml cannot be read"):
        load_run(run.directory)


def test_opening_a_run_imports_nothing_of_it(run: dtrain.Run) -> None:
    environment = json.loads((run.directory / "env.json").read_text())
    (run.directory / "env.json").write_text(json.dumps({**environment, "base": "/nowhere"}))
    opened = load_run(run.directory)
    assert opened.base == Path("/nowhere")
    assert torch.tensor([row["val_loss"] for row in opened.rows]).isfinite().all()


def test_names_of_runs(run: dtrain.Run, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.directory.parents[1])
    found = find_run("")
    assert found.name == "blobs"
    assert find_run("blobs") == found
    with pytest.raises(RunNotFound, match='did you mean "blobs"'):
        find_run("blob")
    job = job_from_python(models.small, samples, {"train": {"loss": "mse"}}, None)
    assert run_directory(job, "a.b-1").name == "a.b-1"
    with pytest.raises(UsageError, match="a run's name has letters"):
        run_directory(job, "../up")
    root = run.directory.parents[1]
    (root / "runs/run-1").mkdir()
    assert next_run_directory(job, root).name == "run-2"
