"""Sums and counts in whole runs: what is merged is what one pass over everything would give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dtrain
from dtrain.calls import job_from_python
from dtrain.errors import InvalidConfig, ShapesDiffer
from dtrain.job import with_scheduler
from dtrain.planning import plan_job
from dtrain.plantext import plan_rows
from tests.training import trained

WriteStore = Callable[..., Path]


def linear() -> nn.Module:
    return nn.Linear(6, 3)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, write_store: WriteStore) -> Path:
    """600 samples, 60 % of whose classes are -100."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(600, 6)).astype("float32")
    y = np.where(rng.random(600) < 0.6, -100, (x @ rng.normal(size=(6, 3))).argmax(1))
    return write_store(
        tmp_path_factory.mktemp("labelled") / "labelled.zarr",
        {
            "x": {"dims": ("n", "f"), "values": x, "chunks": (50, 6)},
            "y": {"dims": ("n",), "values": y.astype("int32"), "chunks": (50,)},
        },
    )


def train(samples: dtrain.Samples, tmp_path: Path, model: Any = linear, **tables: Any) -> dtrain.Run:
    table = {"loss": "cross_entropy", "metrics": ["accuracy"], "rounds": 3, "batch_size": 40}
    return trained(model, samples, tmp_path / "runs", table, **tables)


