"""The numbers behind ``dtrain plan``: what a run would do. Trains and writes nothing."""

from __future__ import annotations

import math
import uuid
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from distributed import Client

from dtrain.algorithm.params import without_frozen
from dtrain.algorithm.plan import pass_size, samples_a_round, steps_a_round
from dtrain.config.values import value_of
from dtrain.data.plan.footprint import format_bytes
from dtrain.data.plan.memory import MemoryBudget
from dtrain.data.plan.missing import absence_of, stands_for
from dtrain.data.plan.partition import JointPlan, eval_partitions
from dtrain.data.plan.readers import choose_readers
from dtrain.data.plan.summary import describe_plan
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Samples
from dtrain.initfile import init_path, read_init
from dtrain.job import Job
from dtrain.prepare import open_runner
from dtrain.resolve import Resolved
from dtrain.runtime.spec import PlannedSource
from dtrain.runtime.trial import Initial

ESTIMATE_UNITS = 16
"""Units of each partition from which a plan estimates mean and standard deviation."""


class Choice(NamedTuple):
    """The value that stands for "auto", and why."""

    value: str | int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlan:
    """What a run reads of one store."""

    source: PlannedSource
    counts: dict[str, Any]
    """Of `describe_plan`."""
    readers: dict[str, tuple[str, str]]
    """By variable: the reader, and why it is taken."""
    gaps: str
    """What its coordinate says about jumps; empty if samples have no windows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The numbers of a run that has not started."""

    data: JointPlan
    stores: tuple[StorePlan, ...]
    initial: Initial
    steps: tuple[int, ...]
    """Local steps a round, by replica; the first ``train.sync_rounds`` rounds have one."""
    samples: int
    """Samples of such a round, by all replicas."""
    held_out: PlannedSource | None
    """The store of ``data.val_path``."""
    held_out_samples: int | None
    """Samples of ``data.val_path``."""
    held_out_gaps: str
    """What its coordinate says about jumps."""
    rounds: int
    eval_every: int
    """Rounds between evaluations."""
    workers: int
    reduced_bytes: int
    """Bytes of parameters averaged a round."""
    commit_bytes: int
    """Bytes of the parameters of a committed round; the inner optimizers' states come on top."""
    round_seconds: float
    """Estimate of the local steps of a round, without reading."""
    checksums: dict[str, bool]
    choices: dict[str, Choice]
    """By key that was "auto"."""

    @property
    def resident_bytes(self) -> int:
        """Bytes that the data path of a worker needs at most."""
        sources = [store.source for store in self.stores]
        apart = [source.memory.total for source in sources if source.workers]
        beside = sum(source.memory.total for source in sources if not source.workers)
        return max([*apart, beside])


def plan_job(job: Job, *, full: bool = False, client: Client | None = None) -> RunPlan:
    """Resolve a job as `train` would, check its data, and try the model on one real batch.

    Parameters
    ----------
    job : Job
    full : bool
        Look for missing chunks in every shard, also of remote stores with very many.
    client : distributed.Client, optional
        Takes precedence over ``cluster.scheduler``.

    Raises
    ------
    DtrainError
        Whatever would stop the run at its start.
    """
    init, run_id = init_path(job), uuid.uuid4().hex[:8]
    opened = open_runner(job, run_id, client=client, most_units=ESTIMATE_UNITS, full=full, count=True)
    with opened as (runner, resolved):
        initial = runner.initialise(None if init is None else read_init(init))
        workers, sources, held_out = runner.num_workers, runner.spec.sources, runner.spec.held_out
    train, plan = job.config.train, resolved.plan
    sizes = [pass_size(size, train) for size in plan.sizes]
    steps = tuple(steps_a_round(size, train) for size in sizes)
    stores = tuple(
        StorePlan(
            source=source,
            counts=describe_plan(source.samples, source.plan),
            readers=choose_readers(source.samples, job.config.data.reader),
            gaps=gaps,
        )
        for source, gaps in zip(sources, resolved.gaps, strict=False)  # the last may be of data.val_path
    )
    return RunPlan(
        data=plan,
        stores=stores,
        initial=initial,
        steps=steps,
        samples=sum(samples_a_round(size, train) for size in sizes),
        held_out=held_out,
        held_out_samples=_held_out_samples(resolved.held_out),
        held_out_gaps=resolved.gaps[-1] if resolved.held_out is not None else "",
        rounds=train.rounds,
        workers=workers,
        reduced_bytes=without_frozen(initial.params).nbytes * plan.replicas,
        commit_bytes=initial.params.nbytes,
        round_seconds=initial.seconds * max(steps) * math.ceil(plan.replicas / workers),
        checksums={v.name: v.checksums for v in sources[0].samples.variables},
        choices=_choices(job, stores, resolved, workers),
        eval_every=resolved.eval_every,
    )


def _held_out_samples(plan: DataPlan | None) -> int | None:
    return None if plan is None else sum(piece.num_samples for piece in eval_partitions(plan, "all"))


