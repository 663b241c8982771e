"""The mathematics of a round around its local steps.

    contribute    theta, theta_k, state_k  ->  what replica k sends, state_k'        on the replica's worker
    combine       theta, what was sent     ->  theta', outer'                        where replicas are averaged

Both runners call these two; `mix.averages` says which replicas are combined. `combine` is `average`, then `stepped`. It
may be given slices of everything (`dtrain.algorithm.slices`), and then returns a slice, to the same bits. A step that
clips needs the norm of all slices' pseudo-gradients, so that it waits for all their means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dtrain.algorithm.codec import Compressed, compress, decompress
from dtrain.algorithm.drift import Squares, block_squares, norm_of
from dtrain.algorithm.fednova import coefficients, equal_norms
from dtrain.algorithm.local import LocalResult
from dtrain.algorithm.momenta import is_finite_state, mean_state
from dtrain.algorithm.outer import outer_step
from dtrain.algorithm.params import is_finite
from dtrain.algorithm.reduce import moved, reduced, weighted_mean
from dtrain.algorithm.replica import empty_inner_state
from dtrain.config.average import AverageConfig
from dtrain.types import (
    Broadcast,
    Contribution,
    Flat,
    InnerState,
    LocalTask,
    OuterState,
    Parameters,
    ReplicaState,
)

NO_SQUARES: Squares = np.zeros(0)


@dataclass(frozen=True, slots=True)
class Update:
    """What a replica sends to be averaged."""

    payload: Parameters | Compressed
    """Its parameters; with a codec, its encoded update."""
    contribution: Contribution
    inner: InnerState | None = None
    """The state of its inner optimizer, where states are averaged."""
    control: Flat | None = None
    """float32[num_params]: its control variate, where there are some."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.payload.nbytes + sum(0 if more is None else more.nbytes for more in (self.inner, self.control))

    def __sizeof__(self) -> int:  # Dask's memory accounting asks this
        return object.__sizeof__(self) + self.nbytes


