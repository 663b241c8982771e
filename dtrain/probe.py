r"""Measure what a local step and a round cost where a run would be trained: ``dtrain plan --probe``.

    T(1)               some rounds of one local step
    T(H)               some rounds of so many that a round takes about a second
    T(H) = H s + o     s seconds a step, o seconds beyond the steps

Real rounds are trained from the first parameters of the run, and thrown away: nothing is evaluated or written. The time
of a step holds its share of waiting for batches, the time beyond the steps what the round sends at this place.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, TypeAlias

from distributed import Client

from dtrain.algorithm.cadence import Costs
from dtrain.config.schema import StopConfig, TrainConfig
from dtrain.events import Reporter, RoundsMeasured
from dtrain.job import Job
from dtrain.prepare import ESTIMATE_UNITS, open_runner
from dtrain.rounds import initial_state, rounds
from dtrain.runtime.runner import Runner
from dtrain.stages import Limit, StageSeconds, limiting_stage
from dtrain.types import Parameters, RoundResult

ROUND_SECONDS = 1.0
"""What a long round takes, about."""
LENGTH_SECONDS = 4.0
"""After this time no more rounds of one length are measured than the fewest."""
PROBE_SECONDS = 20.0
"""After this time rounds are not made longer."""
FEWEST, MOST = 2, 20
"""Rounds of one length that are measured, after one that builds the models and opens the loaders."""
LONG_ENOUGH = 0.6
"""Share of the time wished for that long rounds take at least."""
FLATTEST = 0.02
"""Of long rounds, steps are taken to need this share at least: a difference that is smaller is noise."""
MOST_STEPS = 100_000
"""Of a round."""
NEVER = 1000
"""Rounds between evaluations and commits, and to the end: more than are measured."""

FORWARD = 1 / 3
"""Share of a step that evaluating as many samples takes: the backward pass takes about twice the forward pass."""

Measure: TypeAlias = Callable[[int], Sequence[RoundResult]]
"""Trains some rounds of so many local steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a step and a round took."""

    step: float
    """Seconds of a local step of one replica."""
    overhead: float
    """Seconds of a round beyond its steps."""
    reduce: float
    """Of them, seconds of the longest task that averages replicas."""
    waiting: float
    """Share of the local steps' time that they waited for batches."""
    fetch: float = 0.0
    decode: float = 0.0
    gather: float = 0.0
    """Shares of their time that the stages of the data took (`dtrain.data.load.counted`)."""
    local_steps: int
    """Of the longest rounds."""


def probe_job(
    job: Job, params: Parameters, *, client: Client | None = None, report: Reporter = lambda event: None
) -> Probe:
    """Train some rounds of a job where it would be trained, and return what they took.

    Parameters
    ----------
    job : Job
    params : Parameters
        Of round 0.
    client : distributed.Client, optional
        Takes precedence over ``cluster.scheduler``.
    report : callable
        Called with `RoundsMeasured`, and with the faults of the rounds.

    Raises
    ------
    Diverged
        Parameters are not finite any more, as they would be in the run.
    DtrainError
        Whatever would stop the run at its start.
    """
    config = probed(job.config)
    job, run_id = replace(job, config=config), uuid.uuid4().hex[:8]
    opened = open_runner(job, run_id, client=client, most_units=ESTIMATE_UNITS, on_progress=report)
    with opened as (runner, resolved):
        runner.on_progress = report
        replicas = resolved.plan.replicas
        state = initial_state(params, replicas, config)

        def measure(local_steps: int) -> Sequence[RoundResult]:
            train = config.train.model_copy(update={"local_steps": local_steps})
            longer = config.model_copy(update={"train": train})
            with closing(rounds(runner, state, longer, report, look_ahead=runner.look_ahead)) as results:
                measured = _some(results)
            report(RoundsMeasured(rounds=len(measured), local_steps=local_steps, seconds=_seconds(measured)))
            return measured

        return measured_by(measure, math.ceil(replicas / num_processes(runner)))


def num_processes(runner: Runner[Any]) -> int:
    """Return the number of processes that train replicas at once."""
    return 1 if runner.look_ahead == 0 else runner.num_workers  # 0: a round is trained where it is submitted


def probed(config: TrainConfig) -> TrainConfig:
    """Return the configuration of the rounds that are measured: local steps, and no end, evaluation or commit."""
    train = {"local_steps": 1, "sync_rounds": 0, "rounds": NEVER, "eval_every": NEVER}
    tables = {
        "train": config.train.model_copy(update=train),
        "run": config.run.model_copy(update={"commit_every": NEVER}),
        "stop": StopConfig(),
    }
    return config.model_copy(update=tables)


def _some(results: Iterable[RoundResult]) -> list[RoundResult]:
    """Return some rounds, without the first one."""
    began, measured = time.monotonic(), []
    for result in results:
        measured.append(result)
        late = time.monotonic() - began > LENGTH_SECONDS
        if len(measured) > MOST or (late and len(measured) > FEWEST):
            break
    return measured[1:]


def _seconds(measured: Sequence[RoundResult]) -> float:
    return median(result.seconds for result in measured)


def measured_by(measure: Measure, in_turn: int) -> Probe:
    """Measure short and long rounds, and fit ``T(H) = H s + o``.

    Parameters
    ----------
    measure : callable
        Trains some rounds of so many local steps.
    in_turn : int
        Replicas whose steps one process takes in turn.
    """
    began, short = time.monotonic(), _seconds(measure(1))
    goal = max(ROUND_SECONDS, 2 * short)  # of which at least half is steps
    steps = min(max(2, round(goal / short)), MOST_STEPS)
    results = measure(steps)
    while (long := _seconds(results)) < LONG_ENOUGH * goal and steps < MOST_STEPS:
        if time.monotonic() - began > PROBE_SECONDS:
            break
        step = max(long - short, FLATTEST * long) / (steps - 1)
        steps = min(steps + math.ceil((goal - long) / step), MOST_STEPS)
        results = measure(steps)
    step = max(long - short, FLATTEST * long) / (steps - 1)
    replicas = [contribution for result in results for contribution in result.contributions]
    seconds = sum(one.seconds for one in replicas)
    return Probe(
        step=step / in_turn,
        overhead=max(0.0, short - step),
        reduce=median(result.reduce_seconds for result in results),
        waiting=sum(one.waited for one in replicas) / seconds,
        fetch=sum(one.fetch for one in replicas) / seconds,
        decode=sum(one.decode for one in replicas) / seconds,
        gather=sum(one.gather for one in replicas) / seconds,
        local_steps=steps,
    )


def limit_of(probe: Probe, costs: Costs, local_steps: int, evaluated: float) -> Limit | None:
    """Return the stage that limits rounds of `local_steps`.

    Parameters
    ----------
    probe : Probe
    costs : Costs
    local_steps : int
    evaluated : float
        Samples that are evaluated for each that is trained on. Nothing is evaluated in a probe: what it takes is
        estimated (`FORWARD`).
    """
    steps = local_steps * costs.step
    reading = probe.fetch + probe.decode + probe.gather
    return limiting_stage(
        StageSeconds(
            fetch=probe.fetch * steps,
            decode=probe.decode * steps,
            gather=probe.gather * steps,
            model=(1 - reading) * steps,
            reduce=costs.overhead + costs.wire,
            evaluate=evaluated * steps * (reading + FORWARD * (1 - reading)),
        )
    )
