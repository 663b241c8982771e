"""Loss and metrics of a model as states that merge exactly: pieces can be evaluated anywhere and added in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from dtrain.algorithm.batch import TensorBatch, autocast
from dtrain.algorithm.grouped import Box, Ints, Labels, boxes, num_groups, output_axes, part_of
from dtrain.algorithm.losses import Loss, compared, mean_of_batch
from dtrain.algorithm.metrics.named import FROM_LOSS
from dtrain.algorithm.metrics.state import Floats, Metric, Parts, Rule, State, empty_state, merge_parts, merged, ratio
from dtrain.config.names import metric_key
from dtrain.config.schema import ClassAxis
from dtrain.errors import OutOfMemory

Term: TypeAlias = tuple[float, float]
"""The sum of a quantity, and the number of its terms (or the sum of their weights)."""
Decode: TypeAlias = Callable[[Any, Any], tuple[Any, Any]]
"""(outputs, targets) of the model -> the same in the units of the decoded data."""
LOSS = "loss"
MOST_BYTES = 256 << 20
"""That the states of a metric of all groups may take."""
PERSISTENCE, CLIMATOLOGY = "persistence", "climatology"
"""Baselines of forecasts: everything stays as it is now, or is as it was on average in the training rows."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Loss and metrics over some samples."""

    samples: int
    states: Mapping[str, State]
    """``loss``, metrics by reported name, and those of baselines as ``rmse_persistence``; none before a batch."""
    by_group: Ints
    """int64[group]: the samples that have values in each group."""
    seconds: float = field(default=0.0, compare=False)
    """That the evaluation took."""

    @property
    def loss(self) -> Term:
        """Of everything."""
        if LOSS not in self.states:
            return 0.0, 0.0
        total, count = self.states[LOSS].parts[0][0].tolist()
        return total, count


@dataclass(frozen=True, slots=True)
class Context:
    """What an evaluation knows of a batch beside its tensors."""

    labels: tuple[tuple[Labels, ...], ...] = ()
    """By target: its labels along each grouping."""
    forecasts: Mapping[str, Any] = field(default_factory=dict)
    """By baseline: its forecast of the targets, in decoded units."""
    climate: Any = None
    """The climatology at the places and times of the targets, in decoded units."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """What an evaluation is broken down into; the default is one group of everything."""

    counts: tuple[int, ...] = ()
    """By grouping: its number of labels."""
    by_target: bool = False
    """Whether each target is compared alone with the output of its place."""
    has_loss: bool = True
    """Whether the loss is computed by group too."""
    class_axis: ClassAxis = "auto"
    finite_targets: bool = False
    """Whether targets that are not finite do not count."""

    @property
    def groups(self) -> int:
        """Number of groups."""
        return num_groups(self.counts)

    @property
    def is_whole(self) -> bool:
        """Whether everything is one group."""
        return not self.counts and not self.by_target


WHOLE = Breakdown()
NOTHING_KNOWN = Context()


def evaluate(
    module: nn.Module,
    loss: Loss,
    metrics: Mapping[str, Metric],
    batches: Iterable[TensorBatch],
    precision: str = "float32",
    decode: Decode = lambda outputs, targets: (outputs, targets),
    context_of: Callable[[TensorBatch], Context] | None = None,
    breakdown: Breakdown = WHOLE,
) -> Sums:
    """Return the states of loss and metrics over batches, by group.

    Parameters
    ----------
    module : nn.Module
    loss : callable
    metrics : mapping of str to Metric
    batches : iterable of TensorBatch
    precision : str
        As in `Recipe`.
    decode : callable
        Applied to outputs and targets before metrics are computed; the loss is in the model's units.
    context_of : callable, optional
        Called with each batch, in order.
    breakdown : Breakdown
    """
    module.eval()
    collected = _Collected(breakdown.groups)
    with torch.inference_mode():
        for batch in batches:
            context = NOTHING_KNOWN if context_of is None else context_of(batch)
            with autocast(precision, batch):
                outputs = module(*batch.inputs)
            decoded, targets = decode(outputs, batch.targets)
            collected.samples += batch.size
            for view in _views(outputs, batch, context, breakdown):
                collected.by_group[view.group] += view.size
                if breakdown.has_loss:
                    with autocast(precision, batch):
                        own = view.output(outputs), view.target(batch.targets), view.target(batch.weight)
                        mean = mean_of_batch(compared(loss, *own), view.size)
                    collected.add(LOSS, view.group, (np.array([mean.sum, mean.count]),), ("sum",))
                weight, climate = view.target(batch.weight), view.target(context.climate)
                for name, metric in metrics.items():
                    pair = view.output(decoded), view.target(targets)
                    collected.add(name, view.group, _of_batch(metric, *pair, weight, climate), metric.rules)
                    for baseline, forecast in context.forecasts.items():
                        if metric.needs_climate and baseline == CLIMATOLOGY:
                            continue  # it has no anomalies
                        pair = _compared(view.target(forecast), view.target(targets), breakdown.finite_targets)
                        parts = _of_batch(metric, *pair, weight, climate)
                        collected.add(f"{name}_{baseline}", view.group, parts, metric.rules)
    return Sums(collected.samples, collected.states, collected.by_group)


def _compared(forecast: torch.Tensor, targets: torch.Tensor, finite: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a forecast and targets: with `finite`, what a baseline does not know counts as little as a target."""
    return forecast, torch.where(torch.isfinite(forecast), targets, math.nan) if finite else targets


