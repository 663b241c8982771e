"""Events as lines of text, for a terminal and a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.display import clock, duration, joined, number, shown
from dtrain.errors import listed, shortened
from dtrain.events import (
    CLIMATE,
    COUNTING,
    ChunksFilled,
    ClusterOpening,
    Fault,
    ParametersLoaded,
    ReplicaRejected,
    RoundDamaged,
    RoundsMeasured,
    RunStarted,
    SamplesLeftOut,
    SegmentReplayed,
    StepsTaken,
    WorkerEvicted,
)
from dtrain.report.pace import seconds_left, speed
from dtrain.types import RoundResult


def opening_line(event: ClusterOpening) -> str:
    """Return what is waited for before a run starts."""
    doing = {"local": "starting local workers", "serial": "starting"}
    return f"{shown(event.run)}: {doing.get(event.scheduler, f'connecting to {event.scheduler}')}"


def started_line(event: RunStarted) -> str:
    """Return what is trained, and where."""
    replicas = f"{event.replicas} replica{'s' if event.replicas > 1 else ''}"
    workers = f"{event.workers} worker{'s' if event.workers > 1 else ''}"
    return f"{shown(event.run)}: {event.samples:,} training samples, {replicas} on {workers}"


def continuing_line(event: RunStarted) -> str:
    """Return where a run that was started before goes on."""
    return f"continuing after round {event.round} of {event.rounds}"


def measured_line(event: RoundsMeasured) -> str:
    """Return what rounds of a probe took."""
    return f"measured {event.rounds} rounds of local_steps = {event.local_steps}: {duration(event.seconds)} each"


def loaded_line(event: ParametersLoaded) -> str:
    """Return what the first round starts from, and what of it is new."""
    cast = f" ({' and '.join(event.cast)} as float32)" if event.cast else ""
    new = f"; {len(event.new):,} new: {listed(event.new, 3)}" if event.new else ""
    return f"{event.tensors:,} tensors of {event.path}{cast}{new}"


def round_line(result: RoundResult, rounds: int, speed: float, width: int) -> str:
    """Return the losses and metrics of a round; in several lines if they are wider than `width`."""
    head = f"round {result.round:>{len(str(rounds))}}"
    values = {"train_loss": result.train_loss, **result.metrics}
    parts = [f"{name} {number(value)}" for name, value in values.items()]
    is_short = len("  ".join([head, *parts, "1,234,567 samples/s"])) <= width  # the same for all evaluated rounds
    unit = " samples/s" if is_short else "/s"
    return joined([head, *parts, f"{speed:,.0f}{unit}"], width, indent=" " * (len(head) + 2))


def steps_line(events: Sequence[StepsTaken]) -> str:
    """Return how far the replicas are in a round, or in a pass before the first one."""
    passes = {
        COUNTING: "looking for non-finite values, units",
        CLIMATE: "climatology, units",
        0: "mean and standard deviation, units",
    }
    label = passes.get(events[0].round, f"round {events[0].round}")
    speed = sum(e.samples / e.seconds for e in events)
    return f"{label}: {_replicas(events)}, {speed:,.0f} samples/s"


def _replicas(events: Sequence[StepsTaken]) -> str:
    """Return ``replica 0 7/10, replica 1 6/10`` for few replicas, the slowest and the fastest of many."""
    if len(events) <= 4:
        return ", ".join(f"replica {e.replica} {e.step}/{e.steps}" for e in events)
    done = sorted(e.step / e.steps for e in events)
    return f"{len(events)} replicas at {done[0]:.0%} to {done[-1]:.0%}"


def waiting_line(steps: Sequence[StepsTaken], finished: int, seconds: float) -> str:
    """Return what is waited for, after so many seconds without a step."""
    behind = [e for e in steps if e.step < e.steps]
    if behind:
        names = [f"{e.replica} ({e.step} of {e.steps}{f' on {e.worker}' if e.worker else ''})" for e in behind]
        what = f"replica{'s' if len(behind) > 1 else ''} {listed(names, 3)}"
    elif steps:
        what = f"the average and the evaluation of round {steps[-1].round}"
    else:
        what = f"the first step of round {finished + 1}: workers open data and build the model, or evaluate"
    return f"no step for {clock(seconds)}; waiting for {what}"


def pace_line(rows: Sequence[Mapping[str, Any]], rounds: int, fraction: float = 0.0) -> str:
    """Return the speed of a run and the time that is left, as far as they are known."""
    left = seconds_left(rows, rounds, fraction)
    if left is None:
        return ""
    return f"{speed(rows):,.0f} samples/s, {clock(left)} left"


def fault_line(event: Fault) -> str:
    """Return what went wrong or is missing, and what was done."""
    match event:
        case ChunksFilled():
            missing = f"{event.chunks:,} of {event.of:,} chunks of {event.variable}"
            return f"{missing} are not stored and read as {event.value:g}"
        case SamplesLeftOut():
            named = ", ".join(f"{name} ({count:,})" for name, count in event.by_variable.items())
            return f"{event.samples:,} of {event.of:,} samples left out: non-finite values in {named}"
        case SegmentReplayed():
            return f"lost work with a worker; going on from round {event.round} ({shortened(event.reason, 120)})"
        case ReplicaRejected():
            return f"round {event.round}: replica {event.replica} is not finite and was left out of the average"
        case WorkerEvicted():
            return f"worker {event.worker} has not answered for {event.seconds:.0f} s; its tasks run elsewhere"
        case RoundDamaged():
            return f"round {event.round} is damaged and was skipped: {event.reason}"
