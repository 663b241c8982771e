"""The plan of a run as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.algorithm.plan import pass_size
from dtrain.data.plan.footprint import format_bytes
from dtrain.data.plan.missing import absence_of, stands_for
from dtrain.display import clock, duration, number, shown
from dtrain.job import Job, plain
from dtrain.planning import RunPlan, StorePlan
from dtrain.prepare import ESTIMATE_UNITS
from dtrain.probetext import probe_rows
from dtrain.report.lines import loaded_line
from dtrain.runtime.spec import PlannedSource
from dtrain.urls import has_secret, redacted_url

STEPS_DIFFER = 1.1
"""Numbers of steps that differ by a larger factor shift the optimum of an average by samples (`fednova`)."""
LARGE_STATE = 1 << 20
"""Bytes of a metric's state from which on it is shown."""


def plan_rows(job: Job, plan: RunPlan) -> list[tuple[str, str]]:
    """Return label and text of each line that a person reads."""
    train = job.config.train
    unchecked = [name for name, has in plan.checksums.items() if not has]
    absent = list(_absent_rows(plan))
    checked = f"no checksums in {', '.join(unchecked)}" if unchecked else f"all have checksums{_checksum_name(plan)}"
    return [
        *(row for store in plan.stores for row in _store_rows(job, plan, store)),
        *_counting_rows(job, plan),
        *([("gaps of val_path", plan.held_out_gaps)] if plan.held_out_gaps else []),
        ("chunks", f"{'some are not stored' if absent else 'all chunks are there'}; {checked}"),
        *(("not stored", text) for text in absent),
        ("continuing", _compared(plan)),
        (
            "model",
            f"{plan.initial.num_params:,} parameters{_frozen(plan)}; {', '.join(plan.initial.inputs)} -> "
            f"{plan.initial.outputs}",
        ),
        *([("init", loaded_line(plan.initial.loaded))] if plan.initial.loaded is not None else []),
        ("first loss", f"{train.loss} of one real batch: {number(plan.initial.loss)}{_estimated(job)}"),
        (
            "round",
            f"{_range(plan.steps)} local steps a replica, batch {train.batch_size}: {plan.samples:,} samples, "
            f"{plan.rounds:,} rounds{_short_rounds(job, plan)}{_left_out(job, plan)}",
        ),
        *_metric_rows(plan),
        ("traffic", _traffic(plan)),
        ("commit", _commit(job, plan)),
        ("time", _time(plan)),
        ("worker memory", _worker_memory(plan)),
        *_averaging_rows(job, plan),
        *([("trackers", ", ".join(tracker.name for tracker in job.trackers))] if job.trackers else []),
        *probe_rows(job, plan),
        *((f"auto {key}", f"{value} ({why})") for key, (value, why) in plan.choices.items()),
    ]


def _counting_rows(job: Job, plan: RunPlan) -> Iterator[tuple[str, str]]:
    """Yield what becomes of samples with values that are not finite, and the classes that are balanced."""
    if (least := job.config.data.min_valid) is not None:
        which = "values that are not finite" if least == 1 else f"less than {least:.0%} finite values"
        yield (
            "non-finite",
            f"samples with {which} are left out: the first start counts them, in one pass over the data; the numbers "
            "here are without it",
        )
    if plan.balance is not None:
        yield ("balance", str(plan.balance))


def _metric_rows(plan: RunPlan) -> Iterator[tuple[str, str]]:
    """Yield the memory of the states of metrics, where it is not small."""
    large = {name: size for name, size in plan.initial.metric_bytes.items() if size >= LARGE_STATE}
    if large:
        sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in large.items())
        yield ("metrics", f"{sizes}: the states that each task of an evaluation keeps and sends")
    if (climate := plan.climatology) is not None:
        size = format_bytes(climate.count * climate.places * 4)
        yield ("climatology", f"{climate.text}; the first start reads these rows once, {size} on each worker")


