"""The same bits, wherever and however often a run is executed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client

import dtrain
from dtrain import rounds
from dtrain.data.samples import Samples
from dtrain.errors import Stopped
from dtrain.types import RoundResult
from tests.runtime import models
from tests.training import bits, shas


def without_timings(run: dtrain.Run) -> list[dict[str, Any]]:
    return bits(run.rows)


@pytest.fixture
def train(tmp_path: Path, samples: Samples, train_table: dict[str, Any]) -> Callable[..., dtrain.Run]:
    def start(cluster: Any = "serial", *, model: Any = models.small, run: str | None = None, **changes: Any) -> Any:
        config = changes.pop("config", {})
        average = {"replicas": changes.pop("replicas", 3), **config.get("average", {})}
        table = {**train_table, **changes}
        tables = {**config, "train": table, "average": average}
        given = dtrain.TrainConfig(**tables)
        return dtrain.train(
            model, samples, config=given, cluster=cluster, run=run, run_dir=tmp_path / "runs", progress=False
        )

    return start


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(train: Callable[..., dtrain.Run]) -> None:
    first = without_timings(train())
    assert without_timings(train()) == first
    assert without_timings(train(seed=1)) != first


def test_serial_equals_cluster(train: Callable[..., dtrain.Run], client: Client) -> None:
    assert without_timings(train(client)) == without_timings(train())


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "changes",
    [
        {"local_steps": 7},
        {"batch_size": "full", "micro_batch": 50},
        {"local_epochs": 2, "optimizer": "adamw", "optimizer_args": {"lr": 0.01}, "schedule": "cosine"},
        {"replicas": 1},
        {"replicas": 7, "clip_norm": 0.5, "warmup_steps": 5},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_serial_equals_cluster_whatever_a_round_is(
    train: Callable[..., dtrain.Run], client: Client, changes: dict[str, Any]
) -> None:
    assert without_timings(train(client, **changes)) == without_timings(train(**changes))


def test_frozen_parameters_reach_each_worker_and_no_average(
    train: Callable[..., dtrain.Run], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = {"optimizer": "adamw", "args": {"lr": 0.05, "weight_decay": 0.1}}
    given = {"freeze": ["0.*"], "rounds": 4, "config": {"average": {"outer": outer}, "run": {"commit_every": 2}}}
    expected = train(**given)
    whole = train(rounds=1).rows[0]["bytes_reduced"]
    assert {row["bytes_reduced"] for row in expected.rows} == {whole - 3 * 4 * (6 * 12 + 12)}
    sent: list[int] = []
    scatter = Client.scatter

    def watched(self: Client, values: Any, **options: Any) -> Any:
        sent.extend(value.size for value in values if isinstance(value, np.ndarray))
        return scatter(self, values, **options)

    monkeypatch.setattr(Client, "scatter", watched)
    run = train(client, **given)
    assert without_timings(run) == without_timings(expected)
    assert sent == [6 * 12 + 12]  # once; later segments begin with files
    before, after = train(**{**given, "rounds": 1}).model.state_dict(), run.model.state_dict()
    assert {name for name in after if torch.equal(after[name], before[name])} >= {"0.weight", "0.bias"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("workers", "ahead", "every"), [(1, 2, 3), (2, 0, 10), (3, 1, 1)])
def test_the_number_of_workers_changes_nothing(
    train: Callable[..., dtrain.Run], monkeypatch: pytest.MonkeyPatch, workers: int, ahead: int, every: int
) -> None:
    monkeypatch.setattr(rounds, "LOOK_AHEAD", ahead)
    config = {"cluster": {"workers": workers}, "run": {"commit_every": every}}
    assert without_timings(train("local", rounds=5, config=config)) == without_timings(train(rounds=5))


def test_commits_every_third_round_change_nothing(train: Callable[..., dtrain.Run], client: Client) -> None:
    seldom = train(client, rounds=5, config={"run": {"commit_every": 3}})
    assert without_timings(seldom) == without_timings(train(rounds=5))


@pytest.mark.parametrize("place", ["serial", "cluster"])
def test_resumed_equals_uninterrupted(
    train: Callable[..., dtrain.Run], request: pytest.FixtureRequest, place: str
) -> None:
    where = "serial" if place == "serial" else request.getfixturevalue("client")
    train(where, run="cut", rounds=2)
    resumed = train(where, run="cut", rounds=4)
    assert without_timings(resumed) == without_timings(train(rounds=4))


def test_stopped_in_the_middle_of_a_segment_replays_the_lost_rounds(
    train: Callable[..., dtrain.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = rounds._segment

    def stopping(*arguments: Any) -> Any:
        segment = original(*arguments)
        for result in segment:
            yield result
            if result.round == 4:
                raise Stopped("as if by SIGTERM")
            if result.state is not None:
                return (yield from segment)

    every_third = {"run": {"commit_every": 3}}
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "_segment", stopping)
        with pytest.raises(Stopped):
            train(run="cut", rounds=6, config=every_third)
    resumed = train(run="cut", rounds=6, config=every_third)
    assert [row["round"] for row in resumed.rows] == [1, 2, 3, 4, 5, 6]
    assert without_timings(resumed) == without_timings(train(rounds=6))


def test_by_hand(tmp_path: Path, write_store: Callable[..., Path], client: Client) -> None:
    path = Path(__file__).parents[2] / "examples" / "local_sgd_by_hand.py"
    spec = importlib.util.spec_from_file_location("local_sgd_by_hand", path)
    assert spec is not None
    assert spec.loader is not None
    hand = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hand)
    x, y = hand.make_data()
    store = write_store(
        tmp_path / "hand.zarr",
        {
            "x": {"dims": ("n", "f"), "values": x, "chunks": (64, hand.FEATURES)},
            "y": {"dims": ("n",), "values": y, "chunks": (64,)},
        },
    )
    data = dtrain.open_samples(
        store,
        inputs=["x"],
        targets=["y"],
        shuffle=False,
        partition="contiguous",
        split_order="sequential",
        split={"val": hand.VAL, "test": hand.TEST},
    )
    expected = hand.params_sha256(hand.train(x, y))
    for cluster in ("serial", client):
        run = dtrain.train(
            hand.build,
            data,
            train={
                "loss": "cross_entropy",
                "rounds": hand.ROUNDS,
                "local_epochs": hand.LOCAL_EPOCHS,
                "batch_size": hand.BATCH,
                "optimizer_args": {"lr": hand.LEARNING_RATE, "momentum": hand.MOMENTUM},
                "seed": hand.SEED,
            },
            average={"replicas": hand.REPLICAS},
            cluster=cluster,
            run_dir=tmp_path / "runs",
            progress=False,
        )
        assert shas(run)[-1] == expected


def test_train_rounds_yields_what_train_keeps(
    train: Callable[..., dtrain.Run], samples: Samples, train_table: dict[str, Any]
) -> None:
    results: list[RoundResult] = []
    for result in dtrain.train_rounds(
        models.small, samples, train={**train_table, "rounds": 9}, average={"replicas": 3}, cluster="serial"
    ):
        results.append(result)
        if result.round == 3:
            break
    assert [result.params_sha256 for result in results] == shas(train())
    assert results[0].state is not None  # the first segment is one round
    assert results[0].state.round == 1
