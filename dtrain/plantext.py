"""The plan of a run as lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.data.plan.footprint import format_bytes
from dtrain.display import number
from dtrain.job import Job
from dtrain.planning import ESTIMATE_UNITS, RunPlan, StorePlan


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
            f"{plan.initial.num_params:,} parameters{_frozen(plan)}; {', '.join(plan.initial.inputs)} -> "
            f"{plan.initial.outputs}",
        ),
        ("first loss", f"{train.loss} of one real batch: {number(plan.initial.loss)}{_estimated(job)}"),
        (
            "round",
            f"{_range(plan.steps)} local steps a replica, batch {train.batch_size}: {plan.samples:,} samples, "
            f"{plan.rounds} rounds",
        ),
        ("traffic", f"{format_bytes(plan.reduced_bytes)} averaged a round, {format_bytes(plan.commit_bytes)} a commit"),
        ("time", f"{_seconds(plan.round_seconds)} of local steps a round on {plan.workers} workers (estimate)"),
        *((f"auto {key}", f"{value}: {why}") for key, (value, why) in plan.choices.items()),
    ]


def _frozen(plan: RunPlan) -> str:
    count = plan.initial.num_frozen
    return f", of which {count:,} are frozen: they are neither averaged nor sent each round" if count else ""


def _store_rows(job: Job, plan: RunPlan, store: StorePlan) -> list[tuple[str, str]]:
    counts, sizes = store.counts, store.counts["partition_samples"]
    shared, unit = counts["decodes_per_unit"], format_bytes(store.source.memory.train.unit)
    rows = [
        *store.source.samples.rows(),
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
        ("memory", store.source.memory.comparison()),
    ]
    if store.source.workers:
        rows.append(("workers", f"only {', '.join(store.source.workers)} read it"))
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
        *(["whose window leaves its split"] if store.source.samples.has_windows else []),
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
            if store.source.samples.has_windows
            else "chunks of the variables have different lengths, or reach beyond a unit"
        )
    return f": {'; '.join(why)}"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