def _choices(job: Job, stores: tuple[StorePlan, ...], resolved: Resolved, workers: int) -> dict[str, Choice]:
    """Return the value of each key that is "auto"."""
    config, first, source = job.config, stores[0], stores[0].source
    cached, units = source.memory.train.limits.cached, first.counts["partition_units"]
    gpu = "every worker has a GPU" if resolved.device == "cuda" else "no GPU on the workers"
    replicas = f"the smaller of {workers} workers and the units of the store"
    order = ("sequential", "samples have windows") if source.plan.sequential else ("random", "samples have no windows")
    chosen = {
        "data.sample_dim": Choice(source.samples.sample_dim, "the first dimension that all variables share"),
        "data.split_order": Choice(*order),
        "data.missing": _missing_choice(first.source.samples),
        "data.reader": _reader_choice(first),
        "data.memory": Choice(format_bytes(source.memory.limit), source.memory.what),
        "data.cache": Choice(
            format_bytes(source.memory.cached_bytes),
            f"what is left: {cached:,} of the {units:,} units of a replica",
        ),
        "train.eval_every": Choice(resolved.eval_every, "evaluations take at most about a tenth of the time of steps"),
        "train.device": Choice(resolved.device, gpu),
        "average.replicas": Choice(
            sum(store.source.plan.replicas for store in stores),
            replicas if isinstance(config.data.path, str) else "the sum of the stores'",
        ),
        "cluster.workers": Choice(workers, _cores(config.cluster.threads)),
        "run.commit_every": Choice("as measured", "on evaluated rounds; commits take about 2 % of the time"),
    }
    if config.cluster.scheduler != "local":
        del chosen["cluster.workers"]
    return {key: choice for key, choice in chosen.items() if value_of(config, key) == "auto"}


def _missing_choice(samples: Samples) -> Choice:
    """Return what a chunk that is not stored stands for, by variable, and what it decodes to."""
    judged = {"nan": "as data.non_finite says"}
    absences = [(v, absence_of(samples, v)) for v in samples.variables]
    values = ", ".join(f"{v.name} {judged.get(absence, absence)}" for v, absence in absences)
    return Choice(
        values, "by what a missing chunk decodes to: " + ", ".join(f"{v.name} {stands_for(v)}" for v, _ in absences)
    )


def _cores(threads: int) -> str:
    return "a core each" if threads == 1 else f"a core for each of the {threads} threads of a task"


def _reader_choice(store: StorePlan) -> Choice:
    """Return the readers of a store's variables, with the variables of each where they differ."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, choice in store.readers.items():
        reasons.setdefault(choice, []).append(name)
    names = ", ".join(dict.fromkeys(reader for reader, _ in reasons))
    if len(reasons) == 1:
        return Choice(names, next(iter(reasons))[1])
    return Choice(
        names, "; ".join(f"{reader} for {', '.join(of)}, since {why}" for (reader, why), of in reasons.items())
    )


def plan_record(plan: RunPlan) -> dict[str, Any]:
    """Return the plan as a JSON object; of several stores, the counts of the first, and all under ``stores``."""
    first = plan.stores[0]
    record = {
        "event": "plan",
        **first.counts,
        "held_out_samples": plan.held_out_samples,
        "replicas": plan.data.replicas,
        "fingerprint": plan.data.fingerprint,
        "num_params": plan.initial.num_params,
        "num_frozen": plan.initial.num_frozen,
        "init": None if plan.initial.loaded is None else asdict(plan.initial.loaded),
        "first_loss": plan.initial.loss,
        "steps": list(plan.steps),
        "samples_a_round": plan.samples,
        "rounds": plan.rounds,
        "eval_every": plan.eval_every,
        "workers": plan.workers,
        "resident_bytes": plan.resident_bytes,
        "memory": memory_record(first.source.memory),
        "reduced_bytes": plan.reduced_bytes,
        "commit_bytes": plan.commit_bytes,
        "round_seconds": round(plan.round_seconds, 3),
        "checksums": plan.checksums,
        "absent_chunks": absent_record(first.source),
        "normalize": {
            v.name: {"dims": v.mean_dims, "means": v.num_means}
            for v in first.source.samples.variables
            if v.is_standardised
        },
        "readers": {name: reader for name, (reader, _) in first.readers.items()},
        "gaps": first.gaps,
        "held_out_gaps": plan.held_out_gaps,
        "resolved": {key: {"value": value, "why": why} for key, (value, why) in plan.choices.items()},
    }
    if len(plan.stores) > 1:
        record["stores"] = [
            {
                "path": store.source.samples.path,
                "workers": list(store.source.workers),
                **store.counts,
                "gaps": store.gaps,
                "absent_chunks": absent_record(store.source),
            }
            for store in plan.stores
        ]
    if plan.held_out is not None:
        record["held_out_absent_chunks"] = absent_record(plan.held_out)
    return record


def absent_record(source: PlannedSource) -> dict[str, dict[str, Any]]:
    """Return, by variable, how many chunks are not stored, and what becomes of them."""
    return {
        name: {
            "chunks": count.chunks,
            "of": count.of,
            "missing": absence_of(source.samples, source.samples.variable(name)),
        }
        for name, count in source.absent.items()
    }


def memory_record(budget: MemoryBudget) -> dict[str, Any]:
    """Return the terms of the memory budget."""
    train, evaluate = budget.train, budget.evaluate
    return {
        "limit": budget.limit,
        "total": budget.total,
        "unit": train.unit,
        "open_units": train.open,
        "ahead_units": train.limits.ahead,
        "cached_units": train.limits.cached,
        "read_threads": train.limits.threads,
        "loaders": train.kept,
        "batches": train.buffers,
        "scratch": train.scratch,
        "order": train.order,
        "evaluate": evaluate.total if evaluate else 0,
        "cached": budget.cached_bytes,
        "kept_whole": budget.statics,
        "shard_indices": budget.indices,
        "partitions": budget.tables,
    }
