"""Ways of averaging give the same bits everywhere: serial, on a cluster, resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client

import dtrain
from dtrain.checkpoint import load_round
from dtrain.committed import committed_rounds
from dtrain.data.samples import Samples
from dtrain.errors import InvalidConfig
from dtrain.runfiles import round_directory
from tests.runtime import models

OUTER = {"optimizer": "sgd", "args": {"lr": 0.5, "momentum": 0.9}}
WAYS: dict[str, dict[str, Any]] = {
    "ring": {"mix": {"topology": "ring"}},
    "exponential": {"mix": {"topology": "exponential"}},
    "hierarchical": {"mix": {"topology": "hierarchical", "groups": 2, "period": 2}},
    "hierarchical with an outer optimizer": {
        "mix": {"topology": "hierarchical", "groups": 2, "period": 2},
        "outer": OUTER,
    },
    "median": {"reduce": "median"},
    "trimmed": {"reduce": "trimmed", "trim": 0.3},
    "prox": {"prox": 0.5},
    "averaged states": {"inner_state": "average"},
    "averaged states in a ring": {"inner_state": "average", "mix": {"topology": "ring"}},
    "averaged states with an outer optimizer": {"inner_state": "average", "outer": OUTER},
    "no states": {"inner_state": "reset"},
    "bf16": {"codec": {"name": "bf16"}},
    "int8 with an outer optimizer": {"codec": {"name": "int8"}, "outer": OUTER},
    "int4 in groups": {"codec": {"name": "int4"}, "mix": {"topology": "hierarchical", "groups": 2, "period": 2}},
    "int4 without error feedback": {"codec": {"name": "int4", "error_feedback": False}},
    "control variates": {"control": True},
    "control variates with an outer optimizer": {"control": True, "outer": OUTER},
    "outer schedule and clipping": {"outer": {**OUTER, "schedule": "cosine", "clip_norm": 0.05}},
}


def start(
    samples: Samples,
    where: Path,
    place: Any,
    rounds: int,
    average: dict[str, Any],
    model: Any = models.small,
    **more: Any,
) -> dtrain.Run:
    config = {
        "train": {"loss": "cross_entropy", "rounds": rounds, "batch_size": 40, "optimizer": "adamw"},
        "average": {"replicas": 4, **average},
        "run": {"commit_every": 1, "keep": 9},
        **more,
    }
    return dtrain.train(
        model,
        samples,
        config=dtrain.TrainConfig(**config),
        cluster=place,
        run="run",
        run_dir=where,
        progress=False,
    )


def lose_rounds(run: dtrain.Run, last: int) -> None:
    """Leave a run as if its driver had been killed after a round."""
    for number in committed_rounds(run.directory):
        if number > last:
            shutil.rmtree(round_directory(run.directory, number))


def shas(run: dtrain.Run) -> list[str]:
    return [row["params_sha256"] for row in run.rows]


def drift(run: dtrain.Run) -> list[Any]:
    return [
        (row["update_norm"], row["update_cosine"], row.get("val_loss"), row.get("val_ema_loss")) for row in run.rows
    ]


SHORT = {
    "ring",
    "hierarchical with an outer optimizer",
    "median",
    "averaged states in a ring",
    "int4 in groups",
    "control variates with an outer optimizer",
    "outer schedule and clipping",
    "outer adam, clipped",
    "int4",
    "averaged states",
    "moving average",
}
"""Ways that together touch every part; the others run with the slow tests."""


def ways(names: Iterable[str]) -> list[Any]:
    return [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", ways(WAYS))
def test_serial_equals_cluster_equals_resumed(samples: Samples, tmp_path: Path, client: Client, way: str) -> None:
    serial = start(samples, tmp_path / "serial", "serial", 4, WAYS[way])
    cluster = start(samples, tmp_path / "cluster", client, 4, WAYS[way])
    assert shas(cluster) == shas(serial)
    lose_rounds(cluster, 2)
    assert shas(start(samples, tmp_path / "cluster", client, 4, WAYS[way])) == shas(serial)
    assert shas(serial) != shas(start(samples, tmp_path / "full", "serial", 4, {}))


SLICED: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"weights": "uniform"},
    "median": {"reduce": "median"},
    "outer optimizer": {"outer": OUTER},
    "outer adam, clipped": {"outer": {"optimizer": "adam", "args": {"lr": 0.01}, "clip_norm": 0.01}},
    "int4": {"codec": {"name": "int4"}},
    "bf16, clipped": {"codec": {"name": "bf16"}, "outer": {**OUTER, "clip_norm": 0.01}},
    "control variates": {"control": True, "outer": OUTER},
    "averaged states": {"inner_state": "average"},
    "moving average": {"ema": 0.5, "recalibrate_batchnorm": True},
    "ring": {"mix": {"topology": "ring"}},
    "groups": {"mix": {"topology": "hierarchical", "groups": 2, "period": 2}, "codec": {"name": "int8"}},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("way", ways(SLICED))
def test_slices_change_no_bit(samples: Samples, tmp_path: Path, client: Client, way: str) -> None:
    serial = start(samples, tmp_path / "serial", "serial", 4, SLICED[way], models.wide)
    cluster = start(samples, tmp_path / "cluster", client, 4, SLICED[way], models.wide, cluster={"slices": 3})
    assert (shas(cluster), drift(cluster)) == (shas(serial), drift(serial))
    lose_rounds(cluster, 2)
    again = start(samples, tmp_path / "cluster", client, 4, SLICED[way], models.wide, cluster={"slices": 2})
    assert (shas(again), drift(again)) == (shas(serial), drift(serial))


def test_recalibration_and_the_moving_average_never_come_back_into_training(samples: Samples, tmp_path: Path) -> None:
    plain = start(samples, tmp_path / "plain", "serial", 3, {})
    both = start(samples, tmp_path / "both", "serial", 3, {"ema": 0.75, "recalibrate_batchnorm": True})
    states, other = ([load_round(round_directory(run.directory, n))[0] for n in (1, 2, 3)] for run in (plain, both))
    for one, two in zip(states, other, strict=True):
        end = one.model.num_params
        assert two.broadcast[0].params.flat.tobytes() == one.model.flat.tobytes()
        assert two.model.flat[:end].tobytes() == one.model.flat[:end].tobytes()
        assert two.model.flat[end:].tobytes() != one.model.flat[end:].tobytes()
    expected = states[0].model.flat[:end].astype(np.float64)
    for one, two in zip(states, other, strict=True):
        expected = (0.75 * expected + 0.25 * one.model.flat[:end]).astype(np.float32).astype(np.float64)
        assert two.ema is not None
        assert two.ema.flat[:end].tolist() == expected.tolist()
    assert [row["val_ema_loss"] for row in both.rows] != [row["val_loss"] for row in both.rows]
    assert both.rows[0]["val_ema_loss"] == both.rows[0]["val_loss"]  # it is the model


def test_recalibration_leaves_out_a_last_batch_of_one_sample(tmp_path: Path, write_store: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(33, 6)).astype("float32"), rng.integers(0, 3, 33)
    store = write_store(
        tmp_path / "rows.zarr",
        {
            "x": {"dims": ("n", "f"), "values": x, "chunks": (16, 6)},
            "y": {"dims": ("n",), "values": y, "chunks": (16,)},
        },
    )
    rows = dtrain.open_samples(store, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0}, shuffle=False)
    run = dtrain.train(
        models.small,
        rows,
        train={"loss": "cross_entropy", "rounds": 2, "batch_size": 32, "drop_last": True},
        average={"replicas": 1, "recalibrate_batchnorm": True},
        cluster="serial",
        run_dir=tmp_path / "runs",
        progress=False,
    )
    with torch.no_grad():
        hidden = run.model[0](torch.from_numpy(x[:32]))  # type: ignore[index]
    torch.testing.assert_close(run.model[1].running_mean, hidden.mean(0), rtol=1e-5, atol=1e-6)  # type: ignore[index]
    torch.testing.assert_close(run.model[1].running_var, hidden.var(0), rtol=1e-5, atol=1e-6)  # type: ignore[index]


def test_recalibration_sees_all_of_a_store_that_is_sorted(tmp_path: Path, write_store: Callable[..., Path]) -> None:
    x = np.linspace(-3, 3, 6 * 4000, dtype="float32").reshape(6, 4000).T.copy()
    store = write_store(
        tmp_path / "rows.zarr",
        {
            "x": {"dims": ("n", "f"), "values": x, "chunks": (100, 6)},
            "y": {"dims": ("n",), "values": np.arange(4000) % 3, "chunks": (100,)},
        },
    )
    rows = dtrain.open_samples(store, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})
    run = dtrain.train(
        models.small,
        rows,
        train={"loss": "cross_entropy", "rounds": 1, "local_steps": 40, "batch_size": 20, "eval_every": 1},
        average={"replicas": 2, "recalibrate_batchnorm": True},
        cluster="serial",
        run_dir=tmp_path / "runs",
        progress=False,
    )
    with torch.no_grad():
        hidden = run.model[0](torch.from_numpy(x))  # type: ignore[index]
    mean = run.model[1].running_mean  # type: ignore[index]
    assert ((mean - hidden.mean(0)).abs() < 0.2 * hidden.std(0)).all()  # 2 x 32 x 20 rows in stored order: 0.6


@pytest.mark.parametrize(
    "average",
    [
        {"mix": {"topology": "hierarchical", "groups": 1, "period": 3}},
        {"mix": {"topology": "hierarchical", "groups": 4, "period": 1}},
    ],
)
def test_groups_that_change_nothing_are_full_averaging(
    samples: Samples, tmp_path: Path, average: dict[str, Any]
) -> None:
    full = start(samples, tmp_path / "full", "serial", 3, {})
    assert shas(start(samples, tmp_path / "groups", "serial", 3, average)) == shas(full)


@pytest.mark.parametrize(
    ("average", "said"),
    [
        ({"mix": {"topology": "hierarchical"}}, "average.mix.groups = 0"),
        ({"mix": {"topology": "hierarchical", "groups": 5}}, "4 replicas"),
        ({"mix": {"groups": 2}}, 'average.mix.groups is for average.mix.topology = "hierarchical"'),
        ({"mix": {"topology": "ring", "period": 2}}, "average.mix.period is for"),
        ({"mix": {"topology": "ring"}, "codec": {"name": "int8"}}, "average.codec cannot go with"),
        ({"reduce": "trimmed", "trim": 0.1}, "of 4 replicas leaves out 0"),
        ({"trim": 0.2}, 'average.trim is for average.reduce = "trimmed"'),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    samples: Samples, tmp_path: Path, average: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidConfig, match=said):
        start(samples, tmp_path / "runs", "serial", 2, average)
    assert not (tmp_path / "runs").exists()
