"""The plan of a run as lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.algorithm.plan import pass_size
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
        *([("gaps of val_path", plan.held_out_gaps)] if plan.held_out_gaps else []),
        ("chunks", missing + (f"; no checksums in {', '.join(unchecked)}" if unchecked else "; all have checksums")),
        ("continuing", _compared(plan)),
        (
            "model",
            f"{plan.initial.num_params:,} parameters{_frozen(plan)}; {', '.join(plan.initial.inputs)} -> "
            f"{plan.initial.outputs}",
        ),
        ("first loss", f"{train.loss} of one real batch: {number(plan.initial.loss)}{_estimated(job)}"),
        (
            "round",
            f"{_range(plan.steps)} local steps a replica, batch {train.batch_size}: {plan.samples:,} samples, "
            f"{plan.rounds} rounds{_left_out(job, plan)}",
        ),
        ("traffic", f"{format_bytes(plan.reduced_bytes)} averaged a round, {format_bytes(plan.commit_bytes)} a commit"),
        ("time", f"{_seconds(plan.round_seconds)} of local steps a round on {plan.workers} workers (estimate)"),
        *((f"auto {key}", f"{value} ({why})") for key, (value, why) in plan.choices.items()),
    ]


def _left_out(job: Job, plan: RunPlan) -> str:
    train, sizes = job.config.train, plan.data.sizes
    dropped = sum(size - pass_size(size, train) for size in sizes)
    return f"; train.drop_last leaves out {dropped:,} samples of each pass" if dropped else ""


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
        *([("gaps", store.gaps)] if store.gaps else []),
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


def _compared(plan: RunPlan) -> str:
    """Return what is compared of the data when the run continues, and what is not."""
    are_local = [store.source.samples.store.is_local for store in plan.stores]
    sizes = "the sizes of stored chunks are compared; a chunk overwritten by one of the same size is not noticed"
    if all(are_local):
        return sizes
    remote = "chunks of remote stores are not compared"
    return f"{sizes}; {remote}" if any(are_local) else remote


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
    reasons = {
        "split": "whose window leaves its split",
        "gaps": f"whose window crosses a jump of {store.source.samples.sample_dim}",
        "missing": "near a missing chunk",
    }
    dropped = [f"{count:,} {reasons[why]}" for why, count in counts["dropped"].items() if count]
    return text + (f"; dropped: {', '.join(dropped)}" if dropped else "")


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
