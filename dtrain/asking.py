"""What an evaluation is asked for beside the metrics of everything: found in the stores before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from dtrain.algorithm.evaluate import CLIMATOLOGY, PERSISTENCE
from dtrain.config.functions import Function
from dtrain.config.names import LABEL_LOSSES, LOSSES, METRICS
from dtrain.data.by import VARIABLE, Each, cuts_samples, find_groupings
from dtrain.data.climatology import (
    ClimatePlan,
    Climatology,
    months_of,
    periods_of,
    places_digest,
    plan_climatology,
)
from dtrain.data.distinct import newest_input, target_fields
from dtrain.data.load.places import valid_times
from dtrain.data.plan.partition import cell_anchors
from dtrain.data.plan.splits import SplitName
from dtrain.errors import InvalidConfig
from dtrain.events import StepsTaken
from dtrain.job import Job, of_one_target, with_metrics
from dtrain.resolved import Resolved
from dtrain.runtime.place import Place
from dtrain.runtime.spec import Asked, Climate, PlannedSource, RunSpec

NUMBER_LOSSES = tuple(name for name in LOSSES if name not in LABEL_LOSSES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What an evaluation is asked for."""

    split: SplitName
    by: tuple[str, ...] = ()
    metrics: tuple[str | Function, ...] | None = None
    """In place of ``train.metrics``."""
    baselines: bool | str = True
    """Whether persistence and climatology stand beside forecasts; a text: why they cannot."""
    no_climatology: str = ""
    """Why there is none."""
    all_times: bool = False
    """Whether leads are scored by all of their valid times, not those that all of them share."""


def with_wanted(job: Job, question: Question) -> Job:
    """Return the job of an evaluation with the metrics that are asked for.

    Raises
    ------
    InvalidConfig
        One is not known, or none can be computed of one target alone.
    """
    job = job if question.metrics is None else with_metrics(job, question.metrics)
    job = of_one_target(job) if VARIABLE in question.by and len(targets_of(job)) > 1 else job
    if forecasts(job, question) is True and "rmse" not in job.config.train.metrics:
        job = with_metrics(job, (*job.config.train.metrics, "rmse"))
    return job


def targets_of(job: Job) -> tuple[str, ...]:
    """Return the targets that are evaluated."""
    samples = job.sources[0].samples
    return job.config.data.targets if samples is None else samples.config.targets


def forecasts(job: Job, question: Question) -> bool | str:
    """Return whether baselines can stand beside the model, or why they cannot although it forecasts.

    Targets are then variables that are inputs too, of floats, all of whose leads lie beyond the newest input; and they
    are compared with outputs of their shape.
    """
    if isinstance(question.baselines, str):
        return question.baselines
    samples, train = job.samples, job.config.train
    targets = target_fields(samples)
    own = [
        name for name in train.metrics if name in METRICS and not (METRICS[name].of_labels or METRICS[name].from_loss)
    ]
    if not question.baselines or not (own or train.loss in NUMBER_LOSSES):
        return False
    if len(targets) > 1 and VARIABLE not in question.by:
        return False
    for field in targets:
        variable, (number, _) = samples.variable(field.name), newest_input(samples, field)
        is_number = variable.model_dtype.kind == "f" and variable.sparse is None and not variable.is_static
        if number < 0 or not is_number or max(samples.fields[number].offsets) >= min(field.offsets):
            return False
    if job.config.data.transform:
        return "no baselines: data.transform may change what they would be compared with"
    return True


def needs_climatology(job: Job, question: Question | None) -> bool:
    """Whether an evaluation compares with a climatology."""
    return has_anomalies(job) or (question is not None and forecasts(job, question) is True)


def has_anomalies(job: Job) -> bool:
    """Whether a metric compares differences from a climatology."""
    return any(METRICS[name].needs_climate for name in job.config.train.metrics if name in METRICS)


def plan_of_climatology(job: Job, resolved: Resolved, place: Place) -> ClimatePlan:
    """Plan the climatology of the targets over the training rows.

    Raises
    ------
    InvalidConfig
        A target has none.
    OutOfMemory
        It would take too much memory.
    """
    samples, names = job.samples, tuple(dict.fromkeys(job.samples.config.targets))
    for name in names:
        variable = samples.variable(name)
        if variable.model_dtype.kind != "f" or variable.sparse is not None or variable.is_static:
            raise InvalidConfig(
                f"anomaly_correlation compares differences from a climatology, and the target {name} has none: it is "
                f"{'sparse' if variable.sparse else 'the same in all samples' if variable.is_static else 'no float'}.",
                "Leave it out of train.metrics.",
            )
    return plan_climatology(samples, names, resolved.plan.plans, _each(job, place))


def with_climatology(
    job: Job, resolved: Resolved, spec: RunSpec, place: Place, tell: Callable[[StepsTaken], None]
) -> Resolved:
    """Return what is resolved with the climatology of ``spec.climate_plan``: a pass over the training rows."""
    plan, source = spec.climate_plan, job.sources[0]
    assert plan is not None
    with place.runner(replace(spec, run_id=f"{spec.run_id}-c")) as runner:
        runner.on_progress = tell
        means = runner.place_means()
    places = {name: place.call(source, partial(places_digest, source.described, name)) for name in plan.names}
    return replace(resolved, climatology=Climatology(means, places, plan.text))


