"""What runs in the processes of elastic.py: the log of a worker, and a training that drops what a lost worker did.

A worker loads this module first (``dask worker --preload elastic_peers``): it imports what a training task needs, and
writes when it is ready and when each training task begins and ends to a file of its own, so that the lines survive a
SIGKILL.

As a program it trains the job of a dtrain.toml on a cluster, as torchft's LocalSGD treats a failure (torchft,
local_sgd.py: "If any error occurs, or a worker fails between syncs, sync_every steps will be discarded and a new quorum
will be computed on the next step"):

    round       the documented rule: the parameters go back to the last average, and the samples of the round are
                never trained
    replicas    what its newer code does if the failure is known before the all-reduce, since the quorum is taken
                there: those who are left average, and the samples of the lost replicas are never trained

In both the replicas belong to workers: while one is absent the others train alone, and its replicas go on with its
successor, from the newest average. The steps and the average are dtrain's own, so that a run without a failure gives
the bits of dtrain. It is at its best: a failure is noticed within `POLL_SECONDS`, a new quorum costs nothing, and the
driver keeps the state of every inner optimizer. It ends once as many samples are trained as the job has.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import json
import os
import time
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  torch.optim imports it with its first optimizer: two seconds of the first task
from distributed import Client, Future, Worker, WorkerPlugin

from dtrain.algorithm.params import params_sha256
from dtrain.algorithm.plan import cursor_after, pass_size, plan_round
from dtrain.job import Job
from dtrain.prepare import open_runner
from dtrain.rounds import initial_state
from dtrain.runtime import plugins, remote
from dtrain.types import Broadcast, LocalTask, Position, ReplicaState

POLL_SECONDS = 0.05


# The log of a worker -------------------------------------------------------------------------------------------------


class TaskLog(WorkerPlugin):  # type: ignore[misc]
    """Writes a line when a training task begins, and when it ends."""

    name = "elastic-log"

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", buffering=1)

    def write(self, *words: str) -> None:
        self.file.write(f"{time.monotonic()!r} {' '.join(words)}\n")

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        if str(key).startswith("dtrain-train-"):
            if finish == "executing":
                self.write("begin", str(key))
            elif start == "executing":
                self.write("end", str(key))


async def dask_setup(worker: Worker) -> None:
    """Log the tasks of a worker: Dask calls this before the worker registers with the scheduler."""
    log = TaskLog(Path(os.environ["ELASTIC_LOGS"]) / f"{os.getpid()}.log")
    await worker.plugin_add(log)
    log.write("ready")


# Training that drops -------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """The state of the run, all of it on the driver."""

    position: Position
    broadcast: Broadcast
    replicas: list[ReplicaState]
    trained: int = 0
    """Samples."""
    lost: int = 0
    dropped: int = 0
    """Rounds, or rounds that lack replicas."""
    homes: dict[int, str] = field(default_factory=dict)
    """By replica, its worker."""


def settle(training: Training, workers: set[str], share: int) -> list[int]:
    """Give replicas without a worker to workers without replicas, `share` to each; return those that can train."""
    homes = {k: at for k, at in training.homes.items() if at in workers}
    free = [k for k in range(len(training.replicas)) if k not in homes]
    for at in sorted(workers - set(homes.values())):
        homes |= dict.fromkeys(free[:share], at)
        free = free[share:]
    training.homes = homes
    return sorted(homes)


def wait(client: Client, futures: dict[int, Future], homes: dict[int, str]) -> set[int]:
    """Wait until the tasks of all replicas are done; return the replicas whose worker is gone, as soon as one is."""
    while not all(future.done() for future in futures.values()):
        there = client.nthreads()
        if lost := {k for k in futures if homes[k] not in there}:
            return lost
        time.sleep(POLL_SECONDS)
    return set()


def gather(client: Client, futures: dict[int, Future], homes: dict[int, str]) -> dict[int, Any]:
    """Return the results of some replicas, or nothing if a worker is lost with them: Dask itself would wait for it."""

    async def gathered() -> list[Any]:
        values: list[Any] = await client.gather(list(futures.values()), direct=True)  # from the workers
        return values

    got = asyncio.run_coroutine_threadsafe(gathered(), client.loop.asyncio_loop)
    try:
        while not concurrent.futures.wait([got], timeout=POLL_SECONDS).done:
            if any(homes[k] not in client.nthreads() for k in futures):
                return {}
        return dict(zip(futures, got.result(), strict=True))
    except Exception:  # the next look at the workers tells which is lost
        time.sleep(POLL_SECONDS)
        return {}
    finally:
        got.cancel()


def train_round(client: Client, job: Job, run_id: str, training: Training, tasks: list[LocalTask], rule: str) -> None:
    """Train one round of the replicas that have a task."""
    name = f"{run_id}-{uuid.uuid4().hex[:8]}"
    futures = {
        task.replica: client.submit(
            remote.train_replica,
            run_id,
            task,
            [training.broadcast],
            training.replicas[task.replica],
            None,
            key=f"dtrain-train-r{task.round:05d}-k{task.replica}-{name}",
            workers=[training.homes[task.replica]],
            resources=plugins.RESOURCE,
        )
        for task in tasks
    }
    samples, lost = {task.replica: task.num_samples for task in tasks}, set[int]()
    values: dict[int, Any] = {}
    while futures.keys() - values.keys() - lost:
        waited = {k: one for k, one in futures.items() if k not in values and k not in lost}
        if gone := wait(client, waited, training.homes):
            if rule == "round":
                lost = set(futures)
                break
            lost |= gone
            continue
        values |= gather(client, waited, training.homes)
    for future in futures.values():
        future.release()
    training.lost += sum(samples[k] for k in lost)
    training.dropped += bool(lost)
    if values:
        kept = sorted(values)
        combined = remote.combine_replicas(
            job.config.average, training.broadcast, None, [values[k] for k in kept], (), 1.0
        )
        training.broadcast = combined.broadcast
        for k in kept:
            training.replicas[k] = remote.state_of(values[k])
            training.trained += samples[k]


def train(client: Client, job: Job, rule: str, workers: int) -> dict[str, Any]:
    """Train until as many samples are trained as the job has, and return what came of it."""
    run_id = uuid.uuid4().hex[:8]
    with open_runner(job, run_id, client=client) as (runner, resolved):
        params, replicas = runner.initialise().params, resolved.plan.replicas
        state = initial_state(params, replicas, job.config)
        training = Training(state.position, state.broadcast[0], list(state.replicas))
        sizes = [pass_size(size, job.config.train) for size in resolved.plan.sizes]
        goal = job.config.train.rounds * sum(
            task.num_samples for task in plan_round(state.position, sizes, job.config.train).tasks
        )
        attempted = None
        while training.trained < goal:
            members = settle(training, set(client.nthreads()), replicas // workers)
            if not members:
                time.sleep(POLL_SECONDS)
                continue
            tasks = [plan_round(training.position, sizes, job.config.train).tasks[k] for k in members]
            train_round(client, job, run_id, training, tasks, rule)
            training.position = after(training.position, tasks, sizes)
            if training.position.round == job.config.train.rounds:
                attempted = training.trained
    return {
        "rounds": training.position.round,
        "trained": training.trained,
        "trained_after_all_rounds": attempted,
        "lost": training.lost,
        "dropped": training.dropped,
        "params_sha256": params_sha256(training.broadcast.params),
    }


def after(position: Position, tasks: list[LocalTask], sizes: list[int]) -> Position:
    """Return the position after a round: the data of those who took part are passed over, trained or not."""
    cursors, steps = list(position.cursors), list(position.steps)
    for task in tasks:
        cursors[task.replica] = cursor_after(task, sizes[task.replica])
        steps[task.replica] += task.num_steps
    return replace(position, round=position.round + 1, cursors=tuple(cursors), steps=tuple(steps))


def main() -> None:
    from dtrain_cli.arguments import load_job

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("rule", choices=["round", "replicas"])
    parser.add_argument("--scheduler", required=True, help="scheduler file")
    parser.add_argument("--workers", type=int, required=True, help="at the start")
    options = parser.parse_args()
    job = load_job(options.config, None, options.scheduler)
    with Client(scheduler_file=options.scheduler) as client:
        print(json.dumps({"event": "done", **train(client, job, options.rule, options.workers)}), flush=True)


if __name__ == "__main__":
    main()
