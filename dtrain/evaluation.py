"""A committed round evaluated: its figures beside those of baselines, and its loss by unit."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dtrain.asking import Question, needs_climatology, with_wanted
from dtrain.data.samples import Samples
from dtrain.errors import TooFewSamples
from dtrain.events import Reporter
from dtrain.job import with_scheduler
from dtrain.prepare import open_runner
from dtrain.runclimate import climatology_of
from dtrain.rundata import RunData, check_split
from dtrain.runtime.place import PLACE_NAMES
from dtrain.runtime.resident import Resident, Stream
from dtrain.runtime.where import Where, client_of, scheduler_text
from dtrain.scores import Scores, scores_of
from dtrain.types import Parameters
from dtrain.unitlosses import partitions_of

if TYPE_CHECKING:
    from dtrain.report.partitions import Partitions


@dataclass(frozen=True, slots=True)
class Committed:
    """What is evaluated: the parameters of a round."""

    round: int
    params: Parameters


def scores(
    data: RunData,
    committed: Committed,
    samples: Samples | None,
    question: Question,
    cluster: Where,
    report: Reporter | None = None,
) -> Scores:
    """Evaluate a round on samples, or on the run's own data.

    Parameters
    ----------
    data : RunData
    committed : Committed
    samples : Samples, optional
        By default the run's own.
    question : Question
    cluster : Where
        Where it is computed.
    report : callable, optional
        Gets the progress of a pass over the training rows.

    Raises
    ------
    TooFewSamples
        The split is empty.
    InvalidConfig
        There is no such split, or rows of it may have been trained on.
    """
    split = question.split
    check_split(split)
    job, known, cut = data.own(split) if samples is None else data.given(samples, split)
    if job.sources[0].samples is None:
        question = replace(question, baselines="no baselines: the run's stores are seen by their own workers alone")
    job = with_wanted(job, question)
    job = replace(job, config=with_scheduler(job.config, scheduler_text(cluster, PLACE_NAMES)))
    if needs_climatology(job, question):
        kept = climatology_of(data.directory, data.resolved, job, lambda: data.own("test")[:2], cluster, report)
        if isinstance(kept, str):
            question = replace(question, no_climatology=kept)
        else:
            known = replace(known, climatology=kept)
    with (
        client_of(cluster) as client,
        open_runner(
            job, _run_id(), known=known, client=client, without_lost=True, question=replace(question, split=cut)
        ) as (runner, _),
    ):
        sums = runner.evaluate(committed.params, cut)
        if sums is None:
            raise TooFewSamples(f'The split "{split}" holds no samples.', "Choose another --split.")
        return scores_of(runner, sums, committed.round, job.config.train.metrics)


def losses_by_unit(
    data: RunData, committed: Committed, cluster: Where, say: Callable[[Sequence[Stream]], None]
) -> Partitions:
    """Evaluate each unit of the run's data on its own; `say` gets what is evaluated before the pass begins."""
    job, known, _ = data.own("val")
    job = replace(job, config=with_scheduler(job.config, scheduler_text(cluster, PLACE_NAMES)))
    with (
        client_of(cluster) as client,
        open_runner(job, _run_id(), known=known, client=client, without_lost=True) as (runner, _),
    ):
        streams = Resident(runner.spec).by_unit
        say(streams)
        return partitions_of(streams, runner.losses_by_part(committed.params), runner.spec.plan.replicas)


def _run_id() -> str:
    return uuid.uuid4().hex[:8]
