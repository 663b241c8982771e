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

import numpy as np
import torch
from torch import nn

from dtrain.algorithm.optimizers import make_optimizer, optimizer_named
from dtrain.algorithm.replica import carried, empty_inner_state, pack_inner_state, unpack_inner_state
from dtrain.config.average import OuterConfig
from dtrain.errors import InvalidConfig
from dtrain.types import Flat, InnerState

ARGS = "average.outer.args"
WHOLE_TENSORS = frozenset({"adafactor", "muon", "sparseadam"})
"""Optimizers of torch that depend on the shape of a tensor, or need sparse gradients."""


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
    chosen = optimizer_named(config.optimizer, "average.outer.optimizer")
    make_optimizer(chosen, [nn.Parameter(torch.zeros(1))], config.args, ARGS)
    return chosen


def pseudo_gradient(theta: Flat, mean: Flat) -> Flat:
    """Return ``theta - mean``: subtracted in float64, rounded once to float32; 0 for a mask that stays infinite."""
    gradient = np.empty_like(theta)
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(theta, mean, out=gradient, dtype=np.float64)
    gradient[theta == mean] = 0.0  # infinity less itself
    return gradient


def outer_step(
    theta: Flat, mean: Flat, state: InnerState, config: OuterConfig, *, factor: float, norm: float
) -> tuple[Flat, InnerState]:
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
    factor : float
        On the learning rate.
    norm : float
        Of the pseudo-gradient, of all slices; used to clip it.

    Returns
    -------
    float32[n], InnerState
        The new slice, and the new state.
    """
    parameter = nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = make_optimizer(outer_optimizer(config), [parameter], config.args, ARGS)
    fresh = carried(optimizer)
    unpack_inner_state(state, optimizer, [parameter])
    gradient = torch.from_numpy(pseudo_gradient(theta, mean))
    if config.clip_norm:  # as torch.nn.utils.clip_grad_norm_ does
        gradient *= min(1.0, config.clip_norm / (norm + 1e-6))
    parameter.grad = gradient
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    optimizer.step()
    return parameter.detach().numpy(), pack_inner_state(optimizer, [parameter], fresh)


def outer_state_bytes(config: OuterConfig, params: int) -> int:
    """Return the bytes of the state of the outer optimizer for so many parameters, after a step."""
    one = np.zeros(1, np.float32)
    _, state = outer_step(one, one, empty_inner_state(), config, factor=1.0, norm=0.0)
    return sum(slot.size * (params if slot.shape == (1,) else 1) for slot in state.slots if slot.dtype)
