"""`train`: the loop of rounds, kept in a run directory; and `train_rounds`, the loop alone."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

from distributed import Client

from dtrain.algorithm.stop import end_reason, higher_is_better
from dtrain.asking import has_anomalies
from dtrain.calls import contradiction, is_given, python_job, with_trackers
from dtrain.checkpoint import commit_round, uncommitted
from dtrain.committed import committed_rounds, newest_round, prune, sweep
from dtrain.config.compare import without_secrets
from dtrain.config.schema import RunConfig, TrainConfig
from dtrain.config.values import flat_values
from dtrain.data.samples import Samples
from dtrain.description import plan_sha256
from dtrain.directory import made_directory, next_run_directory, read_plan, run_directory, write_run
from dtrain.display import shown
from dtrain.errors import DataChanged, Interrupted, Stopped
from dtrain.events import (
    ChunksFilled,
    ClusterOpening,
    Event,
    ParametersLoaded,
    ReplicaRejected,
    Reporter,
    RoundCommitted,
    RoundDamaged,
    RoundFinished,
    RunFinished,
    RunStarted,
    SamplesLeftOut,
)
from dtrain.initfile import init_path, read_init, with_init
from dtrain.job import Job, Model, Table, Tracker, absolute
from dtrain.lock import locked
from dtrain.prepare import open_runner
from dtrain.report.history import limit_of_rows
from dtrain.report.journal import cut_history, journal
from dtrain.report.messages import messages_of
from dtrain.report.notebook import is_notebook, notebook_progress
from dtrain.report.tracking import tracking
from dtrain.resolve import filled
from dtrain.resolved import Resolved
from dtrain.rounds import Keeping, initial_state, rounds
from dtrain.run import Run
from dtrain.runfiles import round_directory
from dtrain.runs import remember
from dtrain.runtime.place import check_place
from dtrain.runtime.runner import Held, Runner
from dtrain.runtime.where import Where, client_of
from dtrain.statefiles import moved
from dtrain.types import History, RoundResult, StoredState, TrainState
from dtrain.urls import redacted_url


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
        Called with every event.
    max_seconds : float, optional
        Stop after the round that is being trained when this time is over; it is evaluated and committed.

    Raises
    ------
    RunConflict, RunLocked
        The run exists with other configuration or code, or is being trained.
    Stopped
        `max_seconds` are over; the same call continues.
    DtrainError
        As the errors of this package name them.
    """
    check_place(job.config.cluster, job.base, client)
    with tracking(job.trackers) as track:
        return _train_tracked(job, run, report or (lambda event: None), track, client, max_seconds)


def _train_tracked(
    job: Job, run: Path, report: Reporter, track: Reporter, client: Client | None, max_seconds: float | None
) -> Run:
    """Train a job as `train_job` does; `track` gives events to its trackers."""
    tell = _both(report, track)
    note = _both(lambda event: journal(run, event), tell)
    deadline = None if max_seconds is None else time.monotonic() + max_seconds
    opened = Run(run, job.config.with_functions(job.functions), job.base, job.functions)
    with made_directory(run), locked(run):
        known, state = _resume(run, job, note)
        history = opened.stop_history(opened.rows)
        if known is not None and state is not None and end_reason(history, job.config) is not None:
            write_run(run, job, known, is_new=False)
            if job.trackers:  # what they lack, they take from the history
                track(_started(opened, job.config, state, known))
        else:
            _train(job, opened, known, state, history, client=client, tell=tell, note=note, deadline=deadline)
    tell(_finished(opened, None))
    return opened


