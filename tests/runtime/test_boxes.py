"""Runs over patches of a volume that is cut into boxes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from torch import nn

import dtrain
from dtrain.data.plan.splits import split_cells
from dtrain.errors import RunConflict
from tests.runtime.test_averaging import lose_rounds
from tests.training import bits

PATCH = {"z": 4, "y": 16, "x": 16}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.conv(x.unsqueeze(1))
        return logits


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> Path:
    """One image of 9 MB, and its mask."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 8, 530, 530)).astype("float32")
    dims = ("t", "z", "y", "x")
    return write_store(
        tmp_path_factory.mktemp("volume") / "v.zarr",
        {
            "image": {"dims": dims, "values": image, "chunks": (1, 4, 64, 64)},
            "mask": {"dims": dims, "values": (image > 0).astype("uint8"), "chunks": (1, 4, 64, 64)},
        },
    )


def train(volume: Path, tmp_path: Path, name: str, cluster: Any, **data: Any) -> dtrain.Run:
    table = {"patch": PATCH, "normalize": ["image"], "sample_dim": "t", **data}
    samples = dtrain.open_samples(volume, inputs=["image"], targets=["mask"], **table)
    return dtrain.train(
        Net,
        samples,
        train={"loss": "cross_entropy", "rounds": 3, "local_steps": 20, "batch_size": 8, "eval_every": 1},
        average={"replicas": 3},
        cluster=cluster,
        run=name,
        run_dir=tmp_path,
        progress=False,
    )


@pytest.mark.slow
def test_serial_equals_cluster_equals_resumed(volume: Path, tmp_path: Path, client: Client) -> None:
    serial = train(volume, tmp_path, "serial", "serial")
    (plan,) = serial.plan.plans
    assert plan.blocks
    assert {len(split_cells(plan, split)) > 0 for split in ("train", "val", "test")} == {True}
    cluster = train(volume, tmp_path, "cluster", client)
    assert bits(cluster.rows) == bits(serial.rows)
    lose_rounds(cluster, 1)
    assert bits(train(volume, tmp_path, "cluster", client).rows) == bits(serial.rows)
    assert serial.evaluate(split="test") == cluster.evaluate(split="test")
    with pytest.raises(RunConflict):
        train(volume, tmp_path, "serial", "serial", split={"patches": True})
