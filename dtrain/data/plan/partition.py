"""Plan a store (`plan_data`), and deal its cells to replicas and evaluations: integer arithmetic on metadata alone.

`dtrain.data.plan.cuts` says how units and cells are cut. What decides which samples go where is in `DataPlan`:
small, plain, stored with the run; partitions are derived from it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from dtrain.config.split import SplitConfig
from dtrain.data.plan.anchors import count_samples
from dtrain.data.plan.boxes import window_units, with_units
from dtrain.data.plan.cuts import object_rows
from dtrain.data.plan.footprint import slot_bytes
from dtrain.data.plan.hashing import DEAL, SLICE, Compact, Ints, hash64
from dtrain.data.plan.labels import BY_SHARE, GivenSplits, Labels
from dtrain.data.plan.multiplicity import multiplicity_text
from dtrain.data.plan.parts import Partition as Partition
from dtrain.data.plan.parts import cell_anchors as cell_anchors
from dtrain.data.plan.splits import Runs, SplitName, changes
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Samples
from dtrain.errors import TooFewSamples

WINDOW_BYTES = 64 << 20
"""The mixing window holds about so many decoded bytes, between 8 and 64 units."""


def train_partitions(plan: DataPlan) -> tuple[Partition, ...]:
    """Return the partition of each replica: together the training split.

    `stratified`: of every `replicas` consecutive cells each replica gets one, by a seeded deal, so that all
    partitions look alike and are equal to within one cell. `contiguous`: each replica gets one run of cells, as
    equal in samples as cells allow.
    """
    train = cell_anchors(plan, "train")
    if plan.contiguous:
        return _cut_evenly(train, plan.replicas)
    owner = _owners(train)
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=plan.replicas))
    return tuple(train.chosen(order[start:stop]) for start, stop in pairwise([0, *ends.tolist()]))


def _owners(train: Partition) -> npt.NDArray[np.int32]:
    """Return the replica that each run of anchors is dealt to; a group goes to one replica."""
    plan = train.plan
    begins = changes(train.cells // plan.group)
    is_whole = len(begins) == len(train.cells)
    count = _samples_of(train)
    samples = count if is_whole else np.add.reduceat(count, begins, dtype=np.int64)
    owner = np.empty(len(begins), np.int32)
    dealt = np.argsort(-samples, kind="stable")  # groups with few samples after all others
    together = max(1, SLICE // plan.replicas)
    for first in range(0, math.ceil(len(begins) / plan.replicas), together):
        strata = np.arange(first, first + together)
        draws = hash64(plan.seed, DEAL, strata[:, None], np.arange(plan.replicas)[None, :])
        chosen = dealt[first * plan.replicas :][: draws.size]
        owner[chosen] = np.argsort(draws, axis=1, kind="stable").ravel()[: len(chosen)]
    return owner if is_whole else np.repeat(owner, np.diff(begins, append=len(train.cells)))


def _samples_of(partition: Partition) -> Compact:
    """Return the anchors of each run; where they hold different numbers of samples, its samples."""
    if partition.samples is not None:
        return partition.samples
    if not partition.plan.tile_labels:
        return partition.count
    samples: Ints = partition.count * partition.plan.tiles_of(partition.cells, partition.split)
    return samples


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
    return tuple(piece for piece in _cut_evenly(whole, plan.eval_pieces) if len(piece.cells))


def _cut_evenly(whole: Partition, count: int) -> tuple[Partition, ...]:
    """Cut a partition into runs of whole cells, as equal in samples as cells allow.

    Only if there are fewer cells than partitions the last ones are empty.
    """
    begins = changes(whole.cells)
    filled = min(count, len(begins))
    cuts = np.zeros(count + 1, np.int64) + len(begins)
    if filled:
        samples = np.add.reduceat(_samples_of(whole), begins, dtype=np.int64)
        middles = np.cumsum(samples) - samples / 2
        index = np.arange(filled + 1)
        even = np.searchsorted(middles, index * (int(samples.sum()) / filled))
        even = np.maximum.accumulate(np.maximum(even, index) - index) + index
        cuts[: filled + 1] = np.minimum(even, len(begins) - filled + index)
    runs = np.append(begins, len(whole.cells))[cuts].tolist()
    return tuple(whole.chosen(slice(start, stop)) for start, stop in pairwise(runs))


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


# Counted --------------------------------------------------------------------------------------------------


def counted(samples: Samples, plan: DataPlan, values: Labels, found: str) -> DataPlan:
    """Return a plan with the multiplicities of its samples, which are dealt to replicas by them.

    Parameters
    ----------
    samples : Samples
    plan : DataPlan
    values : uint8[anchor, patch]
    found : str
        The variables with values that are not finite, for errors.

    Raises
    ------
    TooFewSamples
        Nothing is left of a split, or too little for the replicas.
    """
    known = replace(plan, multiplicity=multiplicity_text(values))
    names: tuple[SplitName, ...] = ("train", "val", "test")
    for name in names:
        before = count_samples(plan, name).samples
        if before and not count_samples(known, name).samples:
            raise TooFewSamples(
                f"{samples.path}: data.non_finite leaves out all of the {before:,} samples of {name}; of the whole "
                f"store, by variable with non-finite values: {found}.",
                "Keep samples with fewer finite values (data.non_finite = { min_valid = 0.5 }), split the data in "
                "another way, or repair them.",
            )
    _check_train(samples, known)
    _check_owners(samples, known)
    return known


# Planning -----------------------------------------------------------------------------------------------


def count_units(samples: Samples) -> int:
    """Return the largest number of units that the store can be cut into along its stored objects."""
    rows = object_rows(samples)
    whole = sum(math.ceil((one.num_samples - one.first_row) / rows) for one in samples.stores)
    return min(whole, math.ceil((samples.num_samples - samples.first_row) / rows))  # one may hold several small stores


def plan_data(
    samples: Samples,
    *,
    replicas: int,
    seed: int,
    eval_pieces: int | None = None,
    absent: Runs = (),
    jumps: str = "",
    given: GivenSplits = BY_SHARE,
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
    jumps : str
        Rows that no window may hold together with the row before them, as `DataPlan.jumps`.
    given : GivenSplits
        The splits that ``data.split`` gives by coordinate or by group.

    Raises
    ------
    TooFewSamples
        There are fewer training samples than replicas, or too few that can be dealt apart, or a requested split is
        empty.
    """
    if samples.num_samples == 0:
        raise TooFewSamples(
            f"{samples.path} holds no samples along {samples.sample_dim}.",
            "Write some, or name another dimension in data.sample_dim.",
        )
    config = samples.config
    assert given != BY_SHARE or not (config.split.by or config.split.ranges), "splits that are given must be resolved"
    shares = {} if config.split.by else config.split.shares
    first_offset, last_offset = samples.reach()
    plan = DataPlan(
        num_samples=samples.num_samples,
        unit_rows=1,
        cell_rows=1,
        first_row=samples.first_row,
        absent=absent,
        patches=len(samples.tiles),
        stride=config.stride,
        first_offset=first_offset,
        last_offset=last_offset,
        window=1,
        replicas=replicas,
        eval_pieces=eval_pieces or replicas,
        val=0.0 if config.val_path else shares.get("val", 0.0),
        test=shares.get("test", 0.0),
        sequential=_is_sequential(samples),
        contiguous=config.partition == "contiguous",
        shuffle=config.shuffle,
        seed=seed,
        source=samples.fingerprint,
        jumps=jumps,
        row_labels=given.rows,
        tile_dim=given.dim,
        tile_labels=given.tiles,
        members=samples.row_runs,
    )
    plan = with_units(samples, plan, WINDOW_BYTES)
    _check_train(samples, plan)
    _check_held_out(samples, plan)
    _check_owners(samples, plan)
    return plan