def _of_batch(metric: Metric, outputs: Any, targets: Any, weight: Any, climate: Any) -> Parts:
    if not metric.needs_climate:
        parts: Parts = compared(metric.of_batch, outputs, targets, weight)
        return parts
    return metric.of_batch(outputs, targets, weight, climate=climate)


class _Collected:
    """The states of all groups, as batches come."""

    def __init__(self, groups: int) -> None:
        self.samples = 0
        self.by_group = np.zeros(groups, np.int64)
        self.states: dict[str, State] = {}

    def add(self, name: str, group: int, parts: Parts, rules: tuple[Rule, ...]) -> None:
        """Merge the state of a group's values of a batch into its state."""
        if name not in self.states:
            _check_size(name, parts, len(self.by_group))
            self.states[name] = empty_state(parts, rules, len(self.by_group))
        state = self.states[name]
        for own, new in zip(state.parts, merge_parts(state.of_group(group), parts, rules), strict=True):
            own[group] = new


def _check_size(name: str, parts: Parts, groups: int) -> None:
    """Refuse states that would take too much memory: they are kept by each task, sent and merged."""
    size = sum(part.nbytes for part in parts) * groups
    if size > MOST_BYTES:
        raise OutOfMemory(
            f"The state of {name} takes {-(-size >> 20):,} MB for {groups:,} groups; at most {MOST_BYTES >> 20} MB are "
            "used.",
            "Break the evaluation down into fewer groups, or compute other metrics: --metric rmse.",
        )


@dataclass(frozen=True, slots=True)
class _View:
    """The values of a batch that belong to one group."""

    group: int
    size: int
    """Number of samples."""
    box: Box | None = None
    """None: all values."""
    number: int | None = None
    """Of the target, where each is compared alone."""
    axes: Mapping[int, int] = field(default_factory=dict)
    """By axis of the target: that of the output."""

    def target(self, values: Any) -> Any:
        """Return the part of targets, or of what has their shape; None of None."""
        values = values if self.number is None or values is None else values[self.number]
        return values if self.box is None or values is None else part_of(values, self.box)

    def output(self, values: Any) -> Any:
        """Return the part of outputs."""
        values = values if self.number is None else values[self.number]
        return values if self.box is None else part_of(values, self.box, self.axes)


def _views(outputs: Any, batch: TensorBatch, context: Context, breakdown: Breakdown) -> Iterator[_View]:
    if breakdown.is_whole:
        yield _View(0, batch.size)
        return
    numbers: Sequence[int | None] = range(len(context.labels)) if breakdown.by_target else [None]
    for number, labels in zip(numbers, context.labels, strict=False):
        axes: Mapping[int, int] = {}
        for box in boxes(labels, batch.size):
            if box.places and not axes:
                pair = (outputs, batch.targets) if number is None else (outputs[number], batch.targets[number])
                axes = output_axes(*pair, breakdown.class_axis, box.by)
            yield _View(box.group, box.size, box, number, axes)


# Merged -----------------------------------------------------------------------------------------------------


def merge(pieces: Sequence[Sums]) -> Sums:
    """Merge sums in the order given."""
    names = dict.fromkeys(name for piece in pieces for name in piece.states)
    return Sums(
        sum(piece.samples for piece in pieces),
        {name: merged([piece.states[name] for piece in pieces if name in piece.states]) for name in names},
        np.sum([piece.by_group for piece in pieces], axis=0),
        in_order(piece.seconds for piece in pieces),
    )


def in_order(values: Iterable[float]) -> float:
    """Return the sum of numbers, added one by one: from Python 3.12 on, `sum` compensates what floats round off."""
    total: float = 0  # integers stay integers
    for value in values:
        total += value
    return total


# Values -----------------------------------------------------------------------------------------------------


def values(sums: Sums, wanted: Sequence[str], metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Return ``loss`` and the wanted metrics of everything; NaN where no term counts.

    Parameters
    ----------
    sums : Sums
        Of one group.
    wanted : sequence of str
        As in ``train.metrics``.
    metrics : mapping of str to Metric
        By reported name.
    """
    return {name: float(column[0]) for name, column in columns(sums, wanted, metrics).items()}


def columns(
    sums: Sums, wanted: Sequence[str], metrics: Mapping[str, Metric], baselines: Sequence[str] = ()
) -> dict[str, Floats]:
    """Return ``loss`` and the wanted metrics by group, float64[group].

    Of each baseline too, as ``rmse_persistence``; and the model's skill beside it: 1 - rmse / rmse_persistence.
    """
    loss = _column(sums, LOSS, lambda pair: ratio(*pair.tolist()))
    found = {LOSS: loss}
    for name in wanted:
        key = metric_key(name)
        if name in FROM_LOSS:
            found[key] = np.array([FROM_LOSS[name](one) for one in loss.tolist()])
            continue
        found[key] = _column(sums, key, metrics[key].value)
    for baseline in baselines:
        for name in (metric_key(name) for name in wanted if name not in FROM_LOSS):
            if (reported := f"{name}_{baseline}") in sums.states:
                found[reported] = _column(sums, reported, metrics[name].value)
        if (rmse := f"rmse_{baseline}") in found:
            with np.errstate(divide="ignore", invalid="ignore"):
                found[f"skill_{baseline}"] = 1 - found["rmse"] / found[rmse]
    return found


def _column(sums: Sums, name: str, value: Callable[..., float]) -> Floats:
    """Return the values of a metric by group; NaN of groups that nothing belongs to."""
    state, found = sums.states.get(name), np.full(len(sums.by_group), math.nan)
    for group in np.flatnonzero(sums.by_group).tolist() if state is not None else ():
        found[group] = value(*state.of_group(group)) if state is not None else math.nan
    return found