def _train(
    job: Job,
    opened: Run,
    known: Resolved | None,
    state: TrainState | StoredState | None,
    history: History,
    *,
    client: Client | None,
    tell: Reporter,
    note: Reporter,
    deadline: float | None,
) -> None:
    """Train the rounds after `state`; `note` also writes events to the run's files, `tell` does not."""
    init = None if state is not None else init_path(job)
    scheduler = job.config.cluster.scheduler if client is None else str(client.scheduler.address)
    tell(ClusterOpening(run=str(opened.directory), scheduler=redacted_url(scheduler)))
    anew = known is None and has_anomalies(job)
    opened_at = open_runner(job, uuid.uuid4().hex[:8], known=known, client=client, climatology=anew, on_progress=tell)
    with opened_at as (runner, resolved):
        loaded: tuple[ParametersLoaded, ...] = ()
        if state is None:
            state, resolved, loaded = _first_state(runner, resolved, init)
        write_run(opened.directory, job, resolved, is_new=known is None)
        plan = plan_sha256(opened.directory)
        tell, note = _both(tell, _page_of(runner)), _both(note, _page_of(runner))
        tell(_started(opened, job.config, state, resolved, runner))
        left_out = (SamplesLeftOut(**asdict(one)) for one in resolved.left_out)
        events: list[Event] = [*loaded, *_filled(runner), *left_out]
        for event in events:
            note(event)
        runner.on_progress, runner.on_evicted = tell, note

        def is_over() -> bool:
            return deadline is not None and time.monotonic() > deadline

        with uncommitted(opened.directory) as directory:
            fingerprint = resolved.plan.fingerprint

            def commit(result: RoundResult) -> None:
                _commit(opened, result, fingerprint, plan, note)

            keeping = Keeping(directory, commit, partial(_in_place, opened.directory))
            for result in rounds(
                runner,
                state,
                job.config,
                note,
                history=history,
                look_ahead=runner.look_ahead,
                is_over=is_over,
                keeping=keeping,
            ):
                _keep(opened, result, fingerprint, plan, note)
                if result.state is not None and result.stop is None and is_over():
                    tell(_finished(opened, "max_time"))
                    raise Stopped(f"--max-time is over after round {result.round}.", "Run it again to continue.")


def _in_place(run: Path, state: TrainState | StoredState) -> TrainState | StoredState:
    """Return a state that has been committed, with the files where they are now, also for workers elsewhere."""
    return moved(state, round_directory(run, state.round).absolute()) if isinstance(state, StoredState) else state


def _first_state(
    runner: Runner[Held], resolved: Resolved, init: Path | None
) -> tuple[TrainState, Resolved, tuple[ParametersLoaded, ...]]:
    """Return the state of round 0, what is resolved with the digest of ``train.init``, and what was taken from it."""
    file = None if init is None else read_init(init)
    if file is not None:
        resolved = with_init(resolved, file)
    initial = runner.initialise(file)
    state = initial_state(initial.params, runner.spec.plan.replicas, runner.spec.config)
    return state, resolved, () if initial.loaded is None else (initial.loaded,)


def _resume(run: Path, job: Job, note: Reporter) -> tuple[Resolved | None, StoredState | None]:
    """Return the plan and the newest good state of a run that was started before; cut its history back to it."""
    known = read_plan(run, job)
    sweep(run)
    state, fingerprint, damaged = newest_round(run)
    if known is not None and state is not None and fingerprint != known.plan.fingerprint:
        raise DataChanged(f"{run}: plan.json is not the plan that round {state.round} was trained with.")
    for number, reason in damaged:
        note(RoundDamaged(round=number, reason=reason))
    cut_history(run, state.round if state is not None else 0)
    return known, state


def _keep(run: Run, result: RoundResult, fingerprint: str, plan: str, note: Reporter) -> None:
    """Write a round to the history, and its state, if it has one, as a committed round."""
    for contribution in result.contributions:
        if not contribution.finite:
            note(ReplicaRejected(round=result.round, replica=contribution.replica))
    note(RoundFinished(result))
    if result.state is not None:
        _commit(run, result, fingerprint, plan, note)


def _commit(run: Run, result: RoundResult, fingerprint: str, plan: str, note: Reporter) -> None:
    """Write the state after a round as a committed round."""
    assert result.state is not None
    started = time.monotonic()
    written = commit_round(run.directory, result.state, fingerprint, plan)
    prune(run.directory, run.config.run.keep, run.best_round)
    by_workers = isinstance(result.state, StoredState) and result.state.by_workers
    note(
        RoundCommitted(
            round=result.round,
            bytes=written,
            seconds=time.monotonic() - started,
            by="workers" if by_workers else "driver",
        )
    )