def _is_sequential(samples: Samples) -> bool:
    """Whether splits are cut along the sample axis; whole blocks of patches need not be."""
    config = samples.config
    return config.split_order == "sequential" or (
        config.split_order == "auto" and samples.has_windows and not config.split.patches
    )


def with_values(samples: Samples, plan: DataPlan, values: tuple[int, ...]) -> DataPlan:
    """Return the plan with the most values that a unit has of each sparse variable.

    Where rows are very unequal, fewer units are mixed: each may be as large as the largest.
    """
    known = replace(plan, values=values)
    return replace(known, window=min(plan.window, window_units(slot_bytes(samples, known), WINDOW_BYTES)))


def plan_held_out(samples: Samples, like: DataPlan, *, absent: Runs = (), jumps: str = "") -> DataPlan:
    """Return the plan of a store that is only evaluated: all of it is one split. `absent`, `jumps`: of `plan_data`."""
    config = samples.config
    whole = replace(samples, config=config.model_copy(update={"split": SplitConfig(val=0.0, test=0.0)}))
    return plan_data(whole, replicas=1, seed=like.seed, eval_pieces=like.eval_pieces, absent=absent, jumps=jumps)


def _check_train(samples: Samples, plan: DataPlan) -> None:
    train = count_samples(plan, "train").samples
    if train == 0 and samples.has_windows:
        between = " in one store" if plan.members else ""
        between += " without a jump" if plan.jumps else ""
        raise TooFewSamples(
            f"{samples.path}: samples span {plan.last_offset - plan.first_offset + 1:,} rows of {samples.sample_dim}; "
            f"no run of the training split{between} is as long ({samples.num_rows:,} rows in all).",
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
    shorter += ", or split by patch (data.split.patches = true)" if plan.patches > 1 and plan.whole != "blocks" else ""
    names: tuple[Literal["val", "test"], ...] = ("val", "test")
    for name in names:
        if plan.holds_out(name) and not count_samples(plan, name).samples:
            raise TooFewSamples(
                f"{samples.path}: data.split.{name} = {_held_text(samples, name)} of {samples.num_rows:,} rows "
                f"holds no sample{span}.",
                f"Set data.split.{name} = 0, hold out more{shorter}.",
            )


def _held_text(samples: Samples, name: str) -> str:
    """Return what a split holds as a config file has it."""
    held = samples.config.split.model_dump(exclude_none=True)[name]
    return f"{held:g}" if isinstance(held, float) else json.dumps(held)


def _check_owners(samples: Samples, plan: DataPlan) -> None:
    train, owners = count_samples(plan, "train")
    if owners >= plan.replicas:
        return
    cells = f"{owners:,} cell{'s' if owners > 1 else ''}"
    whole = "a cell, with all patches of its rows," if plan.patches > 1 else "a cell"
    order = ', or set data.split_order = "sequential"' if samples.has_windows and not plan.sequential else ""
    raise TooFewSamples(
        f"{samples.path}: average.replicas = {plan.replicas}, but the {train:,} training samples lie in {cells}, and "
        f"{whole} goes to one replica.",
        f"Ask for at most {owners} replica{'s' if owners > 1 else ''}, hold out less in data.split{order}.",
    )
