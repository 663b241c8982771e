"""What a run would do, said before it runs: the numbers behind ``dtrain plan``. Trains and writes nothing."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from typing import Any

from dtrain.algorithm.plan import samples_a_round, steps_a_round
from dtrain.data.plan.footprint import format_bytes
from dtrain.data.plan.memory import MemoryBudget
from dtrain.data.plan.partition import JointPlan, eval_partitions, plan_held_out
from dtrain.data.plan.readers import choose_readers
from dtrain.data.plan.summary import describe_plan
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Samples
from dtrain.job import Job, open_runner
from dtrain.runtime.tasks import Initial

ESTIMATE_UNITS = 16
"""Units of each partition from which a plan estimates mean and deviation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlan:
    """What a run reads of one store."""

    samples: Samples
    data: DataPlan
    counts: dict[str, Any]
    """Of `describe_plan`."""
    memory: MemoryBudget
    workers: tuple[str, ...]
    """The only ones that read it."""
    readers: dict[str, tuple[str, str]]
    """By variable: the reader, and why it is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The numbers of a run that has not started."""

    data: JointPlan
    stores: tuple[StorePlan, ...]
    initial: Initial
    steps: tuple[int, ...]
    """Local steps a round, by replica."""
    samples: int
    """Samples a round, by all replicas."""
    held_out_samples: int | None
    """Samples of ``data.val_path``."""
    rounds: int
    workers: int
    reduced_bytes: int
    """Bytes of parameters averaged a round."""
    commit_bytes: int
    """Bytes of the parameters of a committed round; the inner optimizers' states come on top."""
    round_seconds: float
    """Estimate of the local steps of a round, without reading."""
    checksums: dict[str, bool]
    resolved: dict[str, tuple[Any, str]]
    """By key that was "auto": the value, and why."""

    @property
    def resident_bytes(self) -> int:
        """Bytes that the data path of a worker needs at most."""
        apart = [store.memory.total for store in self.stores if store.workers]
        beside = sum(store.memory.total for store in self.stores if not store.workers)
        return max([*apart, beside])


def plan_job(job: Job, *, full: bool = False) -> RunPlan:
    """Resolve a job as `train` would, check its data, and try the model on one real batch.

    Parameters
    ----------
    job : Job
    full : bool
        Look for missing chunks in every shard, also of remote stores with very many.

    Raises
    ------
    DtrainError
        Whatever would stop the run at its start.
    """
    with open_runner(job, uuid.uuid4().hex[:8], most_units=ESTIMATE_UNITS, full=full) as (runner, resolved):
        initial = runner.initialise()
        workers, sources = runner.num_workers, runner.spec.sources
    train, plan = job.config.train, resolved.plan
    sizes = [partition.num_samples for partition in plan.partitions()]
    steps = tuple(steps_a_round(size, train) for size in sizes)
    size = initial.params.nbytes
    stores = tuple(
        StorePlan(
            samples=source.samples,
            data=source.plan,
            counts=describe_plan(source.samples, source.plan),
            memory=source.memory,
            workers=source.workers,
            readers=choose_readers(source.samples, job.config.data.reader),
        )
        for source in sources
    )
    return RunPlan(
        data=plan,
        stores=stores,
        initial=initial,
        steps=steps,
        samples=sum(samples_a_round(n, train) for n in sizes),
        held_out_samples=_held_out_samples(job, plan.plans[0]),
        rounds=train.rounds,
        workers=workers,
        reduced_bytes=size * plan.replicas,
        commit_bytes=size,
        round_seconds=initial.seconds * max(steps) * math.ceil(plan.replicas / workers),
        checksums={v.name: v.checksums for v in stores[0].samples.variables},
        resolved=_resolved(job, stores, resolved.device, workers),
    )


def _held_out_samples(job: Job, plan: DataPlan) -> int | None:
    if job.held_out is None:
        return None
    return sum(piece.num_samples for piece in eval_partitions(plan_held_out(job.held_out, plan), "all"))


