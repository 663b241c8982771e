"""Every preset on a model of one parameter, whose way is worked out by hand.

Replica k has the loss (theta - c_k)^2 / 2, and so the gradient theta - c_k. A step of SGD with the learning rate 1/2
halves the distance to c_k. Two replicas have c = (0, 4), four have (0, 4, 8, 12); theta begins at 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dtrain
from dtrain.config.presets import PRESETS
from tests.config.helpers import merged

HALVES = {"optimizer_args": {"lr": 0.5}}
START = 8.0


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([START]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.theta.expand(len(x))


def half_square(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return 0.5 * (outputs - targets).square().mean()


@dataclass(frozen=True)
class Case:
    """What is changed of a preset, and what comes out."""

    train: dict[str, Any]
    expected: list[Any]
    """By round: theta, or theta by replica."""
    average: dict[str, Any] | None = None
    sizes: tuple[int, ...] = (10, 10)
    """Samples by replica."""


def adam(
    gradient: Callable[[float], float],
    lr: float,
    beta: float,
    eps: float,
    decay: float = 0.0,
    factors: tuple[float, ...] = (1, 1, 1),
) -> list[float]:
    """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2)."""
    theta, first, second, path = START, 0.0, 0.0, []
    for step, factor in enumerate(factors, start=1):
        g = gradient(theta)
        first, second = 0.9 * first + 0.1 * g, beta * second + (1 - beta) * g * g
        theta *= 1 - lr * factor * decay
        theta -= lr * factor * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - beta**step)) + eps)
        path.append(theta)
    return path


def fedprox() -> Iterator[float]:
    """4 steps pull towards (c + mu theta) / (1 + mu), each by the factor 1 - lr (1 + mu)."""
    theta, lr, mu = START, 0.01, 0.01
    for _ in range(3):
        own = []
        for c in (0.0, 4.0):
            goal = (c + mu * theta) / (1 + mu)
            own.append(goal + (1 - lr * (1 + mu)) ** 4 * (theta - goal))
        theta = sum(own) / 2
        yield theta


def diloco() -> Iterator[float]:
    """All replicas move alike: their gradients are clipped to 1, and Adam moves by its rate."""
    theta, velocity, lr, decay = START, 0.0, 0.1, 0.1
    factors = iter([0.5, 1.0, *(0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4))])
    for _ in range(3):
        own = theta
        for _ in range(2):
            factor = next(factors)
            own = own * (1 - lr * factor * decay) - lr * factor
        gradient = theta - own
        velocity = 0.9 * velocity + gradient
        theta -= 0.7 * (gradient + 0.9 * velocity)
        yield theta


COSINE = tuple(0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4))

CASES = {
    # the gradient is the mean one, theta - 2, clipped to 1 in three rounds; the cosine acts on the outer step
    "data_parallel": Case(
        {"rounds": 4},
        adam(lambda theta: min(1.0, theta - 2), 2.5, 0.999, 1e-8, 0.01, COSINE),
        {"outer": {"args": {"lr": 2.5, "weight_decay": 0.01}}},
    ),
    # two steps leave a quarter of the distance to the mean of c, which is 2
    "local_sgd": Case({"local_steps": 2, **HALVES}, [3.5, 2.375, 2.09375]),
    # two rounds of one step, then of three: 1/2, 1/2, 1/8, 1/8 of the distance
    "post_local_sgd": Case({"rounds": 4, "sync_rounds": 2, "local_steps": 3, **HALVES}, [5.0, 3.5, 2.1875, 2.0234375]),
    # one step on 10 samples: 8 -> 4; three on 30: 8 -> 4.5; (10 x 4 + 30 x 4.5) / 40 = 4.375
    # then 2.1875 and 4.046875; the limit is not the optimum, 3
    "fedavg": Case({"local_epochs": 1, **HALVES}, [4.375, 3.58203125], sizes=(10, 30)),
    "fedprox": Case({}, list(fedprox())),
    # the same replicas: 2.5 steps count; 8 - 2.5 (1/4 x 4 / 1 + 3/4 x 3.5 / 3) = 3.3125
    # then 3.3125 - 2.5 (1/4 x 1.65625 - 3/4 x 0.6015625 / 3)
    "fednova": Case({"local_epochs": 1, "batch_size": 10, **HALVES}, [3.3125, 2.6533203125], sizes=(10, 30)),
    # g = (theta - 2) / 2 = 3, 1.5, -0.6;  v = 0.9 v + g = 3, 4.2, 3.18;  theta - v
    "fedavgm": Case(HALVES, [5.0, 0.8, -2.38]),
    "fedadam": Case(HALVES, adam(lambda theta: (theta - 2) / 2, 0.1, 0.99, 1e-3)),
    # 6 steps, the first 2 of them warm up
    "diloco": Case(
        {
            "rounds": 3,
            "local_steps": 2,
            "warmup_steps": 2,
            "optimizer_args": {"lr": 0.1, "weight_decay": 0.1},
        },
        list(diloco()),
    ),
    # g = 3, 1.5, 0, -0.75;  v = v / 2 + g = 3, 3, 1.5, 0;  theta - v
    "slowmo": Case({"local_steps": 1, **HALVES}, [5.0, 2.0, 0.5, 0.5]),
    # halfway to 2 and to 10, in groups; in the fourth round (2.375 + 9.875) / 2
    "hierarchical": Case(
        {"local_steps": 1, **HALVES},
        [[5, 5, 9, 9], [3.5, 3.5, 9.5, 9.5], [2.75, 2.75, 9.75, 9.75], [6.125] * 4],
        sizes=(10,) * 4,
    ),
    # halfway (4, 6, 8, 10), then means of three: (10 + 4 + 6) / 3 ...; halfway (10/3, 5, 8, 29/3), then again
    "ring": Case(
        {"local_steps": 1, **HALVES},
        [[20 / 3, 6, 8, 22 / 3], [6, 49 / 9, 68 / 9, 7]],
        {"replicas": 4},
        sizes=(10,) * 4,
    ),
    # halfway (4, 6, 8, 10), the next one; (2.5, 5.5, 8.5, 9.5), the one after; (2.75, 5.75, 6.75, 9.75), the next one
    "exponential": Case(
        {"local_steps": 1, **HALVES},
        [[5, 7, 9, 7], [5.5, 7.5, 5.5, 7.5], [4.25, 6.25, 8.25, 6.25]],
        {"replicas": 4},
        sizes=(10,) * 4,
    ),
    # controls are 0 at first: 8 -> 4 -> 2 with gradients 8, 4 and 8 -> 6 -> 5 with 4, 2: c_k = 6, 3 and c = 4.5
    # then 3.5 -> 2.5 -> 2 with gradients 3.5 - 1.5, 2.5 - 1.5 and 3.5 -> 3 -> 2.75 with -0.5 + 1.5, -1 + 1.5
    # c_k = 3, -0.75 and c = 1.125; 2.375 -> 2.125 -> 2 with -1.875 and 2.375 -> 2.25 -> 2.1875 with 1.875
    "scaffold": Case({"local_epochs": 2, **HALVES}, [3.5, 2.375, 2.09375]),
}


def stores(where: Path, sizes: tuple[int, ...], write_store: Callable[..., Path]) -> list[dict[str, Any]]:
    """A store a replica, whose targets are all c_k = 4 k."""
    made = []
    for replica, size in enumerate(sizes):
        values = np.full(size, 4.0 * replica, np.float32)
        array = {"dims": ("n",), "values": values, "chunks": (10,)}
        made.append({"path": str(write_store(where / f"{replica}.zarr", {"x": array, "y": array}))})
    return made


def way(config: dtrain.TrainConfig) -> list[list[float]]:
    """By round and replica: theta."""
    results = dtrain.train_rounds(config=config, cluster="serial")
    return [[float(start.params.flat[0]) for start in result.state.broadcast] for result in results if result.state]


def test_every_preset_has_a_case() -> None:
    assert set(CASES) == set(PRESETS)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_a_preset_by_hand(name: str, tmp_path: Path, write_store: Callable[..., Path]) -> None:
    case = CASES[name]
    tables: Any = {
        "model": One,
        "data": {
            "path": stores(tmp_path, case.sizes, write_store),
            "inputs": ["x"],
            "targets": ["y"],
            "split": {"val": 0.0, "test": 0.0},
        },
        "train": {"loss": half_square, "rounds": len(case.expected)},
        "run": {"commit_every": 1},
    }
    preset = merged(PRESETS[name].tables, {"train": case.train, "average": case.average or {}})  # type: ignore[no-untyped-call]
    tables = merged(preset, tables)  # type: ignore[no-untyped-call]
    expected = [value if isinstance(value, list) else [value] * len(case.sizes) for value in case.expected]
    np.testing.assert_allclose(way(dtrain.TrainConfig(**tables)), expected, rtol=1e-6)
