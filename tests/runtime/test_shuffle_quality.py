"""A bounded window shuffles well enough: as mixed as a block window of twice the memory, and as good on sorted data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import dtrain
import dtrain.resolve
from dtrain.data.plan.order import epoch_order
from dtrain.data.plan.partition import plan_data

FEATURES, CLASSES, ROWS, UNIT = 8, 10, 20_000, 20


def entropy(parts: np.ndarray, batch: int) -> float:
    """The mean over batches of the entropy, in bits, of the units that their rows come from."""
    found = []
    for start in range(0, len(parts) - batch + 1, batch):
        shares = np.unique(parts[start : start + batch], return_counts=True)[1] / batch
        found.append(-(shares * np.log2(shares)).sum())
    return float(np.mean(found))


def blocks(units: int, rows: int, size: int, seed: int) -> np.ndarray:
    """The units of the rows of a pass: units in random order, the rows of `size` of them shuffled together."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(units)
    return np.concatenate([rng.permutation(np.repeat(order[i : i + size], rows)) for i in range(0, units, size)])


@pytest.mark.parametrize(
    ("units", "rows", "window", "batch"),
    [(512, 128, 16, 128), (1000, 256, 64, 256), (500, 1024, 16, 256), (2000, 40, 20, 64)],
)
def test_batches_are_as_mixed_as_by_blocks_with_twice_the_memory(
    units: int, rows: int, window: int, batch: int
) -> None:
    # blocks of `window` units need twice their memory: the next one is read while one is used
    ours = epoch_order(np.full(units, rows), mixed_units=window, shuffle=True, seed=0, replica=0, epoch=0)
    mixed = entropy(np.concatenate([run.part for run in ours]), batch)
    assert mixed >= entropy(blocks(units, rows, window, 0), batch)
    assert mixed >= entropy(blocks(units, rows, window // 2, 0), batch) + 0.8  # with the same memory


def by_class(rng: np.random.Generator) -> tuple[Any, Any]:
    y = np.sort(rng.integers(CLASSES, size=ROWS))
    return rng.normal(size=(CLASSES, FEATURES))[y] + rng.normal(size=(ROWS, FEATURES)), y


def by_time(rng: np.random.Generator) -> tuple[Any, Any]:
    t = np.linspace(0, 1, ROWS)
    season = np.stack([np.sin(2 * np.pi * (3 * t + k / FEATURES)) for k in range(FEATURES)], axis=1)
    x = season + t[:, None] + rng.normal(size=(ROWS, FEATURES))
    y = np.tanh(x @ rng.normal(size=FEATURES)) * (1 + t) + np.sin(6 * np.pi * t) + 0.3 * rng.normal(size=ROWS)
    return x / 2, y.astype("float32")


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "model", "loss"), [(by_class, classifier, "cross_entropy"), (by_time, regressor, "mse")]
)
def test_on_sorted_data_the_loss_is_that_of_a_full_shuffle(
    write_store: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, model: Any, loss: str
) -> None:
    x, y = make(np.random.default_rng(0))
    path = write_store(
        tmp_path / "s",
        {
            "x": {"dims": ("n", "f"), "values": x.astype("float32"), "chunks": (UNIT, FEATURES)},
            "y": {"dims": ("n",), "values": y, "chunks": (UNIT,)},
        },
    )

    def final(window: int, seed: int, shuffle: bool = True) -> float:
        def planned(samples: Any, **options: Any) -> Any:
            return replace(plan_data(samples, **options), unit_rows=UNIT, cell_rows=UNIT, window=window)

        monkeypatch.setattr(dtrain.resolve, "plan_data", planned)
        run = dtrain.train(
            model,
            dtrain.open_samples(path, inputs=["x"], targets=["y"], shuffle=shuffle),
            train={
                "loss": loss,
                "rounds": 6,
                "local_steps": 50,
                "batch_size": 32,
                "optimizer_args": {"lr": 0.05, "momentum": 0.9},
                "schedule": "cosine",
                "seed": seed,
            },
            average={"replicas": 2},
            cluster="serial",
            run_dir=tmp_path / f"{window}-{seed}-{shuffle}",
            progress=False,
        )
        return float(run.history.val_loss.values[-1])

    full = [final(10_000, seed) for seed in range(5)]
    windowed = [final(32, seed) for seed in range(5)]  # 7 % of the 450 units of a replica
    assert min(full) <= np.mean(windowed) <= max(full)
    assert final(32, 0, shuffle=False) > max(full)  # that the data are sorted matters
