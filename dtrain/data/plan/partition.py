"""Cut the sample axis into units, cells, splits and partitions: integer arithmetic on metadata alone.

    sample axis   0 . . . . . . . . . . . . . . . . . . . . . . . N
    objects       |-------|-------|-------|-------|-------|-----|      as stored
    units         |---------------|---------------|-------------|      read and decoded at once: whole objects
    cells         |---------------|---------------|-------------|      what is dealt to splits and partitions

Cells are whole units where there are enough of them (20 a replica, shares met within 10 %). Otherwise cells are
runs of samples inside units; a unit whose cells have several owners is decoded by each of them.

A shard that is too large to be a unit holds several. Its cells are dealt together, so that it has one owner, where
there are enough shards.

All that decides which samples go where is in `DataPlan`: small, plain, stored with the run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np

from dtrain.config.schema import SplitConfig
from dtrain.data.plan.hashing import DEAL, SPLIT, Ints, hash64
from dtrain.data.samples import WHOLE_OBJECT_BYTES, Samples, common_rows
from dtrain.errors import TooFewSamples

SplitName: TypeAlias = Literal["train", "val", "test", "all"]

UNIT_BYTES = 1 << 20
"""A unit holds at least this many decoded bytes if that leaves enough units."""
PART_BYTES = 4 << 20
"""Of a large shard, a unit holds at most this many."""
WINDOW_BYTES = 64 << 20
"""The window of the shuffle holds about this many decoded bytes, between 8 and 64 units."""
GROWN_BYTES = 32 << 20
"""Units grow up to this size where windows would otherwise read much twice."""
MAX_AMPLIFICATION = 1.10
UNITS_PER_REPLICA = 20
"""With fewer units than this a replica, cuts go at samples inside units."""
MAX_CELLS = 1 << 16
"""Single samples are dealt where that makes no more cells than this."""
SHARE_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlan:
    """Which samples are read by whom: resolved once, at the first start of a run."""

    num_samples: int
    """Rows along the sample dimension."""
    unit_rows: int
    """Rows of a unit; the last one may be shorter."""
    cell_rows: int
    """Rows of a cell, at most `unit_rows`; cells never cross units."""
    group: int = 1
    """Neighbouring cells that are dealt together."""
    first_row: int = 0
    """Rows before it are not used."""
    absent: tuple[tuple[int, int], ...] = ()
    """Runs of rows that are not stored and not used: first, and the one after the last."""
    patches: int = 1
    """Samples that every anchor is cut into."""
    stride: int
    """Anchors are its multiples."""
    first_offset: int
    last_offset: int
    """The rows of a sample lie between them, counted from its anchor."""
    window: int
    """Units that are shuffled into each other."""
    replicas: int
    eval_pieces: int
    """Tasks that an evaluation is cut into."""
    val: float
    test: float
    sequential: bool
    """Splits are cut along the sample axis instead of drawn."""
    contiguous: bool
    """Partitions are runs of the train split instead of dealt by strata."""
    shuffle: bool
    seed: int
    source: str
    """Fingerprint of the store's metadata."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the plan; cursors are only good together with it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def num_units(self) -> int:
        """Units of the whole store."""
        return math.ceil(self.num_samples / self.unit_rows)

    @property
    def cells_per_unit(self) -> int:
        """Cells of a full unit."""
        return math.ceil(self.unit_rows / self.cell_rows)

    @property
    def num_groups(self) -> int:
        """Groups of cells of the whole store."""
        return math.ceil(self.num_cells / self.group)

    @property
    def num_cells(self) -> int:
        """Cells of the whole store."""
        full, rest = divmod(self.num_samples, self.unit_rows)
        return full * self.cells_per_unit + math.ceil(rest / self.cell_rows)

    def unit_range(self, unit: int) -> tuple[int, int]:
        """Return the first row of a unit and the one after its last."""
        start = unit * self.unit_rows
        return start, min(start + self.unit_rows, self.num_samples)


