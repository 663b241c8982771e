"""Which samples of a run count, and how often: resolved once, after the plan and before anything is trained.

plan -> samples with values that are not finite are left out (``data.non_finite``) -> classes (``data.balance``)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from dtrain.data.balance import Balance, balanced, count_classes, join_classes
from dtrain.data.load.finite import LeftOut, Seen, merged, parts_of
from dtrain.data.plan.multiplicity import multiplicity_text
from dtrain.data.plan.partition import JointPlan, cell_anchors, counted
from dtrain.data.plan.units import DataPlan
from dtrain.job import Job
from dtrain.resolve import eval_every
from dtrain.resolved import Resolved
from dtrain.runtime.place import Place
from dtrain.runtime.spec import Source


def is_uncounted(job: Job, resolved: Resolved) -> bool:
    """Return True if samples with values that are not finite are to be left out, and are not known yet."""
    return any(
        source.described.config.min_valid is not None and not plan.multiplicity
        for source, plan in _stores(job, resolved)
    )


def without_non_finite(job: Job, resolved: Resolved, seen: Sequence[Seen], *, trains: bool) -> Resolved:
    """Return what is resolved, with the samples left out that a pass has found.

    Parameters
    ----------
    job : Job
    resolved : Resolved
    seen : sequence of Seen
        By piece of the stores (`Resident.counted`).
    trains : bool
        False if the plan is only evaluated: its training split may be empty.

    Raises
    ------
    TooFewSamples
        Nothing is left of a split, or too little for the replicas.
    """
    plans: list[DataPlan] = []
    left_out: list[LeftOut] = []
    first = 0
    for number, (source, plan) in enumerate(_stores(job, resolved)):
        whole = cell_anchors(plan, "all")
        pieces = len(parts_of(whole, plan.eval_pieces))
        values, found = merged(source.described, whole, seen[first : first + pieces])
        first += pieces
        if trains and number < len(job.sources):
            plans.append(counted(source.described, plan, values, found.named))
        else:
            plans.append(replace(plan, multiplicity=multiplicity_text(values)))
        left_out.append(found)
    known = _with_plans(job, resolved, plans) if trains else replace(resolved, plan=JointPlan(tuple(plans)))
    return replace(known, left_out=tuple(one for one in left_out if one.samples))


def with_classes(job: Job, resolved: Resolved, place: Place) -> Resolved:
    """Return what is resolved, with the samples repeated as ``data.balance`` says.

    The classes of all stores are counted together: a class that is rare in one of them may be frequent in another.

    Raises
    ------
    InvalidConfig, UnsuitableVariable
        The variable is not there, or holds no classes.
    """
    pairs = list(zip(job.sources, resolved.plan.plans, strict=True))
    balance = join_classes(
        [place.call(source, partial(count_classes, source.described, plan)) for source, plan in pairs]
    )
    plans = [_balanced(source, plan, balance, place) for source, plan in pairs]
    held_out = [] if resolved.held_out is None else [resolved.held_out]
    return replace(_with_plans(job, resolved, [*plans, *held_out]), balance=balance)


def _balanced(source: Source, plan: DataPlan, balance: Balance, place: Place) -> DataPlan:
    values = place.call(source, partial(balanced, source.described, plan, balance))
    return replace(plan, multiplicity=multiplicity_text(values))


def _stores(job: Job, resolved: Resolved) -> list[tuple[Source, DataPlan]]:
    """Return the stores, that of ``data.val_path`` last, and their plans."""
    plans = [*resolved.plan.plans, *([] if resolved.held_out is None else [resolved.held_out])]
    return list(zip(job.all_sources, plans, strict=True))


def _with_plans(job: Job, resolved: Resolved, plans: Sequence[DataPlan]) -> Resolved:
    """Return what is resolved with other plans of the stores, that of ``data.val_path`` last."""
    own, held_out = JointPlan(tuple(plans[: len(job.sources)])), None if resolved.held_out is None else plans[-1]
    return replace(resolved, plan=own, held_out=held_out, eval_every=eval_every(job, own, held_out))