def _resolved(job: Job, stores: tuple[StorePlan, ...], device: str, workers: int) -> dict[str, tuple[Any, str]]:
    config, first = job.config, stores[0]
    found: dict[str, tuple[Any, str]] = {}
    if config.data.sample_dim == "auto":
        found["data.sample_dim"] = (first.samples.sample_dim, "the first dimension that all variables share")
    if config.data.split_order == "auto":
        found["data.split_order"] = (
            ("sequential", "samples have windows") if first.data.sequential else ("random", "samples have no windows")
        )
    if config.data.reader == "auto":
        reasons: dict[tuple[str, str], list[str]] = {}
        for name, choice in first.readers.items():
            reasons.setdefault(choice, []).append(name)
        names = ", ".join(dict.fromkeys(reader for reader, _ in reasons))
        why = "; ".join(f"{reader} for {', '.join(of)}, since {why}" for (reader, why), of in reasons.items())
        if len(reasons) == 1:
            why = next(iter(reasons))[1]
        found["data.reader"] = (names, why)
    if config.data.memory == "auto":
        found["data.memory"] = (format_bytes(first.memory.limit), first.memory.what)
    if config.data.cache == "auto":
        cached = first.memory.train.limits.cached
        found["data.cache"] = (
            format_bytes(first.memory.cached_bytes),
            f"what is left: {cached:,} of the {first.counts['partition_units']:,} units of a replica",
        )
    if config.train.device == "auto":
        why = "every worker has a GPU" if device == "cuda" else "not every worker has a GPU"
        found["train.device"] = (device, why)
    if config.average.replicas == "auto":
        replicas = sum(store.data.replicas for store in stores)
        why = f"the smaller of {workers} workers and the units of the store"
        found["average.replicas"] = (replicas, why if isinstance(config.data.path, str) else "the sum of the stores'")
    if config.cluster.workers == "auto" and config.cluster.scheduler == "local":
        found["cluster.workers"] = (workers, f"a core for each of the {config.cluster.threads} threads of a task")
    if config.run.commit_every == "auto":
        found["run.commit_every"] = ("as measured", "so that commits take at most 2 % of the time")
    return found


def plan_rows(job: Job, plan: RunPlan) -> list[tuple[str, str]]:
    """Return label and text of each line that a person reads."""
    train = job.config.train
    unchecked = [name for name, has in plan.checksums.items() if not has]
    missing = {
        "error": "all chunks are there",
        "fill": "missing chunks read as fill value",
        "skip": f"samples of missing chunks are left out ({_total(plan, 'absent_rows'):,} rows)",
    }[job.config.data.missing]
    return [
        *(row for store in plan.stores for row in _store_rows(job, plan, store)),
        ("chunks", missing + (f"; no checksums in {', '.join(unchecked)}" if unchecked else "; all have checksums")),
        (
            "model",
            f"{plan.initial.num_params:,} parameters; {', '.join(plan.initial.inputs)} -> {plan.initial.outputs}",
        ),
        ("first loss", f"{train.loss} of one real batch: {plan.initial.loss:.4f}{_estimated(job)}"),
        (
            "round",
            f"{_range(plan.steps)} local steps a replica, batch {train.batch_size}: {plan.samples:,} samples, "
            f"{plan.rounds} rounds",
        ),
        ("traffic", f"{format_bytes(plan.reduced_bytes)} averaged a round, {format_bytes(plan.commit_bytes)} a commit"),
        ("time", f"{_seconds(plan.round_seconds)} of local steps a round on {plan.workers} workers (estimate)"),
        *((f"auto {key}", f"{value}: {why}") for key, (value, why) in plan.resolved.items()),
    ]


