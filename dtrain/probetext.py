"""What a probe or a bandwidth says about rounds, as lines for people: `dtrain plan --probe --bandwidth`."""

from __future__ import annotations

from dtrain.algorithm.cadence import TARGET_SHARE, Cadence, Costs, pays_from, recommended, table
from dtrain.data.plan.footprint import format_bytes
from dtrain.display import duration
from dtrain.job import Job
from dtrain.planning import RunPlan
from dtrain.probe import Probe

HEADER = ("local_steps", "in steps", "MB/s a worker", "x synchronous")


def probe_rows(job: Job, plan: RunPlan) -> list[tuple[str, str]]:
    """Return label and text of what was measured or predicted; none if neither was asked for."""
    costs = plan.costs
    if costs is None:
        return []
    step = "a local step of a replica" + (", a whole pass," if job.config.train.batch_size == "full" else "")
    if plan.probe is None:
        rows = [("estimate", f"{step} {_estimated(plan)}")]
    else:
        rows = [
            ("probe", f"{step} {_measured(plan, plan.probe)}"),
            ("limited by", str(plan.limit)),
        ]
    if costs.bandwidth:
        rows.append(("bandwidth", _wire(costs, costs.bandwidth)))
    if job.config.train.local_steps is None:
        rows.append(("local_epochs", _as_local_steps(job, plan)))
    return rows


def _measured(plan: RunPlan, probe: Probe) -> str:
    return (
        f"takes {duration(probe.step)}, a round {duration(probe.overhead)} beyond its steps, of which "
        f"{duration(probe.reduce)} to average ({_workers(plan)}, rounds of 1 and {probe.local_steps:,} steps)"
    )


def _estimated(plan: RunPlan) -> str:
    return (
        f"takes {duration(plan.initial.seconds)} ({_workers(plan)}), by a single one; beside the steps only the wire "
        "counts (--probe measures steps and rounds)"
    )


def _workers(plan: RunPlan) -> str:
    return "1 worker" if plan.workers == 1 else f"{plan.workers:,} workers"


def _wire(costs: Costs, bandwidth: float) -> str:
    return (
        f"{bandwidth * 8 / 1e6:,.6g} Mbit/s for the link of each worker: {format_bytes(costs.traffic.busiest)} or "
        f"{duration(costs.wire)} a round for the busiest one; synchronous training would send "
        f"{format_bytes(costs.traffic.all_reduce)} or {duration(costs.all_reduce)} a step"
    )


def _as_local_steps(job: Job, plan: RunPlan) -> str:
    epochs = job.config.train.local_epochs
    passes = "a pass is" if epochs == 1 else f"{epochs} passes are"
    steps = "1 local step" if max(plan.steps) == 1 else f"{max(plan.steps):,} local steps"
    return f"{passes} {steps}; local_steps takes the place of local_epochs"


# The table ------------------------------------------------------------------------------------------------


def cadence_cells(plan: RunPlan) -> list[tuple[str, ...]]:
    """Return the cells of a table of local steps, a row each, without its header; empty if it was not asked for."""
    costs = plan.costs
    return [] if costs is None else [(*_cells(row), _mark(row, costs, plan)) for row in table(costs, max(plan.steps))]


def _cells(row: Cadence) -> tuple[str, ...]:
    sent = row.bytes_per_second / 1e6
    cells = (f"{row.local_steps:,}", f"{row.share:.0%}", f"{sent:,.1f}" if sent >= 10 else f"{sent:.2f}")
    return cells if row.speedup is None else (*cells, f"{row.speedup:,.2f}")


def _mark(row: Cadence, costs: Costs, plan: RunPlan) -> str:
    marks = {recommended(costs): "recommended", max(plan.steps): "as configured"}
    both = "recommended, as configured" if len(marks) == 1 else marks.get(row.local_steps, "")
    return f"<- {both}" if row.local_steps in marks else ""


def cadence_text(plan: RunPlan) -> str:
    """Return the table of local steps, where averaging pays, and the lines to paste; empty if it was not asked for."""
    costs = plan.costs
    if costs is None:
        return ""
    rows = cadence_cells(plan)
    header = HEADER[: len(rows[0]) - 1]
    lines = [
        "  ".join([*(f"{cell:>{len(name)}}" for cell, name in zip(row, header, strict=False)), row[-1]]) for row in rows
    ]
    best = recommended(costs)
    return "\n".join(
        [
            "  ".join(header),
            *(line.rstrip() for line in lines),
            "",
            _pays(costs),
            f"steps have {TARGET_SHARE:.0%} of the time or more from local_steps = {best:,} on; to paste:",
            "",
            "[train]",
            f"local_steps = {best}",
        ]
    )


def _pays(costs: Costs) -> str:
    if costs.bandwidth is None:
        return "--bandwidth 200Mbit compares with synchronous training on such a network"
    first = pays_from(costs)
    if first is None:
        return "one worker has nobody to send to: synchronous training costs as much"
    return f"pays from local_steps = {first:,} on: steps are faster than in synchronous training"
