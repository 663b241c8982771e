"""The local steps: parameters + batches -> parameters, by any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dtrain.algorithm.batch import TensorBatch, autocast
from dtrain.algorithm.optimizers import make_optimizer
from dtrain.algorithm.recipe import Recipe
from dtrain.algorithm.replica import pack_inner_state, unpack_inner_state
from dtrain.types import InnerState


@dataclass(frozen=True, slots=True)
class LocalResult:
    """The result of the local steps of a task, besides the module's parameters."""

    inner: InnerState
    loss_sum: float
    samples: int
    steps: int


def run_local_steps(
    module: nn.Module,
    recipe: Recipe,
    inner: InnerState,
    steps: Iterable[tuple[int, Iterable[TensorBatch]]],
    *,
    first_step: int,
    total_steps: int,
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
        mean loss over the whole batch.
    first_step, total_steps : int
        The replica's steps before this task, and at the end of the run. The schedule is a function of both.
    on_step : callable
        Called after each step with the finished steps and samples of this task.

    Returns
    -------
    LocalResult
    """
    module.train()
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = make_optimizer(recipe.optimizer, params, recipe.optimizer_args)
    unpack_inner_state(inner, optimizer, params)
    base_rates = [group.get("lr") for group in optimizer.param_groups]
    loss_sum, samples, step = 0.0, 0, first_step
    for batch_size, micro_batches in steps:
        optimizer.zero_grad(set_to_none=True)
        for batch in micro_batches:
            with autocast(recipe.precision, batch):
                loss = recipe.loss(module(*batch.inputs), batch.targets)
            loss_sum += loss.item() * batch.size
            (loss if batch.size == batch_size else loss * (batch.size / batch_size)).backward()  # type: ignore[no-untyped-call]
        if recipe.clip_norm > 0:
            nn.utils.clip_grad_norm_(params, recipe.clip_norm)
        _set_rates(optimizer, base_rates, recipe.schedule(step, total_steps))
        optimizer.step()
        samples += batch_size
        step += 1
        on_step(step - first_step, samples)
    return LocalResult(pack_inner_state(optimizer, params), loss_sum, samples, step - first_step)


def _set_rates(
    optimizer: torch.optim.Optimizer, base_rates: Sequence[float | torch.Tensor | None], factor: float
) -> None:
    for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
        if rate is not None:
            group["lr"] = rate * factor