def rows(samples: dtrain.Samples, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [(b.inputs[0].clone(), b.targets.clone()) for b in dtrain.batches(samples, split=split, replicas=2)]  # type: ignore[arg-type, union-attr]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


# Ignored targets --------------------------------------------------------------------------------------------------


def test_validation_is_over_the_targets_that_count(labelled: Path, tmp_path: Path) -> None:
    samples = dtrain.open_samples(labelled, inputs=["x"], targets=["y"])
    run = train(samples, tmp_path)
    x, y = rows(samples, "val")
    logits = run.model(x).detach()
    counted = y != -100
    assert 0 < counted.sum() < len(y)
    last = run.rows[-1]
    right = (logits.argmax(1) == y)[counted]
    assert last["val_accuracy"] == right.sum().item() / len(right)
    expected = nn.functional.cross_entropy(logits[counted], y[counted]).item()
    assert last["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert all(row["train_loss"] is not None and None not in row["replica_loss"] for row in run.rows)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("micro_batch", [1, 7, 10])
def test_micro_batches_change_neither_weights_nor_losses(labelled: Path, tmp_path: Path, micro_batch: int) -> None:
    samples = dtrain.open_samples(labelled, inputs=["x"], targets=["y"])
    whole, cut = train(samples, tmp_path), train(samples, tmp_path, train={"micro_batch": micro_batch})
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(cut.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    for key in ("train_loss", "val_loss", "val_accuracy"):
        assert [row[key] for row in cut.rows] == pytest.approx([row[key] for row in whole.rows], rel=1e-5)


def test_full_batch_gradients_are_those_of_all_labelled_rows(labelled: Path, tmp_path: Path) -> None:
    samples = dtrain.open_samples(labelled, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})
    table = {"batch_size": "full", "micro_batch": 37, "rounds": 4, "optimizer_args": {"lr": 0.5}}
    run = train(samples, tmp_path, train=table, average={"replicas": 1})
    x, y = rows(samples, "all")
    torch.manual_seed(0)
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert [row["train_loss"] for row in run.rows] == pytest.approx(losses, rel=1e-4)


def weighted(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss in which a sample counts as much as its class says."""
    weights = torch.where(targets == -100, 0.0, (targets + 1).float())
    each = nn.functional.cross_entropy(outputs, targets.clamp(min=0), reduction="none")
    return each @ weights, weights.sum()


def test_a_loss_of_sum_and_count_adds_up(labelled: Path, tmp_path: Path) -> None:
    samples = dtrain.open_samples(labelled, inputs=["x"], targets=["y"])
    table = {"loss": "tests.test_terms:weighted", "metrics": ["tests.test_terms:weighted"]}
    whole = train(samples, tmp_path, train=table)
    cut = train(samples, tmp_path, train={**table, "micro_batch": 9})
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(cut.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    x, y = rows(samples, "val")
    total, count = weighted(whole.model(x).detach(), y)
    last = whole.rows[-1]
    assert last["val_loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert last["val_weighted"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert cut.rows[-1]["train_loss"] == pytest.approx(last["train_loss"], rel=1e-5)


# Decoded units ----------------------------------------------------------------------------------------------------


class Add(nn.Module):
    """Predicts the input plus a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.5))

    def forward(self, *inputs: torch.Tensor) -> Any:
        moved = tuple(x + self.shift for x in inputs)
        return moved[0] if len(moved) == 1 else moved


def largest(outputs: Any, targets: Any) -> tuple[float, int]:
    """The largest target of all, as a metric sees it."""
    values = targets if isinstance(targets, tuple) else (targets,)
    return max(float(value.max()) for value in values), 1


@pytest.fixture(scope="module")
def physical(tmp_path_factory: pytest.TempPathFactory, write_store: WriteStore) -> Path:
    """Temperatures of three bands with means of 100, 10,000 and 1e9, and a packed copy of the first."""
    rng = np.random.default_rng(1)
    t = rng.normal(size=(300, 3, 4)) * [[5.0], [50.0], [2.0]] + [[100.0], [10_000.0], [1e9]]
    packed = np.rint((t[:, 0] - 100) / 0.01).astype("int16")
    attributes = {"scale_factor": 0.01, "add_offset": 100.0}
    return write_store(
        tmp_path_factory.mktemp("physical") / "t.zarr",
        {
            "t": {"dims": ("time", "band", "lat"), "values": t, "chunks": (25, 3, 4)},
            "p": {"dims": ("time", "lat"), "values": packed, "chunks": (25, 4), "attributes": attributes},
        },
    )


def measured(store: Path, tmp_path: Path, names: list[str], **data: Any) -> tuple[dtrain.Run, dict[str, Any]]:
    samples = dtrain.open_samples(store, inputs=names, targets=names, **data)
    table = {"loss": "tests.test_terms:first_mse", "metrics": ["mse", "mae", "tests.test_terms:largest"], "rounds": 1}
    if len(names) > 1:
        table["metrics"] = ["tests.test_terms:largest"]
    run = train(samples, tmp_path, Add, train={**table, "optimizer_args": {"lr": 0.0}, "batch_size": 7})
    return run, run.rows[-1]


def first_mse(outputs: Any, targets: Any) -> torch.Tensor:
    pair = (outputs, targets) if isinstance(outputs, torch.Tensor) else (outputs[0], targets[0])
    return nn.functional.mse_loss(*pair)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("data", [{}, {"patch": {"lat": 2}}, {"input_offsets": [-1, 0], "target_offsets": [0, 1]}])
def test_metrics_are_in_the_units_of_the_data_and_the_loss_is_not(
    physical: Path, tmp_path: Path, data: dict[str, Any]
) -> None:
    run, row = measured(physical, tmp_path, ["t"], normalize={"t": ["band"]}, **data)
    std = np.array(run.resolved.scalings["t"].std)
    assert std == pytest.approx([5.0, 50.0, 2.0], rel=0.1)
    if not data.get("input_offsets"):  # then inputs and targets are the same, and every error is 0.5 std
        assert row["val_loss"] == pytest.approx(0.25, rel=1e-5)
        assert row["val_mse"] == pytest.approx(0.25 * np.mean(std**2), rel=1e-5)
        assert row["val_mae"] == pytest.approx(0.5 * np.mean(std), rel=1e-5)
    assert row["val_largest"] == pytest.approx(1e9 + 5, abs=4)
    evaluated = run.evaluate(split="val", round="last")
    assert (evaluated["mse"], evaluated["loss"]) == (row["val_mse"], row["val_loss"])


def test_one_mean_and_packed_values_are_decoded_too(physical: Path, tmp_path: Path) -> None:
    run, row = measured(physical, tmp_path, ["p"], normalize=["p"])
    std = run.resolved.scalings["p"].std[0]
    assert row["val_mse"] == pytest.approx(0.25 * std**2, rel=1e-5)
    assert 105 < row["val_largest"] < 125
    _, plain = measured(physical, tmp_path, ["p"])  # scale_factor and add_offset are applied anyway
    assert plain["val_largest"] == pytest.approx(row["val_largest"], rel=1e-6)
    assert plain["val_mse"] == pytest.approx(0.25, rel=1e-4)


def test_of_several_targets_each_has_its_own_units(physical: Path, tmp_path: Path) -> None:
    _, row = measured(physical, tmp_path, ["p", "t"], normalize={"t": ["band"]})
    assert row["val_largest"] == pytest.approx(1e9 + 5, abs=4)
    _, row = measured(physical, tmp_path, ["t", "p"], normalize={"t": ["band"], "p": []})
    assert row["val_largest"] == pytest.approx(1e9 + 5, abs=4)


# Optimizers that count in their groups ------------------------------------------------------------------------------


class Counting(torch.optim.SGD):
    """Its step grows with a counter in the group."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                parameter.grad *= 1 + 1 / group["k"]
        return super().step(closure)


def test_one_round_of_four_passes_is_four_rounds_of_one(labelled: Path, tmp_path: Path) -> None:
    samples = dtrain.open_samples(labelled, inputs=["x"], targets=["y"])
    table = {"optimizer": "tests.test_terms:Counting", "optimizer_args": {"lr": 0.05}}
    once = train(samples, tmp_path, train={**table, "rounds": 1, "local_epochs": 4}, average={"replicas": 1})
    often = train(samples, tmp_path, train={**table, "rounds": 4}, average={"replicas": 1})
    assert once.rows[-1]["params_sha256"] == often.rows[-1]["params_sha256"]
    resumed = train(samples, tmp_path, train={**table, "rounds": 2}, average={"replicas": 1}, run="cut")
    resumed = train(samples, tmp_path, train={**table, "rounds": 4}, average={"replicas": 1}, run="cut")
    assert resumed.rows[-1]["params_sha256"] == often.rows[-1]["params_sha256"]


# The class axis -----------------------------------------------------------------------------------------------------


def windows() -> nn.Module:
    return nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))


@pytest.mark.parametrize("metrics", [[], ["accuracy"]])
def test_windows_as_long_as_the_classes_need_the_class_axis(
    tmp_path: Path, write_store: WriteStore, metrics: list[str]
) -> None:
    tokens = np.tile(np.arange(16), 40).astype("uint8")
    store = write_store(tmp_path / "t.zarr", {"t": {"dims": ("n",), "values": tokens, "chunks": (64,)}})
    samples = dtrain.open_samples(
        store,
        inputs=["t"],
        targets=["t"],
        input_offsets={"start": 0, "stop": 16},
        target_offsets={"start": 1, "stop": 17},
        stride=16,
    )
    table = {"metrics": metrics, "optimizer": "adam", "optimizer_args": {"lr": 0.1}, "batch_size": 4, "rounds": 15}
    with pytest.raises(ShapesDiffer, match="both axis 1 and the last axis"):
        train(samples, tmp_path, windows, train=table, average={"replicas": 1})
    run = train(samples, tmp_path, windows, train={**table, "class_axis": -1}, average={"replicas": 1})
    assert run.rows[-1]["val_loss"] < 0.1  # the next token follows from this one
    if metrics:
        assert run.rows[-1]["val_accuracy"] == 1.0


# Names of metrics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (["mets:loss"], "val_loss, which is the loss"),
        (["a:score", "b:score"], '"a:score" and "b:score" would both be reported as val_score'),
        (["mse", "mets:mse"], "val_mse"),
        (["accuracy", "accuracy"], "val_accuracy"),
    ],
)
def test_metrics_of_one_name_are_refused(metrics: list[str], said: str) -> None:
    with pytest.raises(InvalidConfig, match=said) as caught:
        dtrain.TrainConfig(train={"metrics": metrics})
    assert caught.value.hint


# Buffers and precision ----------------------------------------------------------------------------------------------


class Counter(nn.Module):
    """Counts its training batches in a tensor that only `get_extra_state` knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.batches = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.batches = self.batches + 1
        return self.linear(x)  # type: ignore[no-any-return]

    def get_extra_state(self) -> torch.Tensor:
        return self.batches.clone()

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.batches = state.clone()


def test_extra_state_goes_on_from_round_to_round(labelled: Path, tmp_path: Path) -> None:
    samples = dtrain.open_samples(labelled, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})
    run = train(samples, tmp_path, Counter, average={"replicas": 1})
    assert run.model.batches.item() == 3 * 15  # 600 samples in batches of 40, three rounds


