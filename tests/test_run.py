"""A run, opened: its files, its model, its evaluations."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dtrain
from dtrain.algorithm.params import flatten, layout_of, params_sha256
from dtrain.calls import job_from_python
from dtrain.config.split import SplitConfig
from dtrain.data.plan.splits import SplitName
from dtrain.data.samples import Samples
from dtrain.directory import find_run, next_run_directory, run_directory
from dtrain.errors import InvalidConfig, RoundNotFound, RunDamaged, RunNotFound, TooFewSamples, UsageError
from dtrain.runs import load_run
from tests.runtime import models
from tests.training import evaluated, rewrite, rewrite_env


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


def test_the_table_of_a_run_shows_evaluated_rounds_and_the_last_one(run: dtrain.Run) -> None:
    lines = [{key: value for key, value in row.items() if row["round"] == 2 or key[:3] != "val"} for row in run.rows]
    (run.directory / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    html = run._repr_html_()
    assert [f">{number} of 4</th>" in html for number in (1, 2, 3, 4)] == [False, True, False, True]
    assert f"{lines[1]['val_loss']:.4g}</td>" in html
    assert "None" not in html
    assert list(run.history.data_vars)[:3] == ["train_loss", "val_loss", "val_accuracy"]


def test_the_validation_split_gives_the_figures_of_the_history(run: dtrain.Run, samples: Samples) -> None:
    values = run.evaluate(split="val", round="last")
    assert values["loss"] == run.rows[-1]["val_loss"]
    assert values["accuracy"] == run.rows[-1]["val_accuracy"]
    whole, number, count = evaluated(run, samples, "all")
    assert (number, count) == (4, 611)
    assert whole.keys() == {"loss", "accuracy"}


def test_an_empty_split_is_refused(samples: Samples, tmp_path: Path) -> None:
    without = replace(samples, config=samples.config.model_copy(update={"split": SplitConfig(val=0.1, test=0.0)}))
    run = dtrain.train(
        models.small,
        without,
        train={"loss": "cross_entropy", "rounds": 1},
        cluster="serial",
        run_dir=tmp_path,
        progress=False,
    )
    for given in (None, without, samples):
        with pytest.raises(TooFewSamples, match='The split "test" holds no samples'):
            run.evaluate(given, split="test")


def test_samples_without_a_split_have_none(run: dtrain.Run, blobs: Path) -> None:
    without = dtrain.open_samples(blobs, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})
    for split in ("val", "test"):
        with pytest.raises(
            TooFewSamples, match=f'"{split}" holds no samples: they were opened with data.split.{split}'
        ):
            run.evaluate(without, split=split)  # type: ignore[arg-type]
    assert evaluated(run, without, "all")[2] == 611


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("tset", 'split = "tset": allowed are val, test, all; did you mean "test"'),
        ("train", "the training split is not evaluated"),
        (None, "split = null: allowed are"),
        (1, "split = 1: allowed are"),
    ],
)
def test_a_split_that_is_not_there_is_refused(run: dtrain.Run, samples: Samples, split: Any, said: str) -> None:
    for given in (None, samples):
        with pytest.raises(InvalidConfig, match=said):
            run.evaluate(given, split=split)


def test_samples_are_what_open_samples_returns(run: dtrain.Run, blobs: Path) -> None:
    with pytest.raises(InvalidConfig, match="samples is a PosixPath, not what open_samples returns"):
        run.evaluate(blobs)  # type: ignore[arg-type]


def test_model_and_evaluation_take_the_last_round_and_say_that_another_is_the_best(
    run: dtrain.Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.setLevel(logging.NOTSET)  # a cluster of another test may have raised it
    rows = [{**row, "val_loss": abs(row["round"] - 2.0)} for row in run.rows]
    rewrite(run.directory, rows)
    assert run.best_round == 2
    last = run.evaluate(split="val", round=4)
    assert caplog.messages == []
    assert run.evaluate(split="val") == last != run.evaluate(split="val", round="best")
    assert params_sha256(flatten(run.model, layout_of(run.model))) == rows[-1]["params_sha256"]
    assert run.evaluate(split="val") == last
    assert caplog.messages == ["blobs: this is round 4, the last one; round 2 has the best val_loss."]


# Samples that are given ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> Path:
    """Targets that can be learnt by heart only: a model that has seen a row knows it."""
    return write_noise(tmp_path_factory.mktemp("noise") / "noise.zarr", write_store)


def write_noise(path: Path, write_store: Callable[..., Path], rows: int = 200, chunk: int = 8, seed: int = 4) -> Path:
    rng = np.random.default_rng(seed)
    arrays = {
        "x": {"dims": ("n", "f"), "values": rng.normal(size=(rows, 64)).astype("float32"), "chunks": (chunk, 64)},
        "y": {"dims": ("n",), "values": rng.normal(size=rows).astype("float32"), "chunks": (chunk,)},
    }
    return write_store(path, arrays)


def regression() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1), nn.Flatten(0))


def learn(path: Path, tmp_path: Path, **data: Any) -> dtrain.Run:
    """Train until the training rows are known by heart."""
    return dtrain.train(
        regression,
        dtrain.open_samples(path, inputs=["x"], targets=["y"], **{"split": {"val": 0.1, "test": 0.2}, **data}),
        train={"loss": "mse", "rounds": 30, "batch_size": 10, "optimizer": "adam", "optimizer_args": {"lr": 0.003}},
        average={"replicas": 2},
        cluster="serial",
        run_dir=tmp_path / "runs",
        progress=False,
    )


@pytest.fixture(scope="module")
def learnt(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> dtrain.Run:
    run = learn(noise, tmp_path_factory.mktemp("learnt"))
    assert run.rows[-1]["train_loss"] < 0.2 < 0.7 < run.rows[-1]["val_loss"]
    return run


def open_noise(path: Any, **data: Any) -> Samples:
    return dtrain.open_samples(path, inputs=["x"], targets=["y"], **data)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("split", ["val", "test", "all"])
@pytest.mark.parametrize("spelling", ["plain", "relative", "link", "link above", "file", "slash", "dots", "moved"])
def test_the_runs_own_store_has_the_runs_own_splits(
    learnt: dtrain.Run, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: SplitName, spelling: str
) -> None:
    monkeypatch.chdir(noise.parent)
    (tmp_path / "link").symlink_to(noise)
    (tmp_path / "above").symlink_to(noise.parent)
    shutil.copytree(noise, tmp_path / "moved.zarr")
    paths = {
        "plain": noise,
        "relative": "noise.zarr",
        "link": tmp_path / "link",
        "link above": tmp_path / "above/noise.zarr",
        "file": f"file://{noise}",
        "slash": f"{noise}/",
        "dots": f"../{noise.parent.name}/./noise.zarr",
        "moved": tmp_path / "moved.zarr",  # another path, and the rows that were trained on
    }
    own = evaluated(learnt, None, split)
    given = open_noise(paths[spelling])
    assert evaluated(learnt, given, split) == own
    assert (own[0]["loss"] > 0.7) == (split != "all")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_copy_in_other_chunks_keeps_the_splits(
    learnt: dtrain.Run, noise: Path, tmp_path: Path, write_store: Callable[..., Path], split: SplitName
) -> None:
    copy = write_noise(tmp_path / "copy.zarr", write_store, chunk=50)
    assert open_noise(copy).fingerprint != open_noise(noise).fingerprint
    own = evaluated(learnt, None, split)
    found = evaluated(learnt, open_noise(copy), split)
    assert found[2] == own[2]
    assert found[0]["loss"] == pytest.approx(own[0]["loss"], rel=1e-6)


def test_another_store_is_cut_with_the_shares_of_the_run(
    learnt: dtrain.Run, tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    other = write_noise(tmp_path / "other.zarr", write_store, rows=300, seed=9)
    for data in ({}, {"split": {"val": 0.5}}, {"split": {"val": 0.3, "test": 0.01}}, {"shuffle": False}):
        for split, count in (("val", 30), ("test", 60), ("all", 300)):
            given = open_noise(other, **data)
            found = evaluated(learnt, given, split)  # type: ignore[arg-type]
            assert found[2] == pytest.approx(count, rel=0.1)


def test_the_samples_own_shares_and_order_change_nothing(learnt: dtrain.Run, noise: Path) -> None:
    own = learnt.evaluate(split="test")
    for data in ({"split": {"val": 0.3, "test": 0.3}}, {"split_order": "sequential"}, {"partition": "contiguous"}):
        assert learnt.evaluate(open_noise(noise, **data), split="test") == own


def test_other_rows_of_the_runs_own_store_are_not_cut_anew(learnt: dtrain.Run, noise: Path) -> None:
    few = open_noise(noise, isel={"n": {"start": 20, "stop": 120}})
    for split in ("val", "test"):
        with pytest.raises(InvalidConfig, match="rows 0 to 199; the samples hold rows 20 to 119.*trained on"):
            learnt.evaluate(few, split=split)  # type: ignore[arg-type]
    assert evaluated(learnt, few, "all")[2] == 100


def test_keys_that_samples_leave_out_are_the_runs(
    noise: Path, tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    run = learn(
        noise,
        tmp_path,
        isel={"n": {"start": 0, "stop": 150}},
        normalize=["x"],
        transform="tests.test_run:halved",
        target_offsets=2,
        stride=3,
    )
    other = write_noise(tmp_path / "other.zarr", write_store, rows=300, seed=9)
    for split in ("val", "test", "all"):
        own = evaluated(run, None, split)  # type: ignore[arg-type]
        assert evaluated(run, open_noise(noise), split) == own  # type: ignore[arg-type]
    whole = evaluated(run, open_noise(other), "all")
    assert whole[2] == len(range(0, 298, 3))  # the run's offsets and stride, and not its rows
    part = evaluated(run, open_noise(other, isel={"n": {"stop": 30}}), "all")
    assert part[2] == len(range(0, 28, 3))
    for data, said in (
        ({"normalize": ["y"]}, r'samples have data\.normalize = \["y"\], and the run was trained with \["x"\]'),
        ({"normalize": []}, r"samples have data\.normalize = \[\]"),
        ({"transform": "tests.test_run:regression"}, r"samples have data\.transform"),
    ):
        with pytest.raises(InvalidConfig, match=said):
            run.evaluate(open_noise(other, **data), split="all")


def halved(batch: Any, generator: Any) -> Any:
    return replace(batch, inputs=tuple(x / 2 for x in batch.inputs))


def test_the_same_rows_seen_through_another_window_keep_their_splits(learnt: dtrain.Run, noise: Path) -> None:
    later = open_noise(noise, target_offsets=1)
    own = evaluated(learnt, None, "test")
    found = evaluated(learnt, later, "test")
    assert 0 < found[2] < own[2]  # samples that reach beyond the split are dropped
    assert found[0]["loss"] > 0.5


def test_a_store_of_the_validation_is_all_validation(
    noise: Path, tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    held_out = write_noise(tmp_path / "val.zarr", write_store, rows=90, seed=6)
    run = learn(noise, tmp_path, val_path=str(held_out), split={"val": 0.0, "test": 0.1})
    own = evaluated(run, None, "val")
    for split in ("val", "all"):
        assert evaluated(run, open_noise(held_out), split) == own  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match=r"validation store of the run \(data\.val_path\): it has no test split"):
        run.evaluate(open_noise(held_out), split="test")
    assert run.evaluate(open_noise(noise), split="test") == run.evaluate(split="test")


def test_each_store_of_a_run_with_several_keeps_its_splits(
    noise: Path, tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    second = write_noise(tmp_path / "second.zarr", write_store, rows=160, seed=7)
    run = dtrain.train(
        regression,
        config=dtrain.TrainConfig(
            data={"path": [{"path": str(noise)}, {"path": str(second)}], "inputs": ["x"], "targets": ["y"]},
            train={"loss": "mse", "rounds": 2, "batch_size": 10},
        ),
        cluster="serial",
        run_dir=tmp_path / "runs",
        progress=False,
    )
    for split in ("val", "test", "all"):
        loss, _, count = evaluated(run, None, split)  # type: ignore[arg-type]
        parts = [
            evaluated(run, open_noise(path), split)  # type: ignore[arg-type]
            for path in (noise, second)
        ]
        assert sum(number for _, _, number in parts) == count
        total = sum(means["loss"] * number for means, _, number in parts)
        assert total / count == pytest.approx(loss["loss"], rel=1e-6)
        assert parts[1][2] == sum(
            piece.num_samples for _, piece in run.plan.pieces(split) if piece.plan.num_samples == 160
        )  # type: ignore[arg-type]


def test_the_runs_own_data_need_not_be_there_to_evaluate_others(
    noise: Path, tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    shutil.copytree(noise, tmp_path / "gone.zarr")
    run = learn(tmp_path / "gone.zarr", tmp_path)
    own = run.evaluate(split="test")
    (tmp_path / "gone.zarr").rename(tmp_path / "moved.zarr")
    assert load_run(run.directory).evaluate(open_noise(tmp_path / "moved.zarr"), split="test") == own
    assert load_run(run.directory).model is not None


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
    rewrite_env(run.directory, base="/nowhere")
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
    for name in ("../up", "r\n", "", "a b", ".hidden", "x" * 65):
        with pytest.raises(UsageError, match="a run's name has letters"):
            run_directory(job, name)
    root = run.directory.parents[1]
    (root / "runs/run-1").mkdir()
    assert next_run_directory(job, root).name == "run-2"
