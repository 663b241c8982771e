"""Runs of one round, and models whose predictions can be told by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dtrain
from dtrain.data.samples import Samples


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., dtrain.Run]:
    """A function that trains a model for one round: run_of(build, samples, loss="mse", batch_size=7)."""
    number = 0

    def make(build: Any, samples: Samples, *, average: Any = None, model_args: Any = None, **train: Any) -> dtrain.Run:
        nonlocal number
        number += 1
        return dtrain.train(
            build,
            samples,
            train={"rounds": 1, "batch_size": 7, "optimizer_args": {"lr": 0.0}, **train},
            average={"replicas": 1, **(average or {})},
            model_args=model_args,
            cluster="serial",
            run_dir=tmp_path / f"runs{number}",
            progress=False,
        )

    return make
