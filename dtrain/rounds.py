"""The loop: rounds in segments, submitted ahead, replayed when something is lost."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.algorithm.evaluate import Sums, in_order, values
from dtrain.algorithm.metrics.state import Metric
from dtrain.algorithm.pattern import first_outer
from dtrain.algorithm.plan import first_position, is_evaluated, pass_size, plan_round, position_after
from dtrain.algorithm.replica import fresh_replica
from dtrain.algorithm.stop import end_reason, metric_of
from dtrain.config.schema import TrainConfig
from dtrain.errors import Diverged, UnsuitableVariable
from dtrain.events import Reporter, SegmentReplayed
from dtrain.runtime.runner import Held, Outcome, Runner, SegmentLost, given_up
from dtrain.statefiles import evaluated_params
from dtrain.types import (
    Broadcast,
    History,
    Parameters,
    Position,
    RoundResult,
    RoundSummary,
    StoredState,
    TrainState,
)

MAX_REPLAYS = 3
"""Times that one segment is begun again before the run gives up."""
WORKERS_SECONDS = 120.0
"""While workers leave and join, the run does not give up before this time."""
MAX_PAUSE_SECONDS = 5.0
"""Pause between two attempts, so that workers can come back."""
LOOK_AHEAD = 1
"""Rounds that are submitted before the results of an earlier one have come back."""
COMMIT_SHARE = 0.02
"""With ``commit_every = "auto"``: the share of the time that commits may take."""
MAX_COMMIT_EVERY = 100
"""Bounds the rounds that a lost segment repeats, and the tasks that the scheduler remembers, up to the next evaluated
round."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where the states of a run may be files."""

    directory: Callable[[int], Path]
    """Makes a new directory for the files of a round, until it is committed."""
    commit: Callable[[RoundResult], None]
    """Commits a round that was yielded without its state before: then its segment was to be longer."""
    committed: Callable[[TrainState | StoredState], TrainState | StoredState]
    """Returns a state that has been committed since, with the files where they are now."""


def rounds(
    runner: Runner[Held],
    state: TrainState | StoredState,
    config: TrainConfig,
    report: Reporter,
    *,
    history: History = (),
    look_ahead: int | None = None,
    is_over: Callable[[], bool] = lambda: False,
    keeping: Keeping | None = None,
) -> Generator[RoundResult, None, None]:
    """Yield the rounds after `state`, segment by segment, up to the last one or a rule of ``[stop]``.

    A segment starts from a state that the driver holds, or that lies in files, and ends with the next one. Whatever is
    lost on the way is done again from its start: the same bits.

    Parameters
    ----------
    runner : Runner
    state : TrainState or StoredState
    config : TrainConfig
    report : callable
        Called with an event for each segment that is replayed.
    history : tuple of float or None
        ``stop.metric`` of the rounds up to `state`, as `stop_history` counts them.
    look_ahead : int, optional
        Rounds submitted ahead; it changes nothing but the speed.
    is_over : callable
        Whether the time of the run is over. Then no further round is begun, and the one that is being trained ends
        its segment: its result holds the state and an evaluation. A round that is replayed has been yielded before,
        and ends nothing.
    keeping : Keeping, optional
        Where states may be files. They must have been committed when the next round is asked for.
    """
    ahead = LOOK_AHEAD if look_ahead is None else look_ahead
    yielded, is_auto = state.round, config.run.commit_every == "auto"

    def ends_with(number: int) -> bool:
        if number > yielded and is_over():
            return True
        # the sooner there is a commit, the less the next loss costs
        return is_auto and is_evaluated(number, runner.spec.eval_every, config.train) and runner.has_lost_workers

    for result in _replayed(runner, state, config, report, history, ahead, ends_with, keeping):
        if result.round > yielded:
            yielded = result.round
            yield result
        elif result.state is not None and keeping is not None:
            keeping.commit(result)


def _replayed(
    runner: Runner[Held],
    state: TrainState | StoredState,
    config: TrainConfig,
    report: Reporter,
    history: History,
    ahead: int,
    ends_with: Callable[[int], bool],
    keeping: Keeping | None,
) -> Iterator[RoundResult]:
    """Yield the rounds of one segment after the other; those of a segment that is lost are yielded again."""
    wanted = config.run.commit_every
    every, replays, first_lost = first_cadence(wanted), 0, 0.0
    started, losses, begun = time.monotonic(), 0, Counter[int]()
    while state.round < config.train.rounds:
        began = time.monotonic()
        end = next_commit(state.round, every, wanted, runner.spec.eval_every)
        try:
            last = min(end, config.train.rounds)
            done = yield from _segment(runner, state, last, config, history, ahead, replays, begun, ends_with, keeping)
        except SegmentLost as lost:
            replays, first_lost, losses = replays + 1, first_lost if replays else began, losses + 1
            report(SegmentReplayed(round=state.round, reason=lost.reason))
            if replays > MAX_REPLAYS and not _may_recover(lost, time.monotonic() - first_lost):
                kept = "Committed rounds are safe."
                raise given_up(lost, f"Round {state.round + 1}", replays, kept) from lost
            time.sleep(_pause(lost, replays))
            every = 1  # where workers are lost, short segments get done
            continue
        if done[-1].stop is not None:
            return
        history, replays = (*history, *(result.stop_metric for result in done)), 0
        reached = done[-1].state
        assert reached is not None, "a segment ends with a state"
        state = reached if keeping is None else keeping.committed(reached)
        begun = Counter({number: times for number, times in begun.items() if number > state.round})
        if not isinstance(wanted, str):
            every = min(4 * every, wanted)
        elif runner.has_lost_workers:
            every, losses = 1, losses + 1
        else:
            now, seconds = time.monotonic(), sum(result.seconds for result in done)
            between = (now - started) / losses if losses else math.inf
            every = commit_cadence(now - began - seconds, seconds / len(done), len(done), between)