def _find_climate(job: Job, resolved: Resolved, place: Place) -> Climate | str:
    """Return the climatology with the period of each row that is evaluated, or why it does not fit them."""
    climatology = resolved.climatology
    assert climatology is not None
    source = job.sources[0]
    for name, digest in climatology.places.items():
        if place.call(source, partial(places_digest, source.described, name)) != digest:
            return f"the climatology is of other places than {name} of {source.described.path}"
    plans = [*resolved.plan.plans, *([] if resolved.held_out is None else [resolved.held_out])]
    months = _each(job, place)(months_of) if climatology.count > 1 else [None] * len(plans)
    if climatology.count > 1 and any(one is None for one in months):
        return f"the climatology is by calendar month, and rows of {source.described.path} have no dates"
    return Climate(climatology, periods_of(months, plans, climatology.count))


def _each(job: Job, place: Place) -> Each:
    """Return a function that calls another one with the samples of each store, where it can be seen."""
    return lambda function: [place.call(source, partial(function, source.described)) for source in job.all_sources]


def with_asked(job: Job, resolved: Resolved, spec: RunSpec, place: Place, question: Question | None) -> RunSpec:
    """Return what a runner is given, with what an evaluation compares with and is broken down by.

    Raises
    ------
    InvalidConfig
        The target has no such dimension or coordinate, there are too many groups, or anomalies cannot be computed.
    """
    climate: Climate | str = question.no_climatology if question is not None else ""
    if needs_climatology(job, question) and resolved.climatology is not None:
        climate = _find_climate(job, resolved, place)
    if isinstance(climate, Climate):
        spec = replace(spec, climate=climate)
    elif has_anomalies(job):
        raise InvalidConfig(f"anomaly_correlation: {climate}.", "Evaluate other metrics: --metric rmse.")
    if question is None:
        return spec
    return replace(spec, asked=_find_asked(job, spec.sources, spec.held_out, place, question, climate))


def _find_asked(
    job: Job,
    sources: Sequence[PlannedSource],
    held_out: PlannedSource | None,
    place: Place,
    question: Question,
    climate: Climate | str,
) -> Asked:
    """Find the groups of an evaluation, the rows that count, and the baselines.

    Raises
    ------
    InvalidConfig
        The target has no such dimension or coordinate, or there are too many groups.
    """
    groupings = find_groupings(job.samples, question.by, _each(job, place)) if question.by else ()
    asked = _with_baselines(Asked(groupings=groupings), job, question, climate)
    if job.config.train.loss not in LOSSES and cuts_samples(job.samples, groupings):
        asked = replace(asked, notes=(*asked.notes, "the loss is a function of whole samples, and not broken down"))
    if question.all_times or not any(one.kind == "lead" and one.count > 1 for one in groupings):
        return asked
    evaluated = [held_out] if question.split == "val" and held_out is not None else list(sources)
    return _with_shared(asked, [*sources, held_out], evaluated, question.split)


def _with_baselines(asked: Asked, job: Job, question: Question, climate: Climate | str) -> Asked:
    """Return what is asked with the baselines of forecasts, and how they were computed."""
    possible = forecasts(job, question)
    if possible is not True:
        return replace(asked, notes=(possible,) if possible else ())
    fill = "; where that is missing, as the mean" if job.samples.config.fills_inputs else ""
    notes = [f"persistence: each lead is as the newest input{fill}"]
    if isinstance(climate, str):
        return replace(asked, baselines=(PERSISTENCE,), notes=(*notes, f"no climatology: {climate}"))
    notes.append(f"climatology: {climate.climatology.text}")
    return replace(asked, baselines=(PERSISTENCE, CLIMATOLOGY), notes=tuple(notes))


def _with_shared(
    asked: Asked, stores: Sequence[PlannedSource | None], evaluated: Sequence[PlannedSource], split: SplitName
) -> Asked:
    """Return what is asked with the valid times that all leads share, if there are some."""
    shared, some, every = [], 0, 0
    for store in (store for store in stores if store is not None):
        if not any(store is one for one in evaluated):
            shared.append(np.zeros(0, bool))
            continue
        whole = cell_anchors(store.plan, "all" if store is stores[-1] else split, store.lost)
        times = valid_times(whole, target_fields(store.samples)[0].offsets)
        shared.append(times.shared)
        some, every = some + int(times.shared.sum()), every + int(times.any_lead.sum())
    leads = next(one.count for one in asked.groupings if one.kind == "lead")
    if not some:
        note = f"no valid time is shared by all {leads} leads: each lead is scored at its own valid times"
        return replace(asked, notes=(*asked.notes, note))
    note = f"leads are scored at the {some:,} of {every:,} valid times that all {leads} leads share"
    return replace(asked, shared=tuple(shared), notes=(*asked.notes, note))
