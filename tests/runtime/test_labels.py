"""Labels with a fill value, in whole runs: what becomes of a missing one depends on the loss, and is never a guess."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import Client
from torch import nn

import dtrain
from dtrain.calls import job_from_python
from dtrain.errors import NonFiniteData
from dtrain.job import with_scheduler
from dtrain.planning import plan_job
from dtrain.plantext import plan_rows
from tests.runtime import models
from tests.training import shas, trained

ROWS = 300
X = np.random.default_rng(1).normal(size=(ROWS, 6)).astype("float32")
CLASSES = np.arange(ROWS) % 3
MISSING = np.arange(ROWS) % 10 == 4


def one() -> nn.Module:
    """A number for each sample."""
    return nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))


def own_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss that knows nothing of dtrain; it is sent by value, so that what it has seen is kept in a file."""
    with open(os.environ["SEEN"], "a") as file:
        file.write(f"{targets.dtype} {int((targets == -100).sum())}\n")
    if targets.is_floating_point():
        return F.mse_loss(outputs.mean(1), torch.nan_to_num(targets))
    return F.cross_entropy(outputs, targets)


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[str, int]]]:
    """A function that returns dtype and number of ignored classes of all targets that `own_loss` has seen since."""
    path = tmp_path / "seen"
    monkeypatch.setenv("SEEN", str(path))

    def since() -> list[tuple[str, int]]:
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [(line.split()[0].removeprefix("torch."), int(line.split()[1])) for line in lines]

    return since


@pytest.fixture
def store(tmp_path: Path, write_store: Callable[..., Path]) -> Callable[..., Path]:
    """A function that writes x(n, f) and y(n)."""

    def write(name: str, labels: np.ndarray, **attributes: Any) -> Path:
        arrays = {
            "x": {"dims": ("n", "f"), "values": X, "chunks": (20, 6)},
            "y": {"dims": ("n",), "values": labels, "chunks": (20,), "attributes": attributes},
        }
        return write_store(tmp_path / name, arrays)

    return write


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., dtrain.Run]:
    def run(path: Path, name: str, model: Any = models.small, cluster: Any = "serial", **more: Any) -> dtrain.Run:
        data = more.pop("data", {})
        samples = dtrain.open_samples(path, inputs=["x"], targets=["y"], **data)
        table = {"rounds": 2, "batch_size": 16, "loss": "cross_entropy", **more}
        return trained(model, samples, tmp_path / "runs", table, cluster, run=name)

    return run


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("dtype", "mark"), [("uint8", 255), ("int16", -1), ("int64", -9999)])
def test_missing_labels_are_left_out_like_those_that_are_stored_as_ignored(
    store: Callable[..., Path], start: Callable[..., dtrain.Run], client: Client, dtype: str, mark: int
) -> None:
    marked = store("marked", np.where(MISSING, mark, CLASSES).astype(dtype), _FillValue=mark)
    ignored = store("ignored", np.where(MISSING, -100, CLASSES))
    options = {"metrics": ["accuracy"]}
    run, expected = start(marked, "marked", **options), start(ignored, "ignored", **options)
    assert shas(run) == shas(expected)
    assert [row["val_loss"] for row in run.rows] == [row["val_loss"] for row in expected.rows]
    assert [row["val_accuracy"] for row in run.rows] == [row["val_accuracy"] for row in expected.rows]
    if dtype == "uint8":
        assert shas(run) == shas(start(marked, "cluster", cluster=client, **options))
        other = dtrain.open_samples(marked, inputs=["x"], targets=["y"])
        assert run.evaluate(other, split="all") == expected.evaluate(split="all")
        assert json.loads((run.directory / "plan.json").read_text())["labels"] == "ignored"


def test_missing_labels_of_a_validation_store(store: Callable[..., Path], start: Callable[..., dtrain.Run]) -> None:
    labels = np.where(MISSING, 255, CLASSES).astype("uint8")
    train = store("train", CLASSES.astype("int64"))
    data = {"val_path": str(store("val", labels, missing_value=255)), "split": {"val": 0.0, "test": 0.0}}
    plain = {**data, "val_path": str(store("ignored", np.where(MISSING, -100, CLASSES)))}
    each = {"eval_every": 1}
    run, expected = start(train, "marked", data=data, **each), start(train, "ignored", data=plain, **each)
    assert [row["val_loss"] for row in run.rows] == [row["val_loss"] for row in expected.rows]


def test_masks_of_two_classes_with_a_fill_value(store: Callable[..., Path], start: Callable[..., dtrain.Run]) -> None:
    marked = store("marked", np.where(MISSING, 255, CLASSES == 1).astype("uint8"), _FillValue=255)
    run = start(marked, "r", one, loss="bce", metrics=["accuracy"])
    assert all(np.isfinite(row["train_loss"]) and np.isfinite(row["val_loss"]) for row in run.rows)
    samples = dtrain.open_samples(marked, inputs=["x"], targets=["y"])
    model = run.model
    with torch.no_grad():
        logits = model(torch.from_numpy(X))
    kept = torch.from_numpy(~MISSING)
    expected = F.binary_cross_entropy_with_logits(logits[kept], torch.from_numpy(CLASSES == 1)[kept].float()).item()
    found = run.evaluate(samples, split="all", round="last")
    right = ((logits > 0) == torch.from_numpy(CLASSES == 1))[kept].float().mean().item()
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["accuracy"] == pytest.approx(right)