def _page_of(runner: Runner[Held]) -> Reporter:
    """Return a reporter that shows a run on its page in Dask's dashboard, where there is one."""

    def show(event: Event) -> None:
        for message in messages_of(event):
            runner.publish(message)

    return show


def _started(
    run: Run | None,
    config: TrainConfig,
    state: TrainState | StoredState,
    resolved: Resolved,
    runner: Runner[Held] | None = None,
) -> RunStarted:
    return RunStarted(
        run="" if run is None else str(run.directory),
        round=state.round,
        rounds=config.train.rounds,
        replicas=resolved.plan.replicas,
        samples=sum(resolved.plan.sizes),
        workers=0 if runner is None else runner.num_workers,
        dashboard="" if runner is None else runner.open_dashboard(),
        eval_every=resolved.eval_every,
        metric=config.stop.metric,
        higher=higher_is_better(config),
        rows=() if run is None else tuple(run.rows),
        settings=dict(flat_values(without_secrets(config))),
    )


def _filled(runner: Runner[Held]) -> Iterator[ChunksFilled]:
    """Yield the chunks that are not stored and are filled, by store and variable."""
    stores = runner.spec.sources if runner.spec.held_out is None else (*runner.spec.sources, runner.spec.held_out)
    for store in stores:
        for name, one in filled(store.source, store.absent).items():
            of = store.absent[name].of
            yield ChunksFilled(
                path=redacted_url(store.samples.path), variable=name, chunks=one.chunks, of=of, value=one.value
            )


def _finished(run: Run, reason: Literal["max_time"] | None) -> RunFinished:
    """Return the end of a run; without a reason it is the one that its history gives."""
    rows = run.rows
    ended = reason or end_reason(run.stop_history(rows), run.config)
    assert ended is not None
    return RunFinished(
        reason=ended,
        rounds=rows[-1]["round"],
        params_sha256=rows[-1]["params_sha256"],
        val_loss=rows[-1].get("val_loss"),
        run=str(run.directory),
        limited_by=limit_of_rows(rows),
    )


def _both(first: Reporter, second: Reporter | None) -> Reporter:
    def both(event: Event) -> None:
        first(event)
        if second is not None:
            second(event)

    return both


# Python -------------------------------------------------------------------------------------------------


def train(
    model: Model | None = None,
    samples: Samples | None = None,
    *,
    train: Table | None = None,
    average: Table | None = None,
    stop: Table | None = None,
    config: TrainConfig | None = None,
    model_args: Table | None = None,
    cluster: Where | None = None,
    run: str | os.PathLike[str] | None = None,
    run_dir: str | Path | None = None,
    progress: bool = True,
    report: Reporter | None = None,
    trackers: Sequence[str | Tracker] | None = None,
) -> Run:
    """Train a model and return the run.

    Parameters
    ----------
    model : callable or str
        Function that returns a ``torch.nn.Module``, or a class of modules, or its name as ``module:function``. It may
        be defined in a notebook.
    samples : Samples
        From `open_samples`.
    train, average, stop : mapping, optional
        Tables of the configuration, for example ``train=dict(loss="cross_entropy", rounds=20)``. Functions may be
        given as such, also those of a notebook: ``train=dict(loss=my_loss, metrics=["accuracy", my_metric],
        optimizer=MyOptimizer, schedule=my_schedule)``. A loss or metric is called with (outputs, targets), a schedule
        with (step, total), an optimizer with the parameters and ``optimizer_args``.
    config : TrainConfig, optional
        Instead of the tables. Then arguments that are left out are as it says, and arguments that contradict it are
        refused. Keys of ``config.data`` that the samples leave out are theirs too.
    model_args : mapping, optional
        Keyword arguments of the function.
    cluster : str, path, distributed.Client or cluster, optional
        ``local`` (default) starts workers on this machine, ``serial`` none; or an address, a scheduler file, a client,
        or a cluster as Dask has them (``LocalCluster``, ``SLURMCluster``, ``KubeCluster`` ...), which stays open.
    run : str, optional
        Name of the run; the same name continues it. By default the next free number.
    run_dir : path
        Where runs are kept, relative to the working directory; by default ``runs``.
    progress : bool
        Whether to show progress: lines on stderr; in a notebook, one output that is updated.
    report : callable, optional
        Called with every event (`dtrain.events`), besides the progress.
    trackers : sequence of str or callable, optional
        Instead of ``run.trackers``: ``tensorboard``, ``mlflow``, or functions, objects or classes of yours
        (`dtrain.report.tracking`). Each is called with every event in a thread of its own.

    Returns
    -------
    Run

    Raises
    ------
    DtrainError
        As the classes of `dtrain.errors` say.
    Interrupted
        A KeyboardInterrupt that says how to go on.
    """
    job = python_job(model, samples, config, model_args, cluster, train=train, average=average, stop=stop)
    job = job if trackers is None else with_trackers(job, config, trackers)
    placed = replace(job, config=job.config.model_copy(update={"run": _run_table(job.config, run_dir)}))
    directory = next_run_directory(placed, Path.cwd()) if run is None else Path(run_directory(placed, run))
    remember(directory, job.functions)
    try:
        with client_of(cluster) as client, _shown(progress) as show:
            return train_job(placed, directory, client=client, report=_both(show, report))
    except KeyboardInterrupt:
        raise _interrupted(placed, directory) from None


