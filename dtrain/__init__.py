"""Train PyTorch models on Zarr data larger than memory, on any Dask cluster.

The public names are loaded when they are first used, so that ``import dtrain.data`` needs no torch and
``dtrain --help`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.batching import batches
    from dtrain.config.schema import TrainConfig
    from dtrain.data.samples import Samples
    from dtrain.data.source import open_samples
    from dtrain.plans import Plan, plan
    from dtrain.run import Run
    from dtrain.runs import last_run, load_run
    from dtrain.trainer import train, train_rounds
    from dtrain.types import Cursor, RoundResult, TrainState

__version__ = "0.1.0"

_PUBLIC = {
    "Cursor": "dtrain.types",
    "Plan": "dtrain.plans",
    "RoundResult": "dtrain.types",
    "Run": "dtrain.run",
    "Samples": "dtrain.data.samples",
    "TrainConfig": "dtrain.config.schema",
    "TrainState": "dtrain.types",
    "batches": "dtrain.batching",
    "last_run": "dtrain.runs",
    "load_run": "dtrain.runs",
    "open_samples": "dtrain.data.source",
    "plan": "dtrain.plans",
    "train": "dtrain.trainer",
    "train_rounds": "dtrain.trainer",
}

_MODULES = ("errors", "events")

__all__ = [
    "Cursor",
    "Plan",
    "RoundResult",
    "Run",
    "Samples",
    "TrainConfig",
    "TrainState",
    "__version__",
    "batches",
    "last_run",
    "load_run",
    "open_samples",
    "plan",
    "train",
    "train_rounds",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"dtrain.{name}")
    raise AttributeError(f"module 'dtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
