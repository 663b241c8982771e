"""The local steps: parameters + batches -> parameters, by any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dtrain.algorithm.losses import Loss
from dtrain.algorithm.params import InnerState, pack_inner_state, unpack_inner_state
from dtrain.algorithm.plan import Schedule
from dtrain.errors import InvalidConfig, UserCodeFailed, did_you_mean


@dataclass(frozen=True, slots=True)
class TensorBatch:
    """Samples of one micro-batch as the model and the loss take them."""

    inputs: tuple[torch.Tensor, ...]
    targets: torch.Tensor | tuple[torch.Tensor, ...]
    size: int
    split: str = "train"
    """``train``, ``val``, ``test`` or ``all``: a transform may do other things to samples that are only evaluated."""

    def __iter__(self) -> Iterator[Any]:
        """Yield inputs and targets: ``for (x,), y in batches``."""
        yield self.inputs
        yield self.targets


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a replica learns."""

    loss: Loss
    optimizer: Callable[..., torch.optim.Optimizer]
    optimizer_args: dict[str, Any]
    schedule: Schedule
    clip_norm: float
    """0: no clipping."""
    precision: str = "float32"
    """``bfloat16``: forward and loss under autocast; parameters, gradients and the optimizer stay float32."""


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What the local steps of a task leave behind, besides the module's parameters."""

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
        The replica's steps before this task, and at the end of the run: what the schedule is a function of.
    on_step : callable
        Is told the steps and samples of this task that are done, after each step.

    Returns
    -------
    LocalResult
    """
    module.train()
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = make_optimizer(recipe, params)
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


def autocast(precision: str, batch: TensorBatch) -> AbstractContextManager[Any]:
    """Return the context in which model and loss are called."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(batch.inputs[0].device.type, dtype=torch.bfloat16)


def make_optimizer(recipe: Recipe, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the inner optimizer.

    Raises
    ------
    UserCodeFailed
        It does not accept its arguments.
    """
    try:
        return recipe.optimizer(params, **recipe.optimizer_args)
    except (TypeError, ValueError) as error:
        name = getattr(recipe.optimizer, "__name__", "optimizer")
        raise UserCodeFailed(
            f"The optimizer {name} does not accept optimizer_args = {recipe.optimizer_args}: {error}",
            "Give the arguments that torch documents for it.",
        ) from None


def optimizer_named(name: str, key: str = "train.optimizer") -> type[torch.optim.Optimizer]:
    """Return the class of ``torch.optim`` of that name, in any case.

    Raises
    ------
    InvalidConfig
        torch has no such optimizer.
    """
    known = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name.lower() not in known:
        raise InvalidConfig(
            f'{key} = "{name}": torch.optim has no such optimizer{did_you_mean(name.lower(), known)}',
            f'Allowed are {", ".join(sorted(known.keys() - {"lbfgs"}))} or "module:function".',
        )
    if name.lower() == "lbfgs":
        raise InvalidConfig(f'{key} = "lbfgs" evaluates the loss several times a step; it is not supported.')
    return known[name.lower()]


def _set_rates(optimizer: torch.optim.Optimizer, base_rates: Sequence[Any], factor: float) -> None:
    for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
        if rate is not None:
            group["lr"] = rate * factor
