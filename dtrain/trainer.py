"""The loop: a generator of rounds, and `train` around it, which keeps them in a run directory."""

from __future__ import annotations

import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import Client

from dtrain.algorithm.evaluate import values
from dtrain.algorithm.params import empty_inner_state
from dtrain.algorithm.plan import plan_round
from dtrain.algorithm.stop import metric_of, stop_reason
from dtrain.checkpoint import commit_round, load_tensor_file, newest_state, prune, sweep
from dtrain.config import TrainConfig
from dtrain.data.partition import DataPlan, train_partitions
from dtrain.data.samples import Samples
from dtrain.errors import ClusterLost, DataChanged, DiskFull, Diverged, OutOfMemory, RunDamaged, Stopped
from dtrain.events import (
    Event,
    ReplicaRejected,
    Reporter,
    RoundCommitted,
    RoundDamaged,
    RoundFinished,
    RunFinished,
    RunStarted,
    SegmentReplayed,
)
from dtrain.job import Job, job_from_python, open_runner
from dtrain.lock import locked
from dtrain.report.history import read_rows, row_of
from dtrain.report.journal import HISTORY, cut_history, journal
from dtrain.run import Run, next_run_directory, read_plan, run_directory, with_scheduler, write_run
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


# The loop -----------------------------------------------------------------------------------------------


def iterate_rounds(
    runner: Runner,
    state: TrainState[Any],
    job: Job,
    plan: DataPlan,
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
    plan : DataPlan
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
        replays, before = 0, (*before, *(_metric(result, job) for result in done))
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
    plan: DataPlan,
    before: Sequence[float | None],
    look_ahead: int,
) -> Iterator[RoundResult]:
    """Yield the rounds from `state` to `end`; round r + 1 is submitted against the handles of round r."""
    sizes = [partition.num_samples for partition in train_partitions(plan)]
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
        before = (*before, _metric(result, job))
        result = replace(result, stop=stop_reason(before, job.config))
        if result.stop is not None or current.round == end:
            yield replace(result, state=runner.gather(current))
            return
        yield result


def _metric(result: RoundResult, job: Job) -> float | None:
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


def _initial_state(runner: Runner, job: Job, plan: DataPlan) -> TrainState[Any]:
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


# Around it ----------------------------------------------------------------------------------------------


def train_job(
    job: Job,
    run: Path,
    *,
    client: Client | None = None,
    report: Reporter | None = None,
    max_seconds: float | None = None,
) -> Run:
    """Train a job in a run directory, or continue where its newest commit ended; idempotent.

    Parameters
    ----------
    job : Job
    run : path
        The run's directory; made if absent.
    client : distributed.Client, optional
        Takes precedence over ``cluster.scheduler``.
    report : callable, optional
        Is told every event.
    max_seconds : float, optional
        Stop after the round that is being trained when this time is over.

    Raises
    ------
    RunConflict, RunLocked
        The run exists with other configuration or code, or is being trained.
    Stopped
        `max_seconds` are over; the same call continues.
    DtrainError
        As the errors of this package name them.
    """
    _make_directory(run)
    tell = report or (lambda event: None)
    both = _both(run, tell)
    deadline = time.monotonic() + max_seconds if max_seconds is not None else None
    opened = Run(run, job.config, job.base, job.functions)
    with locked(run):
        known, state = _resume(run, job, both)
        before = [metric_of(row, job.config) for row in opened.rows]
        ended = _ended(before, job.config)
        if known is not None and state is not None and ended is not None:
            write_run(run, job, known)
            tell(_finished(opened, ended))
            return opened
        with open_runner(job, uuid.uuid4().hex[:8], plan=known, client=client) as (runner, plan):
            if state is None:
                state = _initial_state(runner, job, plan)
            write_run(run, job, plan)
            tell(_started(run, state, job, plan, runner))
            runner.on_progress = tell
            for result in iterate_rounds(runner, state, job, plan, both, before=before):
                for contribution in result.contributions:
                    if not contribution.finite:
                        both(ReplicaRejected(round=result.round, replica=contribution.replica))
                both(RoundFinished(result))
                before.append(_metric(result, job))
                if result.state is not None:
                    _commit(opened, result.state, plan, both)
                    if deadline is not None and time.monotonic() > deadline and _ended(before, job.config) is None:
                        tell(_finished(opened, "max_time"))
                        raise Stopped(f"--max-time is over after round {result.round}.", "Run it again to continue.")
    tell(_finished(opened, _ended(before, job.config)))
    return opened


def _resume(run: Path, job: Job, tell: Reporter) -> tuple[DataPlan | None, TrainState[Any] | None]:
    """Return the plan and the newest good state of a run that was started before; cut its history back to it."""
    known = read_plan(run, job)
    sweep(run)
    state, fingerprint, damaged = newest_state(run)
    if known is not None and state is not None and fingerprint != known.fingerprint:
        raise DataChanged(f"{run}: plan.json is not the plan that round {state.round} was trained with.")
    for number, reason in damaged:
        tell(RoundDamaged(round=number, reason=reason))
    cut_history(run, state.round if state is not None else 0)
    if state is not None and [row["round"] for row in read_rows(run / HISTORY)] != list(range(1, state.round + 1)):
        raise RunDamaged(
            f"{run / HISTORY} does not hold the {state.round} rounds that are committed.",
            "Restore it from a copy, or start again under another --run NAME.",
        )
    return known, state


