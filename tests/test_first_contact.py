"""What people try first works, or one sentence says what does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dtrain
from dtrain.errors import (
    Diverged,
    FirstLossNotFinite,
    InvalidConfig,
    NotAModule,
    RunConflict,
    ShapesDiffer,
    TooFewSamples,
    UnsuitableModel,
    UserCodeFailed,
)
from tests.runtime import models
from tests.training import trained

WriteStore = Callable[..., Path]


def linear() -> nn.Module:
    return nn.Linear(6, 3)


def train(samples: dtrain.Samples, tmp_path: Path, model: Any = linear, **tables: Any) -> dtrain.Run:
    table = {"loss": "cross_entropy", "rounds": 2, "batch_size": 40}
    return trained(model, samples, tmp_path / "runs", table, **tables)


# Optimizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "AdamW", "rmsprop", "adagrad"])
def test_another_optimizer_has_its_own_defaults(samples: dtrain.Samples, tmp_path: Path, name: str) -> None:
    run = train(samples, tmp_path, train={"optimizer": name})
    assert run.config.train.optimizer_args == {}
    assert len(run.rows) == 2


def test_an_outer_optimizer_too(samples: dtrain.Samples, tmp_path: Path) -> None:
    run = train(samples, tmp_path, average={"outer": {"optimizer": "adam"}})
    assert run.config.average.outer is not None
    assert run.config.average.outer.args == {}


@pytest.mark.parametrize("name", ["sgd", "SGD"])
def test_the_defaults_of_the_schema_are_those_of_sgd(name: str) -> None:
    config = dtrain.TrainConfig(train={"optimizer": name}, average={"outer": {"optimizer": name}})
    assert config.train.optimizer_args == {"lr": 0.01, "momentum": 0.9}
    assert config.average.outer is not None
    assert config.average.outer.args == {"lr": 0.7, "momentum": 0.9, "nesterov": True}


def test_given_arguments_are_kept() -> None:
    config = dtrain.TrainConfig(train={"optimizer": "adam", "optimizer_args": {"lr": 0.1}})
    assert config.train.optimizer_args == {"lr": 0.1}


# Models -----------------------------------------------------------------------------------------------------------


def test_a_module_in_place_of_a_function_is_refused(samples: dtrain.Samples, tmp_path: Path) -> None:
    with pytest.raises(NotAModule, match="an instance of Linear") as caught:
        train(samples, tmp_path, nn.Linear(6, 3))
    assert "def build(): return Linear(...)" in caught.value.hint


def test_the_class_with_model_args_is_a_function(samples: dtrain.Samples, tmp_path: Path) -> None:
    run = train(samples, tmp_path, nn.Linear, model_args={"in_features": 6, "out_features": 3})
    assert len(run.rows) == 2


def test_a_model_that_is_all_frozen_is_refused(samples: dtrain.Samples, tmp_path: Path) -> None:
    with pytest.raises(UnsuitableModel, match="requires a gradient") as caught:
        train(samples, tmp_path, train={"freeze": ["*"]})
    assert "train.freeze" in caught.value.hint


@pytest.fixture(scope="module")
def bytes_store(tmp_path_factory: pytest.TempPathFactory, write_store: WriteStore) -> Path:
    rng = np.random.default_rng(0)
    return write_store(
        tmp_path_factory.mktemp("bytes") / "b.zarr",
        {
            "x": {"dims": ("n", "f"), "values": rng.integers(0, 255, (200, 6), "uint8"), "chunks": (40, 6)},
            "y": {"dims": ("n",), "values": rng.integers(0, 3, 200).astype("int64"), "chunks": (40,)},
        },
    )


def convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("model", [linear, convolution])
def test_integers_into_a_layer_of_floats_say_what_to_do(bytes_store: Path, tmp_path: Path, model: Any) -> None:
    samples = dtrain.open_samples(bytes_store, inputs=["x"], targets=["y"])
    with pytest.raises(ShapesDiffer, match=r"inputs x int64\[") as caught:
        train(samples, tmp_path, model)
    assert "Call .float() on x" in caught.value.hint
    assert 'data.normalize = ["x"]' in caught.value.hint
    standardised = dtrain.open_samples(bytes_store, inputs=["x"], targets=["y"], normalize=["x"])
    assert len(train(standardised, tmp_path, model).rows) == 2


def test_other_faults_of_shapes_have_the_usual_hint(samples: dtrain.Samples, tmp_path: Path) -> None:
    with pytest.raises(ShapesDiffer) as caught:
        train(samples, tmp_path, lambda: nn.Linear(7, 3))
    assert "data.sample_dim" in caught.value.hint


def normed() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(6, 3))  # type: ignore[no-any-return]


def parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))  # type: ignore[no-any-return]


class Computed(nn.Module):
    """Keeps a tensor that was computed from a parameter, and a lock: neither can be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.doubled = self.linear.weight * 2
        self.lock = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return self.linear(x)  # type: ignore[no-any-return]


