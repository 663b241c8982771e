"""A runner is one class and one line in `PLACES`: registered here, it runs without a change in dtrain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import dtrain
from dtrain.config.schema import ClusterConfig
from dtrain.data.samples import Samples
from dtrain.runtime import place
from dtrain.runtime.place import Place, SerialPlace
from dtrain.runtime.runner import SegmentLost
from dtrain.runtime.serial import SerialRound, SerialRunner
from dtrain.runtime.spec import RunSpec
from dtrain.types import RoundPlan
from tests.runtime import models


class Forgetful(SerialRunner):
    """Loses the third round once."""

    lost = 0

    def submit(self, held: SerialRound, plan: RoundPlan) -> SerialRound:
        if plan.round == 3 and not Forgetful.lost:
            Forgetful.lost += 1
            raise SegmentLost("on purpose")
        return super().submit(held, plan)


@dataclass(frozen=True, slots=True)
class ForgetfulPlace(SerialPlace):
    @contextmanager
    def runner(self, spec: RunSpec) -> Iterator[Any]:
        runner = Forgetful(spec)
        yield runner
        runner.close()


@contextmanager
def open_forgetful(config: ClusterConfig, base: Path) -> Iterator[Place]:
    yield ForgetfulPlace()


def test_a_place_is_one_line(samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(place.PLACES, "forgetful", open_forgetful)
    monkeypatch.setattr(Forgetful, "lost", 0)
    runs = [
        dtrain.train(
            models.small,
            samples,
            train={"loss": "cross_entropy", "rounds": 4, "local_steps": 2, "batch_size": 16},
            average={"replicas": 2},
            cluster=cluster,
            run_dir=tmp_path,
            progress=False,
        )
        for cluster in ("serial", "forgetful")
    ]
    assert Forgetful.lost == 1
    assert [row["params_sha256"] for row in runs[0].rows] == [row["params_sha256"] for row in runs[1].rows]
    assert sum(row["retried"] for row in runs[1].rows) >= 1
