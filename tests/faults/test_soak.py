"""A thousand rounds: nothing grows with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from distributed import Client

import dtrain
from dtrain.data.samples import Samples
from dtrain.events import Event, RoundFinished
from tests.clusters import new_cluster
from tests.runtime import models

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(900)]
ROUNDS, EVERY, SETTLED = 1000, 25, 400
MOST_GROWTH = 8e3
"""Bytes a round that the memory of a process may grow by once it has settled: 8 MB in 1,000 rounds."""


def measured(samples: Samples, where: Path) -> dict[str, list[float]]:
    """Train, and return what was measured every `EVERY` rounds."""
    found: dict[str, list[float]] = {name: [] for name in ("driver", "worker", "tasks", "files", "threads")}
    with new_cluster(2) as cluster, Client(cluster) as client:
        workers, here = [psutil.Process(pid) for pid in client.run(os.getpid).values()], psutil.Process()

        def look(event: Event) -> None:
            if isinstance(event, RoundFinished) and event.result.round % EVERY == 0:
                found["driver"].append(here.memory_info().rss)
                found["worker"].append(max(worker.memory_info().rss for worker in workers))
                found["tasks"].append(len(cluster.scheduler.tasks))
                found["files"].append(here.num_fds() + sum(worker.num_fds() for worker in workers))
                found["threads"].append(here.num_threads() + sum(worker.num_threads() for worker in workers))

        dtrain.train(
            models.small,
            samples,
            train={"loss": "cross_entropy", "rounds": ROUNDS, "local_steps": 2, "batch_size": 16, "eval_every": 10},
            average={"replicas": 2},
            cluster=client,
            run_dir=where,
            progress=False,
            report=look,
        )
    return found


def slope(values: list[float]) -> float:
    """Return the growth a round after the first `SETTLED`, by the median of slopes between points (Theil and Sen)."""
    settled = np.asarray(values[SETTLED // EVERY :])
    first, second = np.triu_indices(len(settled), 1)
    return float(np.median((settled[second] - settled[first]) / (EVERY * (second - first))))


def test_a_thousand_rounds_take_no_more_memory_tasks_files_or_threads(
    samples: Samples, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    found = measured(samples, tmp_path)
    slopes = {name: slope(values) for name, values in found.items()}
    for name, values in found.items():
        record_property(name, (values[0], values[SETTLED // EVERY], values[-1], slopes[name]))
    print({name: (values[0], values[SETTLED // EVERY], values[-1], slopes[name]) for name, values in found.items()})
    assert slopes["driver"] < MOST_GROWTH
    assert slopes["worker"] < MOST_GROWTH
    assert slopes["tasks"] == slopes["files"] == slopes["threads"] == 0
    assert max(found["tasks"]) < 2 * max(found["tasks"][:4])
