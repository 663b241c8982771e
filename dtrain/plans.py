"""`plan`: what `train` would do, as numbers and as a table; trains and writes nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dtrain.calls import python_job
from dtrain.config.schema import TrainConfig
from dtrain.config.values import parse_bandwidth
from dtrain.data.samples import Samples
from dtrain.display import html_card, html_table, text_table
from dtrain.events import Reporter
from dtrain.job import Model, Table
from dtrain.planning import RunPlan, plan_job
from dtrain.planrecord import plan_record
from dtrain.plantext import plan_rows
from dtrain.probe import probe_job
from dtrain.probetext import HEADER, cadence_cells, cadence_text
from dtrain.runtime.where import Where, client_of


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan(RunPlan):
    """The numbers of a run that has not started. Made by `plan`; printed, it is a table."""

    rows: tuple[tuple[str, str], ...]
    """Label and text of each line of the table."""

    @property
    def record(self) -> dict[str, Any]:
        """The numbers as ``dtrain plan --json`` prints them."""
        return plan_record(self)

    def __str__(self) -> str:
        return "\n\n".join(filter(None, [text_table(self.rows), cadence_text(self)]))

    def __repr__(self) -> str:
        return f"<dtrain.Plan>\n{self}"

    def _repr_html_(self) -> str:
        cells = cadence_cells(self)
        table = html_table("", cells, HEADER[: len(cells[0]) - 1], numbers=True) if cells else ""
        return html_card("dtrain.Plan", [html_table("", self.rows), table])


def plan(
    model: Model | None = None,
    samples: Samples | None = None,
    *,
    train: Table | None = None,
    average: Table | None = None,
    stop: Table | None = None,
    config: TrainConfig | None = None,
    model_args: Table | None = None,
    cluster: Where | None = None,
    full: bool = False,
    probe: bool = False,
    bandwidth: str | None = None,
    run: str | os.PathLike[str] | None = None,
    run_dir: str | Path | None = None,
    progress: bool = True,
    report: Reporter | None = None,
) -> Plan:
    """Return what `train` would do with the same arguments: partitions, steps, memory, traffic, one real loss.

    Parameters
    ----------
    model, samples, train, average, stop, config, model_args, cluster
        As of `train`.
    full : bool
        Look for missing chunks in every shard, also of remote stores with very many.
    probe : bool
        Train some rounds, throw them away, and say what a step and a round take and how many local steps pay.
    bandwidth : str, optional
        Of each worker's link, such as ``200Mbit``, ``5Gbit/s`` or ``25MB/s``: predict rounds on such a network.
    report : callable, optional
        Called with the events of a probe.
    run, run_dir, progress
        As of `train`; they change nothing here, since nothing is written.

    Returns
    -------
    Plan

    Raises
    ------
    DtrainError
        Whatever would stop the run at its start.

    Examples
    --------
    >>> plan = dtrain.plan(build, samples, train=dict(loss="mse"))  # doctest: +SKIP
    >>> plan.record["first_loss"], plan.resident_bytes  # doctest: +SKIP
    """
    job = python_job(model, samples, config, model_args, cluster, train=train, average=average, stop=stop)
    speed = None if bandwidth is None else parse_bandwidth(bandwidth)
    with client_of(cluster) as client:
        planned = plan_job(job, full=full, client=client)
        tell = report or (lambda event: None)
        measured = probe_job(job, planned.initial.params, client=client, report=tell) if probe else None
    planned = replace(planned, probe=measured, bandwidth=speed)
    values = {field.name: getattr(planned, field.name) for field in fields(planned)}
    return Plan(**values, rows=tuple(plan_rows(job, planned)))
