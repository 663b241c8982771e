"""From a job to a runner: describe the stores, resolve what decides bits, check the data, run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import Any

from distributed import Client

from dtrain.algorithm.plan import micro_size, pass_size
from dtrain.algorithm.recipe import outer_factors
from dtrain.asking import Question, has_anomalies, plan_of_climatology, with_asked, with_climatology
from dtrain.config.schema import TrainTable
from dtrain.config.values import cache_bytes, parse_bytes
from dtrain.counting import is_uncounted, with_classes, without_non_finite
from dtrain.data.categories import check_categories
from dtrain.data.encoding import Scaling
from dtrain.data.genes import check_digests, genes_of
from dtrain.data.load.statistics import scalings_of
from dtrain.data.plan.footprint import tables_bytes
from dtrain.data.plan.memory import MemoryBudget, Reading, plan_memory
from dtrain.data.plan.missing import AbsentChunks
from dtrain.data.plan.partition import Partition, eval_partitions
from dtrain.data.plan.splits import Runs
from dtrain.data.plan.units import DataPlan
from dtrain.data.read.inventory import Inventory, take_inventory
from dtrain.data.samples import Samples
from dtrain.errors import DataChanged, TooFewSamples
from dtrain.events import StepsTaken
from dtrain.job import Job
from dtrain.resolve import (
    absent_rows_of,
    changed_contents,
    check_filled,
    check_kind,
    described,
    filled,
    labelled,
    missing_labels,
    pinned,
    resolve,
)
from dtrain.resolved import Resolved
from dtrain.runtime.codebytes import sent
from dtrain.runtime.place import Place, open_place
from dtrain.runtime.runner import Runner
from dtrain.runtime.spec import PlannedSource, RunSpec, Source
from dtrain.runtime.usercode import user_code

ESTIMATE_UNITS = 16
"""Units of each partition from which a plan estimates mean and standard deviation."""


@contextmanager
def open_runner(
    job: Job,
    run_id: str,
    *,
    known: Resolved | None = None,
    client: Client | None = None,
    most_units: int | None = None,
    full: bool = False,
    count: bool = False,
    without_lost: bool = False,
    leave_out: bool = True,
    question: Question | None = None,
    climatology: bool = False,
    on_progress: Callable[[StepsTaken], None] | None = None,
) -> Iterator[tuple[Runner[Any], Resolved]]:
    """Open the place that the configuration names, and give a runner with all that decides bits.

    Parameters
    ----------
    job : Job
    run_id : str
        Names this execution; keys of tasks carry it.
    known : Resolved, optional
        Of the run's first start; without it, it is resolved now.
    client : distributed.Client, optional
        Takes precedence over ``cluster.scheduler``.
    most_units : int, optional
        Units of each partition that ``data.normalize`` reads, for an estimate; by default all of them.
    full : bool
        Look for missing chunks in every shard, also of remote stores with very many.
    count : bool
        Count the missing chunks also where ``data.missing`` is ``fill`` or ``skip``.
    without_lost : bool
        Evaluate without the rows that are not stored any more, where ``data.missing`` is ``skip``.
    leave_out : bool
        Look for the samples that ``data.non_finite`` leaves out: a pass over all samples.
    question : Question, optional
        What an evaluation is asked for beside the metrics of everything.
    climatology : bool
        Compute the climatology of the targets, if it is not known: a pass over the training rows.
    on_progress : callable, optional
        Called with the progress of the passes for ``data.non_finite`` and ``data.normalize``.

    Raises
    ------
    ChunkTooLarge, OutOfMemory, TooFewSamples, ChunkMissing
        The plan cannot work.
    ClusterUnreachable, ClusterUnsuitable
        There is no cluster.
    DataChanged
        The data are not those of the run's first start.
    """
    with open_place(job.config.cluster, job.base, client) as place:
        labels = missing_labels(job.config.train) if known is None else known.labels
        snapshots = () if known is None else known.snapshots
        job = labelled(described(pinned(job, snapshots), place, snapshots), labels)
        resolved = known or resolve(job, place)
        _check_passes(job.config.train, resolved.plan.sizes)
        resolved, absent = _compared(job, resolved, place, started=known is not None, full=full, count=count)
        if resolved.scalings or not job.config.data.normalize:
            job = labelled(_standardised(job, resolved.scalings), labels)
        lost = tuple(absent_rows_of(source, place) if without_lost else () for source in job.all_sources)
        tell = on_progress or (lambda event: None)
        with sent(job.functions, job.base) as code:
            if leave_out and is_uncounted(job, resolved):
                planned = _planned_sources(job, resolved, place, absent, lost)
                with place.runner(_spec(job, resolved, f"{run_id}-f", planned, code)) as runner:
                    runner.on_progress = tell
                    resolved = without_non_finite(job, resolved, runner.seen(), trains=known is None)
            if known is None and job.config.data.balance:
                resolved = with_classes(job, resolved, place)
            if known is None:
                _check_passes(job.config.train, resolved.plan.sizes)
            planned = _planned_sources(job, resolved, place, absent, lost)
            if job.config.data.normalize and not resolved.scalings:
                with place.runner(_spec(job, resolved, f"{run_id}-n", planned, code)) as runner:
                    runner.on_progress = tell
                    scalings = scalings_of(runner.moments(most_units), job.samples.variables)
                resolved = replace(resolved, scalings=scalings)
            spec = _spec(job, resolved, run_id, planned, code)
            is_missing = climatology and resolved.climatology is None
            if is_missing or (most_units is not None and has_anomalies(job)):
                spec = replace(spec, climate_plan=plan_of_climatology(job, resolved, place))
                resolved = with_climatology(job, resolved, spec, place, tell) if is_missing else resolved
            if most_units is None:
                spec = with_asked(job, resolved, spec, place, question)
            with place.runner(spec) as runner:
                yield runner, resolved


def _standardised(job: Job, scalings: Mapping[str, Scaling]) -> Job:
    """Return the job with the variables standardised that plan.json names: also of other data than the run's own."""
    sources = tuple(replace(source, samples=source.described.standardised_by(scalings)) for source in job.sources)
    held_out = job.held_out and replace(job.held_out, samples=job.held_out.described.standardised_by(scalings))
    return replace(job, sources=sources, held_out=held_out)


