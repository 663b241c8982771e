"""The counts of a plan that a person wants to see: units, cells, samples of each split, bytes decoded a pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from dtrain.data.plan.anchors import count_samples
from dtrain.data.plan.hashing import slices
from dtrain.data.plan.partition import Partition, train_partitions
from dtrain.data.plan.splits import SplitName
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Samples
from dtrain.data.variable import Variable


def describe_plan(samples: Samples, plan: DataPlan) -> dict[str, Any]:
    """Return the counts of a plan by name, as ``dtrain plan --json`` prints them."""
    parts = train_partitions(plan)
    dropped = dropped_samples(plan)
    touched = sum(len(part.units) for part in parts)
    distinct = _num_distinct_units(plan, parts)
    decoded, distinct_bytes = decoded_bytes(samples, parts)
    return {
        "units": plan.num_units,
        "unit_rows": plan.unit_rows,
        "cells": plan.num_cells,
        "cell_rows": plan.cell_rows,
        "window_units": plan.window,
        "partition_samples": [part.num_samples for part in parts],
        "val_samples": count_samples(plan, "val").samples,
        "test_samples": count_samples(plan, "test").samples,
        "dropped_samples": sum(dropped.values()),
        "dropped": dropped,
        "jumps": len(plan.jump_rows),
        "decodes_per_unit": touched / distinct,
        "partition_units": max(len(part.units) for part in parts),
        "decoded_bytes": decoded,
        "read_amplification": decoded / max(1, distinct_bytes),
        "patches": plan.patches,
        "absent_rows": sum(stop - start for start, stop in plan.absent),
    }


def dropped_samples(plan: DataPlan) -> dict[str, int]:
    """Return how many samples no split holds, by the reason.

    ``missing``: a chunk of its rows, or of a cell beside them, is not stored; ``gaps``: its window holds a jump;
    ``split``: its window leaves its split or the store.
    """
    splits: tuple[SplitName, ...] = ("train", "val", "test")
    kept = sum(count_samples(plan, split).samples for split in splits)
    stored, smooth = replace(plan, jumps=""), replace(plan, jumps="", absent=())
    whole, of_stored, of_smooth = (count_samples(each, "all").samples for each in (smooth, stored, plan))
    anchors = -(-plan.num_samples // plan.stride) - -(-plan.first_row // plan.stride)
    return {
        "split": anchors * plan.patches - whole + of_smooth - kept,
        "gaps": of_stored - of_smooth,
        "missing": whole - of_stored,
    }


def _num_distinct_units(plan: DataPlan, parts: tuple[Partition, ...]) -> int:
    is_used = np.zeros(plan.num_units, bool)
    for part in parts:
        is_used[part.units] = True
    return int(is_used.sum())


def decoded_bytes(samples: Samples, parts: tuple[Partition, ...]) -> tuple[int, int]:
    """Return the bytes decoded in a pass over all partitions, and the bytes of the distinct chunks among them."""
    counts = [(_decoded_chunks(samples, v, parts), v.chunk_rows * v.row_bytes) for v in samples.streamed]
    decoded = sum(total * chunk for (total, _), chunk in counts)
    return decoded, sum(distinct * chunk for (_, distinct), chunk in counts)


def _decoded_chunks(samples: Samples, v: Variable, parts: tuple[Partition, ...]) -> tuple[int, int]:
    """Return how many rows of chunks the parts of partitions decode, in all and without repetitions."""
    low, high = samples.reach(v.name)
    begins = np.zeros(-(-samples.num_samples // v.chunk_rows) + 1, np.int32)
    decoded = 0
    for part in parts:
        starts, stops = part.spans()
        for some in slices(len(starts)):
            first, after = (starts[some] + low) // v.chunk_rows, -(-(stops[some] + high) // v.chunk_rows)
            decoded += int((after - first).sum())
            np.add.at(begins, first, 1)
            np.subtract.at(begins, after, 1)
    np.cumsum(begins, out=begins)
    return decoded, int(np.count_nonzero(begins))
