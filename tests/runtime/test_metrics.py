"""Metrics in whole runs: the same numbers on a cluster, by hand, and for other micro-batches; torchmetrics by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from distributed import Client
from torch import nn
from torchmetrics.classification import BinaryAUROC, BinaryF1Score, MulticlassF1Score

import dtrain
from dtrain.algorithm.metrics.named import metric_named
from dtrain.calls import job_from_python
from dtrain.errors import InvalidConfig, RunConflict, ShapesDiffer
from dtrain.job import with_scheduler
from dtrain.planning import plan_job
from dtrain.plantext import plan_rows
from tests.training import bits, trained

NUMBERS = ["mse", "mae", "rmse", "r2"]
LABELS = ["accuracy", "f1", "iou", "dice", "auroc"]
TABLE = {"rounds": 2, "batch_size": 20, "micro_batch": 7, "eval_every": 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> Path:
    """400 samples; of some classes and masks is not known what they are."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)).astype("float32")
    number = (20 * x @ rng.normal(size=(6, 2)) + 280).astype("float32")
    label = (x @ rng.normal(size=(6, 4))).argmax(1).astype("int16")
    mask = (x @ rng.normal(size=(6, 3)) > 0.5).astype("int8")
    label[::9], mask[::7, 1] = -100, -100
    arrays = {"x": x, "number": number, "label": label, "mask": mask, "area": rng.random(400).astype("float32")}
    return write_store(
        tmp_path_factory.mktemp("metrics") / "s.zarr",
        {
            name: {"dims": ("n", f"{name}_k")[: v.ndim], "values": v, "chunks": (20, *v.shape[1:])}
            for name, v in arrays.items()
        },
    )


def linear(outputs: int = 2) -> nn.Module:
    return nn.Linear(6, outputs)


KINDS: dict[str, dict[str, Any]] = {
    "number": {"loss": "mse", "metrics": NUMBERS},
    "label": {"loss": "cross_entropy", "metrics": LABELS},
    "mask": {"loss": "bce", "metrics": LABELS},
}
OUTPUTS = {"number": 2, "label": 4, "mask": 3}


def start(path: Path, where: Path, kind: str, cluster: Any = "serial", **more: Any) -> dtrain.Run:
    data = {"normalize": ["number"] if kind == "number" else [], **more.pop("data", {})}
    samples = dtrain.open_samples(path, inputs=["x"], targets=[kind], **data)
    table = {**TABLE, **KINDS[kind], **more.pop("train", {})}
    return trained(linear, samples, where, table, cluster, model_args={"outputs": OUTPUTS[kind]}, **more)


