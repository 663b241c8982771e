"""The mathematics of a round around its local steps, as two functions.

    contribute    theta, theta_k, state_k  ->  what replica k sends, state_k'        on the replica's worker
    combine       theta, what was sent     ->  theta', outer'                        where replicas are averaged

Both runners call these two and nothing else. `mix.averages` says which replicas are combined.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from dtrain.algorithm.codec import Compressed, compress, decompress
from dtrain.algorithm.local import LocalResult
from dtrain.algorithm.mix import Average, averages, neighbourhoods
from dtrain.algorithm.momenta import mean_state
from dtrain.algorithm.outer import outer_step
from dtrain.algorithm.params import is_finite, params_sha256, with_frozen, without_frozen
from dtrain.algorithm.reduce import mean_of, reduced
from dtrain.algorithm.replica import empty_inner_state
from dtrain.config.schema import AverageConfig
from dtrain.types import (
    Broadcast,
    Contribution,
    InnerState,
    LocalTask,
    OuterState,
    Parameters,
    ReplicaState,
    RoundPlan,
    RoundSummary,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Update:
    """What a replica sends to be averaged."""

    payload: Parameters | Compressed
    """Its parameters; with a codec, its encoded update."""
    contribution: Contribution
    inner: InnerState | None = None
    """The state of its inner optimizer, where states are averaged."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.payload.nbytes + (0 if self.inner is None else self.inner.nbytes)

    def __sizeof__(self) -> int:  # Dask's memory accounting asks this
        return object.__sizeof__(self) + self.nbytes


@dataclass(frozen=True, slots=True)
class Combined:
    """What some replicas go on from."""

    broadcast: Broadcast
    outer: OuterState
    contributions: tuple[Contribution, ...]
    """Of the replicas that were averaged, in replica order."""
    nbytes: int
    """Bytes that were averaged."""

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

    A replica whose parameters are not finite keeps the state it came with.

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
    finite = is_finite(after, start.params)
    contribution = Contribution(
        replica=task.replica,
        samples=local.samples,
        steps=local.steps,
        loss_sum=local.loss_sum,
        loss_count=local.loss_count,
        finite=finite,
        non_finite=local.non_finite,
    )
    if not finite:
        return Update(after, contribution), state
    payload: Parameters | Compressed = after
    residual = None
    if config.codec is not None:
        payload, residual = compress(start.params, after, state.residual, config.codec)
    sent = local.inner if config.inner_state == "average" else None
    kept = local.inner if config.inner_state == "keep" else empty_inner_state()
    return Update(payload, contribution, sent), ReplicaState(kept, residual)


def combine(start: Broadcast, updates: Sequence[Update], outer: OuterState, config: AverageConfig) -> Combined:
    """Average replicas in replica order, and take the step of the outer optimizer.

    Replicas that are not finite are left out. If none is finite the first one stands for all: the driver stops the
    run by the summary.

    Parameters
    ----------
    start : Broadcast
        What the replicas were given at the start of the round.
    updates : sequence of Update
        In replica order.
    outer : tuple of InnerState
        State of the outer optimizer by slice; empty without one.
    config : AverageConfig
    """
    kept = [update for update in updates if update.contribution.finite] or list(updates[:1])
    weights = [update.contribution.samples if config.weights == "samples" else 1 for update in kept]
    mean = reduced([_received(start, update, config) for update in kept], weights, config)
    if config.outer is not None:
        end = mean.layout.num_params  # buffers never reach the outer optimizer
        stepped, state = outer_step(start.params.flat[:end], mean.flat[:end], outer[0], config.outer)
        mean, outer = replace(mean, flat=np.concatenate([stepped, mean.flat[end:]])), (state,)
    states = [update.inner for update in kept if update.inner is not None]
    inner = mean_state(states, weights) if len(states) == len(kept) else None
    nbytes = sum(update.nbytes for update in updates)
    return Combined(Broadcast(mean, inner), outer, tuple(update.contribution for update in updates), nbytes)


def _received(start: Broadcast, update: Update, config: AverageConfig) -> Parameters:
    if isinstance(update.payload, Parameters):
        return update.payload
    assert config.codec is not None
    return decompress(start.params, update.payload, config.codec)


# The pattern of a round -----------------------------------------------------------------------------------


def first_outer(config: AverageConfig) -> OuterState:
    """Return the state of an outer optimizer that has taken no step."""
    return () if config.outer is None else (empty_inner_state(),)


def round_averages(plan: RoundPlan, starts: Sequence[object], config: AverageConfig) -> tuple[Average, ...]:
    """Return the means of a round, each once.

    Parameters
    ----------
    plan : RoundPlan
    starts : sequence
        By replica: what it started from (or a handle); replicas that share it hold the same object.
    config : AverageConfig
    """
    members = neighbourhoods(config.mix, plan.round, len(plan.tasks))
    on_start = config.outer is not None or config.codec is not None  # a plain mean does not depend on the start
    keys: list[Hashable] = [id(start) if on_start else None for start in starts]
    return averages(members, keys)


def apart(broadcast: Sequence[Broadcast]) -> tuple[Broadcast, ...]:
    """Return, by replica, what it starts from without the frozen parameters; equal objects stay one object."""
    distinct = {id(start): replace(start, params=without_frozen(start.params)) for start in broadcast}
    return tuple(distinct[id(start)] if start.params.layout.num_frozen else start for start in broadcast)


def settled(
    broadcast: Sequence[Broadcast], replicas: Sequence[ReplicaState]
) -> tuple[tuple[Broadcast, ...], tuple[ReplicaState, ...]]:
    """Return what replicas start from and what they keep, with averaged states of inner optimizers among the latter."""
    plain = {id(start): Broadcast(start.params) for start in broadcast}
    kept = [
        state if start.inner is None else replace(state, inner=start.inner)
        for start, state in zip(broadcast, replicas, strict=True)
    ]
    return tuple(plain[id(start)] for start in broadcast), tuple(kept)


def together(broadcast: Sequence[Broadcast], model: Parameters) -> tuple[Broadcast, ...]:
    """Return, by replica, what it starts from with the frozen parameters of the model; the inverse of `apart`."""
    shared = {id(model.flat): Broadcast(model)}
    distinct = {
        id(start): shared.get(id(start.params.flat)) or Broadcast(with_frozen(start.params, model.frozen))
        for start in broadcast
    }
    return tuple(distinct[id(start)] if model.layout.num_frozen else start for start in broadcast)


def by_replica(means: Sequence[Average], values: Sequence[T]) -> tuple[T, ...]:
    """Return, by replica, the value of the mean that it receives."""
    received = {replica: value for mean, value in zip(means, values, strict=True) for replica in mean.receivers}
    return tuple(received[replica] for replica in range(len(received)))


def model_of(means: Sequence[Average], combined: Sequence[Combined]) -> Parameters:
    """Return what is evaluated and saved, without frozen parameters: the mean of all replicas' parameters."""
    if len(combined) == 1:
        return combined[0].broadcast.params
    return mean_of([one.broadcast.params for one in combined], [len(mean.receivers) for mean in means])


def summarise(combined: Sequence[Combined], model: Parameters, start: Parameters) -> RoundSummary:
    """Return the scalars of a round that started from `start`; `model` is whole."""
    contributions = {c.replica: c for one in combined for c in one.contributions}
    return RoundSummary(
        contributions=tuple(contributions[replica] for replica in sorted(contributions)),
        params_sha256=params_sha256(model),
        finite=is_finite(model, start),
        bytes_reduced=sum(one.nbytes for one in combined),
    )