def _store_rows(job: Job, plan: RunPlan, store: StorePlan) -> list[tuple[str, str]]:
    counts, sizes = store.counts, store.counts["partition_samples"]
    shared, unit = counts["decodes_per_unit"], format_bytes(store.memory.train.unit)
    rows = [
        *store.samples.rows(),
        (
            "units",
            f"{counts['units']:,} of {counts['unit_rows']:,} rows ({unit})"
            + (f", cut into {counts['cells']:,} cells of {counts['cell_rows']:,}" if shared > 1 else ""),
        ),
        ("splits", _splits(plan, store)),
        ("partitions", f"{len(sizes)} of {_range(sizes)} samples, {job.config.data.partition}"),
        (
            "reading",
            f"{format_bytes(counts['decoded_bytes'])} decoded a pass over all replicas, read amplification "
            f"{counts['read_amplification']:.2f}{_why_amplified(store)}",
        ),
        ("memory", store.memory.comparison()),
    ]
    if store.workers:
        rows.append(("workers", f"only {', '.join(store.workers)} read it"))
    return rows


def _estimated(job: Job) -> str:
    if not job.config.data.normalize:
        return ""
    return f" (normalised by the first {ESTIMATE_UNITS} units of each partition)"


def _total(plan: RunPlan, key: str) -> int:
    return sum(store.counts[key] for store in plan.stores)


def _seconds(seconds: float) -> str:
    return f"about {seconds:.1f} s" if seconds >= 0.1 else "less than 0.1 s"


def _splits(plan: RunPlan, store: StorePlan) -> str:
    counts = store.counts
    val = f"{counts['val_samples']:,}" if plan.held_out_samples is None else f"{plan.held_out_samples:,} of val_path"
    text = f"train {sum(counts['partition_samples']):,}, val {val}, test {counts['test_samples']:,} samples"
    dropped = counts["dropped_samples"]
    why = [
        *(["whose window leaves its split"] if store.samples.has_windows else []),
        *(["near a missing chunk"] if counts["absent_rows"] else []),
    ]
    return text + (f"; {dropped:,} dropped {' or '.join(why)}".rstrip() if dropped else "")


def _why_amplified(store: StorePlan) -> str:
    """Return why chunks are decoded more than once a pass."""
    counts, shared = store.counts, store.counts["decodes_per_unit"]
    if counts["read_amplification"] < 1.005:
        return ""
    why = []
    if shared > 1.005:
        why.append(f"a unit is decoded by {shared:.2f} replicas, so that few units make equal parts")
    if counts["read_amplification"] > 1.005 * shared:
        why.append(
            "windows reach into the next units"
            if store.samples.has_windows
            else "chunks of the variables have different lengths, or reach beyond a unit"
        )
    return f": {'; '.join(why)}"


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
        "first_loss": plan.initial.loss,
        "steps": list(plan.steps),
        "samples_a_round": plan.samples,
        "rounds": plan.rounds,
        "workers": plan.workers,
        "resident_bytes": plan.resident_bytes,
        "memory": memory_record(first.memory),
        "reduced_bytes": plan.reduced_bytes,
        "commit_bytes": plan.commit_bytes,
        "round_seconds": round(plan.round_seconds, 3),
        "checksums": plan.checksums,
        "readers": {name: reader for name, (reader, _) in first.readers.items()},
        "resolved": {key: {"value": value, "why": why} for key, (value, why) in plan.resolved.items()},
    }
    if len(plan.stores) > 1:
        record["stores"] = [
            {"path": store.samples.path, "workers": list(store.workers), **store.counts} for store in plan.stores
        ]
    return record


def memory_record(law: MemoryBudget) -> dict[str, Any]:
    """Return the terms of the memory law."""
    train, evaluate = law.train, law.evaluate
    return {
        "limit": law.limit,
        "total": law.total,
        "unit": train.unit,
        "open_units": train.open,
        "ahead_units": train.limits.ahead,
        "cached_units": train.limits.cached,
        "read_threads": train.limits.threads,
        "loaders": train.kept,
        "batches": train.buffers,
        "scratch": train.scratch,
        "evaluate": evaluate.total if evaluate else 0,
        "cached": law.cached_bytes,
        "kept_whole": law.statics,
        "shard_indices": law.indices,
    }


def _range(values: Any) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
