"""What a run would do, said before it runs: the numbers behind ``dtrain plan``. Trains and writes nothing."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from typing import Any

from dtrain.algorithm.plan import samples_a_round, steps_a_round
from dtrain.data.partition import (
    DataPlan,
    describe_plan,
    eval_partitions,
    format_bytes,
    open_units,
    plan_held_out,
    resident_bytes,
    train_partitions,
)
from dtrain.job import Job, open_runner
from dtrain.runtime.tasks import Initial


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The numbers of a run that has not started."""

    data: DataPlan
    counts: dict[str, Any]
    """Of `describe_plan`."""
    initial: Initial
    steps: tuple[int, ...]
    """Local steps a round, by replica."""
    samples: int
    """Samples a round, by all replicas."""
    held_out_samples: int | None
    """Samples of ``data.val_path``."""
    rounds: int
    workers: int
    resident_bytes: int
    """Decoded bytes of a replica's open units."""
    reduced_bytes: int
    """Bytes of parameters averaged a round."""
    commit_bytes: int
    """Bytes of the parameters of a committed round; the inner optimizers' states come on top."""
    round_seconds: float
    """Estimate of the local steps of a round, without reading."""
    checksums: dict[str, bool]
    resolved: dict[str, tuple[Any, str]]
    """By key that was "auto": the value, and why."""


def plan_job(job: Job) -> RunPlan:
    """Resolve a job as `train` would, check its data, and try the model on one real batch.

    Raises
    ------
    DtrainError
        Whatever would stop the run at its start.
    """
    with open_runner(job, uuid.uuid4().hex[:8]) as (runner, plan):
        initial = runner.initialise()
        workers = runner.num_workers
    train = job.config.train
    sizes = [partition.num_samples for partition in train_partitions(plan)]
    steps = tuple(steps_a_round(size, train) for size in sizes)
    size = initial.params.nbytes
    return RunPlan(
        data=plan,
        counts=describe_plan(plan),
        initial=initial,
        steps=steps,
        samples=sum(samples_a_round(n, train) for n in sizes),
        held_out_samples=_held_out_samples(job, plan),
        rounds=train.rounds,
        workers=workers,
        resident_bytes=resident_bytes(job.samples, plan),
        reduced_bytes=size * plan.replicas,
        commit_bytes=size,
        round_seconds=initial.seconds * max(steps) * math.ceil(plan.replicas / workers),
        checksums={v.name: v.checksums for v in job.samples.variables},
        resolved=_resolved(job, plan, workers),
    )


def _held_out_samples(job: Job, plan: DataPlan) -> int | None:
    if job.held_out is None:
        return None
    return sum(piece.num_samples for piece in eval_partitions(plan_held_out(job.held_out, plan), "all"))


def _resolved(job: Job, plan: DataPlan, workers: int) -> dict[str, tuple[Any, str]]:
    config = job.config
    found: dict[str, tuple[Any, str]] = {}
    if config.data.sample_dim == "auto":
        found["data.sample_dim"] = (job.samples.sample_dim, "the first dimension that all variables share")
    if config.data.split_order == "auto":
        found["data.split_order"] = (
            ("sequential", "samples have windows") if plan.sequential else ("random", "samples have no windows")
        )
    if config.data.reader == "auto":
        found["data.reader"] = ("zarr", "the only reader of this version")
    if config.train.device == "auto":
        found["train.device"] = ("cpu", "the only device of this version")
    if config.average.replicas == "auto":
        found["average.replicas"] = (plan.replicas, f"the smaller of {workers} workers and the units of the store")
    if config.cluster.workers == "auto" and config.cluster.scheduler == "local":
        found["cluster.workers"] = (workers, f"a core for each of the {config.cluster.threads} threads of a task")
    if config.run.commit_every == "auto":
        found["run.commit_every"] = ("as measured", "so that commits take at most 2 % of the time")
    return found


def plan_rows(job: Job, plan: RunPlan) -> list[tuple[str, str]]:
    """Return label and text of each line that a person reads."""
    counts, train = plan.counts, job.config.train
    unchecked = [name for name, has in plan.checksums.items() if not has]
    sizes = counts["partition_samples"]
    shared = counts["decodes_per_unit"]
    missing = "all chunks are there" if job.config.data.missing == "error" else "missing chunks read as fill value"
    return [
        *job.samples.rows(),
        (
            "units",
            f"{counts['units']:,} of {counts['unit_rows']:,} rows "
            f"({format_bytes(counts['unit_rows'] * job.samples.row_bytes)})"
            + (f", cut into {counts['cells']:,} cells of {counts['cell_rows']:,}" if shared > 1 else ""),
        ),
        ("splits", _splits(job, plan)),
        ("partitions", f"{len(sizes)} of {_range(sizes)} samples, {job.config.data.partition}"),
        ("reading", f"each unit is decoded {shared:.2f} times a pass, over all replicas"),
        ("chunks", missing + (f"; no checksums in {', '.join(unchecked)}" if unchecked else "; all have checksums")),
        (
            "model",
            f"{plan.initial.num_params:,} parameters; {', '.join(plan.initial.inputs)} -> {plan.initial.outputs}",
        ),
        ("first loss", f"{train.loss} of one real batch: {plan.initial.loss:.4f}"),
        (
            "round",
            f"{_range(plan.steps)} local steps a replica, batch {train.batch_size}: {plan.samples:,} samples, "
            f"{plan.rounds} rounds",
        ),
        ("memory", f"{open_units(plan.data)} open units a replica: {format_bytes(plan.resident_bytes)}"),
        ("traffic", f"{format_bytes(plan.reduced_bytes)} averaged a round, {format_bytes(plan.commit_bytes)} a commit"),
        ("time", f"{_seconds(plan.round_seconds)} of local steps a round on {plan.workers} workers (estimate)"),
        *((f"auto {key}", f"{value}: {why}") for key, (value, why) in plan.resolved.items()),
    ]


def _seconds(seconds: float) -> str:
    return f"about {seconds:.1f} s" if seconds >= 0.1 else "less than 0.1 s"


def _splits(job: Job, plan: RunPlan) -> str:
    counts = plan.counts
    val = f"{counts['val_samples']:,}" if plan.held_out_samples is None else f"{plan.held_out_samples:,} of val_path"
    text = f"train {sum(counts['partition_samples']):,}, val {val}, test {counts['test_samples']:,} samples"
    dropped = counts["dropped_samples"]
    return text + (f"; {dropped:,} dropped whose window leaves its split" if dropped else "")


def plan_record(plan: RunPlan) -> dict[str, Any]:
    """Return the plan as a JSON object."""
    return {
        "event": "plan",
        **plan.counts,
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
        "reduced_bytes": plan.reduced_bytes,
        "commit_bytes": plan.commit_bytes,
        "round_seconds": round(plan.round_seconds, 3),
        "checksums": plan.checksums,
        "resolved": {key: {"value": value, "why": why} for key, (value, why) in plan.resolved.items()},
    }


def _range(values: Any) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