@pytest.mark.parametrize(("loss", "metrics"), [("mse", []), ("mae", []), ("huber", []), ("bce", ["mse"])])
def test_a_number_that_is_missing_is_never_trained_on(
    store: Callable[..., Path], start: Callable[..., dtrain.Run], loss: str, metrics: list[str]
) -> None:
    marked = store("marked", np.where(MISSING, -99, CLASSES).astype("int16"), _FillValue=-99)
    with pytest.raises(
        NonFiniteData, match=r"y\[\d*4\] in chunk y/c/\d+ is -99, which marks a missing value"
    ) as caught:
        start(marked, "r", one, loss=loss, metrics=metrics)
    assert caught.value.code == 5


def test_numbers_of_which_none_is_missing_are_trained_on_as_before(
    store: Callable[..., Path], start: Callable[..., dtrain.Run]
) -> None:
    marked = store("marked", CLASSES.astype("int16"), _FillValue=-99)
    floats = store("floats", CLASSES.astype("float32"))
    run = start(marked, "marked", one, loss="mse")
    assert shas(run) == shas(start(floats, "floats", one, loss="mse"))
    assert json.loads((run.directory / "plan.json").read_text())["labels"] == "nan"


def test_a_loss_of_the_users_sees_the_ignored_class_only_if_it_is_allowed(
    store: Callable[..., Path], start: Callable[..., dtrain.Run], seen: Callable[[], list[tuple[str, int]]]
) -> None:
    name = "tests.runtime.test_labels:own_loss"
    marked = store("marked", np.where(MISSING, 255, CLASSES).astype("uint8"), _FillValue=255)
    with pytest.raises(NonFiniteData, match="is 255, which marks a missing value") as caught:
        start(marked, "refused", loss=name)
    assert "see class -100 there" in caught.value.hint
    assert seen() == []
    allowed = start(marked, "allowed", loss=name, data={"non_finite": "allow"})
    found = seen()
    assert {dtype for dtype, _ in found} == {"int64"}
    assert sum(count for _, count in found) > 0
    assert json.loads((allowed.directory / "plan.json").read_text())["labels"] == "refused"
    start(store("none", CLASSES.astype("uint8"), _FillValue=255), "none", loss=name)
    assert set(seen()) == {("int64", 0)}


def test_a_missing_label_is_left_out_where_the_loss_of_the_user_would_see_it(
    store: Callable[..., Path], start: Callable[..., dtrain.Run], seen: Callable[[], list[tuple[str, int]]]
) -> None:
    marked = store("marked", np.where(MISSING, -1, CLASSES).astype("int16"), _FillValue=-1)
    run = start(marked, "own", loss="tests.runtime.test_labels:own_loss", data={"non_finite": "skip"})
    assert sum(count for _, count in seen()) == 0
    events = (run.directory / "events.jsonl").read_text().splitlines()
    (left_out,) = (event for event in map(json.loads, events) if event["event"] == "SamplesLeftOut")
    assert (left_out["samples"], left_out["by_variable"]) == (int(MISSING.sum()), {"y": int(MISSING.sum())})
    kept = start(marked, "known", loss="cross_entropy", data={"non_finite": "skip"})
    assert not any("SamplesLeftOut" in line for line in (kept.directory / "events.jsonl").read_text().splitlines())


def test_batches_hold_the_ignored_class(store: Callable[..., Path]) -> None:
    marked = store("marked", np.where(MISSING, 255, CLASSES).astype("uint8"), _FillValue=255)
    samples = dtrain.open_samples(marked, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0}, shuffle=False)
    found = torch.cat([targets.clone() for _, targets in dtrain.batches(samples, batch_size=64)])
    assert found.dtype == torch.int64
    assert found.tolist() == np.where(MISSING, -100, CLASSES).tolist()


@pytest.mark.parametrize(("loss", "said"), [("cross_entropy", "leave it out"), ("mse", ""), ("own", "refused unless")])
@pytest.mark.usefixtures("seen")
def test_the_plan_says_what_becomes_of_missing_labels(store: Callable[..., Path], loss: str, said: str) -> None:
    name = "tests.runtime.test_labels:own_loss" if loss == "own" else loss
    labels = store("marked", CLASSES.astype("uint8"), _FillValue=255)
    samples = dtrain.open_samples(labels, inputs=["x"], targets=["y"])
    config = dtrain.TrainConfig(train={"loss": name, "batch_size": 16}, average={"replicas": 2})
    model = one if loss == "mse" else models.small
    job = job_from_python(model, samples, {}, with_scheduler(config, "serial"))
    text = dict(plan_rows(job, plan_job(job))).get("labels y", "")
    assert (said in text) if said else not text
