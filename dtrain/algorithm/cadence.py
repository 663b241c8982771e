r"""Choosing H, the local steps of a round: what a round costs, and how that cost shrinks as H grows.

    T(H) = H s + o + w                    s a local step, o a round's overhead, w its time on the wire
    w    = in / B + out / B               what the busiest worker sends and receives, at B bytes a second
    synchronous training takes            s + 2 P (W - 1) / W / B a step, the all-reduce of a ring

A round first brings the replicas' updates to the reducer, then the mean back. W workers hold M replicas; the reducer's
slices lie on S of the workers. The share of time in steps is H s / T(H). Fewer steps a round learn more a step and cost
more time: the smallest H that keeps most of the time for steps is a good choice, since learning falls slowly with H and
waiting does not.

References
----------
Utilisation over bandwidth and H: Douillard et al. 2025, arXiv:2503.09799 (table 6, simulated).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TARGET_SHARE = 0.9
"""Share of the time that steps shall have at the recommended H."""
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""The H of a table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of a round."""

    sent: int
    """By each replica to the reducer."""
    received: int
    """By each worker from the reducer."""
    synchronous: int
    """Of the gradients that synchronous training would reduce in each step."""
    replicas: int
    workers: int
    slices: int = 1

    @property
    def a_worker(self) -> int:
        """Bytes through the link of the busiest worker: first those that come in, then those that go out."""
        if self.workers == 1:
            return 0
        own = math.ceil(self.replicas / self.workers)
        there = max((self.replicas - own) * self.sent / self.slices, own * self.sent)
        back = max((self.workers - 1) * self.received / self.slices, self.received)
        if self.slices == self.workers:  # each worker keeps its own slice
            there, back = (self.workers - 1) / self.workers * own * self.sent, back * 1.0
            back = (self.workers - 1) / self.workers * self.received
        return round(there + back)

    @property
    def all_reduce(self) -> float:
        """Bytes through the link of each worker in an all-reduce by a ring; both directions are used at once."""
        return 2 * self.synchronous * (self.workers - 1) / self.workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a step and a round cost."""

    step: float
    """Seconds of a local step of the slowest worker, for all of its replicas."""
    overhead: float
    """Seconds of a round beyond its steps."""
    traffic: Traffic
    bandwidth: float | None = None
    """Bytes a second of each worker's link; None: the overhead holds all there is."""

    @property
    def wire(self) -> float:
        """Seconds of a round on the wire that the overhead does not hold."""
        return self.traffic.a_worker / self.bandwidth if self.bandwidth else 0.0

    @property
    def synchronous(self) -> float:
        """Seconds of a step of synchronous training on the same wire."""
        return self.step + (self.traffic.all_reduce / self.bandwidth if self.bandwidth else 0.0)


@dataclass(frozen=True, slots=True)
class Cadence:
    """What rounds of some local steps cost."""

    local_steps: int
    seconds: float
    """Of a round."""
    share: float
    """Of the time that is spent in steps."""
    bytes_per_second: float
    """Through the link of the busiest worker."""
    speedup: float
    """Steps a second over those of synchronous training."""


def cadence(local_steps: int, costs: Costs) -> Cadence:
    """Return what rounds of `local_steps` cost."""
    steps = local_steps * costs.step
    seconds = steps + costs.overhead + costs.wire
    return Cadence(
        local_steps,
        seconds,
        steps / seconds,
        costs.traffic.a_worker / seconds,
        local_steps * costs.synchronous / seconds,
    )


def recommended(costs: Costs) -> int:
    """Return the fewest local steps that leave `TARGET_SHARE` of the time to steps, to two digits.

    >>> traffic = Traffic(sent=0, received=0, synchronous=0, replicas=2, workers=2)
    >>> recommended(Costs(step=0.1, overhead=0.03, traffic=traffic))
    3
    >>> recommended(Costs(step=0.01, overhead=0.15, traffic=traffic))
    140
    """
    beside = costs.overhead + costs.wire
    fewest = max(1, math.ceil(TARGET_SHARE / (1 - TARGET_SHARE) * beside / costs.step - 1e-9))
    unit: int = 10 ** max(0, len(str(fewest)) - 2)
    return math.ceil(fewest / unit) * unit


def pays_from(costs: Costs) -> int | None:
    """Return the fewest local steps that are faster than synchronous training; None without a wire to save."""
    saved = costs.synchronous - costs.step
    if saved <= 0:
        return None
    return math.floor((costs.overhead + costs.wire) / saved) + 1


def table(costs: Costs, steps: Sequence[int] = STEPS) -> tuple[Cadence, ...]:
    """Return what rounds of each number of local steps cost, the recommended number among them."""
    return tuple(cadence(number, costs) for number in sorted({*steps, recommended(costs)}))
