"""The pattern of a round: which means there are, who goes on from which, what is evaluated and summarised.

Functions of handles: both runners use them, one with values and one with futures.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TypeVar

from dtrain.algorithm.average import AverageFacts
from dtrain.algorithm.drift import cosine_terms, mean_cosine, norm_of
from dtrain.algorithm.mix import Average, averages, neighbourhoods
from dtrain.algorithm.params import params_sha256, with_frozen, without_frozen
from dtrain.algorithm.reduce import mean_of
from dtrain.algorithm.replica import empty_inner_state
from dtrain.config.average import AverageConfig
from dtrain.types import Broadcast, OuterState, Parameters, ReplicaState, RoundPlan, RoundSummary

T = TypeVar("T")


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
    on_start = config.outer is not None  # a mean alone does not depend on what its receivers started from
    keys: list[Hashable] = [id(start) if on_start else None for start in starts]
    return averages(members, keys)


def starts_of(mean: Average, starts: Sequence[T], config: AverageConfig) -> list[T] | None:
    """Return what the members of a mean started from; None if it differs and is not needed to average them."""
    own = [starts[k] for k in mean.members]
    is_needed = config.codec is not None or config.weights == "fednova"
    return own if is_needed or all(one is starts[mean.receivers[0]] for one in own) else None


def apart(broadcast: Sequence[Broadcast]) -> tuple[Broadcast, ...]:
    """Return, by replica, what it starts from without the frozen parameters; equal objects stay one object."""
    distinct = {id(start): replace(start, params=without_frozen(start.params)) for start in broadcast}
    return tuple(distinct[id(start)] if start.params.layout.num_frozen else start for start in broadcast)


def settled(
    broadcast: Sequence[Broadcast], replicas: Sequence[ReplicaState]
) -> tuple[tuple[Broadcast, ...], tuple[ReplicaState, ...]]:
    """Return what replicas start from and what they keep, with averaged states of inner optimizers among the latter."""
    plain = {id(start): replace(start, inner=None) for start in broadcast}
    kept = [
        state if start.inner is None else replace(state, inner=start.inner)
        for start, state in zip(broadcast, replicas, strict=True)
    ]
    return tuple(plain[id(start)] for start in broadcast), tuple(kept)


def together(broadcast: Sequence[Broadcast], model: Parameters) -> tuple[Broadcast, ...]:
    """Return, by replica, what it starts from with the frozen parameters of the model; the inverse of `apart`."""
    if not model.layout.num_frozen:
        return tuple(broadcast)
    distinct = {id(start): replace(start, params=_thawed(start.params, model)) for start in broadcast}
    return tuple(distinct[id(start)] for start in broadcast)


def _thawed(params: Parameters, model: Parameters) -> Parameters:
    return model if params.flat is model.flat else with_frozen(params, model.frozen)


def by_replica(means: Sequence[Average], values: Sequence[T]) -> tuple[T, ...]:
    """Return, by replica, the value of the mean that it receives."""
    received = {replica: value for mean, value in zip(means, values, strict=True) for replica in mean.receivers}
    return tuple(received[replica] for replica in range(len(received)))


def model_of(means: Sequence[Average], params: Sequence[Parameters]) -> Parameters:
    """Return what is evaluated and saved, without frozen parameters: the mean of all replicas' parameters.

    Parameters
    ----------
    means : sequence of Average
    params : sequence of Parameters
        By mean: what its receivers go on from.
    """
    if len(params) == 1:
        return params[0]
    return mean_of(params, [len(mean.receivers) for mean in means])


def summarise(facts: Sequence[Sequence[AverageFacts]], model: Parameters) -> RoundSummary:
    """Return the scalars of a round.

    Parameters
    ----------
    facts : sequence of sequence of AverageFacts
        By mean, and slice.
    model : Parameters
        Whole: what is evaluated and saved.
    """
    every = [one for slices in facts for one in slices]
    contributions = {c.replica: c for one in every for c in one.contributions}
    return RoundSummary(
        contributions=tuple(contributions[replica] for replica in sorted(contributions)),
        params_sha256=params_sha256(model),
        finite=all(one.finite for one in every),
        bytes_reduced=sum(one.nbytes for one in every),
        update_cosine=mean_cosine([_cosine_terms(slices) for slices in facts if slices[0].coefficients]),
        reduce_seconds=max(one.seconds for one in every),
    )


def _cosine_terms(slices: Sequence[AverageFacts]) -> tuple[float, float]:
    norms = [c.update_norm for c in slices[0].contributions]
    return cosine_terms(norms, slices[0].coefficients, norm_of([one.squares for one in slices]))
