"""Configurations that several tests use."""

from __future__ import annotations

REQUIRED = ("model", "data.path", "data.inputs", "data.targets", "train.loss")
SMALLEST = {"model": "m:f", "data": {"path": "x.zarr", "inputs": ["a"], "targets": ["b"]}, "train": {"loss": "mse"}}
RICH = {
    "model": "pkg.net:build",
    "model_args": {"width": 32, "dropout": 0.1, "name": "é", "flags": [True, False], "deep": {"er": [1, 2]}},
    "data": {"path": "x.zarr", "inputs": ["a", "b"], "targets": ["c"], "split": {"val": 0.2, "test": 0.0}},
    "train": {"loss": "mse", "optimizer_args": {"lr": 0.001}, "batch_size": "full", "local_steps": 5, "clip_norm": 1},
    "average": {"replicas": 3},
}


def merged(one, two):
    shared = {k: merged(one[k], two[k]) for k in one.keys() & two.keys() if isinstance(two[k], dict)}
    return {**one, **two, **shared}