def _segment(
    runner: Runner[Held],
    state: TrainState | StoredState,
    end: int,
    config: TrainConfig,
    history: History,
    ahead: int,
    replays: int,
    begun: Counter[int],
    ends_with: Callable[[int], bool],
    keeping: Keeping | None,
) -> Generator[RoundResult, None, list[RoundResult]]:
    """Yield the rounds from `state` to `end`; round r + 1 is submitted against the handles of round r.

    The segment ends earlier with a round for which `ends_with` is true. `begun` counts how often each round was
    begun.
    """
    sizes = [pass_size(size, config.train) for size in runner.spec.plan.sizes]
    begun[state.round + 1] += 1  # its start may be lost, too
    held, position = runner.place(state, replays), state.position
    pending: deque[tuple[Position, Held]] = deque()
    done: list[RoundResult] = []
    first_commit = next_commit(state.round, 1, config.run.commit_every, runner.spec.eval_every)
    finished = time.monotonic()
    while not done or done[-1].state is None:
        while position.round < end and len(pending) <= ahead and not (pending and ends_with(pending[0][0].round)):
            plan = plan_round(position, sizes, config.train, runner.spec.eval_every)
            if plan.round > state.round + 1:
                begun[plan.round] += 1
            held, position = runner.submit(held, plan), position_after(plan, sizes)
            pending.append((position, held))
        reached, handles = pending.popleft()
        would_be_committed = bool(done) and done[-1].round >= first_commit
        outcome = runner.collect(handles, done[-1].round if would_be_committed else None)
        seconds, finished = time.monotonic() - finished, time.monotonic()
        metrics = _metrics(outcome.sums, outcome.ema_sums, config, runner.metrics)
        result = _result(reached.round, outcome, metrics, config, history)
        result = replace(result, seconds=seconds, retried=begun[reached.round] - 1)
        if result.stop is not None or reached.round == end or ends_with(reached.round):
            directory = None if keeping is None else keeping.directory
            result = _ended(result, runner.gather(handles, reached, directory), runner, config)
        history = (*history, result.stop_metric)
        done.append(result)
        yield result
    return done


def _ended(
    result: RoundResult, state: TrainState | StoredState, runner: Runner[Held], config: TrainConfig
) -> RoundResult:
    """Return the last round of a segment with its state, evaluated outside of the cadence if it has to be.

    Such an evaluation is shown and kept, and no rule of ``[stop]`` counts it.
    """
    if not is_evaluated(result.round, runner.spec.eval_every, config.train):
        model, ema = evaluated_params(state)
        ema_sums = None if ema is None else runner.evaluate(ema, "val")
        sums = runner.evaluate(model, "val")
        result = replace(result, metrics=_metrics(sums, ema_sums, config, runner.metrics))
    return replace(result, state=state)


def _metrics(
    sums: Sums | None, ema_sums: Sums | None, config: TrainConfig, metrics: Mapping[str, Metric]
) -> dict[str, float]:
    """Return loss and metrics of the model, and of the moving average of models."""
    wanted = config.train.metrics
    own = values(sums, wanted, metrics) if sums is not None else {}
    ema = values(ema_sums, wanted, metrics) if ema_sums is not None else {}
    return {f"val_{name}": value for name, value in own.items()} | {f"val_ema_{name}": v for name, v in ema.items()}