def _checksum_name(plan: RunPlan) -> str:
    """Return the checksum that the store keeps of each chunk, in brackets."""
    name = plan.stores[0].source.samples.store.checksum
    return f" ({name})" if name else ""


def _traffic(plan: RunPlan) -> str:
    replicas = plan.data.replicas
    by = "1 replica" if replicas == 1 else f"{replicas:,} replicas"
    back = format_bytes(plan.traffic.received)
    return f"{format_bytes(plan.traffic.sent)} sent a round by {by}, {back} back to each worker"


def _commit(job: Job, plan: RunPlan) -> str:
    """Return the bytes of a commit, and who writes them."""
    size = f"{format_bytes(plan.commit.total)}: parameters {format_bytes(plan.commit.parameters)}"
    size += f", states of optimizers and replicas {format_bytes(plan.commit.states)}"
    if plan.shared is None:
        return size
    directory = shown(Path(job.base, job.config.run.dir).expanduser())
    if plan.shared:
        return f"{size}; the workers write them, for they see {directory}"
    return f"{size}; the driver writes them, a few at a time, for not all workers see {directory} as it does"


def _averaging_rows(job: Job, plan: RunPlan) -> Iterator[tuple[str, str]]:
    """Yield what the layers of the model and the steps of the replicas suggest for ``[average]``."""
    average = job.config.average
    if plan.initial.has_batchnorm and plan.data.replicas > 1 and not average.recalibrate_batchnorm:
        yield (
            "batch norm",
            "its running statistics are averaged; average.recalibrate_batchnorm = true takes them anew for the "
            "averaged model",
        )
    can_normalise = average.reduce == "mean" and average.mix.topology in ("full", "hierarchical")
    if average.weights == "samples" and can_normalise and max(plan.steps) > STEPS_DIFFER * min(plan.steps):
        steps = _range(plan.steps)
        yield ("weights", f'replicas take {steps} steps; average.weights = "fednova" divides their updates by them')


def _short_rounds(job: Job, plan: RunPlan) -> str:
    short = min(job.config.train.sync_rounds, plan.rounds)
    return f"; the first {short:,} have one step (train.sync_rounds)" if short else ""


def _left_out(job: Job, plan: RunPlan) -> str:
    train, sizes = job.config.train, plan.data.sizes
    dropped = sum(size - pass_size(size, train) for size in sizes)
    return f"; train.drop_last leaves out {dropped:,} samples of each pass" if dropped else ""


def _absent_rows(plan: RunPlan) -> Iterator[str]:
    """Yield, by store and variable, how many chunks are not stored, and what becomes of them."""
    stores = [*(store.source for store in plan.stores), *([plan.held_out] if plan.held_out is not None else [])]
    for store in stores:
        where = f" of {redacted_url(store.samples.path)}" if len(stores) > 1 else ""
        for name, count in store.absent.items():
            yield f"{count.chunks:,} of {count.of:,} chunks of {name}{where} {_becomes(store, name)}"


def _becomes(store: PlannedSource, name: str) -> str:
    """Say what becomes of a chunk that is not stored, and which key decides it."""
    variable, data = store.samples.variable(name), store.samples.config
    match absence_of(store.samples, variable):
        case "skip":
            rows = sum(stop - start for start, stop in store.plan.absent)
            return f'are left out, {rows:,} rows with those of all variables (data.missing = "skip")'
        case "nan":
            return f"read as NaN (data.non_finite = {plain(data.non_finite)})"
        case _:
            return f'read as {stands_for(variable)} (data.missing = "{data.missing}")'


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
            f"{counts['units']:,} of {_unit(counts)} ({unit})"
            + (f", cut into {counts['cells']:,} cells of {counts['cell_rows']:,}" if shared > 1 else ""),
        ),
        ("splits", _splits(plan, store)),
        *([("groups", store.given.note)] if store.given.note else []),
        *([("leakage", store.leakage)] if store.leakage else []),
        *([("gaps", store.gaps)] if store.gaps else []),
        *([("sample weights", store.weight)] if store.weight else []),
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
    compared = dict.fromkeys(store.source.samples.store.compared for store in plan.stores)
    hidden = any(has_secret(one.path) for store in plan.stores for one in store.source.samples.stores)
    return "; ".join([*compared, *(["the first bytes are, behind a URL that a run keeps in part"] if hidden else [])])


