"""Plan the evaluation of given samples, so that no row of their val and test splits has been trained on.

the samples' store                    val and test                           all
one that the run was trained on       the run's own splits                   all rows of the samples
one of as many rows: maybe a copy     the run's own splits                   likewise
that of ``data.val_path``             val: all rows                          likewise
any other                             cut with the run's shares and seed     likewise

Splits by coordinate are those of the samples' own coordinate, in any store. Splits by group are known in the stores of
the run, and in copies: the same groups in the same rows. In others a group may be one that was trained on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

from dtrain.data.plan.boxes import blocks_for, blocks_with_labels
from dtrain.data.plan.labels import BY_SHARE, GivenSplits, same_labels
from dtrain.data.plan.partition import plan_data, plan_held_out
from dtrain.data.plan.splits import SplitName
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Samples
from dtrain.errors import InvalidConfig

StoreOfRun: TypeAlias = int | Literal["held_out", "part"] | None
"""A store's number in ``data.path``, or the store of ``data.val_path``; "part" for some of several stores that are one;
None for a store that the run does not know."""


def plan_evaluation(
    samples: Samples,
    split: SplitName,
    plans: tuple[DataPlan, ...],
    held_out: DataPlan | None,
    store: StoreOfRun,
    jumps: str = "",
    given: GivenSplits = BY_SHARE,
) -> tuple[DataPlan, SplitName]:
    """Plan the evaluation of a split of given samples.

    Parameters
    ----------
    samples : Samples
        With the run's own keys of ``[data]`` for splits.
    split : {"val", "test", "all"}
    plans : tuple of DataPlan
        Of the stores that the run was trained on.
    held_out : DataPlan, optional
        Of the store of ``data.val_path``.
    store : int, "held_out" or "part", optional
        Which store of the run it is.
    jumps : str
        The jumps of the samples' coordinate (`DataPlan.jumps`).
    given : GivenSplits
        The splits that the run's ``data.split`` gives in the samples by coordinate or by group.

    Returns
    -------
    DataPlan
    SplitName
        The split of this plan that is evaluated.

    Raises
    ------
    InvalidConfig
        Rows of the split may have been trained on, or there is no such split.
    TooFewSamples
        The store is too short to be cut.
    """
    if store == "held_out":
        return _of_held_out(samples, split, plans[0], held_out, jumps), "all"
    own = (samples.first_row, samples.num_samples, samples.row_runs)
    alike = [plan for plan in plans if (plan.first_row, plan.num_samples, plan.members) == own]
    if store == "part":
        alike = []
    elif store is not None:
        alike = [plans[store]] if plans[store] in alike else []
    else:
        alike = [plan for plan in alike if not _is_given(samples) and _agree(plan, samples, given)]
    same = [plan for plan in alike if plan.source == samples.fingerprint]
    if split == "all":
        return (cut_as(same[0], samples, jumps) if same else plan_held_out(samples, plans[0], jumps=jumps)), split
    for plan in same or alike:
        _check_patches(samples, split, plan)
    if store is not None and not alike and not _is_given(samples):
        raise _part(samples, split) if store == "part" else _other_rows(samples, split, plans[store])
    if not alike and samples.config.split.by:
        raise _other_groups(samples, split)
    cuts = [cut_as(plan, samples, jumps, given) for plan in same or alike]
    if not cuts:
        return plan_data(samples, replicas=1, seed=plans[0].seed, jumps=jumps, given=given), split
    if any(cut != cuts[0] for cut in cuts):
        raise InvalidConfig(
            f"{samples.path} has as many rows as several stores of the run, whose splits differ: it may be a copy of "
            "any of them.",
            "Name the store that the run was trained on, or evaluate all of the data.",
        )
    return cuts[0], split


def cut_as(plan: DataPlan, samples: Samples, jumps: str = "", given: GivenSplits = BY_SHARE) -> DataPlan:
    """Return the plan of samples of the same rows as those of another plan, with its splits.

    Which samples count is known of the same samples alone: others are counted anew.
    """
    first, last = samples.reach()
    alike = (plan.first_offset, plan.last_offset) == (first, last)
    is_cut_alike = _same_patches(plan, samples)
    is_same = plan.source == samples.fingerprint and plan.stride == samples.config.stride
    blocks = blocks_with_labels(samples) if given.tiles else blocks_for(samples)
    return replace(
        plan,
        patches=len(samples.tiles),
        blocks=plan.blocks if is_cut_alike else blocks,
        tile_labels=plan.tile_labels if is_cut_alike else given.tiles,
        stride=samples.config.stride,
        first_offset=first,
        last_offset=last,
        source=samples.fingerprint,
        jumps=plan.jumps if alike else jumps,
        multiplicity=plan.multiplicity if is_same else "",
    )


def _same_patches(plan: DataPlan, samples: Samples) -> bool:
    cuts = [(cut.dim, cut.length, cut.size) for cut in samples.tiles.cuts]
    return [(axis.dim, axis.length, axis.size) for axis in plan.blocks] == cuts


def _agree(plan: DataPlan, samples: Samples, given: GivenSplits) -> bool:
    """Whether rows and patches of samples have the labels of a plan."""
    is_same = same_labels(plan.row_labels, given.rows)
    return is_same and (not _same_patches(plan, samples) or same_labels(plan.tile_labels, given.tiles))


def _is_given(samples: Samples) -> bool:
    """Whether all splits are given by coordinate: then they are known of rows that the run does not know."""
    split = samples.config.split
    return bool(split.ranges) and not any(split.shares.values())


def _check_patches(samples: Samples, split: SplitName, plan: DataPlan) -> None:
    """Refuse other patches than those that the splits of a run were cut by."""
    shares = plan.val + plan.test > 0
    if plan.blocks and shares and plan.whole != "rows" and not _same_patches(plan, samples):
        wanted = ", ".join(f"{axis.dim} = {axis.size}" for axis in plan.blocks)
        raise InvalidConfig(
            f"The splits of the run hold patches of {{ {wanted} }}: other patches of {split} may overlap with "
            "some that were trained on.",
            "Evaluate the same patches, or all of the data.",
        )


def _of_held_out(samples: Samples, split: SplitName, like: DataPlan, held_out: DataPlan | None, jumps: str) -> DataPlan:
    if split == "test":
        raise InvalidConfig(
            f"{samples.path} is the validation store of the run (data.val_path): it has no test split.",
            "Evaluate val: that is all of it.",
        )
    return (
        held_out
        if held_out and held_out == cut_as(held_out, samples, jumps)
        else plan_held_out(samples, like, jumps=jumps)
    )


def _other_rows(samples: Samples, split: SplitName, plan: DataPlan) -> InvalidConfig:
    return InvalidConfig(
        f"{samples.path} is a store of the run, which knows its rows {plan.first_row:,} to {plan.num_samples - 1:,}; "
        f"the samples hold rows {samples.first_row:,} to {samples.num_samples - 1:,}. Their split {split} may hold "
        "rows that were trained on.",
        "Evaluate all of rows that the run has not seen, or the run's own split: name no data.",
    )


def _part(samples: Samples, split: SplitName) -> InvalidConfig:
    return InvalidConfig(
        f"{samples.path}: the run was trained on other stores beside it, or on the same in another order. Rows of its "
        f"split {split} may have been trained on.",
        "Evaluate the run's own split (name no data), or all of them.",
    )


def _other_groups(samples: Samples, split: SplitName) -> InvalidConfig:
    return InvalidConfig(
        f"{samples.path} is no store of the run, nor a copy of one: groups of {samples.config.split.by} in its split "
        f"{split} may have been trained on.",
        "Evaluate all of a store whose groups the run has not seen, or the run's own split: name no data.",
    )
