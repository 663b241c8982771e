"""Futures of a TrainState: scattered from the driver to the workers, and gathered back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

from distributed import Future

from dtrain.algorithm.params import with_frozen, without_frozen
from dtrain.algorithm.pattern import apart, settled, together
from dtrain.algorithm.slices import (
    Slices,
    cut_broadcast,
    cut_outer,
    cut_params,
    join_broadcast,
    join_outer,
    join_params,
)
from dtrain.runtime import remote
from dtrain.runtime.client import TaskClient
from dtrain.runtime.reducing import Before, Sliced
from dtrain.types import Broadcast, Flat, Layout, OuterState, Parameters, Position, TrainState

T = TypeVar("T")
SMALL_BYTES = 1 << 20
"""Results whose other parts are below this size are sent whole; a task to split them would cost more."""


@dataclass(frozen=True, slots=True)
class ClusterRound:
    """Futures of the values after a round; replicas that share a value hold the same ones."""

    before: Before
    """What the next round starts from."""
    replicas: tuple[Future, ...]
    model: Sliced
    ema: Sliced | None
    """None without a moving average, and before its first round."""
    layout: Layout
    frozen: Flat | None
    """The frozen parameters, on the driver; None if they are in a file."""
    frozen_sent: Future | None
    """The same on the workers, sent to each once; None without frozen parameters."""
    summary: Future | None = None
    """None before the first round of a segment."""
    sums: Future | None = None
    """None without a validation split too, and after rounds that are not evaluated."""
    ema_sums: Future | None = None


# There ----------------------------------------------------------------------------------------------------


def scattered(client: TaskClient, state: TrainState, at: Mapping[int, str], slices: Slices) -> ClusterRound:
    """Send a state from the driver to the workers of its replicas."""
    starts, frozen = apart(state.broadcast), state.model.frozen
    broadcast = _scatter_each(client, starts, at, lambda one: [cut_broadcast(one, cut) for cut in slices])
    outer: tuple[Sliced, ...] = ((),) * len(starts)
    if any(state.outer):
        params = state.model.layout.num_params
        first = dict.fromkeys(at, at[0])
        outer = _scatter_each(client, state.outer, first, lambda one: [cut_outer(one, cut, params) for cut in slices])
    return ClusterRound(
        before=Before(broadcast, outer, slices, len(slices) == 1 and _is_small(replace(state, broadcast=starts))),
        replicas=tuple(client.scatter_each(state.replicas, [at[k] for k in range(len(state.replicas))])),
        model=broadcast[0] if _is_shared(state) else _scatter_model(client, state.model, slices, at[0]),
        ema=None if state.ema is None else _scatter_model(client, state.ema, slices, at[0]),
        layout=state.model.layout,
        frozen=frozen,
        frozen_sent=client.scatter(frozen, list(at.values())) if len(frozen) else None,
    )


def _scatter_each(
    client: TaskClient, values: Sequence[T], at: Mapping[int, str], cut: Callable[[T], Sequence[object]]
) -> tuple[Sliced, ...]:
    """Send the slices of each value to the worker of its replica; replicas that share a value share the futures."""
    places: dict[int, list[str]] = {}
    for k, value in enumerate(values):
        places.setdefault(id(value), []).append(at[k])
    distinct = {id(value): value for value in values}
    sent = {key: tuple(client.scatter(one, places[key]) for one in cut(value)) for key, value in distinct.items()}
    return tuple(sent[id(value)] for value in values)


def _scatter_model(client: TaskClient, model: Parameters, slices: Slices, at: str) -> Sliced:
    return tuple(client.scatter(cut_params(without_frozen(model), cut), [at]) for cut in slices)


def _is_shared(state: TrainState) -> bool:
    """Whether the model that is evaluated is what every replica starts from."""
    return all(own.params is state.model for own in state.broadcast)


def _is_small(state: TrainState) -> bool:
    """Whether results are sent whole: parameters together with the states of replicas and outer optimizer.

    Those states are useless where the parameters go, so they must be small. Before the first step they are empty, and
    do not show the size that they will have.
    """
    if state.round == 0:
        return are_small(own.nbytes for own in state.broadcast)
    outer = [piece.nbytes for states in state.outer for piece in states]
    return are_small([*(own.nbytes for own in state.replicas), *outer])


def are_small(sizes: Iterable[int]) -> bool:
    """Whether results of these sizes are sent whole."""
    return all(nbytes <= SMALL_BYTES for nbytes in sizes)


# And back -------------------------------------------------------------------------------------------------


def handles_of(held: ClusterRound) -> dict[str, Future]:
    """Return the futures that a state is gathered from, by key."""
    nested = [held.model, *held.before.broadcast, held.replicas, *held.before.outer, held.ema or ()]
    return {handle.key: handle for handle in chain.from_iterable(nested)}


def gathered(held: ClusterRound, position: Position, values: Mapping[str, Any]) -> TrainState:
    """Return the state after a round, of results by key."""
    wholes = {_keys(own): _start([values[key] for key in _keys(own)]) for own in held.before.broadcast}
    starts = [wholes[_keys(own)] for own in held.before.broadcast]
    model = wholes[keys].params if (keys := _keys(held.model)) in wholes else _model([values[key] for key in keys])
    model = with_frozen(model, held.frozen)
    broadcast, replicas = settled(starts, [remote.state_of(values[handle.key]) for handle in held.replicas])
    return TrainState(
        position=position,
        model=model,
        broadcast=together(broadcast, model),
        replicas=replicas,
        outer=_outer(held, values),
        ema=None if held.ema is None else with_frozen(_model([values[key] for key in _keys(held.ema)]), held.frozen),
    )


def _keys(sliced: Sliced) -> tuple[str, ...]:
    return tuple(handle.key for handle in sliced)


def _start(slices: Sequence[Any]) -> Broadcast:
    return join_broadcast([remote.broadcast_of(one) for one in slices])


def _model(slices: Sequence[Any]) -> Parameters:
    return join_params([remote.model_in(one) for one in slices])


def _outer(held: ClusterRound, values: Mapping[str, Any]) -> tuple[OuterState, ...]:
    """Return, by replica, the whole state of the outer optimizer; equal handles give one object."""
    wholes: dict[tuple[str, ...], OuterState] = {(): ()}
    for own, start in zip(held.before.outer, held.before.broadcast, strict=True):
        if (keys := _keys(own)) not in wholes:
            sizes = [remote.broadcast_of(values[handle.key]).params.num_params for handle in start]
            wholes[keys] = join_outer([remote.outer_of(values[key]) for key in keys], sizes)
    return tuple(wholes[_keys(own)] for own in held.before.outer)