@dataclass(frozen=True)
class Partition:
    """The samples that one replica (or one evaluation task) owns. A sample is known by its anchor row."""

    plan: DataPlan
    cells: Ints
    """Indices of its cells, ascending; each holds an anchor."""
    first: Ints
    """By cell: its first anchor."""
    count: Ints
    """By cell: the number of its anchors, `plan.stride` apart."""

    @cached_property
    def units(self) -> Ints:
        """The units that hold its cells, ascending."""
        return np.unique(self.cells // self.plan.cells_per_unit)

    @cached_property
    def part_sizes(self) -> Ints:
        """Samples it owns of each of `units`."""
        owner = np.searchsorted(self.units, self.cells // self.plan.cells_per_unit)
        anchors = np.bincount(owner, weights=self.count, minlength=len(self.units)).astype(np.int64)
        return anchors * self.plan.patches

    @property
    def num_samples(self) -> int:
        """Samples of a pass."""
        return int(self.count.sum()) * self.plan.patches

    def spans(self) -> tuple[Ints, Ints]:
        """Return, by part, its first anchor and the row after its last."""
        owner = self.cells // self.plan.cells_per_unit
        begins = np.flatnonzero(np.diff(owner, prepend=-1))
        ends = np.append(begins[1:], len(owner)) - 1
        return self.first[begins], self.first[ends] + (self.count[ends] - 1) * self.plan.stride + 1

    def part_anchors(self, part: int) -> Ints:
        """Return the anchors that it owns of ``units[part]``, ascending."""
        unit, per_unit = int(self.units[part]), self.plan.cells_per_unit
        cells = slice(*np.searchsorted(self.cells, [unit * per_unit, (unit + 1) * per_unit]))
        first, count = self.first[cells], self.count[cells]
        within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        anchors: Ints = np.repeat(first, count) + self.plan.stride * within
        return anchors


def cell_bounds(plan: DataPlan, cells: Ints) -> tuple[Ints, Ints]:
    """Return the first row of each cell and the one after its last."""
    unit, within = np.divmod(cells, plan.cells_per_unit)
    starts = unit * plan.unit_rows + within * plan.cell_rows
    ends = np.minimum((unit + 1) * plan.unit_rows, plan.num_samples)
    stops = np.minimum(starts + plan.cell_rows, ends)
    return np.clip(starts, plan.first_row, stops), stops


def cell_anchors(plan: DataPlan, split: SplitName) -> Partition:
    """Return all cells of a split that hold anchors, as one partition.

    The rows of a sample must all lie in its split: in a run of neighbouring cells of that split. Anchors whose
    window leaves it are dropped.
    """
    cells = split_cells(plan, split)
    starts, stops = cell_bounds(plan, cells)
    begins = np.flatnonzero(np.diff(cells, prepend=-2) != 1)  # where a run of neighbours begins
    lengths = np.diff(np.append(begins, len(cells)))
    run_start = np.repeat(starts[begins], lengths)
    run_stop = np.repeat(stops[begins + lengths - 1], lengths)
    low = np.maximum(starts, run_start - plan.first_offset)
    high = np.minimum(stops, run_stop - plan.last_offset)
    first = -(-low // plan.stride) * plan.stride
    count = np.maximum(0, -(-(high - first) // plan.stride))
    kept = count > 0
    return Partition(plan, cells[kept], first[kept], count[kept])


# Planning -----------------------------------------------------------------------------------------------


def count_units(samples: Samples) -> int:
    """Return the most units that the store can be cut into along its stored objects."""
    return math.ceil((samples.num_samples - samples.first_row) / _boundary(samples))


def plan_data(
    samples: Samples,
    *,
    replicas: int,
    seed: int,
    eval_pieces: int | None = None,
    absent: tuple[tuple[int, int], ...] = (),
) -> DataPlan:
    """Resolve units, cells and window from metadata, the number of replicas and the seed; never from memory.

    Raises
    ------
    TooFewSamples
        There are fewer training samples than replicas, or a split asked for is empty.
    """
    if samples.num_samples == 0:
        raise TooFewSamples(f"{samples.path} holds no samples along {samples.sample_dim}.")
    unit_rows = _unit_rows(samples, replicas, whole=not absent)
    row_bytes = max(1, samples.row_bytes)
    config = samples.config
    plan = DataPlan(
        num_samples=samples.num_samples,
        unit_rows=unit_rows,
        cell_rows=unit_rows,
        first_row=samples.first_row,
        absent=absent,
        patches=len(samples.tiles),
        stride=config.stride,
        first_offset=samples.reach()[0],
        last_offset=samples.reach()[1],
        window=min(64, max(8, WINDOW_BYTES // (unit_rows * row_bytes))),
        replicas=replicas,
        eval_pieces=eval_pieces or replicas,
        val=0.0 if config.val_path else config.split.val,
        test=config.split.test,
        sequential=config.split_order == "sequential" or (config.split_order == "auto" and samples.has_windows),
        contiguous=config.partition == "contiguous",
        shuffle=config.shuffle,
        seed=seed,
        source=samples.fingerprint,
    )
    plan = replace(plan, group=_group(samples, plan))
    if plan.group == 1:
        plan = replace(plan, cell_rows=_cell_rows(plan))
    train = sum(partition.num_samples for partition in train_partitions(plan))
    if train == 0 and samples.has_windows:
        raise TooFewSamples(
            f"{samples.path}: samples span {plan.last_offset - plan.first_offset + 1:,} rows of {samples.sample_dim}; "
            f"no run of the training split is as long ({samples.num_samples - samples.first_row:,} rows in all).",
            'Use a shorter window, hold out less in data.split, or set data.split_order = "sequential".',
        )
    if train < replicas:
        raise TooFewSamples(
            f"{samples.path}: {train:,} training samples for average.replicas = {replicas}; each replica needs one.",
            "Ask for fewer replicas, or hold out less in data.split.",
        )
    first, last = plan.first_offset, plan.last_offset
    for name in ("val", "test"):
        if getattr(plan, name) > 0 and not cell_anchors(plan, name).num_samples:
            raise TooFewSamples(
                f"{samples.path}: data.split.{name} = {getattr(plan, name):g} of {samples.num_samples:,} rows "
                "holds no sample"
                + (f" with its whole window of {last - first + 1:,} rows." if samples.has_windows else "."),
                f"Set data.split.{name} = 0, hold out more"
                + (", or use a shorter window." * samples.has_windows or "."),
            )
    return plan


def plan_held_out(samples: Samples, like: DataPlan) -> DataPlan:
    """Return the plan of a store that is only evaluated: all of it is one split."""
    config = samples.config
    whole = replace(samples, config=config.model_copy(update={"split": SplitConfig(val=0.0, test=0.0)}))
    return plan_data(whole, replicas=1, seed=like.seed, eval_pieces=like.eval_pieces)


def format_bytes(count: float) -> str:
    """Return a count of bytes in the unit a person would use.

    >>> format_bytes(1_500_000)
    '1.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _boundary(samples: Samples) -> int:
    return min(common_rows([v.object_rows for v in samples.streamed]), max(1, samples.num_samples))


def _unit_rows(samples: Samples, replicas: int, *, whole: bool) -> int:
    """Return the rows of a unit: the smallest run that reads efficiently.

    Small objects are put together up to `UNIT_BYTES`, large shards cut at their inner chunks. Then it grows, as
    long as windows reach so far beyond it that much is read twice, and there are enough units.
    """
    boundary, row_bytes = _boundary(samples), max(1, samples.row_bytes)
    rows = samples.num_samples - samples.first_row
    inner = common_rows([v.chunk_rows for v in samples.streamed])
    if boundary * row_bytes > WHOLE_OBJECT_BYTES and boundary > inner and boundary % inner == 0:
        sizes = [inner * n for n in range(1, boundary // inner + 1) if boundary % (inner * n) == 0]
        start = max([size for size in sizes if size * row_bytes <= PART_BYTES] or sizes[:1])
        candidates = [size for size in sizes if size >= start]
    else:
        wanted = math.ceil(UNIT_BYTES / (boundary * row_bytes)) if whole else 1
        enough_units = rows // (boundary * 3 * UNITS_PER_REPLICA * replicas)
        start = boundary * max(1, min(wanted, enough_units))
        most = min(GROWN_BYTES // row_bytes, rows // (UNITS_PER_REPLICA * replicas))
        candidates = [start, *range(start + boundary, most + 1, boundary)]
    grown = [size for size in candidates if size == start or size * row_bytes <= GROWN_BYTES]
    enough = next((size for size in grown if _amplification(samples, size) <= MAX_AMPLIFICATION), grown[-1])
    return min(samples.num_samples, enough)


def _amplification(samples: Samples, unit_rows: int) -> float:
    """Return the bytes decoded for a unit in the middle of the store, over the bytes of its rows."""
    decoded = 0
    for v in samples.streamed:
        low, high = samples.reach(v.name)
        first = (unit_rows * 8 + low) // v.chunk_rows
        decoded += (-(-(unit_rows * 9 + high) // v.chunk_rows) - first) * v.chunk_rows * v.row_bytes
    return decoded / max(1, unit_rows * samples.row_bytes)


def _group(samples: Samples, plan: DataPlan) -> int:
    """Return how many units are dealt together: those of a shard, if there are enough shards."""
    boundary = _boundary(samples)
    group = boundary // plan.unit_rows if boundary % plan.unit_rows == 0 else 1
    candidate = replace(plan, group=group)
    groups = len(np.unique(_present_cells(candidate) // group))
    enough = groups >= UNITS_PER_REPLICA * plan.replicas and _shares_met(candidate)
    return group if enough else 1


def _cell_rows(plan: DataPlan) -> int:
    """Return the longest cell that gives every replica enough cells and every split its share."""
    candidate = plan
    for pieces in _pieces(plan):
        candidate = replace(plan, cell_rows=math.ceil(plan.unit_rows / pieces))
        if len(_present_cells(candidate)) >= UNITS_PER_REPLICA * plan.replicas and _shares_met(candidate):
            break
    return candidate.cell_rows


def _pieces(plan: DataPlan) -> Iterator[int]:
    """Yield into how many cells to try to cut a unit.

    A unit is decoded once for each owner of its cells, so few, long cells are tried first. With more cells than
    owners finer cuts cost nothing more, and where all units fit the window decoding them is cheap: then single
    samples are dealt, if they are not too many, and the parts are equal.
    """
    yield 1
    if math.ceil((plan.num_samples - plan.first_row) / plan.unit_rows) > plan.window:
        yield from range(2, min(plan.replicas + 2, plan.unit_rows) + 1)
    finest = max(plan.stride, math.ceil(plan.num_samples / MAX_CELLS))
    yield max(1, plan.unit_rows // finest)


def _used_rows(plan: DataPlan) -> int:
    starts, stops = cell_bounds(plan, _present_cells(plan))
    return max(1, int((stops - starts).sum()))


def _shares_met(plan: DataPlan) -> bool:
    for name in ("val", "test"):
        share = getattr(plan, name)
        if share > 0:
            starts, stops = cell_bounds(plan, split_cells(plan, name))
            got = int((stops - starts).sum()) / _used_rows(plan)
            if abs(got - share) > SHARE_TOLERANCE * share:
                return False
    return True


# Splits and partitions ------------------------------------------------------------------------------------


def split_cells(plan: DataPlan, split: SplitName) -> Ints:
    """Return the cells of a split, ascending."""
    cells = _present_cells(plan)
    groups = np.unique(cells // plan.group)
    count = len(groups)
    if split == "all":
        return cells
    num_val, num_test = round(count * plan.val), round(count * plan.test)
    bounds = {"train": (0, count - num_val - num_test), "val": (count - num_val - num_test, count - num_test)}
    start, stop = bounds.get(split, (count - num_test, count))
    ranked = groups
    if not plan.sequential:
        ranked = groups[np.argsort(hash64(plan.seed, SPLIT, groups), kind="stable")]
    return cells[np.isin(cells // plan.group, ranked[start:stop])]


def _present_cells(plan: DataPlan) -> Ints:
    """Return the cells with rows that are used, ascending: without a row that is absent."""
    cells = np.arange(plan.num_cells)
    starts, stops = cell_bounds(plan, cells)
    used = starts < stops
    for first, after in plan.absent:
        used &= (stops <= first) | (starts >= after)
    return cells[used]


def train_partitions(plan: DataPlan) -> tuple[Partition, ...]:
    """Return the partition of each replica: together the train split.

    `stratified`: of every `replicas` consecutive cells each replica gets one, by a seeded deal, so that all
    partitions look alike and are equal to within one cell. `contiguous`: each gets one run, cut where is
    nearest to equal.
    """
    train = cell_anchors(plan, "train")
    if plan.contiguous:
        return _runs(train, plan.replicas)
    groups, member = np.unique(train.cells // plan.group, return_inverse=True)
    strata = math.ceil(len(groups) / plan.replicas)
    draws = hash64(plan.seed, DEAL, np.arange(strata)[:, None], np.arange(plan.replicas)[None, :])
    owner = np.empty(len(groups), np.int64)
    samples = np.bincount(member, weights=train.count).astype(np.int64)
    dealt = np.argsort(-samples, kind="stable")  # groups with few samples after all others
    owner[dealt] = np.argsort(draws, axis=1, kind="stable").ravel()[: len(groups)]
    return tuple(_chosen(train, np.flatnonzero(owner[member] == replica)) for replica in range(plan.replicas))


def eval_partitions(plan: DataPlan, split: SplitName) -> tuple[Partition, ...]:
    """Return the pieces that an evaluation of a split is cut into, in order; none of them is empty."""
    whole = cell_anchors(plan, split)
    return _runs(whole, min(plan.eval_pieces, len(whole.cells)))


def _runs(whole: Partition, count: int) -> tuple[Partition, ...]:
    """Cut a partition into runs with samples as equal as the bounds of cells allow; none is empty."""
    if not count:
        return ()
    middles = np.cumsum(whole.count) - whole.count / 2
    index = np.arange(count + 1)
    cuts = np.searchsorted(middles, index * (int(whole.count.sum()) / count))
    cuts = np.maximum.accumulate(np.maximum(cuts, index) - index) + index
    cuts = np.minimum(cuts, len(whole.cells) - count + index)
    return tuple(_chosen(whole, slice(a, b)) for a, b in pairwise(cuts.tolist()))


def _chosen(whole: Partition, which: Any) -> Partition:
    return Partition(whole.plan, whole.cells[which], whole.first[which], whole.count[which])


@dataclass(frozen=True)
class JointPlan:
    """The plans of all stores of a run; their replicas are numbered through, store by store.

    Partitions are computed once, when they are first asked for; they are not pickled.
    """

    plans: tuple[DataPlan, ...]

    def __reduce__(self) -> tuple[type[JointPlan], tuple[tuple[DataPlan, ...]]]:
        return JointPlan, (self.plans,)

    @property
    def replicas(self) -> int:
        """Replicas of all stores."""
        return sum(plan.replicas for plan in self.plans)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the plans; cursors are only good together with it."""
        if len(self.plans) == 1:
            return self.plans[0].fingerprint
        return hashlib.sha256(" ".join(plan.fingerprint for plan in self.plans).encode()).hexdigest()

    @cached_property
    def partitions(self) -> tuple[Partition, ...]:
        """The partition of each replica."""
        return tuple(partition for plan in self.plans for partition in train_partitions(plan))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each replica's partition."""
        return tuple(partition.num_samples for partition in self.partitions)

    @property
    def stores(self) -> tuple[int, ...]:
        """By replica, the number of its store."""
        return tuple(number for number, plan in enumerate(self.plans) for _ in range(plan.replicas))

    def pieces(self, split: SplitName) -> tuple[tuple[int, Partition], ...]:
        """Return the pieces that an evaluation is cut into, each with the number of its store."""
        return tuple(
            (number, piece) for number, plan in enumerate(self.plans) for piece in eval_partitions(plan, split)
        )


def describe_plan(samples: Samples, plan: DataPlan) -> dict[str, Any]:
    """Return the counts that a person wants to see of a plan."""
    parts = train_partitions(plan)
    splits: tuple[SplitName, ...] = ("train", "val", "test")
    anchors = -(-plan.num_samples // plan.stride) - -(-plan.first_row // plan.stride)
    touched = sum(len(part.units) for part in parts)
    distinct = len(np.unique(np.concatenate([part.units for part in parts])))
    decoded, distinct_bytes = decoded_bytes(samples, parts)
    return {
        "units": plan.num_units,
        "unit_rows": plan.unit_rows,
        "cells": plan.num_cells,
        "cell_rows": plan.cell_rows,
        "window_units": plan.window,
        "partition_samples": [part.num_samples for part in parts],
        "val_samples": sum(part.num_samples for part in eval_partitions(plan, "val")),
        "test_samples": sum(part.num_samples for part in eval_partitions(plan, "test")),
        "dropped_samples": anchors * plan.patches - sum(cell_anchors(plan, split).num_samples for split in splits),
        "decodes_per_unit": touched / distinct,
        "partition_units": max(len(part.units) for part in parts),
        "decoded_bytes": decoded,
        "read_amplification": decoded / max(1, distinct_bytes),
        "patches": plan.patches,
        "absent_rows": sum(stop - start for start, stop in plan.absent),
    }


def decoded_bytes(samples: Samples, parts: tuple[Partition, ...]) -> tuple[int, int]:
    """Return the bytes decoded in a pass over all partitions, and those of the distinct chunks among them."""
    decoded = distinct = 0
    for v in samples.streamed:
        low, high = samples.reach(v.name)
        spans = [part.spans() for part in parts]
        first = np.concatenate([start + low for start, _ in spans]) // v.chunk_rows
        after = -(-np.concatenate([stop + high for _, stop in spans]) // v.chunk_rows)
        chunk = v.chunk_rows * v.row_bytes
        decoded += int((after - first).sum()) * chunk
        order = np.argsort(first, kind="stable")
        first, after = first[order], np.maximum.accumulate(after[order])
        before = np.concatenate([first[:1], after[:-1]])
        distinct += int(np.maximum(0, after - np.maximum(first, before)).sum()) * chunk
    return decoded, distinct