def _estimated(job: Job) -> str:
    if not job.config.data.normalize:
        return ""
    return f" (normalised by the first {ESTIMATE_UNITS} units of each partition)"


def _time(plan: RunPlan) -> str:
    where = "in this process" if plan.processes < plan.workers else _count(plan.workers, "worker")
    return (
        f"about {duration(plan.round_seconds)} a round, of which local steps {duration(plan.steps_seconds)} and "
        f"evaluation {duration(plan.evaluate_seconds)}; about {clock(plan.rounds * plan.round_seconds)} for "
        f"{_count(plan.rounds, 'round')}, {where} (estimate, if no other program needs the cores)"
    )


def _worker_memory(plan: RunPlan) -> str:
    return (
        f"about {format_bytes(plan.worker_bytes)} at its peak: {format_bytes(plan.initial.process_bytes)} as measured "
        "in a step of the model, and the data as above (estimate)"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def _splits(plan: RunPlan, store: StorePlan) -> str:
    counts = store.counts
    reasons = {
        "split": "whose window leaves its split",
        "gaps": f"whose window crosses a jump of {store.source.samples.sample_dim}",
        "missing": "near a missing chunk",
        "left_out": "beside a split that is given",
        "stores": "whose window leaves its store",
        "non_finite": "with values that are not finite",
    }
    dropped = [f"{count:,} {reasons[why]}" for why, count in counts["dropped"].items() if count]
    text = _given_splits(plan, store) if store.given.held else _shares(plan, store)
    return text + _held_whole(store) + (f"; dropped: {', '.join(dropped)}" if dropped else "")


def _shares(plan: RunPlan, store: StorePlan) -> str:
    counts = store.counts
    val = f"{counts['val_samples']:,}" if plan.held_out_samples is None else f"{plan.held_out_samples:,} of val_path"
    return f"train {sum(counts['partition_samples']):,}, val {val}, test {counts['test_samples']:,} samples"


def _given_splits(plan: RunPlan, store: StorePlan) -> str:
    """Return what each split holds, in the words of the coordinate or variable that it is given by."""
    counts, given = store.counts, store.given.held
    samples = {
        "train": sum(counts["partition_samples"]),
        "val": counts["val_samples"] if plan.held_out_samples is None else plan.held_out_samples,
        "test": counts["test_samples"],
    }
    shares = {"val": store.source.plan.val, "test": store.source.plan.test}
    texts = []
    for name, count in samples.items():
        if name in given:
            texts.append(f"{name} {given[name]}, {count:,} samples")
        elif count:
            share = f"a share of {shares[name]:g} of the rest" if plan.held_out_samples is None else "val_path"
            texts.append(f"{name} {share}, {count:,} samples")
    return f"by {given['train'].by}: {'; '.join(texts)}"


def _unit(counts: Mapping[str, Any]) -> str:
    """Return what a unit holds: rows, or the rows of a block."""
    return " x ".join(
        [_count(counts["unit_rows"], "row"), *(f"{dim} {length:,}" for dim, length in counts["unit_block"].items())]
    )


def _held_whole(store: StorePlan) -> str:
    """Return what of a store that is cut into blocks lies in one split."""
    plan = store.source.plan
    if not plan.blocks or plan.val + plan.test == 0:
        return ""
    held = {"rows": "all patches of a row", "blocks": "a place in all rows", "cells": "a block of patches"}
    return f"; {held[plan.whole]} {'lie' if plan.whole == 'rows' else 'lies'} in one split"


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