class Constant(nn.Module):
    """Predicts one number, computed under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        with torch.no_grad():
            self.linear.weight.fill_(273.0)
            self.linear.bias.fill_(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_bfloat16_does_not_round_the_targets(tmp_path: Path, write_store: WriteStore, loss: str) -> None:
    y = (272.0 + 0.3 * np.random.default_rng(0).normal(size=(200, 1))).astype("float32")  # bfloat16 knows 272 and 274
    store = write_store(
        tmp_path / "y.zarr",
        {
            "x": {"dims": ("n", "f"), "values": np.ones((200, 1), "float32"), "chunks": (50, 1)},
            "y": {"dims": ("n", "f"), "values": y, "chunks": (50, 1)},
        },
    )
    samples = dtrain.open_samples(store, inputs=["x"], targets=["y"])
    table = {"loss": loss, "metrics": ["mse"], "optimizer_args": {"lr": 0.0}, "rounds": 1, "precision": "bfloat16"}
    run = train(samples, tmp_path, Constant, train=table)
    _, targets = rows(samples, "val")
    error = 272.0 - targets.double()  # 273 in bfloat16
    expected = {"mse": error**2, "mae": error.abs(), "huber": nn.functional.huber_loss(error * 0, -error)}[loss]
    assert run.rows[0]["val_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert run.rows[0]["val_mse"] == pytest.approx((error**2).mean().item(), rel=1e-5)


# The first try ------------------------------------------------------------------------------------------------------


class Watching(nn.Linear):
    """Writes the sizes of its batches into a file."""

    def __init__(self, seen: str) -> None:
        super().__init__(6, 3)
        self.seen = seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with open(self.seen, "a") as file:
            print(len(x), file=file)
        return super().forward(x)


@pytest.mark.parametrize("batch_size", [300, "full"])
def test_no_batch_is_larger_than_a_micro_batch(labelled: Path, tmp_path: Path, batch_size: Any) -> None:
    samples = dtrain.open_samples(labelled, inputs=["x"], targets=["y"])
    config = dtrain.TrainConfig(
        model_args={"seen": str(tmp_path / "plan")},
        train={"loss": "cross_entropy", "batch_size": batch_size, "micro_batch": 32, "rounds": 1},
        average={"replicas": 2},
        cluster={"scheduler": "serial"},
    )
    plan_job(job_from_python(Watching, samples, {}, config))
    table = {"batch_size": batch_size, "micro_batch": 32}
    train(samples, tmp_path, Watching, train=table, model_args={"seen": str(tmp_path / "train")})
    for name in ("plan", "train"):
        assert max(map(int, (tmp_path / name).read_text().split())) == 32


# Frozen parameters --------------------------------------------------------------------------------------------------


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))


FROZEN = {"0.weight", "0.bias"}
OUTERS = [
    {"optimizer": "adamw", "args": {"lr": 0.1, "weight_decay": 0.1}},
    {"optimizer": "sgd", "args": {"lr": 0.7, "momentum": 0.9, "weight_decay": 0.1}},
]


def by_hand() -> nn.Module:
    module = two_layers()
    module[0].requires_grad_(False)  # type: ignore[operator]
    return module


@pytest.mark.parametrize("outer", OUTERS, ids=["adamw", "sgd"])
@pytest.mark.parametrize("how", ["train.freeze", "requires_grad"])
def test_frozen_parameters_do_not_move(labelled: Path, tmp_path: Path, outer: dict[str, Any], how: str) -> None:
    samples = dtrain.open_samples(labelled, inputs=["x"], targets=["y"])
    table: dict[str, Any] = {"rounds": 5}
    if how == "train.freeze":
        table["freeze"] = ["0.*"]
    model = two_layers if how == "train.freeze" else by_hand
    run = train(samples, tmp_path, model, train=table, average={"outer": outer})
    torch.manual_seed(0)
    before, after = two_layers().state_dict(), run.model.state_dict()
    assert {name for name in after if torch.equal(after[name], before[name])} == FROZEN
    assert {row["bytes_reduced"] for row in run.rows} == {2 * 4 * 63}  # the last layer, of two replicas


def test_freezing_by_pattern_is_freezing_by_hand(labelled: Path, tmp_path: Path) -> None:
    samples = dtrain.open_samples(labelled, inputs=["x"], targets=["y"])
    average = {"outer": OUTERS[0]}
    pattern = train(samples, tmp_path, two_layers, train={"freeze": ["0.*"]}, average=average)
    hand = train(samples, tmp_path, by_hand, average=average)
    assert [row["params_sha256"] for row in pattern.rows] == [row["params_sha256"] for row in hand.rows]


def test_a_resumed_run_keeps_its_frozen_parameters(labelled: Path, tmp_path: Path) -> None:
    samples = dtrain.open_samples(labelled, inputs=["x"], targets=["y"])
    average = {"outer": OUTERS[0]}
    whole = train(samples, tmp_path, two_layers, train={"freeze": ["0.*"], "rounds": 4}, average=average)
    train(samples, tmp_path, two_layers, train={"freeze": ["0.*"], "rounds": 2}, average=average, run="cut")
    cut = train(samples, tmp_path, two_layers, train={"freeze": ["0.*"], "rounds": 4}, average=average, run="cut")
    assert cut.rows[-1]["params_sha256"] == whole.rows[-1]["params_sha256"]


def test_frozen_parameters_come_from_train_init(labelled: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    samples = dtrain.open_samples(labelled, inputs=["x"], targets=["y"])
    tensors = {name: torch.full_like(tensor, 0.01) for name, tensor in two_layers().state_dict().items()}
    save_file(tensors, tmp_path / "init.safetensors")
    table = {"freeze": ["0.*"], "init": str(tmp_path / "init.safetensors")}
    run = train(samples, tmp_path, two_layers, train=table)
    after = run.model.state_dict()
    assert {name for name in after if torch.equal(after[name], tensors[name])} == FROZEN
    assert run.evaluate(split="val", round="last")["loss"] == pytest.approx(run.rows[-1]["val_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("freeze", "said"),
    [(["0.wieght"], 'no parameter matches "0.wieght"; did you mean "0.weight"'), (["head.*"], 'matches "head.*"')],
)
def test_a_pattern_that_matches_nothing_is_refused(
    labelled: Path, freeze: list[str], said: str, tmp_path: Path
) -> None:
    samples = dtrain.open_samples(labelled, inputs=["x"], targets=["y"])
    with pytest.raises(InvalidConfig) as caught:
        train(samples, tmp_path, two_layers, train={"freeze": freeze})
    assert said in caught.value.message
    assert "0.weight" in caught.value.hint


def test_plan_counts_frozen_parameters_and_their_traffic(labelled: Path) -> None:
    samples = dtrain.open_samples(labelled, inputs=["x"], targets=["y"])
    config = dtrain.TrainConfig(
        train={"loss": "cross_entropy", "freeze": ["0.*"], "rounds": 1}, average={"replicas": 2}
    )
    job = job_from_python(two_layers, samples, {}, with_scheduler(config, "serial"))
    plan = plan_job(job)
    assert (plan.reduced_bytes, plan.commit.parameters) == (2 * 4 * 63, 4 * (140 + 63))
    assert "203 parameters, of which 140 are frozen" in dict(plan_rows(job, plan))["model"]
