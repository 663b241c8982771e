"""The loop: rounds in segments, submitted ahead, replayed when something is lost."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain.algorithm.evaluate import values
from dtrain.algorithm.params import empty_inner_state
from dtrain.algorithm.plan import plan_round
from dtrain.algorithm.stop import metric_of, stop_reason
from dtrain.checkpoint import load_tensor_file
from dtrain.data.plan.partition import JointPlan
from dtrain.errors import ClusterLost, Diverged, OutOfMemory
from dtrain.events import Reporter, SegmentReplayed
from dtrain.job import Job
from dtrain.report.history import row_of
from dtrain.runtime.runner import Runner, SegmentLost
from dtrain.types import Contribution, Cursor, RoundResult, RoundSummary, TrainState

MAX_REPLAYS = 3
"""Times that one segment is begun again before the run gives up."""
LOOK_AHEAD = 1
"""Rounds that are submitted before the results of an earlier one have come back."""
COMMIT_SHARE = 0.02
"""With ``commit_every = "auto"``: the share of the time that commits may take."""
MAX_COMMIT_EVERY = 100
"""Bounds the rounds that a lost segment repeats, and the tasks that the scheduler remembers."""


def iterate_rounds(
    runner: Runner,
    state: TrainState[Any],
    job: Job,
    plan: JointPlan,
    report: Reporter,
    *,
    before: Sequence[float | None] = (),
    look_ahead: int | None = None,
) -> Iterator[RoundResult]:
    """Yield the rounds after `state`, segment by segment, until the last one or a rule of ``[stop]``.

    A segment is rooted in a state that the driver holds, and ends with the next one. Whatever is lost on the way
    is done again from its root: the same bits.

    Parameters
    ----------
    runner : Runner
    state : TrainState
        Held by the driver.
    job : Job
    plan : JointPlan
    report : callable
        Is told what is lost and replayed.
    before : sequence of float or None
        ``stop.metric`` of the rounds before.
    look_ahead : int, optional
        Rounds submitted ahead; it changes nothing but the speed.
    """
    ahead = LOOK_AHEAD if look_ahead is None else look_ahead
    every, yielded, replays = first_cadence(job.config.run.commit_every), state.round, 0
    while state.round < job.config.train.rounds:
        end = min(job.config.train.rounds, next_commit(state.round, every, job.config.run.commit_every))
        began, root, done = time.monotonic(), state, list[RoundResult]()
        try:
            for result in _segment(runner, root, end, job, plan, before, ahead):
                done.append(result)
                if result.round > yielded:
                    yielded = result.round
                    yield replace(result, retried=replays)
                if result.stop is not None:
                    return
        except SegmentLost as lost:
            replays += 1
            report(SegmentReplayed(round=root.round, reason=lost.reason))
            if replays > MAX_REPLAYS:
                raise _given_up(lost, root.round) from lost
            continue
        replays, before = 0, (*before, *(stop_metric(result, job) for result in done))
        state = done[-1].state or state
        seconds = sum(result.seconds for result in done)
        if job.config.run.commit_every == "auto":
            every = commit_cadence(time.monotonic() - began - seconds, seconds / len(done), every)


def first_cadence(commit_every: int | str) -> int:
    """Return the rounds of the first segment: with "auto" one, so that a run is soon safe."""
    return 1 if isinstance(commit_every, str) else commit_every


def next_commit(finished: int, every: int, commit_every: int | str) -> int:
    """Return the round of the next commit: a multiple of a fixed ``commit_every``, else `every` rounds on."""
    return finished + every if isinstance(commit_every, str) else (finished // every + 1) * every


def commit_cadence(overhead_seconds: float, round_seconds: float, every: int) -> int:
    """Return after how many rounds to commit so that commits take `COMMIT_SHARE` of the time.

    Parameters
    ----------
    overhead_seconds : float
        What the last segment took beyond its rounds: gathering, writing and placing a state.
    round_seconds : float
        Mean of its rounds.
    every : int
        Rounds of the last segment; the next one has at most 4 times as many.

    >>> commit_cadence(0.1, 1.0, 4), commit_cadence(1.0, 0.01, 1), commit_cadence(0.0, 1.0, 8)
    (5, 4, 1)
    """
    wanted = math.ceil(overhead_seconds / (COMMIT_SHARE * max(round_seconds, 1e-6)))
    return max(1, min(wanted, 4 * every, MAX_COMMIT_EVERY))


def _segment(
    runner: Runner,
    state: TrainState[Any],
    end: int,
    job: Job,
    plan: JointPlan,
    before: Sequence[float | None],
    look_ahead: int,
) -> Iterator[RoundResult]:
    """Yield the rounds from `state` to `end`; round r + 1 is submitted against the handles of round r."""
    sizes = [partition.num_samples for partition in plan.partitions()]
    submitted = runner.place(state)
    pending: deque[tuple[TrainState[Any], Any, Any]] = deque()
    finished = time.monotonic()
    while submitted.round < end or pending:
        while submitted.round < end and len(pending) <= look_ahead:
            submitted, summary = runner.submit_round(submitted, plan_round(submitted, sizes, job.config.train))
            pending.append((submitted, summary, runner.submit_evaluation(submitted.params[0], "val")))
        current, *handles = pending.popleft()
        summary, sums = runner.collect(handles)
        _check_finite(current.round, summary, job.config.average.max_rejected)
        found = values(sums, job.config.train.metrics) if sums is not None else {}
        seconds, finished = time.monotonic() - finished, time.monotonic()
        result = _result(current.round, summary, {f"val_{name}": value for name, value in found.items()}, seconds)
        before = (*before, stop_metric(result, job))
        result = replace(result, stop=stop_reason(before, job.config))
        if result.stop is not None or current.round == end:
            yield replace(result, state=runner.gather(current))
            return
        yield result


def stop_metric(result: RoundResult, job: Job) -> float | None:
    """Return ``stop.metric`` of a round."""
    return metric_of(row_of(result), job.config)


def _result(
    number: int,
    summary: RoundSummary,
    metrics: dict[str, float],
    seconds: float,
) -> RoundResult:
    each = summary.contributions
    samples = sum(c.samples for c in each)
    return RoundResult(
        round=number,
        train_loss=sum(c.loss_sum for c in each) / samples,
        metrics=metrics,
        samples=samples,
        steps=sum(c.steps for c in each),
        seconds=seconds,
        bytes_reduced=summary.bytes_reduced,
        rejected=len(_rejected(summary)),
        retried=0,
        params_sha256=summary.params_sha256,
        replica_loss=tuple(c.loss_sum / c.samples for c in each),
        contributions=each,
        state=None,
        stop=None,
    )


def _rejected(summary: RoundSummary) -> list[Contribution]:
    return [c for c in summary.contributions if not c.finite]


def _check_finite(number: int, summary: RoundSummary, allowed: float) -> None:
    cure = "Use a smaller learning rate, train.warmup_steps or train.clip_norm; committed rounds are safe."
    rejected, count = _rejected(summary), len(summary.contributions)
    if len(rejected) > allowed * count or len(rejected) == count:
        names = ", ".join(str(c.replica) for c in rejected[:5])
        raise Diverged(
            f"Round {number}: {len(rejected)} of {count} replicas ended with parameters that are not finite "
            f"(replica {names}); average.max_rejected = {allowed:g}.",
            cure,
        )
    if not summary.finite:
        raise Diverged(f"Round {number}: the averaged parameters are not finite.", cure)


def _given_up(lost: SegmentLost, committed: int) -> Exception:
    if lost.killed:
        return OutOfMemory(
            f"Tasks of round {committed + 1} took down their workers {MAX_REPLAYS + 1} times, most likely for want of "
            f"memory: {lost.reason}",
            "Give the workers more memory (cluster.memory), or use a smaller train.batch_size or fewer workers.",
        )
    return ClusterLost(
        f"Round {committed + 1} was lost {MAX_REPLAYS + 1} times in a row: {lost.reason}",
        "Committed rounds are safe. Run the same command again to continue.",
    )


def initial_state(runner: Runner, job: Job, plan: JointPlan) -> TrainState[Any]:
    """Return the state of round 0: what the user's function builds, or the tensors of ``train.init``."""
    initial = runner.initialise()
    params = initial.params
    if job.config.train.init:
        params = load_tensor_file(Path(job.base, job.config.train.init).expanduser(), params.layout)
    count = plan.replicas
    return TrainState(
        round=0,
        params=(params,) * count,
        inner=(initial.inner,) * count,
        outer=() if job.config.average.outer is None else (empty_inner_state(),),
        cursors=(Cursor(0, 0),) * count,
        steps=(0,) * count,
    )
