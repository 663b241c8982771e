"""The local steps: parameters + batches -> parameters, by any torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dtrain.algorithm.batch import TensorBatch, autocast, non_finite_values
from dtrain.algorithm.fednova import first_norm
from dtrain.algorithm.losses import compared, mean_of_batch
from dtrain.algorithm.optimizers import make_optimizer
from dtrain.algorithm.recipe import Recipe
from dtrain.algorithm.replica import carried, pack_inner_state, unpack_inner_state
from dtrain.algorithm.scaffold import ControlledSteps
from dtrain.types import Flat, InnerState


@dataclass(frozen=True, slots=True)
class LocalResult:
    """The result of the local steps of a task, besides the module's parameters."""

    inner: InnerState
    loss_sum: float
    loss_count: float
    non_finite: int
    """NaN and infinite values in the batches whose loss was not finite."""
    samples: int
    steps: int
    step_norm: float = 0.0
    """Sum of the weights of the gradients in the update (`dtrain.algorithm.fednova`)."""
    control: Flat | None = None
    """The replica's next control variate, where there are some."""


def run_local_steps(
    module: nn.Module,
    recipe: Recipe,
    inner: InnerState,
    steps: Iterable[tuple[int, Iterable[TensorBatch]]],
    *,
    first_step: int,
    total_steps: int,
    controlled: ControlledSteps | None = None,
    on_step: Callable[[int, int], None] = lambda steps, samples: None,
) -> LocalResult:
    """Take one inner-optimizer step for each element of `steps`; changes the module's parameters.

    Parameters
    ----------
    module : nn.Module
        Holds the parameters to start from.
    recipe : Recipe
    inner : InnerState
        State of the inner optimizer; not changed.
    steps : iterable of (int, iterable of TensorBatch)
        For each step the samples of its batch, and the micro-batches that make it up. The gradient is that of the
        sum of the losses over the whole batch, divided by the number of its terms.
    first_step, total_steps : int
        The replica's steps before this task, and at the end of the run. The schedule is a function of both.
    controlled : ControlledSteps, optional
        Corrects the gradients by control variates.
    on_step : callable
        Called after each step with the finished steps and samples of this task.

    Returns
    -------
    LocalResult
    """
    module.train()
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = make_optimizer(recipe.optimizer, params, recipe.optimizer_args)
    fresh = carried(optimizer)
    unpack_inner_state(inner, optimizer, params)
    base_rates = [group.get("lr") for group in optimizer.param_groups]
    start = [parameter.detach().clone() for parameter in params] if recipe.prox else []
    norm = first_norm(
        recipe.optimizer,
        recipe.optimizer_args,
        optimizer.param_groups[0].get("lr"),
        recipe.prox,
        first_step if inner.slots else 0,
    )
    losses, samples, step = _Losses(), 0, first_step
    for batch_size, micro_batches in steps:
        optimizer.zero_grad(set_to_none=True)
        losses += _accumulate(module, recipe, params, batch_size, micro_batches)
        if controlled is not None:
            controlled.correct()
        if recipe.prox:
            _pull_back(params, start, recipe.prox)
        if recipe.clip_norm > 0:
            nn.utils.clip_grad_norm_(params, recipe.clip_norm)
        factor = recipe.schedule(step, total_steps)
        _set_rates(optimizer, base_rates, factor)
        optimizer.step()
        norm = norm.after(float(factor))
        samples += batch_size
        step += 1
        on_step(step - first_step, samples)
    return LocalResult(
        pack_inner_state(optimizer, params, fresh),
        losses.sum,
        losses.count,
        losses.non_finite,
        samples,
        step - first_step,
        norm.total,
        None if controlled is None else controlled.own_control(),
    )


@dataclass(frozen=True, slots=True)
class _Losses:
    sum: float = 0.0
    count: float = 0
    non_finite: int = 0

    def __add__(self, other: _Losses) -> _Losses:
        return _Losses(self.sum + other.sum, self.count + other.count, self.non_finite + other.non_finite)


def _accumulate(
    module: nn.Module,
    recipe: Recipe,
    params: Sequence[nn.Parameter],
    batch_size: int,
    micro_batches: Iterable[TensorBatch],
) -> _Losses:
    """Leave the gradient of a batch in the parameters; return the sum of its losses and the number of its terms.

    The number of terms of all micro-batches is known after the last one. The first one that has terms tells what to
    expect if all samples have as many; where they do not, the gradient is rescaled.
    """
    seen, expected = _Losses(), 0.0
    for batch in micro_batches:
        with autocast(recipe.precision, batch):
            mean = mean_of_batch(compared(recipe.loss, module(*batch.inputs), batch.targets, batch.weight), batch.size)
        expected = expected or mean.count * batch_size / batch.size
        share = mean.count / expected if expected else 1.0
        (mean.value if share == 1.0 else mean.value * share).backward()  # type: ignore[no-untyped-call]
        total = mean.sum
        seen += _Losses(total, mean.count, 0 if math.isfinite(total) else non_finite_values(batch))
    if seen.count not in (0, expected):
        for parameter in params:
            if parameter.grad is not None:
                parameter.grad *= expected / seen.count
    return seen


def _pull_back(params: Sequence[nn.Parameter], start: Sequence[torch.Tensor], prox: float) -> None:
    """Add the gradient of ``prox / 2 * |theta - start|^2`` (FedProx: Li et al. 2020, arXiv:1812.06127)."""
    with torch.no_grad():
        for parameter, origin in zip(params, start, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - origin, alpha=prox)


def _set_rates(
    optimizer: torch.optim.Optimizer, base_rates: Sequence[float | torch.Tensor | None], factor: float
) -> None:
    for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
        if rate is not None:
            group["lr"] = rate * factor