def by_hand(run: dtrain.Run, kind: str, weight: bool = False) -> dict[str, float]:
    """The metrics of the test split from all of it at once."""
    config = run.config.data
    samples = dtrain.open_samples(
        config.path, inputs=["x"], targets=[kind], normalize=list(config.normalize), weight=config.weight
    )
    with dtrain.batches(samples, split="test", batch_size=10**6, replicas=2) as batches:
        batch = next(batches)
    with torch.inference_mode():
        outputs, targets = run.model(*batch.inputs).double(), batch.targets
    if kind == "number":
        scaling = run.resolved.scalings["number"]
        outputs, targets = (one.double() * scaling.std[0] + scaling.mean[0] for one in (outputs, targets))
    found = {}
    for name in KINDS[kind]["metrics"]:
        parts = metric_named(name).of_batch(outputs, targets, *([batch.weight] if weight else []))
        found[name] = metric_named(name).value(*parts)
    return found


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", ["", "area"])
def test_a_run_reports_metrics_of_the_whole_split(path: Path, tmp_path: Path, kind: str, weight: str) -> None:
    run = start(path, tmp_path, kind, data={"weight": weight})
    assert {f"val_{name}" for name in ("loss", *KINDS[kind]["metrics"])} <= run.rows[-1].keys()
    found = run.evaluate(split="test")
    assert found.pop("loss") > 0
    assert found == pytest.approx(by_hand(run, kind, bool(weight)), rel=1e-5)
    assert list(run.history.data_vars)[1:3] == ["val_loss", f"val_{KINDS[kind]['metrics'][0]}"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cluster_gives_the_same_bits(path: Path, tmp_path: Path, kind: str, client: Client) -> None:
    serial, cluster = (start(path, tmp_path / name, kind, at) for name, at in (("s", "serial"), ("c", client)))
    assert bits(serial.rows) == bits(cluster.rows)
    assert serial.evaluate(split="test") == serial.evaluate(split="test", cluster=client) == cluster.evaluate()


def test_micro_batches_change_no_counts(path: Path, tmp_path: Path) -> None:
    values = []
    for size in (1, 9, 64):
        run = start(path, tmp_path / str(size), "label", train={"micro_batch": size, "optimizer_args": {"lr": 0.0}})
        values.append(run.evaluate())
    for one in values[1:]:
        assert {name: one[name] for name in LABELS} == {name: values[0][name] for name in LABELS}
        assert one["loss"] == pytest.approx(values[0]["loss"], rel=1e-6)


def test_best_rounds_go_by_the_direction_of_a_metric(path: Path, tmp_path: Path) -> None:
    run = start(path, tmp_path, "label", train={"rounds": 4}, stop={"metric": "val_f1", "patience": 9})
    assert run.rows[run.best_round - 1]["val_f1"] == max(row["val_f1"] for row in run.rows)  # type: ignore[operator]


# torchmetrics ---------------------------------------------------------------------------------------------------


class Share(torchmetrics.Metric):
    """A subclass of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.right += (outputs.argmax(1) == targets).sum()
        self.count += targets.numel()

    def compute(self) -> torch.Tensor:
        return self.right / self.count


def macro_f1() -> torchmetrics.Metric:
    return MulticlassF1Score(num_classes=4, ignore_index=-100)


@pytest.mark.parametrize("where", ["serial", "cluster"])
def test_a_class_by_name_an_object_and_a_function(path: Path, tmp_path: Path, where: str, client: Client) -> None:
    cluster = "serial" if where == "serial" else client
    table = {"metrics": ["f1", macro_f1, "accuracy", Share], "loss": "cross_entropy"}
    run = start(path, tmp_path / "label", "label", cluster, train=table)
    row = run.rows[-1]
    assert row["val_macro_f1"] == pytest.approx(row["val_f1"], rel=1e-6)
    assert 0 < row["val_Share"] < row["val_accuracy"]  # it counts targets of -100
    own = [BinaryF1Score(ignore_index=-100), BinaryAUROC(thresholds=400, ignore_index=-100)]
    masks = start(path, tmp_path / "mask", "mask", cluster, train={"metrics": [*own, "f1", "auroc"]})
    assert masks.rows[-1]["val_BinaryF1Score"] == pytest.approx(masks.rows[-1]["val_f1"], rel=1e-6)
    assert masks.rows[-1]["val_BinaryAUROC"] == pytest.approx(masks.rows[-1]["val_auroc"], abs=0.01)
    by_name = {"metrics": ["torchmetrics:MeanAbsoluteError", "torchmetrics.regression:MeanSquaredError", "mae", "mse"]}
    numbers = start(path, tmp_path / "number", "number", cluster, train=by_name).rows[-1]
    assert numbers["val_MeanAbsoluteError"] == pytest.approx(numbers["val_mae"], rel=1e-9)
    assert numbers["val_MeanSquaredError"] == pytest.approx(numbers["val_mse"], rel=1e-9)


def test_the_class_says_whether_more_is_better(path: Path, tmp_path: Path) -> None:
    table = {"metrics": [macro_f1, Share], "loss": "cross_entropy"}
    run = start(path, tmp_path, "label", train=table, stop={"metric": "val_macro_f1", "patience": 9})
    assert run.config.stop.mode == dtrain.load_run(run.directory).config.stop.mode == "max"
    with pytest.raises(InvalidConfig, match=r'stop.metric = "val_Share": Share does not say whether more is') as caught:
        start(path, tmp_path / "b", "label", train=table, stop={"metric": "val_Share", "patience": 9})
    assert caught.value.hint == 'Set stop.mode = "max" or stop.mode = "min".'
    mode = start(path, tmp_path / "c", "label", train=table, stop={"metric": "val_Share", "mode": "max"})
    assert mode.config.stop.mode == "max"


def test_what_does_not_merge_is_refused_before_training(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="BinaryAUROC keeps all values in its state preds and target"):
        start(path, tmp_path, "mask", train={"metrics": ["torchmetrics.classification:BinaryAUROC"]})
    with pytest.raises(InvalidConfig, match='has no function BinaryAUROK; did you mean "BinaryAUROC') as caught:
        start(path, tmp_path, "mask", train={"metrics": ["torchmetrics.classification:BinaryAUROK"]})
    assert caught.value.message.startswith('train.metrics = "torchmetrics.classification:BinaryAUROK": ')
    assert "BinaryAccuracy" in caught.value.hint
    per_class = MulticlassF1Score(num_classes=4, average=None, ignore_index=-100)
    with pytest.raises(ShapesDiffer, match=r"MulticlassF1Score gives float\d+\[4\]"):
        start(path, tmp_path, "label", train={"metrics": [per_class]})
    assert not any(tmp_path.iterdir())


def test_other_options_are_other_code(path: Path, tmp_path: Path) -> None:
    metrics = [BinaryF1Score(ignore_index=-100)]
    run = start(path, tmp_path, "mask", train={"metrics": metrics})
    again = dtrain.load_run(run.directory, metrics=metrics)
    assert again.evaluate() == run.evaluate()
    other = dtrain.load_run(run.directory, metrics=[BinaryF1Score(ignore_index=-100, threshold=0.3)])
    with pytest.raises(RunConflict, match=r"other code of train\.metrics"):
        other.evaluate()


def test_torchmetrics_is_not_imported_unless_it_is_named() -> None:
    code = "import sys, dtrain, dtrain.run, dtrain.trainer; print('torchmetrics' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_the_package_the_extra_is_named(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidConfig, match="no module torchmetrics is installed") as caught:
        start(path, tmp_path, "number", train={"metrics": ["torchmetrics:MeanAbsoluteError"]})
    assert caught.value.hint == 'Install it here and on the workers: pip install "dtrain[metrics]".'


# Plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_shows_large_states_and_refuses_unfit_metrics(path: Path) -> None:
    samples = dtrain.open_samples(path, inputs=["x"], targets=["label"])

    def job(**train: Any) -> Any:
        tables = {"train": {"loss": "cross_entropy", **train}, "average": {"replicas": 2}}
        built = job_from_python(linear, samples, tables, None, {"outputs": 200})
        return replace(built, config=with_scheduler(built.config, "serial"))

    small, large = job(metrics=["f1", "accuracy"]), job(metrics=["auroc", "f1"])
    assert "metrics" not in dict(plan_rows(small, plan_job(small)))
    shown = dict(plan_rows(large, plan_job(large)))["metrics"]
    assert shown == "auroc 1.6 MB: the states that each task of an evaluation keeps and sends"
    with pytest.raises(ShapesDiffer, match=r"^mse: the model's output is float32\[\d+, 200\], the target int64"):
        plan_job(job(metrics=["mse"]))
