"""The recipe of the local steps: loss, optimizer, schedule and metrics, from names or the user's functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dtrain.algorithm.losses import Loss, loss_named
from dtrain.algorithm.masked import of_finite_targets
from dtrain.algorithm.metrics.named import FROM_LOSS, metric_named
from dtrain.algorithm.metrics.state import Metric, of_sums
from dtrain.algorithm.metrics.terms import mean_over_batch
from dtrain.algorithm.metrics.torchmetric import torchmetric, torchmetric_of
from dtrain.algorithm.optimizers import MakeOptimizer, optimizer_named
from dtrain.algorithm.schedules import SCHEDULES, Schedule, schedule_named, with_warmup
from dtrain.config.functions import Function
from dtrain.config.names import metric_key
from dtrain.config.schema import TrainConfig, TrainTable

Functions: TypeAlias = Mapping[str, Function]
"""By config key (``model``, ``train.loss``, ``train.metrics.NAME`` ...): a function of the user's."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a replica learns."""

    loss: Loss
    optimizer: MakeOptimizer
    optimizer_args: Mapping[str, Any]
    schedule: Schedule
    clip_norm: float
    """0: no clipping."""
    precision: str = "float32"
    """``bfloat16``: forward and loss under autocast; parameters, gradients and the optimizer stay float32."""
    prox: float = 0.0
    """The factor mu of FedProx's term ``mu / 2 * |theta - theta_start|^2`` of the loss; 0: none."""


def outer_factors(config: TrainConfig, own: Functions) -> tuple[float, ...]:
    """Return, by round, the factor of ``average.outer.schedule``; empty if it is constant."""
    name = config.average.outer_schedule
    if name == "constant":
        return ()
    schedule: Schedule = own["average.outer.schedule"] if "average.outer.schedule" in own else SCHEDULES[name]
    return tuple(float(schedule(number, config.train.rounds)) for number in range(config.train.rounds))


def recipe_of(train: TrainTable, own: Functions, prox: float = 0.0, finite_targets: bool = False) -> Recipe:
    """Return the recipe of ``[train]``; the user's functions take the place of names.

    With `finite_targets`, built-in losses leave out targets that are not finite.
    """
    return Recipe(
        loss=own["train.loss"] if "train.loss" in own else _loss_named(train, finite_targets),
        optimizer=own["train.optimizer"] if "train.optimizer" in own else optimizer_named(train.optimizer),
        optimizer_args=train.optimizer_args,
        schedule=with_warmup(own["train.schedule"], train.warmup_steps)
        if "train.schedule" in own
        else schedule_named(train.schedule, train.warmup_steps),
        clip_norm=train.clip_norm,
        precision=train.precision,
        prox=prox,
    )


def _loss_named(train: TrainTable, finite_targets: bool) -> Loss:
    loss = loss_named(train.loss, train.class_axis)
    return of_finite_targets(loss) if finite_targets else loss


def metrics_of(train: TrainTable, own: Functions, finite_targets: bool = False) -> dict[str, Metric]:
    """Return the metrics that are computed batch by batch, by the name they are reported with.

    With `finite_targets`, built-in metrics leave out targets that are not finite.
    """
    chosen: dict[str, Metric] = {}
    for name in train.metrics:
        if name not in FROM_LOSS:
            function = own.get(f"train.metrics.{name}")
            if function:
                chosen[metric_key(name)] = _of_function(function, train)
            else:
                chosen[metric_key(name)] = metric_named(name, train.class_axis, finite_targets)
    return chosen


def _of_function(function: Function, train: TrainTable) -> Metric:
    """Return the metric of a function of the user's, or of a class of torchmetrics."""
    metric = torchmetric_of(function)
    if metric is not None:
        return torchmetric(metric, train.loss, train.class_axis)
    return of_sums(mean_over_batch(function))