@dataclass(frozen=True, slots=True)
class AverageFacts:
    """What is small about a mean, and goes into the summary of the round."""

    contributions: tuple[Contribution, ...]
    """Of the replicas that were averaged, in replica order."""
    coefficients: tuple[float, ...]
    """Of their updates in the pseudo-gradient, 0 for a replica that was left out; empty if it is no sum of them."""
    squares: Squares
    """Of the pseudo-gradient, by block; empty where nobody asks for its norm."""
    nbytes: int
    """Bytes that they sent."""
    finite: bool = True
    """Whether what came out is finite."""
    seconds: float = 0.0
    """That averaging took."""


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of some replicas, before the step of the outer optimizer."""

    params: Parameters
    inner: InnerState | None
    control: Flat | None
    facts: AverageFacts

    def __sizeof__(self) -> int:  # Dask's memory accounting asks this
        return object.__sizeof__(self) + Broadcast(self.params, self.inner, self.control).nbytes


@dataclass(frozen=True, slots=True)
class Combined:
    """What some replicas go on from."""

    broadcast: Broadcast
    outer: OuterState
    facts: AverageFacts

    def __sizeof__(self) -> int:  # Dask's memory accounting asks this
        return object.__sizeof__(self) + self.broadcast.nbytes + sum(state.nbytes for state in self.outer)


def contribute(
    start: Broadcast,
    after: Parameters,
    state: ReplicaState,
    local: LocalResult,
    task: LocalTask,
    config: AverageConfig,
) -> tuple[Update, ReplicaState]:
    """Return what a replica sends after its local steps, and what it keeps.

    A replica of which something that is averaged is not finite keeps the state it came with.

    Parameters
    ----------
    start : Broadcast
        What the replica was given at the start of the round.
    after : Parameters
        Its parameters after the local steps.
    state : ReplicaState
        What it kept from the round before.
    local : LocalResult
        What the local steps left behind besides the parameters.
    task : LocalTask
        The steps that were asked for.
    config : AverageConfig
    """
    sent = local.inner if config.inner_state == "average" else None
    finite = is_finite(after, start.params) and _finite_beside(sent, local.control)
    payload: Parameters | Compressed = after
    reached, residual = after, None
    if finite and config.codec is not None:
        payload, reached, residual = compress(start.params, after, state.residual, config.codec)
        finite = is_finite(reached, start.params)
    contribution = Contribution(
        replica=task.replica,
        samples=local.samples,
        steps=local.steps,
        loss_sum=local.loss_sum,
        loss_count=local.loss_count,
        finite=finite,
        non_finite=local.non_finite,
        step_norm=local.step_norm,
    )
    if not finite:
        return Update(after, contribution), state
    end = after.num_params
    norm = norm_of([block_squares(start.params.flat[:end], reached.flat[:end])])
    kept = local.inner if config.inner_state == "keep" else empty_inner_state()
    update = Update(payload, replace(contribution, update_norm=norm), sent, local.control)
    return update, ReplicaState(kept, residual, local.control)


def _finite_beside(inner: InnerState | None, control: Flat | None) -> bool:
    """Whether what is averaged beside the parameters is finite."""
    return (inner is None or is_finite_state(inner)) and (control is None or bool(np.isfinite(control).all()))


def combine(
    start: Broadcast,
    starts: Sequence[Broadcast] | None,
    updates: Sequence[Update],
    outer: OuterState,
    config: AverageConfig,
    factor: float = 1.0,
) -> Combined:
    """Average replicas in replica order, and take the step of the outer optimizer.

    Replicas that are not finite are left out. If none is finite the mean is `start`: those who receive it stay where
    they were. The driver stops the run if too many are left out.

    Parameters
    ----------
    start : Broadcast
        What those who receive the mean were given at the start of the round.
    starts : sequence of Broadcast or None
        What those who are averaged were given (`starts_of`).
    updates : sequence of Update
        What they send, in replica order.
    outer : tuple of InnerState
        State of the outer optimizer; empty without one.
    config : AverageConfig
    factor : float
        On the learning rate of the outer optimizer.
    """
    mean = average(start, starts, updates, config)
    return stepped(start, mean, outer, config, factor, norm_of([mean.facts.squares]))


def average(
    start: Broadcast, starts: Sequence[Broadcast] | None, updates: Sequence[Update], config: AverageConfig
) -> Mean:
    """Average replicas in replica order; arguments as those of `combine`."""
    kept = [k for k, update in enumerate(updates) if update.contribution.finite]
    if not kept:
        return _unmoved(start, updates)
    own = [updates[k].contribution for k in kept]
    received = [_received(updates[k], None if starts is None else starts[k], config) for k in kept]
    weights = [1 if config.weights == "uniform" else c.samples for c in own]
    params, shares = reduced(received, weights, config), [weight / sum(weights) for weight in weights]
    if starts is not None and config.weights == "fednova" and config.reduce == "mean" and not equal_norms(own):
        shares = coefficients(own)
        params = moved(params, [starts[k].params for k in kept], received, weights, shares)
    states = [inner for k in kept if (inner := updates[k].inner) is not None]
    controls = [control for k in kept if (control := updates[k].control) is not None]
    is_sum = config.reduce == "mean" and starts is not None and all(other is start for other in starts)
    by_update = dict(zip(kept, shares, strict=True))
    end, has_norm = params.num_params, is_sum or (config.outer is not None and config.outer.clip_norm > 0)
    facts = AverageFacts(
        contributions=tuple(update.contribution for update in updates),
        coefficients=tuple(by_update.get(k, 0.0) for k in range(len(updates))) if is_sum else (),
        squares=block_squares(start.params.flat[:end], params.flat[:end]) if has_norm else NO_SQUARES,
        nbytes=sum(update.nbytes for update in updates),
    )
    return Mean(
        params,
        mean_state(states, weights) if len(states) == len(kept) else None,
        weighted_mean(controls, weights) if len(controls) == len(kept) else None,
        facts,
    )


def _unmoved(start: Broadcast, updates: Sequence[Update]) -> Mean:
    """Return the mean of replicas of which none is finite."""
    facts = AverageFacts(
        contributions=tuple(update.contribution for update in updates),
        coefficients=(),
        squares=NO_SQUARES,
        nbytes=sum(update.nbytes for update in updates),
    )
    return Mean(start.params, start.inner, start.control, facts)


def stepped(
    start: Broadcast, mean: Mean, outer: OuterState, config: AverageConfig, factor: float, norm: float
) -> Combined:
    """Take the step of the outer optimizer from `start` along the pseudo-gradient, if there is one.

    Parameters
    ----------
    start, outer, config, factor
        As those of `combine`.
    mean : Mean
    norm : float
        Of the whole pseudo-gradient, of all slices.
    """
    params = mean.params
    if config.outer is not None:
        end = params.num_params  # buffers never reach the outer optimizer
        theta, state = outer_step(
            start.params.flat[:end], params.flat[:end], outer[0], config.outer, factor=factor, norm=norm
        )
        params, outer = replace(params, flat=np.concatenate([theta, params.flat[end:]])), (state,)
    facts = replace(mean.facts, finite=is_finite(params, start.params))
    return Combined(Broadcast(params, mean.inner, mean.control), outer, facts)


def _received(update: Update, start: Broadcast | None, config: AverageConfig) -> Parameters:
    if isinstance(update.payload, Parameters):
        return update.payload
    assert config.codec is not None
    assert start is not None
    return decompress(start.params, update.payload, config.codec)