def scripted() -> nn.Module:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        return torch.jit.script(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))  # type: ignore[no-any-return]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model", [normed, parametrised, Computed, scripted])
def test_models_that_cannot_be_copied_are_built_anew(samples: dtrain.Samples, tmp_path: Path, model: Any) -> None:
    whole = train(samples, tmp_path, model, train={"rounds": 4})
    assert whole.rows[-1]["train_loss"] < whole.rows[0]["train_loss"]
    train(samples, tmp_path, model, run="cut")
    cut = train(samples, tmp_path, model, train={"rounds": 4}, run="cut")
    assert [row["params_sha256"] for row in cut.rows] == [row["params_sha256"] for row in whole.rows]
    assert whole.evaluate(split="val", round="last")["loss"] == whole.rows[-1]["val_loss"]


class Parts(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        if kind == "buffer":
            self.register_buffer("scale", torch.ones(3, device="meta"))
        elif kind == "parameter":
            self.scale = nn.Parameter(torch.ones(3, device="meta"))
        else:
            self.register_buffer("scale", torch.eye(3).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "said"), [("buffer", "device meta"), ("parameter", "device meta"), ("sparse", "sparse or quantized")]
)
def test_tensors_without_values_are_named(samples: dtrain.Samples, tmp_path: Path, kind: str, said: str) -> None:
    with pytest.raises(UnsuitableModel, match=f"scale is .*{said}") as caught:
        train(samples, tmp_path, Parts, model_args={"kind": kind})
    assert "Build the module" in caught.value.hint


# Small batches ----------------------------------------------------------------------------------------------------


def rows_of(tmp_path: Path, write_store: WriteStore, count: int) -> dtrain.Samples:
    """Samples of one replica's training split."""
    rng = np.random.default_rng(0)
    store = write_store(
        tmp_path / f"rows-{count}.zarr",
        {
            "x": {"dims": ("n", "f"), "values": rng.normal(size=(count, 6)).astype("float32"), "chunks": (16, 6)},
            "y": {"dims": ("n",), "values": rng.integers(0, 3, count), "chunks": (16,)},
        },
    )
    return dtrain.open_samples(store, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})


def squeezed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 1), Squeeze())


