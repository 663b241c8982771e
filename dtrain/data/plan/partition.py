"""Plan a store (`plan_data`), and deal its cells to replicas and evaluations: integer arithmetic on metadata alone.

`dtrain.data.plan.cuts` says how units and cells are cut. What decides which samples go where is in `DataPlan`:
small, plain, stored with the run; partitions are derived from it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from dtrain.config.schema import SplitConfig
from dtrain.data.plan.cuts import object_rows, unit_rows, with_cells
from dtrain.data.plan.hashing import DEAL, Ints, hash64
from dtrain.data.plan.splits import Runs, SplitName, split_cells, without_rows
from dtrain.data.plan.units import Box, DataPlan, cell_bounds
from dtrain.data.samples import Samples
from dtrain.errors import TooFewSamples

WINDOW_BYTES = 64 << 20
"""The mixing window holds about so many decoded bytes, between 8 and 64 units."""


@dataclass(frozen=True)
class Partition:
    """The samples that one replica, or one evaluation task, owns. A sample is named by its anchor row.

    A *part* is a unit as one partition sees it: the anchors of the unit that the partition owns.
    """

    plan: DataPlan
    cells: Ints
    """Numbers of its cells, ascending; each cell holds an anchor."""
    first: Ints
    """The first anchor of each cell."""
    count: Ints
    """The number of anchors of each cell; they are `plan.stride` apart."""

    @cached_property
    def units(self) -> Ints:
        """The units that hold its cells, ascending; ``units[part]`` is the unit of a part."""
        return np.unique(self.cells // self.plan.cells_per_unit)

    @cached_property
    def part_sizes(self) -> Ints:
        """The number of samples of each part."""
        owner = np.searchsorted(self.units, self.cells // self.plan.cells_per_unit)
        anchors = np.bincount(owner, weights=self.count, minlength=len(self.units)).astype(np.int64)
        return anchors * self.plan.patches

    @property
    def num_samples(self) -> int:
        """Number of samples of a pass."""
        return int(self.count.sum()) * self.plan.patches

    def spans(self) -> tuple[Ints, Ints]:
        """Return the first anchor of each part, and the row after its last anchor."""
        owner = self.cells // self.plan.cells_per_unit
        begins = np.flatnonzero(np.diff(owner, prepend=-1))
        ends = np.append(begins[1:], len(owner)) - 1
        return self.first[begins], self.first[ends] + (self.count[ends] - 1) * self.plan.stride + 1

    def part_anchors(self, part: int) -> Ints:
        """Return the anchors of a part, ascending."""
        cells = self._cells_of(part)
        first, count = self.first[cells], self.count[cells]
        within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        anchors: Ints = np.repeat(first, count) + self.plan.stride * within
        return anchors

    def box(self, part: int) -> Box:
        """Return the box from the first to the last anchor of a part."""
        cells = self._cells_of(part)
        first, count = self.first[cells], self.count[cells]
        return Box(int(first[0]), int(first[-1] + (count[-1] - 1) * self.plan.stride) + 1)

    def _cells_of(self, part: int) -> slice:
        unit, per_unit = int(self.units[part]), self.plan.cells_per_unit
        return slice(*np.searchsorted(self.cells, [unit * per_unit, (unit + 1) * per_unit]))

    def chosen(self, which: Ints | slice) -> Partition:
        """Return the partition of some of its cells."""
        return Partition(self.plan, self.cells[which], self.first[which], self.count[which])


def cell_anchors(plan: DataPlan, split: SplitName, lost: Runs = ()) -> Partition:
    """Return all cells of a split that hold anchors and none of the `lost` rows, as one partition.

    The rows of a sample must all lie in one run of neighbouring cells of its split. Anchors whose window leaves
    it are dropped.
    """
    cells = without_rows(plan, split_cells(plan, split), lost)
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


def train_partitions(plan: DataPlan) -> tuple[Partition, ...]:
    """Return the partition of each replica: together the training split.

    `stratified`: of every `replicas` consecutive cells each replica gets one, by a seeded deal, so that all
    partitions look alike and are equal to within one cell. `contiguous`: each replica gets one run of cells, as
    equal in samples as cells allow.
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
    return tuple(train.chosen(np.flatnonzero(owner[member] == replica)) for replica in range(plan.replicas))


def eval_partitions(plan: DataPlan, split: SplitName, lost: Runs = ()) -> tuple[Partition, ...]:
    """Return the pieces that an evaluation of a split is cut into, in order; none is empty.

    Parameters
    ----------
    plan : DataPlan
    split : str
    lost : tuple of (int, int)
        Runs of rows that are left out since they are not stored any more: splits are cut as if they were.
    """
    whole = cell_anchors(plan, split, lost)
    return _runs(whole, min(plan.eval_pieces, len(whole.cells)))


