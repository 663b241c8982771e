r"""SCAFFOLD: control variates take out of each local step what is peculiar to the replica's data.

    g_i <- g_i + c - c_k          in each local step, before the inner optimizer
    c_k' = mean_i g_i             of the round's gradients, as they were before
    c'   = sum_k w_k c_k'         averaged as the parameters are

With plain SGD c_k' is the paper's second option, c_k - c + (theta - theta_k) / (H lr), written so that it does not
depend on the inner optimizer. Both controls are 0 in the first round.

References
----------
Karimireddy et al. 2020, arXiv:1910.06378.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dtrain.types import Flat, Layout


@dataclass(frozen=True, slots=True)
class Controls:
    """The control variates that a replica begins a round with."""

    shared: Flat | None
    """float32[num_params]: c; None is 0."""
    own: Flat | None
    """float32[num_params]: c_k; None is 0."""


class ControlledSteps:
    """Corrects the gradients of a round's local steps, and takes their mean; it changes with each step."""

    def __init__(self, module: nn.Module, layout: Layout, controls: Controls) -> None:
        named = dict(module.named_parameters())
        self._params = [
            (named[entry.name], slice(entry.offset, entry.offset + entry.size))
            for entry in layout.entries
            if entry.kind == "param" and not entry.alias
        ]
        device = self._params[0][0].device
        zeros = np.zeros(layout.num_params, np.float32)
        shared, own = (zeros if given is None else given for given in (controls.shared, controls.own))
        self._correction = torch.from_numpy(shared - own).to(device)
        self._sum = torch.zeros(layout.num_params, device=device)
        self._steps = 0

    def correct(self) -> None:
        """Add ``c - c_k`` to the gradients that the parameters hold.

        A parameter without a gradient has the gradient 0; without a correction too, it is left out of the step.
        """
        for parameter, place in self._params:
            correction = self._correction[place].view_as(parameter)
            if parameter.grad is None:
                parameter.grad = correction.clone() if correction.any() else None
            else:
                self._sum[place] += parameter.grad.reshape(-1)
                parameter.grad += correction
        self._steps += 1

    def own_control(self) -> Flat:
        """Return float32[num_params]: the mean of the gradients, the replica's next control variate."""
        mean: Flat = (self._sum / max(1, self._steps)).cpu().numpy()
        return mean