def _result(
    number: int, outcome: Outcome, metrics: dict[str, float], config: TrainConfig, history: History
) -> RoundResult:
    """Return what a round gave, and why it is the last one, if it is."""
    summary, each = outcome.summary, outcome.summary.contributions
    _check_finite(number, summary, config.average.max_rejected)
    averaged = [c for c in each if c.finite]
    if number == 1 and averaged and config.data.weight and not any(c.loss_count for c in averaged):
        raise UnsuitableVariable(
            f"Round 1: all of its {sum(c.samples for c in each):,} samples have weight 0 (data.weight = "
            f'"{config.data.weight}").',
            "Name a variable with positive values.",
        )
    train_loss = _ratio(in_order(c.loss_sum for c in averaged), in_order(c.loss_count for c in averaged))
    stop_metric = metric_of({"train_loss": train_loss, **metrics}, config)
    return RoundResult(
        round=number,
        train_loss=train_loss,
        metrics=metrics,
        samples=sum(c.samples for c in each),
        steps=sum(c.steps for c in each),
        seconds=0.0,
        bytes_reduced=summary.bytes_reduced,
        rejected=len(summary.rejected),
        retried=0,
        params_sha256=summary.params_sha256,
        replica_loss=tuple(_ratio(c.loss_sum, c.loss_count) for c in each),
        contributions=each,
        update_cosine=summary.update_cosine,
        reduce_seconds=summary.reduce_seconds,
        evaluate_seconds=sum(sums.seconds for sums in (outcome.sums, outcome.ema_sums) if sums is not None),
        stop_metric=stop_metric,
        stop=end_reason((*history, stop_metric), config),
    )


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def initial_state(params: Parameters, replicas: int, config: TrainConfig) -> TrainState:
    """Return the state of round 0."""
    return TrainState(
        position=first_position(replicas),
        model=params,
        broadcast=(Broadcast(params),) * replicas,
        replicas=(fresh_replica(),) * replicas,
        outer=(first_outer(config.average),) * replicas,
    )


# Commits --------------------------------------------------------------------------------------------------


def first_cadence(commit_every: int | str) -> int:
    """Return the rounds of the first segment: with "auto" one, so that a run is soon safe."""
    return 1 if isinstance(commit_every, str) else commit_every


def next_commit(finished: int, every: int, commit_every: int | str, eval_every: int) -> int:
    """Return the round of the next commit, which is an evaluated one.

    It is the first such round after `every` rounds or more. A fixed ``commit_every`` is rounded up to a multiple of
    `eval_every`, and no multiple of it is passed over, wherever a run was interrupted.

    >>> next_commit(7, 4, "auto", 3), next_commit(7, 4, 4, 1), next_commit(7, 4, 4, 3), next_commit(4, 1, 4, 1)
    (12, 8, 12, 5)
    """
    soonest = math.ceil((finished + every) / eval_every) * eval_every
    if isinstance(commit_every, str):
        return soonest
    period = math.ceil(commit_every / eval_every) * eval_every
    return min(soonest, (finished // period + 1) * period)


def commit_cadence(overhead_seconds: float, round_seconds: float, every: int, loss_seconds: float = math.inf) -> int:
    """Return after how many rounds to commit so that commits take `COMMIT_SHARE` of the time.

    Where work is often lost, commits come more often: sqrt(2 * overhead * time between two losses) apart, where
    commits and what losses repeat cost the least together (Young, 1974, doi:10.1145/361147.361115).

    Parameters
    ----------
    overhead_seconds : float
        What the last segment took beyond its rounds: gathering, writing and placing a state.
    round_seconds : float
        Mean of its rounds.
    every : int
        Rounds of the last segment; the next one has at most 4 times as many.
    loss_seconds : float
        Mean time between two losses so far.

    >>> commit_cadence(0.1, 1.0, 4), commit_cadence(1.0, 0.01, 1), commit_cadence(0.0, 1.0, 8)
    (5, 4, 1)
    >>> commit_cadence(0.5, 0.1, 80, 100.0)
    100
    >>> commit_cadence(0.5, 0.1, 80, 4.0)
    20
    """
    apart = max(overhead_seconds, 0.0) / COMMIT_SHARE
    if math.isfinite(loss_seconds):
        apart = min(apart, math.sqrt(2 * max(overhead_seconds, 0.0) * loss_seconds))
    return max(1, min(math.ceil(apart / max(round_seconds, 1e-6)), 4 * every, MAX_COMMIT_EVERY))


# Failures -------------------------------------------------------------------------------------------------


def _check_finite(number: int, summary: RoundSummary, allowed: float) -> None:
    cure, seen = "Use a smaller learning rate, train.warmup_steps or train.clip_norm; committed rounds are safe.", ""
    if values := sum(c.non_finite for c in summary.contributions if not c.finite):
        seen = f" Their batches held {values:,} NaN or infinite values of the data."
        cure = 'Set data.non_finite = "error" to see which chunks hold them, or replace them in data.transform.'
    rejected, count = summary.rejected, len(summary.contributions)
    if len(rejected) > allowed * count or len(rejected) == count:
        raise Diverged(
            f"Round {number}: {len(rejected)} of {count} replicas ended with parameters that are not finite "
            f"(replica {', '.join(map(str, rejected[:5]))}); average.max_rejected = {allowed:g}.{seen}",
            cure,
        )
    if not summary.finite:
        raise Diverged(f"Round {number}: the averaged parameters are not finite.", cure)


def _pause(lost: SegmentLost, replays: int) -> float:
    """Return the seconds to wait for workers to come back; at first none, if others are left."""
    waits = lost.gone and (not lost.left or replays > MAX_REPLAYS)
    return min(replays - 1, MAX_PAUSE_SECONDS) if waits else 0.0


def _may_recover(lost: SegmentLost, seconds: float) -> bool:
    """Whether a segment that was lost too often may still succeed: workers leave and join, and no task ends them."""
    return lost.gone and not lost.killed and not lost.full and seconds < WORKERS_SECONDS