def _shown(progress: bool) -> AbstractContextManager[Reporter]:
    """Return what shows the progress: in a notebook one output, elsewhere lines on stderr."""
    if not progress:
        return nullcontext(lambda event: None)
    if is_notebook():
        return notebook_progress()
    from dtrain.report.progress import terminal_progress

    return terminal_progress()


def _interrupted(job: Job, run: Path) -> Interrupted:
    """Return what is said after Ctrl-C: what is kept, and how to go on."""
    committed = committed_rounds(run) if run.is_dir() else []
    where = "" if job.config.run.dir == absolute(RunConfig().dir) else f", run_dir={shown(job.config.run.dir)!r}"
    again = f"dtrain.train(..., run={run.name!r}{where})"
    if not committed:
        return Interrupted("Interrupted before a round was committed.", f"Start again: {again}")
    return Interrupted(
        f"Interrupted: {shown(run)} keeps round {committed[-1]} of {job.config.train.rounds}.",
        f"Go on: {again}. Look at it: dtrain.last_run()",
    )


def train_rounds(
    model: Model | None = None,
    samples: Samples | None = None,
    *,
    train: Table | None = None,
    average: Table | None = None,
    config: TrainConfig | None = None,
    model_args: Table | None = None,
    cluster: Where | None = None,
) -> Iterator[RoundResult]:
    """Yield the rounds of a training that is kept nowhere: the loop is yours to stop.

    Parameters are as those of `train`. Each `RoundResult` holds the losses and, at commits, the whole `TrainState`.

    Examples
    --------
    >>> for result in train_rounds(build, samples, train=dict(loss="mse")):  # doctest: +SKIP
    ...     if result.metrics.get("val_loss", 1.0) < 0.1:  # not every round is evaluated
    ...         break
    """
    job = python_job(model, samples, config, model_args, cluster, train=train, average=average)
    with (
        client_of(cluster) as client,
        open_runner(job, uuid.uuid4().hex[:8], client=client, climatology=has_anomalies(job)) as (runner, resolved),
    ):
        state, _, _ = _first_state(runner, resolved, init_path(job))
        show = _page_of(runner)
        show(_started(None, job.config, state, resolved, runner))
        for result in rounds(runner, state, job.config, show, look_ahead=runner.look_ahead):
            show(RoundFinished(result))
            yield result


def _run_table(config: TrainConfig, run_dir: str | Path | None) -> RunConfig:
    configured = absolute(config.run.dir)
    wanted = configured if run_dir is None else absolute(str(run_dir))
    if is_given(config, "run", "dir") and wanted != configured:
        raise contradiction("run_dir", str(run_dir), config.run.dir, "run.dir")
    return config.run.model_copy(update={"dir": wanted})
