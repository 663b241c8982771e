r"""The outer optimizer: a step of any torch optimizer along the pseudo-gradient.

    g = theta - mean_k theta_k          old minus new, so that the optimizer descends along it like a gradient

With SGD (0.7, momentum 0.9, Nesterov) this is DiLoCo; with Adam FedAdam; with one replica Lookahead. The difference
is taken in float64 and rounded once. The optimizer sees one flat slice of the parameters, so it must act on each
element alone; buffers never reach it.

References
----------
DiLoCo: Douillard et al. 2023, arXiv:2311.08105. FedOpt: Reddi et al. 2021, arXiv:2003.00295. Lookahead: Zhang et al.
2019, arXiv:1907.08610.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from dtrain.algorithm.local import optimizer_named
from dtrain.algorithm.params import Flat, InnerState, pack_inner_state, unpack_inner_state
from dtrain.config import OuterConfig
from dtrain.errors import InvalidConfig, UserCodeFailed

WHOLE_TENSORS = frozenset({"adafactor", "muon", "sparseadam"})
"""Optimizers of torch that look at the shape of a tensor, or need sparse gradients."""


def outer_optimizer(config: OuterConfig) -> type[torch.optim.Optimizer]:
    """Return the optimizer class of ``[average.outer]``, after trying its arguments.

    Raises
    ------
    InvalidConfig
        torch has none of that name, or it does not act element by element.
    UserCodeFailed
        It does not accept the arguments.
    """
    if config.optimizer.lower() in WHOLE_TENSORS:
        raise InvalidConfig(
            f'average.outer.optimizer = "{config.optimizer}" works on whole tensors; the outer optimizer sees slices '
            "of a flat vector.",
            "Use sgd, adam, adamw, adagrad or another optimizer that acts element by element.",
        )
    found = optimizer_named(config.optimizer, "average.outer.optimizer")
    _make(found, nn.Parameter(torch.zeros(1)), config.args)
    return found


def pseudo_gradient(theta: Flat, mean: Flat) -> Flat:
    """Return ``theta - mean``: subtracted in float64, rounded once to float32."""
    gradient: Flat = (theta.astype(np.float64) - mean).astype(np.float32)
    return gradient


def outer_step(theta: Flat, mean: Flat, state: InnerState, config: OuterConfig) -> tuple[Flat, InnerState]:
    """Take one step of the outer optimizer; changes none of its arguments.

    Parameters
    ----------
    theta : float32[n]
        The slice of the parameters that the round started from.
    mean : float32[n]
        The average of the replicas' slices.
    state : InnerState
        Of the outer optimizer for this slice.
    config : OuterConfig

    Returns
    -------
    float32[n], InnerState
        The new slice, and the new state.
    """
    parameter = nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = _make(outer_optimizer(config), parameter, config.args)
    unpack_inner_state(state, optimizer, [parameter])
    parameter.grad = torch.from_numpy(pseudo_gradient(theta, mean))
    optimizer.step()
    return parameter.detach().numpy(), pack_inner_state(optimizer, [parameter])


def _make(
    optimizer: type[torch.optim.Optimizer], parameter: nn.Parameter, arguments: dict[str, Any]
) -> torch.optim.Optimizer:
    try:
        return optimizer([parameter], **arguments)
    except (TypeError, ValueError) as error:
        raise UserCodeFailed(
            f"{optimizer.__name__} does not accept average.outer.args = {arguments}: {error}",
            "Give the arguments that torch documents for it.",
        ) from None
