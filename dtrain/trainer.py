"""`train`: the loop of rounds, kept in a run directory; and `train_rounds`, the loop alone."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import Client

from dtrain.algorithm.stop import metric_of, stop_reason
from dtrain.checkpoint import commit_round, newest_state, prune, sweep
from dtrain.config import TrainConfig
from dtrain.data.plan.partition import JointPlan
from dtrain.data.samples import Samples
from dtrain.errors import DataChanged, DiskFull, RunDamaged, Stopped
from dtrain.events import (
    ClusterOpening,
    Event,
    ReplicaRejected,
    Reporter,
    RoundCommitted,
    RoundDamaged,
    RoundFinished,
    RunFinished,
    RunStarted,
)
from dtrain.job import Job, Resolved, job_from_python, open_runner
from dtrain.lock import locked
from dtrain.report.history import read_rows
from dtrain.report.journal import HISTORY, cut_history, journal
from dtrain.rounds import initial_state, iterate_rounds, stop_metric
from dtrain.run import Run, next_run_directory, read_plan, run_directory, with_scheduler, write_run
from dtrain.runtime.runner import Runner
from dtrain.types import RoundResult, TrainState


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
        scheduler = job.config.cluster.scheduler if client is None else str(client.scheduler.address)
        tell(ClusterOpening(run=str(run), scheduler=scheduler))
        with open_runner(job, uuid.uuid4().hex[:8], known=known, client=client, on_progress=tell) as (runner, resolved):
            plan = resolved.plan
            if state is None:
                state = initial_state(runner, job, plan)
            write_run(run, job, resolved)
            tell(_started(run, state, job, plan, runner))
            runner.on_progress = tell
            for result in iterate_rounds(runner, state, job, plan, both, before=before):
                for contribution in result.contributions:
                    if not contribution.finite:
                        both(ReplicaRejected(round=result.round, replica=contribution.replica))
                both(RoundFinished(result))
                before.append(stop_metric(result, job))
                if result.state is not None:
                    _commit(opened, result.state, plan, both)
                    if deadline is not None and time.monotonic() > deadline and _ended(before, job.config) is None:
                        tell(_finished(opened, "max_time"))
                        raise Stopped(f"--max-time is over after round {result.round}.", "Run it again to continue.")
    tell(_finished(opened, _ended(before, job.config)))
    return opened


def _resume(run: Path, job: Job, tell: Reporter) -> tuple[Resolved | None, TrainState[Any] | None]:
    """Return the plan and the newest good state of a run that was started before; cut its history back to it."""
    known = read_plan(run, job)
    sweep(run)
    state, fingerprint, damaged = newest_state(run)
    if known is not None and state is not None and fingerprint != known.plan.fingerprint:
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


def _commit(run: Run, state: TrainState[Any], plan: JointPlan, tell: Reporter) -> None:
    started = time.monotonic()
    written = commit_round(run.directory, state, plan.fingerprint)
    prune(run.directory, run.config.run.keep, run.best_round)
    tell(RoundCommitted(round=state.round, bytes=written, seconds=time.monotonic() - started))


def _started(run: Path, state: TrainState[Any], job: Job, plan: JointPlan, runner: Runner) -> RunStarted:
    return RunStarted(
        run=str(run),
        round=state.round,
        rounds=job.config.train.rounds,
        replicas=plan.replicas,
        samples=sum(partition.num_samples for partition in plan.partitions()),
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
    with open_runner(job, uuid.uuid4().hex[:8], client=client) as (runner, resolved):
        plan = resolved.plan
        yield from iterate_rounds(runner, initial_state(runner, job, plan), job, plan, lambda event: None)


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
