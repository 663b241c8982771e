"""From a job to a runner: describe the stores, resolve what decides bits, check the data, run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import Any

from distributed import Client

from dtrain.algorithm.plan import micro_size
from dtrain.config.values import cache_bytes, parse_bytes
from dtrain.data.encoding import Scaling
from dtrain.data.load.statistics import scalings_of
from dtrain.data.plan.memory import MemoryBudget, Reading, plan_memory
from dtrain.data.plan.missing import AbsentChunks
from dtrain.data.plan.partition import Partition, eval_partitions
from dtrain.data.plan.units import DataPlan
from dtrain.data.read.presence import check_presence, content_digest
from dtrain.data.samples import Samples
from dtrain.errors import DataChanged
from dtrain.events import StepsTaken
from dtrain.job import Job
from dtrain.resolve import Resolved, check_filled, check_kind, described, filled, labelled, missing_labels, resolve
from dtrain.runtime.codebytes import pickle_functions
from dtrain.runtime.place import Place, open_place
from dtrain.runtime.runner import Runner
from dtrain.runtime.spec import PlannedSource, RunSpec, Source


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
    on_progress : callable, optional
        Called with the progress of the pass for ``data.normalize``.

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
        job = labelled(described(job, place), labels)
        resolved = known or resolve(job, place)
        absent = _check_data(job, resolved, place, started=known is not None, full=full, count=count)
        if known is None:
            resolved = replace(
                resolved, filled=tuple(filled(*pair) for pair in zip(job.all_sources, absent, strict=True))
            )
        if resolved.scalings or not job.config.data.normalize:
            job = labelled(_standardised(job, resolved.scalings), labels)
        planned = _planned_sources(job, resolved, place, absent)
        if job.config.data.normalize and not resolved.scalings:
            with place.runner(_spec(job, resolved, f"{run_id}-n", planned)) as runner:
                runner.on_progress = on_progress or runner.on_progress
                scalings = scalings_of(runner.moments(most_units), job.samples.variables)
            resolved = replace(resolved, scalings=scalings)
        with place.runner(_spec(job, resolved, run_id, planned)) as runner:
            yield runner, resolved


def _standardised(job: Job, scalings: Mapping[str, Scaling]) -> Job:
    """Return the job with the variables standardised that plan.json names: also of other data than the run's own."""
    sources = tuple(replace(source, samples=source.described.standardised_by(scalings)) for source in job.sources)
    held_out = job.held_out and replace(job.held_out, samples=job.held_out.described.standardised_by(scalings))
    return replace(job, sources=sources, held_out=held_out)


def _check_data(
    job: Job, resolved: Resolved, place: Place, *, started: bool, full: bool, count: bool
) -> tuple[Mapping[str, AbsentChunks], ...]:
    """Refuse missing chunks; where a run was `started` before, also other metadata and modified chunks.

    Returns, by store and variable, the missing chunks that are no fault.
    """
    if started:
        for source, plan in zip(job.sources, resolved.plan.plans, strict=True):
            check_kind(source.described, plan)
    absent = tuple(
        place.call(source, partial(check_presence, source.described, full=full))
        if count or source.described.config.missing in ("auto", "error")
        else {}
        for source in job.all_sources
    )
    if started:
        for source, before in zip(job.all_sources, resolved.contents, strict=False):
            _check_contents(source, before, place)
        if resolved.filled is not None:
            known = (*resolved.filled, *({} for _ in absent[len(resolved.filled) :]))
            for source, missing, was in zip(job.all_sources, absent, known, strict=True):
                check_filled(source, filled(source, missing), was)
    return absent


def _check_contents(source: Source, before: Mapping[str, str], place: Place) -> None:
    """Refuse a store that has been modified since the run's first start."""
    now = place.call(source, partial(content_digest, source.described))
    changed = [name for name, digest in before.items() if now.get(name, digest) != digest]
    if changed:
        raise DataChanged(
            f"{source.described.path}: chunks of {', '.join(changed)} have been modified since the run was started.",
            "Restore the data, or train under another --run NAME.",
        )


# What a runner is given -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Planned:
    sources: tuple[PlannedSource, ...]
    held_out: PlannedSource | None


def _spec(job: Job, resolved: Resolved, run_id: str, planned: _Planned) -> RunSpec:
    return RunSpec(
        run_id=run_id,
        sources=planned.sources,
        plan=resolved.plan,
        held_out=planned.held_out,
        scalings=resolved.scalings,
        config=job.config,
        code=pickle_functions(job.functions, job.base),
        device=resolved.device,
    )


def _planned_sources(
    job: Job, resolved: Resolved, place: Place, absent: tuple[Mapping[str, AbsentChunks], ...]
) -> _Planned:
    sources = []
    stores, parts = resolved.plan.stores, resolved.plan.partitions
    lost = resolved.lost or ((),) * len(absent)
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
    if held_out is None or job.held_out is None:
        samples, pieces = source.described, eval_partitions(plan, "val") or eval_partitions(plan, "all")
    else:
        samples, pieces = job.held_out.described, eval_partitions(held_out, "all")
    limit, name = _memory(job, place)
    beside = 1 if source.workers else sum(not other.workers for other in job.sources)
    return plan_memory(
        _reading(job, source.described, parts, workers, shuffle=plan.shuffle),
        _reading(job, samples, pieces, workers, shuffle=False),
        limit // beside,
        name,
        None if cache == "auto" else cache_bytes(cache),
    )


def _reading(
    job: Job, samples: Samples, parts: list[Partition] | tuple[Partition, ...], workers: int, *, shuffle: bool
) -> Reading:
    return Reading(
        samples=samples,
        plan=parts[0].plan,
        loaders=-(-len(parts) // workers),
        units=max(len(part.units) for part in parts),
        batch_size=min(micro_size(job.config.train), max(part.num_samples for part in parts)),
        shuffle=shuffle,
    )


def _memory(job: Job, place: Place) -> tuple[int, str]:
    """Return the bytes that the data path of a worker may use, and their name."""
    memory = job.config.data.memory
    given = parse_bytes(memory, "data.memory") if memory != "auto" else None
    return (given, "data.memory") if given is not None and given < place.memory else (place.memory, place.memory_name)
