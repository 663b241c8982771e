"""Optimizers of torch by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from dtrain.errors import InvalidConfig, UserCodeFailed, did_you_mean

MakeOptimizer: TypeAlias = Callable[..., torch.optim.Optimizer]
"""(parameters, **arguments) -> optimizer."""


def make_optimizer(
    make: MakeOptimizer, params: list[nn.Parameter], arguments: Mapping[str, Any], key: str = "optimizer_args"
) -> torch.optim.Optimizer:
    """Make an optimizer over parameters.

    Raises
    ------
    UserCodeFailed
        It does not accept its arguments.
    """
    try:
        return make(params, **arguments)
    except (TypeError, ValueError) as error:
        name = getattr(make, "__name__", "optimizer")
        raise UserCodeFailed(
            f"The optimizer {name} does not accept {key} = {dict(arguments)}: {error}",
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
