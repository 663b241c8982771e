"""Plan the evaluation of given samples, so that no row of their val and test splits has been trained on.

the samples' store                    val and test                           all
one that the run was trained on       the run's own splits                   all rows of the samples
one of as many rows: maybe a copy     the run's own splits                   likewise
that of ``data.val_path``             val: all rows                          likewise
any other                             cut with the run's shares and seed     likewise
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

from dtrain.data.plan.boxes import blocks_for
from dtrain.data.plan.partition import plan_data, plan_held_out
from dtrain.data.plan.splits import SplitName
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Samples
from dtrain.errors import InvalidConfig

StoreOfRun: TypeAlias = int | Literal["held_out"] | None
"""A store's number in ``data.path``, or the store of ``data.val_path``; None for a store that the run does not know."""


def plan_evaluation(
    samples: Samples,
    split: SplitName,
    plans: tuple[DataPlan, ...],
    held_out: DataPlan | None,
    store: StoreOfRun,
    jumps: str = "",
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
    store : int or "held_out", optional
        Which store of the run it is.
    jumps : str
        The jumps of the samples' coordinate (`DataPlan.jumps`).

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
    alike = [plan for plan in plans if (plan.first_row, plan.num_samples) == (samples.first_row, samples.num_samples)]
    if store is not None:
        alike = [plans[store]] if plans[store] in alike else []
    same = [plan for plan in alike if plan.source == samples.fingerprint]
    if split == "all":
        return (cut_as(same[0], samples, jumps) if same else plan_held_out(samples, plans[0], jumps=jumps)), split
    for plan in same or alike:
        _check_patches(samples, split, plan)
    if store is not None and not alike:
        raise _other_rows(samples, split, plans[store])
    cuts = [cut_as(plan, samples, jumps) for plan in same or alike]
    if not cuts:
        return plan_data(samples, replicas=1, seed=plans[0].seed, jumps=jumps), split
    if any(cut != cuts[0] for cut in cuts):
        raise InvalidConfig(
            f"{samples.path} has as many rows as several stores of the run, whose splits differ: it may be a copy of "
            "any of them.",
            "Name the store that the run was trained on, or evaluate all of the data.",
        )
    return cuts[0], split


def cut_as(plan: DataPlan, samples: Samples, jumps: str = "") -> DataPlan:
    """Return the plan of samples of the same rows as those of another plan, with its splits."""
    first, last = samples.reach()
    alike = (plan.first_offset, plan.last_offset) == (first, last)
    return replace(
        plan,
        patches=len(samples.tiles),
        blocks=plan.blocks if _same_patches(plan, samples) else blocks_for(samples),
        stride=samples.config.stride,
        first_offset=first,
        last_offset=last,
        source=samples.fingerprint,
        jumps=plan.jumps if alike else jumps,
    )


def _same_patches(plan: DataPlan, samples: Samples) -> bool:
    cuts = [(cut.dim, cut.length, cut.size) for cut in samples.tiles.cuts]
    return [(axis.dim, axis.length, axis.size) for axis in plan.blocks] == cuts


def _check_patches(samples: Samples, split: SplitName, plan: DataPlan) -> None:
    """Refuse other patches than those that the splits of a run were cut by."""
    if plan.blocks and plan.whole != "rows" and not _same_patches(plan, samples):
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
