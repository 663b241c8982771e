r"""The bytes of a round: what replicas send to be averaged, what comes back, and what the busiest link carries.

    there   the replicas' updates go to the workers that average them      most that one worker sends or receives
    back    the means go to the workers of the replicas that receive them  most that one worker sends or receives

Replica k lies on worker k mod W. The slices of a mean are spread over the workers, beginning with that of its first
receiver. Several means also go to worker 0, for the model that is evaluated. A value goes once to each worker that
needs it, and nothing is sent where it lies already. Links carry both directions at once, but the way back begins when
the means are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from dtrain.algorithm.codec import encoded_bytes
from dtrain.algorithm.mix import Average, averages, neighbourhoods
from dtrain.algorithm.outer import outer_state_bytes
from dtrain.algorithm.pattern import by_replica
from dtrain.config.average import AverageConfig
from dtrain.types import Layout

Move: TypeAlias = tuple[int, int, int, int]
"""Number of a replica or a mean, slice, from worker, to worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of a round; where rounds differ (``average.mix.period``), the mean of some."""

    sent: int
    """By all replicas, to be averaged: ``bytes_reduced`` of the history."""
    received: int
    """By each worker, from each mean that its replicas go on from."""
    busiest: int
    """Through the link of the busiest worker: there, and then back."""
    all_reduce: int
    """Through the link of each worker, if a ring reduced the gradients of a step: both directions are used at once."""


def traffic(
    layout: Layout,
    inner_bytes: int,
    config: AverageConfig,
    *,
    replicas: int,
    workers: int,
    slices: int = 1,
    small: int = 0,
) -> Traffic:
    """Return the bytes of a round.

    Parameters
    ----------
    layout : Layout
    inner_bytes : int
        Of the state of an inner optimizer that has taken a step.
    config : AverageConfig
    replicas : int
    workers : int
        Those without a replica take no part.
    slices : int
        Of the reducer.
    small : int
        What a replica keeps for itself travels with its update up to this size: it would cost more to take it apart.
    """
    used = min(workers, replicas)
    sent, received = update_bytes(layout, inner_bytes, config), broadcast_bytes(layout, inner_bytes, config)
    cycle = means_of_cycle(config, replicas)
    members = sum(len(mean.members) for means in cycle for mean in means)
    kept = _kept_bytes(layout, inner_bytes, config)
    whole = sent + kept if slices == 1 and kept <= small else sent
    links = [_busiest_link(means, used, slices, whole, received) for means in cycle]
    return Traffic(
        sent=round(Fraction(sent * members, len(cycle))),
        received=received,
        busiest=round(sum(links) / len(cycle)),
        all_reduce=round(Fraction(2 * 4 * layout.num_params * (used - 1), used)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitBytes:
    """Bytes of the arrays of a committed round."""

    parameters: int
    """Of the model, of replicas that start from others, and of the moving average of models."""
    states: int
    """What the replicas keep, and the states of the outer optimizer."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.states


def commit_bytes(layout: Layout, inner_bytes: int, config: AverageConfig, replicas: int) -> CommitBytes:
    """Return the bytes of a committed round, of the one with the most means.

    Parameters
    ----------
    layout : Layout
    inner_bytes : int
        Of the state of an inner optimizer that has taken a step.
    config : AverageConfig
    replicas : int
    """
    params = sum(entry.size * (1 if entry.kind == "extra" else 4) for entry in layout.entries)  # tied ones each
    means = max(len(means) for means in means_of_cycle(config, replicas))
    vectors = means + (means > 1 or config.recalibrate_batchnorm)  # and the model that is evaluated
    control = 4 * layout.num_params if config.control else 0
    averaged = inner_bytes if config.inner_state == "average" else 0  # lies with each replica
    outer = 0 if config.outer is None else outer_state_bytes(config.outer, layout.num_params)
    return CommitBytes(
        parameters=params * (vectors + (1 if config.ema else 0)),
        states=replicas * (_kept_bytes(layout, inner_bytes, config) + averaged) + means * outer + control,
    )


def update_bytes(layout: Layout, inner_bytes: int, config: AverageConfig) -> int:
    """Return the bytes that a replica sends to be averaged: those of its `Update`."""
    params = 4 * layout.num_params if config.codec is None else encoded_bytes(layout.num_params, config.codec)
    return params + _beside_params(layout, inner_bytes, config)


def broadcast_bytes(layout: Layout, inner_bytes: int, config: AverageConfig) -> int:
    """Return the bytes that a replica goes on from: those of its `Broadcast`, without the frozen parameters."""
    return 4 * layout.num_params + _beside_params(layout, inner_bytes, config)


def _beside_params(layout: Layout, inner_bytes: int, config: AverageConfig) -> int:
    """Return the bytes of what goes with the parameters in both directions: buffers, states, control variates."""
    buffers = 4 * (layout.num_flat - layout.num_params) + layout.num_extra
    inner = inner_bytes if config.inner_state == "average" else 0
    return buffers + inner + (4 * layout.num_params if config.control else 0)


def _kept_bytes(layout: Layout, inner_bytes: int, config: AverageConfig) -> int:
    """Return the bytes of a `ReplicaState`: the inner optimizer's state, the codec's residual, the control variate."""
    inner = inner_bytes if config.inner_state == "keep" else 0
    residual = 4 * layout.num_params if config.codec is not None and config.codec.error_feedback else 0
    return inner + residual + (4 * layout.num_params if config.control else 0)


def means_of_cycle(config: AverageConfig, replicas: int) -> tuple[tuple[Average, ...], ...]:
    """Return the means of each of the first ``average.mix.period`` rounds."""
    rounds, starts = [], (0,) * replicas
    for number in range(1, config.mix.period + 1):
        keys = starts if config.outer is not None else (0,) * replicas  # as in `round_averages`
        means = averages(neighbourhoods(config.mix, number, replicas), keys)
        rounds.append(means)
        starts = by_replica(means, range(len(means)))
    return tuple(rounds)


def _busiest_link(means: Sequence[Average], workers: int, slices: int, sent: int, received: int) -> float:
    there: set[Move] = set()
    back: set[Move] = set()
    for number, mean in enumerate(means):
        for one in range(slices):
            at = (mean.receivers[0] + one) % workers
            there |= {(replica, one, replica % workers, at) for replica in mean.members}
            back |= {(number, one, at, replica % workers) for replica in mean.receivers}
            back |= {(number, one, at, 0)} if len(means) > 1 else set()
    return (_most_moves(there) * sent + _most_moves(back) * received) / slices


def _most_moves(moves: Collection[Move]) -> int:
    """Return the most moves out of one worker, or into one."""
    real = [(source, target) for _, _, source, target in moves if source != target]
    ends = [*Counter(source for source, _ in real).values(), *Counter(target for _, target in real).values()]
    return max(ends, default=0)
