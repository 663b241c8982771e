r"""FedNova: updates are divided by the steps behind them, so that replicas with more steps do not count double.

    d_k = (theta - theta_k) / |a_k|        |a_k| = sum_i a_ki, the weights of the round's gradients in the update
    theta' = theta - tau * sum_k p_k d_k   p_k = n_k / sum_j n_j,   tau = sum_k p_k |a_k|

With plain SGD a_ki is the factor of the learning-rate schedule, and |a_k| the number of steps if it is constant. SGD
with momentum repeats a gradient in the steps after it; a pull towards theta (``average.prox``) takes it back. Other
optimizers move by about the learning rate in each step, whatever the gradients are: |a_k| is as for plain SGD.
Replicas of equal |a_k| are averaged as with ``weights = "samples"``, to the same bits.

References
----------
Wang et al. 2020, arXiv:2007.07481. There momentum is reset in each round; here it may be kept, and |a_k| then counts
earlier gradients as if they were those of this round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dtrain.algorithm.evaluate import in_order
from dtrain.algorithm.optimizers import MakeOptimizer
from dtrain.types import Contribution


@dataclass(frozen=True, slots=True)
class StepNorm:
    """The sum of the weights of gradients in an update, after some steps."""

    momentum: float
    damped: float
    """1 - dampening: the weight of a new gradient in the momentum."""
    nesterov: bool
    pull: float
    """Learning rate times ``average.prox``."""
    velocity: float | None
    """Weight of all gradients in the momentum; None before the first step."""
    total: float = 0.0

    def after(self, factor: float) -> StepNorm:
        """Return the sum after a step with a factor on the learning rate: the way of SGD along a gradient of 1."""
        gradient = step = velocity = 1.0 - self.pull * self.total
        if self.momentum and self.velocity is not None:
            step = velocity = self.momentum * self.velocity + self.damped * gradient
        if self.nesterov:
            step = gradient + self.momentum * velocity
        return replace(self, velocity=velocity, total=self.total + factor * step)


def first_norm(
    optimizer: MakeOptimizer, arguments: Mapping[str, Any], rate: float | None, prox: float, steps: int
) -> StepNorm:
    """Return the sum before the first step of a round.

    Parameters
    ----------
    optimizer : callable
        The class of the inner optimizer, or a function that makes it.
    arguments : mapping
        Its arguments.
    rate : float or None
        Its learning rate before the schedule.
    prox : float
        ``average.prox``.
    steps : int
        The steps behind the momentum that the optimizer starts with.
    """
    given = arguments if optimizer is torch.optim.SGD else {}
    momentum, damped = float(given.get("momentum", 0.0)), 1.0 - float(given.get("dampening", 0.0))
    return StepNorm(
        momentum=momentum,
        damped=damped,
        nesterov=bool(given.get("nesterov", False)),
        pull=float(rate or 0.0) * prox,
        velocity=_velocity(momentum, damped, steps) if steps else None,
    )


def _velocity(momentum: float, damped: float, steps: int) -> float:
    """Return the weight of all gradients in the momentum after some steps; the first one is not damped."""
    left = momentum ** (steps - 1)
    return left + damped * (steps - 1 if momentum == 1 else (1 - left) / (1 - momentum))


def coefficients(kept: Sequence[Contribution]) -> list[float]:
    """Return the factors of the updates in FedNova's step; of replicas with equal norms n_k / sum_j n_j.

    >>> one, two = (Contribution(replica=k, samples=n, steps=n, loss_sum=0.0, loss_count=n, finite=True, step_norm=n)
    ...             for k, n in enumerate((2, 6)))
    >>> coefficients([one, two])  # tau = (2 * 2 + 6 * 6) / 8 = 5
    [0.625, 0.625]
    """
    samples = sum(c.samples for c in kept)
    effective = in_order(c.samples * c.step_norm for c in kept) / samples
    return [effective * c.samples / (samples * c.step_norm) if c.step_norm else 0.0 for c in kept]


def equal_norms(kept: Sequence[Contribution]) -> bool:
    """Whether all replicas have the same weight of gradients in their updates, so that nothing is to be corrected."""
    return all(c.step_norm == kept[0].step_norm for c in kept)