def _runs(whole: Partition, count: int) -> tuple[Partition, ...]:
    """Cut a partition into runs of cells, as equal in samples as cells allow; none is empty."""
    if not count:
        return ()
    middles = np.cumsum(whole.count) - whole.count / 2
    index = np.arange(count + 1)
    cuts = np.searchsorted(middles, index * (int(whole.count.sum()) / count))
    cuts = np.maximum.accumulate(np.maximum(cuts, index) - index) + index
    cuts = np.minimum(cuts, len(whole.cells) - count + index)
    return tuple(whole.chosen(slice(a, b)) for a, b in pairwise(cuts.tolist()))


@dataclass(frozen=True)
class JointPlan:
    """The plans of all stores of a run; replicas are numbered through, store by store."""

    plans: tuple[DataPlan, ...]

    def __reduce__(self) -> tuple[type[JointPlan], tuple[tuple[DataPlan, ...]]]:
        return JointPlan, (self.plans,)

    @property
    def replicas(self) -> int:
        """Number of replicas of all stores."""
        return sum(plan.replicas for plan in self.plans)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the plans; a cursor is valid only together with it."""
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
        """Return the number of each replica's store."""
        return tuple(number for number, plan in enumerate(self.plans) for _ in range(plan.replicas))

    def pieces(self, split: SplitName) -> tuple[tuple[int, Partition], ...]:
        """Return the pieces that an evaluation is cut into, each with the number of its store."""
        return tuple(
            (number, piece) for number, plan in enumerate(self.plans) for piece in eval_partitions(plan, split)
        )


# Planning -----------------------------------------------------------------------------------------------


def count_units(samples: Samples) -> int:
    """Return the largest number of units that the store can be cut into along its stored objects."""
    return math.ceil((samples.num_samples - samples.first_row) / object_rows(samples))


def plan_data(
    samples: Samples,
    *,
    replicas: int,
    seed: int,
    eval_pieces: int | None = None,
    absent: Runs = (),
) -> DataPlan:
    """Resolve units, cells and mixing window from metadata, the number of replicas and the seed; never from memory.

    Parameters
    ----------
    samples : Samples
    replicas : int
    seed : int
    eval_pieces : int, optional
        Number of tasks of an evaluation; as many as replicas if not given.
    absent : tuple of (int, int)
        Runs of rows that are not stored and not used (`absent_rows`).

    Raises
    ------
    TooFewSamples
        There are fewer training samples than replicas, or a requested split is empty.
    """
    if samples.num_samples == 0:
        raise TooFewSamples(
            f"{samples.path} holds no samples along {samples.sample_dim}.",
            "Write some, or name another dimension in data.sample_dim.",
        )
    rows = unit_rows(samples, replicas, whole=not absent)
    config = samples.config
    first_offset, last_offset = samples.reach()
    plan = DataPlan(
        num_samples=samples.num_samples,
        unit_rows=rows,
        cell_rows=rows,
        first_row=samples.first_row,
        absent=absent,
        patches=len(samples.tiles),
        stride=config.stride,
        first_offset=first_offset,
        last_offset=last_offset,
        window=min(64, max(8, WINDOW_BYTES // (rows * max(1, samples.row_bytes)))),
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
    plan = with_cells(samples, plan)
    _check_train(samples, plan)
    _check_held_out(samples, plan)
    return plan


def plan_held_out(samples: Samples, like: DataPlan, *, absent: Runs = ()) -> DataPlan:
    """Return the plan of a store that is only evaluated: all of it is one split, but for `absent` rows."""
    config = samples.config
    whole = replace(samples, config=config.model_copy(update={"split": SplitConfig(val=0.0, test=0.0)}))
    return plan_data(whole, replicas=1, seed=like.seed, eval_pieces=like.eval_pieces, absent=absent)


def _check_train(samples: Samples, plan: DataPlan) -> None:
    train = cell_anchors(plan, "train").num_samples
    if train == 0 and samples.has_windows:
        raise TooFewSamples(
            f"{samples.path}: samples span {plan.last_offset - plan.first_offset + 1:,} rows of {samples.sample_dim}; "
            f"no run of the training split is as long ({samples.num_samples - samples.first_row:,} rows in all).",
            'Use a shorter window, hold out less in data.split, or set data.split_order = "sequential".',
        )
    if train < plan.replicas:
        raise TooFewSamples(
            f"{samples.path}: {train:,} training samples for average.replicas = {plan.replicas}; each replica needs "
            "one.",
            "Ask for fewer replicas, or hold out less in data.split.",
        )


def _check_held_out(samples: Samples, plan: DataPlan) -> None:
    span = f" with its whole window of {plan.last_offset - plan.first_offset + 1:,} rows" if samples.has_windows else ""
    shorter = ", or use a shorter window" if samples.has_windows else ""
    shares: tuple[tuple[SplitName, float], ...] = (("val", plan.val), ("test", plan.test))
    for name, share in shares:
        if share > 0 and not cell_anchors(plan, name).num_samples:
            raise TooFewSamples(
                f"{samples.path}: data.split.{name} = {share:g} of {samples.num_samples:,} rows holds no sample{span}.",
                f"Set data.split.{name} = 0, hold out more{shorter}.",
            )
