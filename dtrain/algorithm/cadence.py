r"""Choosing H, the local steps of a round: what a round costs, and how that cost shrinks as H grows.

    T(H) = H s + o + w                    s a local step, o a round's overhead, w its time on the wire
    w    = there / B + back / B           bytes of the busiest worker (`dtrain.algorithm.traffic`), B bytes a second
    synchronous training takes            s + 2 P (W - 1) / W / B a step: the all-reduce of P bytes by a ring

The share of time in steps is H s / T(H). Fewer steps a round learn more a step and cost more time: the smallest H that
keeps most of the time for steps is a good choice, since learning falls slowly with H and waiting does not.

References
----------
Utilisation over bandwidth and H: Charles et al. 2025, arXiv:2503.09799 (table 6, simulated).
All-reduce by a ring: Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtrain.algorithm.traffic import Traffic

TARGET_SHARE = 0.9
"""Share of the time that steps have at the recommended H, at least."""
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""The H of a table."""


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
        """Seconds of a round on the wire, beside the overhead."""
        return self.traffic.busiest / self.bandwidth if self.bandwidth else 0.0

    @property
    def all_reduce(self) -> float:
        """Seconds that synchronous training would spend on the same wire in each step; 0 without a bandwidth."""
        return self.traffic.all_reduce / self.bandwidth if self.bandwidth else 0.0


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
    speedup: float | None
    """Steps a second over those of synchronous training; None without a bandwidth."""


def cadence(local_steps: int, costs: Costs) -> Cadence:
    """Return what rounds of `local_steps` cost."""
    steps = local_steps * costs.step
    seconds = steps + costs.overhead + costs.wire
    speedup = local_steps * (costs.step + costs.all_reduce) / seconds if costs.bandwidth else None
    return Cadence(local_steps, seconds, steps / seconds, costs.traffic.busiest / seconds, speedup)


def recommended(costs: Costs) -> int:
    """Return the fewest local steps that leave `TARGET_SHARE` of the time to steps, rounded up to two digits.

    >>> none = Traffic(sent=0, received=0, busiest=0, all_reduce=0)
    >>> recommended(Costs(step=0.1, overhead=0.03, traffic=none))
    3
    >>> recommended(Costs(step=0.01, overhead=0.15, traffic=none))
    140
    """
    beside = costs.overhead + costs.wire
    fewest = max(1, math.ceil(TARGET_SHARE / (1 - TARGET_SHARE) * beside / costs.step - 1e-9))
    unit: int = 10 ** max(0, len(str(fewest)) - 2)
    return math.ceil(fewest / unit) * unit


def pays_from(costs: Costs) -> int | None:
    """Return the fewest local steps that are faster than synchronous training; None without a wire to save."""
    if not costs.all_reduce:
        return None
    return math.floor((costs.overhead + costs.wire) / costs.all_reduce) + 1


def table(costs: Costs, local_steps: int) -> tuple[Cadence, ...]:
    """Return what rounds of each number of local steps cost; the recommended and the present one are among them."""
    return tuple(cadence(number, costs) for number in sorted({*STEPS, recommended(costs), local_steps}))