def _check_passes(train: TrainTable, sizes: Sequence[int]) -> None:
    """Refuse passes that ``train.drop_last`` leaves empty."""
    for replica, size in enumerate(sizes):
        if not pass_size(size, train):
            raise TooFewSamples(
                f"train.drop_last leaves nothing of the {size:,} samples of replica {replica}: they are fewer than "
                f"train.batch_size = {train.batch_size}.",
                "Use a smaller train.batch_size, fewer replicas, or drop_last = false.",
            )


def _compared(
    job: Job, resolved: Resolved, place: Place, *, started: bool, full: bool, count: bool
) -> tuple[Resolved, tuple[Mapping[str, AbsentChunks], ...]]:
    """Look for what the stores hold: refuse missing chunks that are faults, and stores other than at the first start.

    Returns what is resolved, and by store and variable the missing chunks that are no fault.
    """
    if started:
        for source, plan in zip(job.sources, resolved.plan.plans, strict=True):
            check_kind(source.described, plan)
        for source in job.all_sources:
            check_categories(source.described, resolved.categories)
        for source in job.all_sources if resolved.genes else ():
            genes = place.call(source, partial(genes_of, source.described))
            check_digests(source.described.path, genes, resolved.genes)
    digests, found = not started or bool(resolved.contents), []
    for source in job.all_sources:
        presence = count or source.described.config.missing in ("auto", "error")
        look = partial(take_inventory, source.described, full=full, digests=digests, presence=presence)
        found.append(place.call(source, look))
    absent = tuple(inventory.absent for inventory in found)
    fills = tuple(filled(*store) for store in zip(job.all_sources, absent, strict=True))
    if not started:
        return replace(resolved, contents=tuple(inventory.digests for inventory in found), filled=fills), absent
    for source, digests_before, inventory in zip(job.all_sources, resolved.contents, found, strict=False):
        _check_contents(source, digests_before, inventory)
    if resolved.filled is not None:
        were = (*resolved.filled, *({} for _ in fills[len(resolved.filled) :]))
        for source, now, before in zip(job.all_sources, fills, were, strict=True):
            check_filled(source, now, before)
    return resolved, absent


