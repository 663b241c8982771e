"""A topology is a function in one dictionary: ring averaging, registered here, runs without a change in dtrain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from distributed import Client
from torch import nn

import dtrain
from dtrain.algorithm import mix
from dtrain.algorithm.mix import Neighbourhoods
from dtrain.algorithm.params import params_sha256
from dtrain.checkpoint import load_params, load_round
from dtrain.config.average import MixConfig
from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.samples import Samples
from dtrain.runfiles import round_directory

REPLICAS = 4
ROUNDS = 3
RATE = 0.5


def ring(config: MixConfig, number: int, replicas: int) -> Neighbourhoods:
    return tuple(tuple(sorted({(k - 1) % replicas, k, (k + 1) % replicas})) for k in range(replicas))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mix.TOPOLOGIES, "ring", ring)


def linear() -> nn.Module:
    return nn.Linear(6, 3)


def start(samples: Samples, tmp_path: Path, cluster: Any, rounds: int = ROUNDS, **average: Any) -> dtrain.Run:
    return dtrain.train(
        linear,
        samples,
        train={"loss": "cross_entropy", "rounds": rounds, "batch_size": "full", "optimizer_args": {"lr": RATE}},
        average={"replicas": REPLICAS, "mix": {"topology": "ring"}, **average},
        cluster=cluster,
        run="ring",
        run_dir=tmp_path,
        progress=False,
    )


def by_hand(samples: Samples) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradient descent on each replica's own weights, averaged with its two neighbours: in float64, row by row."""
    group: Any = zarr.open_group(samples.path, mode="r")
    x, y = torch.from_numpy(group["x"][:].astype("float32")), torch.from_numpy(group["y"][:].astype("int64"))
    plan = plan_data(samples, replicas=REPLICAS, seed=0)
    rows = [np.concatenate([p.part_anchors(i) for i in range(len(p.units))]) for p in train_partitions(plan)]
    torch.manual_seed(0)
    weights = [torch.cat([p.detach().flatten() for p in linear().parameters()])] * REPLICAS
    for _ in range(ROUNDS):
        after = []
        for own, part in zip(weights, rows, strict=True):
            leaf = own.clone().requires_grad_()
            logits = x[part] @ leaf[:18].reshape(3, 6).T + leaf[18:]
            nn.functional.cross_entropy(logits, y[part]).backward()
            assert leaf.grad is not None
            after.append((own - RATE * leaf.grad).double())
        sizes = [len(part) for part in rows]
        weights = [
            (sum(sizes[j] * after[j] for j in of) / sum(sizes[j] for j in of)).float()  # type: ignore[union-attr]
            for of in ring(MixConfig(), 1, REPLICAS)
        ]
    return weights, torch.stack(weights).double().mean(0).float()


def test_each_replica_goes_on_from_the_mean_of_its_neighbours(samples: Samples, tmp_path: Path) -> None:
    run = start(samples, tmp_path, "serial")
    expected, mean = by_hand(samples)
    state, _ = load_round(round_directory(run.directory, ROUNDS))
    assert len({own.params.flat.tobytes() for own in state.broadcast}) == REPLICAS
    for own, weights in zip(state.broadcast, expected, strict=True):
        np.testing.assert_allclose(own.params.flat, weights, atol=1e-6)
    np.testing.assert_allclose(state.model.flat, mean, atol=1e-6)
    assert run.rows[-1]["params_sha256"] == params_sha256(load_params(round_directory(run.directory, ROUNDS)))
    assert run.rows[-1]["bytes_reduced"] == 3 * REPLICAS * state.model.nbytes


def test_a_cluster_gives_the_same_bits_and_resume_goes_on(samples: Samples, tmp_path: Path, client: Client) -> None:
    outer = {"outer": {"optimizer": "sgd", "args": {"lr": 0.5, "momentum": 0.9}}}
    for number, average in enumerate(({}, outer)):
        serial = start(samples, tmp_path / f"serial{number}", "serial", **average)
        cluster = start(samples, tmp_path / f"cluster{number}", client, **average)
        start(samples, tmp_path / f"cut{number}", client, rounds=2, **average)
        resumed = start(samples, tmp_path / f"cut{number}", "serial", **average)
        shas = [[row["params_sha256"] for row in run.rows] for run in (serial, cluster, resumed)]
        assert shas[0] == shas[1] == shas[2]


def test_a_mean_that_several_replicas_receive_is_computed_once() -> None:
    full = mix.full(MixConfig(), 1, 5)
    assert len(mix.averages(full, [None] * 5)) == 1
    halves = ((0, 1), (0, 1), (2, 3), (2, 3))
    assert [mean.receivers for mean in mix.averages(halves, [None] * 4)] == [(0, 1), (2, 3)]
    assert len(mix.averages(halves, [1, 2, 1, 1])) == 3  # the outer step of replica 1 starts elsewhere