class Squeeze(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze()


@pytest.mark.parametrize(
    ("count", "train_table", "cure"),
    [
        (33, {"batch_size": 32}, "train.drop_last = true"),
        (33, {"batch_size": "full", "micro_batch": 32}, "train.micro_batch"),
        (64, {"batch_size": 33, "local_steps": 2, "micro_batch": 8}, "train.micro_batch"),
        (65, {"batch_size": 16, "micro_batch": 5}, "train.micro_batch"),
    ],
)
def test_a_batch_of_one_is_tried_before_training(
    tmp_path: Path, write_store: WriteStore, count: int, train_table: dict[str, Any], cure: str
) -> None:
    samples = rows_of(tmp_path, write_store, count)
    with pytest.raises(
        ShapesDiffer, match="not on a single sample, .* replica 0: Expected more than 1 value"
    ) as caught:
        train(samples, tmp_path, models.small, train=train_table, average={"replicas": 1})
    assert cure in caught.value.hint


def test_the_batch_size_of_the_hint_works(tmp_path: Path, write_store: WriteStore) -> None:
    samples = rows_of(tmp_path, write_store, 33)
    with pytest.raises(ShapesDiffer) as caught:
        train(samples, tmp_path, models.small, train={"batch_size": 32}, average={"replicas": 1})
    better = int(caught.value.hint.rpartition("train.batch_size = ")[2].rstrip("."))
    assert len(train(samples, tmp_path, models.small, train={"batch_size": better}, average={"replicas": 1}).rows) == 2
    dropped = train(
        samples, tmp_path, models.small, train={"batch_size": 32, "drop_last": True}, average={"replicas": 1}
    )
    assert [row["samples"] for row in dropped.rows] == [32, 32]


def test_a_squeeze_that_loses_the_samples_is_found_too(tmp_path: Path, write_store: WriteStore) -> None:
    samples = rows_of(tmp_path, write_store, 33)
    with pytest.raises(ShapesDiffer, match="not on a single sample"):
        train(samples, tmp_path, squeezed, train={"loss": "mse", "batch_size": 32}, average={"replicas": 1})


def test_a_model_that_takes_single_samples_is_not_refused(tmp_path: Path, write_store: WriteStore) -> None:
    samples = rows_of(tmp_path, write_store, 33)
    assert [row["steps"] for row in train(samples, tmp_path, train={"batch_size": 32}).rows] == [2, 2]


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_without_the_last_batch_passes_are_cut_and_rounds_agree(
    tmp_path: Path, write_store: WriteStore, micro_batch: int
) -> None:
    samples = rows_of(tmp_path, write_store, 103)
    table = {"batch_size": 8, "drop_last": True, "micro_batch": micro_batch}
    two = {"replicas": 2}
    often = train(samples, tmp_path, models.small, train={**table, "rounds": 4}, average=two)
    sizes = often.plan.sizes
    assert sum(sizes) == 103
    assert [row["steps"] for row in often.rows] == [sum(size // 8 for size in sizes)] * 4
    assert [row["samples"] for row in often.rows] == [sum(size // 8 * 8 for size in sizes)] * 4
    train(samples, tmp_path, models.small, train={**table, "rounds": 2}, average=two, run="cut")
    resumed = train(samples, tmp_path, models.small, train={**table, "rounds": 4}, average=two, run="cut")
    assert resumed.rows[-1]["params_sha256"] == often.rows[-1]["params_sha256"]
    with_all = train(samples, tmp_path, train={**table, "drop_last": False, "rounds": 1}, average=two)
    assert with_all.rows[0]["samples"] == 103


def drawn(batch: Any, generator: torch.Generator) -> Any:
    return replace(batch, inputs=(batch.inputs[0] + torch.randn(batch.inputs[0].shape, generator=generator),))


def test_passes_in_one_round_or_in_several_are_the_same_without_the_last_batch(
    tmp_path: Path, write_store: WriteStore
) -> None:
    samples = rows_of(tmp_path, write_store, 61)
    samples = dtrain.open_samples(
        samples.path,
        inputs=["x"],
        targets=["y"],
        split={"val": 0.0, "test": 0.0},
        transform="tests.test_first_contact:drawn",
    )
    table = {"batch_size": 8, "drop_last": True}
    once = train(samples, tmp_path, train={**table, "rounds": 1, "local_epochs": 3}, average={"replicas": 1})
    often = train(samples, tmp_path, train={**table, "rounds": 3}, average={"replicas": 1})
    assert once.rows[-1]["params_sha256"] == often.rows[-1]["params_sha256"]


def test_drop_last_that_leaves_nothing_is_refused(tmp_path: Path, write_store: WriteStore) -> None:
    samples = rows_of(tmp_path, write_store, 33)
    with pytest.raises(TooFewSamples, match=r"leaves nothing of the \d+ samples of replica 0") as caught:
        train(samples, tmp_path, train={"batch_size": 40, "drop_last": True})
    assert "drop_last = false" in caught.value.hint


# Data that are not finite -------------------------------------------------------------------------------------------


def with_nan(tmp_path: Path, write_store: WriteStore, share: float) -> dtrain.Samples:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)).astype("float32")
    x[rng.random(200) < share, 2] = np.nan
    y = rng.integers(0, 3, 200)
    store = write_store(
        tmp_path / "nan.zarr",
        {
            "x": {"dims": ("n", "f"), "values": x, "chunks": (40, 6)},
            "y": {"dims": ("n",), "values": y, "chunks": (40,)},
        },
    )
    return dtrain.open_samples(store, inputs=["x"], targets=["y"], non_finite="allow")


def test_a_first_loss_of_nan_counts_the_nan_of_the_data(tmp_path: Path, write_store: WriteStore) -> None:
    with pytest.raises(FirstLossNotFinite, match=r"its 40 samples hold (\d+) NaN or infinite values") as caught:
        train(with_nan(tmp_path, write_store, 0.5), tmp_path)
    assert "data.transform" in caught.value.hint
    assert "initialisation" not in str(caught.value)


def test_a_first_loss_of_nan_without_nan_in_the_data_is_the_models(samples: dtrain.Samples, tmp_path: Path) -> None:
    with pytest.raises(FirstLossNotFinite, match="its data are finite") as caught:
        train(samples, tmp_path, models.nan_once, model_args={"threshold": -99.0})
    assert "initialisation" in caught.value.hint


def test_a_diverged_run_counts_the_nan_of_the_data(tmp_path: Path, write_store: WriteStore) -> None:
    rare = with_nan(tmp_path, write_store, 0.02)
    with pytest.raises(Diverged, match=r"Their batches held \d+ NaN or infinite values of the data") as caught:
        train(rare, tmp_path, train={"batch_size": 2})
    assert "data.non_finite" in caught.value.hint
    assert "learning rate" not in caught.value.hint


def test_a_run_that_diverges_by_itself_is_told_of_the_learning_rate(samples: dtrain.Samples, tmp_path: Path) -> None:
    with pytest.raises(Diverged) as caught:
        train(samples, tmp_path, models.small, train={"optimizer_args": {"lr": 1e30}})
    assert "of the data" not in caught.value.message
    assert "learning rate" in caught.value.hint


# Transforms ---------------------------------------------------------------------------------------------------------


def doubled(batch: Any, generator: torch.Generator) -> Any:
    assert isinstance(batch.inputs, tuple)
    assert isinstance(batch.targets, tuple)
    return replace(batch, inputs=tuple(2 * x for x in batch.inputs), targets=tuple(y % 2 for y in batch.targets))


def doubled_singly(batch: Any, generator: torch.Generator) -> Any:
    return replace(batch, inputs=2 * batch.inputs[0], targets=batch.targets[0] % 2)


def old_style(batch: Any, generator: torch.Generator) -> Any:
    return replace(batch, targets=batch.targets.long())


def fewer(batch: Any, generator: torch.Generator) -> Any:
    return replace(batch, targets=())


def test_a_transform_gets_and_returns_tuples(blobs: Path, tmp_path: Path) -> None:
    def opened(name: str) -> dtrain.Samples:
        return dtrain.open_samples(blobs, inputs=["x"], targets=["y"], transform=f"tests.test_first_contact:{name}")

    plain = next(dtrain.batches(dtrain.open_samples(blobs, inputs=["x"], targets=["y"])))
    for name in ("doubled", "doubled_singly"):
        batch = next(dtrain.batches(opened(name)))
        assert torch.equal(batch.inputs[0], 2 * plain.inputs[0])
        assert isinstance(batch.targets, torch.Tensor)
        assert isinstance(plain.targets, torch.Tensor)
        assert torch.equal(batch.targets, plain.targets % 2)
    shas = {name: train(opened(name), tmp_path).rows[-1]["params_sha256"] for name in ("doubled", "doubled_singly")}
    assert len(set(shas.values())) == 1
    with pytest.raises(UserCodeFailed, match="AttributeError") as caught:
        train(opened("old_style"), tmp_path)
    assert "batch.inputs and batch.targets are tuples" in caught.value.hint
    with pytest.raises(UserCodeFailed, match="1 inputs and 0 targets for 1 and 1"):
        train(opened("fewer"), tmp_path)


# Going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"schedule": "cosine"}, {"schedule": "cosine", "rounds": 4}, 'train.schedule = "cosine" depends on the last'),
        ({}, {"optimizer_args": {"lr": 0.1}}, "To go on from its parameters"),
        ({}, {"schedule": "linear"}, "To go on from its parameters"),
    ],
)
def test_what_changes_how_a_run_goes_on_starts_a_new_one_from_its_parameters(
    samples: dtrain.Samples, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], said: str
) -> None:
    first = train(samples, tmp_path, train=before, run="first")
    with pytest.raises(RunConflict) as caught:
        train(samples, tmp_path, train={**before, **after}, run="first")
    assert said in caught.value.hint
    init = caught.value.hint.rpartition('train.init = "')[2].rstrip('".')
    base = Path(__file__).parent if not Path(init).is_absolute() else Path("/")
    table = {**before, **after, "init": str(base / init), "optimizer_args": {"lr": 0.0}}
    second = train(samples, tmp_path, train=table, run="second")
    assert second.rows[-1]["params_sha256"] == first.rows[-1]["params_sha256"]


def test_other_changes_are_to_be_undone(samples: dtrain.Samples, tmp_path: Path) -> None:
    train(samples, tmp_path, run="first")
    with pytest.raises(RunConflict) as caught:
        train(samples, tmp_path, train={"batch_size": 20}, run="first")
    assert "undo the change" in caught.value.hint


def test_a_run_of_another_model_is_no_start(samples: dtrain.Samples, tmp_path: Path) -> None:
    run = train(samples, tmp_path)
    with pytest.raises(InvalidConfig, match=r"the model has no .* of the 2 tensors of .*params.safetensors"):
        train(samples, tmp_path, models.small, train={"init": str(run.directory)})