def _check_contents(source: Source, before: Mapping[str, str], now: Inventory) -> None:
    """Refuse a store that has been modified since the run's first start."""
    if changed := changed_contents(before, now.digests):
        members = source.described.members
        path, what = (members[int(changed[0])].path, "") if members else (source.described.path, ", ".join(changed))
        raise DataChanged(
            f"{path}: chunks{f' of {what}' if what else ''} have been modified since the run was started.",
            "Restore the data, or train under another --run NAME.",
        )


# What a runner is given -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Planned:
    sources: tuple[PlannedSource, ...]
    held_out: PlannedSource | None


def _spec(job: Job, resolved: Resolved, run_id: str, planned: _Planned, code: bytes) -> RunSpec:
    return RunSpec(
        run_id=run_id,
        sources=planned.sources,
        plan=resolved.plan,
        held_out=planned.held_out,
        scalings=resolved.scalings,
        config=job.config,
        code=code,
        device=resolved.device,
        eval_every=resolved.eval_every,
        outer_factors=_outer_factors(job),
    )


def _outer_factors(job: Job) -> tuple[float, ...]:
    with user_code("average.outer.schedule"):
        return outer_factors(job.config, job.functions)


def _planned_sources(
    job: Job,
    resolved: Resolved,
    place: Place,
    absent: tuple[Mapping[str, AbsentChunks], ...],
    lost: tuple[Runs, ...],
) -> _Planned:
    sources = []
    stores, parts = resolved.plan.stores, resolved.plan.partitions
    for number, (source, plan) in enumerate(zip(job.sources, resolved.plan.plans, strict=True)):
        own = list(compress(parts, (store == number for store in stores)))
        budget = _budget(job, source, own, resolved.held_out, place)
        sources.append(PlannedSource(source, plan, budget, absent[number], lost[number]))
    held_out = None
    if job.held_out is not None and resolved.held_out is not None:
        held_out = PlannedSource(job.held_out, resolved.held_out, sources[0].memory, absent[-1], lost[-1])
    return _Planned(tuple(sources), held_out)


def _budget(job: Job, source: Source, parts: list[Partition], held_out: DataPlan | None, place: Place) -> MemoryBudget:
    """Divide the memory that a worker has for a store."""
    workers, plan, cache = len(source.workers) or place.shares, parts[0].plan, job.config.data.cache
    own, kept = source.described, sum(part.nbytes for part in parts)
    if held_out is None or job.held_out is None:
        samples, pieces = own, eval_partitions(plan, "val") or eval_partitions(plan, "all")
        tables = sum(piece.nbytes for piece in pieces)
    else:
        samples, pieces = job.held_out.described, eval_partitions(held_out, "all")
        tables = tables_bytes(samples, held_out, sum(piece.nbytes for piece in pieces))
    limit, name = _memory(job, place)
    beside = 1 if source.workers else sum(not other.workers for other in job.sources)
    return plan_memory(
        _reading(job, own, parts, workers, shuffle=plan.shuffle, tables=tables_bytes(own, plan, kept)),
        _reading(job, samples, pieces, workers, shuffle=False, tables=tables),
        limit // beside,
        name,
        None if cache == "auto" else cache_bytes(cache),
    )


def _reading(
    job: Job, samples: Samples, parts: Sequence[Partition], workers: int, *, shuffle: bool, tables: int
) -> Reading:
    return Reading(
        samples=samples,
        plan=parts[0].plan,
        loaders=-(-len(parts) // workers),
        units=max(len(part.units) for part in parts),
        batch_size=min(micro_size(job.config.train), max(part.num_samples for part in parts)),
        shuffle=shuffle,
        tables=tables,
        largest=max(part.largest for part in parts),
    )


def _memory(job: Job, place: Place) -> tuple[int, str]:
    """Return the bytes that the data path of a worker may use, and their name."""
    memory = job.config.data.memory
    given = parse_bytes(memory, "data.memory") if memory != "auto" else None
    return (given, "data.memory") if given is not None and given < place.memory else (place.memory, place.memory_name)