def _ended(values: Sequence[float | None], config: TrainConfig) -> Any:
    """Return why a run with these values of ``stop.metric`` is complete, or None."""
    return stop_reason(values, config) or ("rounds" if len(values) >= config.train.rounds else None)


def _both(run: Path, tell: Reporter) -> Reporter:
    def both(event: Event) -> None:
        journal(run, event)
        tell(event)

    return both


def _make_directory(run: Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskFull(
            f"{run} cannot be made: {error.strerror}.", "Set run.dir to a place that you may write to."
        ) from error


def _commit(run: Run, state: TrainState[Any], plan: DataPlan, tell: Reporter) -> None:
    started = time.monotonic()
    written = commit_round(run.directory, state, plan.fingerprint)
    prune(run.directory, run.config.run.keep, run.best_round)
    tell(RoundCommitted(round=state.round, bytes=written, seconds=time.monotonic() - started))


def _started(run: Path, state: TrainState[Any], job: Job, plan: DataPlan, runner: Runner) -> RunStarted:
    return RunStarted(
        run=str(run),
        round=state.round,
        rounds=job.config.train.rounds,
        replicas=plan.replicas,
        samples=sum(partition.num_samples for partition in train_partitions(plan)),
        workers=runner.num_workers,
        dashboard=runner.dashboard,
    )


def _finished(run: Run, reason: Any) -> RunFinished:
    last = run.rows[-1]
    return RunFinished(
        reason=reason,
        rounds=last["round"],
        params_sha256=last["params_sha256"],
        val_loss=last.get("val_loss"),
        run=str(run.directory),
    )


# Python -------------------------------------------------------------------------------------------------


def train(
    model: Callable[..., Any] | str,
    samples: Samples,
    *,
    train: Mapping[str, Any] | None = None,
    average: Mapping[str, Any] | None = None,
    stop: Mapping[str, Any] | None = None,
    config: TrainConfig | None = None,
    model_args: Mapping[str, Any] | None = None,
    cluster: Client | str = "local",
    run: str | None = None,
    run_dir: str | Path = "runs",
    progress: bool = True,
    report: Reporter | None = None,
) -> Run:
    """Train a model and return the run.

    Parameters
    ----------
    model : callable or str
        Function that returns a ``torch.nn.Module``, or its name as ``module:function``. It may be defined in a
        notebook.
    samples : Samples
        From `open_samples`.
    train, average, stop : mapping, optional
        Tables of the configuration, for example ``train=dict(loss="cross_entropy", rounds=20)``.
    config : TrainConfig, optional
        Instead of the tables.
    model_args : mapping, optional
        Keyword arguments of the function.
    cluster : distributed.Client or str
        A client, an address, ``local`` (default) or ``serial``.
    run : str, optional
        Name of the run; the same name continues it. By default the next free number.
    run_dir : path
        Where runs are kept, relative to the working directory.
    progress : bool
        Whether to show progress on stderr.
    report : callable, optional
        Is told every event (`dtrain.events`), besides the progress.

    Returns
    -------
    Run

    Raises
    ------
    DtrainError
        As the classes of `dtrain.errors` say.
    """
    job, client = _python_job(model, samples, config, model_args, cluster, train=train, average=average, stop=stop)
    placed = replace(job, config=job.config.model_copy(update={"run": _run_table(job.config, run_dir)}))
    directory = next_run_directory(placed, Path.cwd()) if run is None else Path(run_directory(placed, run))
    if not progress:
        return train_job(placed, directory, client=client, report=report)
    from dtrain.report.progress import terminal_progress

    with terminal_progress() as show:
        return train_job(placed, directory, client=client, report=_chained(show, report))


def train_rounds(
    model: Callable[..., Any] | str,
    samples: Samples,
    *,
    train: Mapping[str, Any] | None = None,
    average: Mapping[str, Any] | None = None,
    config: TrainConfig | None = None,
    model_args: Mapping[str, Any] | None = None,
    cluster: Client | str = "local",
) -> Iterator[RoundResult]:
    """Yield the rounds of a training that is kept nowhere: the loop is yours to stop.

    Parameters are as those of `train`. Each `RoundResult` holds the losses and, at commits, the whole `TrainState`.

    Examples
    --------
    >>> for result in train_rounds(build, samples, train=dict(loss="mse")):  # doctest: +SKIP
    ...     if result.metrics["val_loss"] < 0.1:
    ...         break
    """
    job, client = _python_job(model, samples, config, model_args, cluster, train=train, average=average)
    with open_runner(job, uuid.uuid4().hex[:8], client=client) as (runner, plan):
        yield from iterate_rounds(runner, _initial_state(runner, job, plan), job, plan, lambda event: None)


def _python_job(
    model: Callable[..., Any] | str,
    samples: Samples,
    config: TrainConfig | None,
    model_args: Mapping[str, Any] | None,
    cluster: Client | str,
    **tables: Mapping[str, Any] | None,
) -> tuple[Job, Client | None]:
    given = {name: dict(table) for name, table in tables.items() if table}
    job = job_from_python(model, samples, given, config)
    if model_args:
        job = replace(job, config=job.config.model_copy(update={"model_args": dict(model_args)}))
    if isinstance(cluster, str):
        return replace(job, config=with_scheduler(job.config, cluster)), None
    return job, cluster


def _run_table(config: TrainConfig, run_dir: str | Path) -> Any:
    return config.run.model_copy(update={"dir": str(Path(run_dir).expanduser().absolute())})


def _chained(first: Reporter, second: Reporter | None) -> Reporter:
    def both(event: Event) -> None:
        first(event)
        if second is not None:
            second(event)

    return both
