"""The plan of a run as a JSON object: ``dtrain plan --json``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dtrain.algorithm.cadence import TARGET_SHARE, pays_from, recommended, table
from dtrain.data.balance import Balance
from dtrain.data.categories import categories_of
from dtrain.data.plan.memory import MemoryBudget
from dtrain.data.plan.missing import absence_of
from dtrain.planning import RunPlan, StorePlan
from dtrain.runtime.spec import PlannedSource
from dtrain.urls import redacted_url

MOST_NAMES = 100
"""Names of categories that the object holds, of each categorical."""


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
        "balance": None if plan.balance is None else balance_record(plan.balance),
        "workers": plan.workers,
        "resident_bytes": plan.resident_bytes,
        "memory": memory_record(first.source.memory),
        "reduced_bytes": plan.traffic.sent,
        "received_bytes": plan.traffic.received,
        "commit_bytes": plan.commit.total,
        "commit_by": "workers" if plan.shared else "driver",
        "round_seconds": round(plan.round_seconds, 3),
        "worker_bytes": plan.worker_bytes,
        "checksums": plan.checksums,
        "absent_chunks": absent_record(first.source),
        "normalize": {
            v.name: {"dims": v.mean_dims, "means": v.num_means}
            for v in first.source.samples.variables
            if v.is_standardised
        },
        "categories": {
            name: {"count": one.count, "names": one.names[:MOST_NAMES]}
            for name, one in categories_of(first.source.samples).items()
        },
        "notes": dict(first.source.samples.store.notes),
        "readers": {name: reader for name, (reader, _) in first.readers.items()},
        "chosen": {one.dim: asdict(one) for one in first.source.samples.chosen},
        "splits": splits_record(first),
        "leakage": first.leakage,
        "gaps": first.gaps,
        "weight": first.weight,
        "held_out_gaps": plan.held_out_gaps,
        "resolved": {key: {"value": value, "why": why} for key, (value, why) in plan.choices.items()},
        "probe": probe_record(plan),
        "cadence": cadence_record(plan),
    }
    if len(plan.stores) > 1:
        record["stores"] = [
            {
                "path": redacted_url(store.source.samples.path),
                "workers": list(store.source.workers),
                **store.counts,
                "splits": splits_record(store),
                "gaps": store.gaps,
                "absent_chunks": absent_record(store.source),
                "notes": dict(store.source.samples.store.notes),
            }
            for store in plan.stores
        ]
    if plan.held_out is not None:
        record["held_out_absent_chunks"] = absent_record(plan.held_out)
    return record


def balance_record(balance: Balance) -> dict[str, Any]:
    """Return, by class of ``data.balance``, its training samples and how many times a pass each comes."""
    factors = balance.factors
    classes = list(balance.counts)[:MOST_NAMES]
    return {
        "by": balance.by,
        "classes": [{"class": key, "samples": balance.counts[key], "factor": factors[key]} for key in classes],
        "without_a_class": balance.missing,
    }


def splits_record(store: StorePlan) -> dict[str, dict[str, Any]]:
    """Return, by split, what it holds of the coordinate or variable that splits are given by; nothing for shares."""
    samples = {
        "train": sum(store.counts["partition_samples"]),
        "val": store.counts["val_samples"],
        "test": store.counts["test_samples"],
    }
    return {name: {**asdict(held), "samples": samples[name]} for name, held in store.given.held.items()}


def probe_record(plan: RunPlan) -> dict[str, Any] | None:
    """Return what was measured of a step and a round, and what limits rounds as they are configured."""
    probe, limit = plan.probe, plan.limit
    if probe is None:
        return None
    return {
        "step_seconds": probe.step,
        "overhead_seconds": probe.overhead,
        "reduce_seconds": probe.reduce,
        "waiting_share": probe.waiting,
        "measured_local_steps": probe.local_steps,
        "limited_by": None if limit is None else asdict(limit),
    }


def cadence_record(plan: RunPlan) -> dict[str, Any] | None:
    """Return what rounds of some numbers of local steps cost; `measured` says whether by a probe."""
    costs = plan.costs
    if costs is None:
        return None
    return {
        "measured": plan.probe is not None,
        "bandwidth": costs.bandwidth,
        "local_steps": max(plan.steps),
        "recommended": recommended(costs),
        "target_share": TARGET_SHARE,
        "pays_from": pays_from(costs),
        "wire_bytes": costs.traffic.busiest,
        "wire_seconds": costs.wire,
        "all_reduce_seconds": costs.all_reduce if costs.bandwidth else None,
        "table": [asdict(row) for row in table(costs, max(plan.steps))],
    }


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
