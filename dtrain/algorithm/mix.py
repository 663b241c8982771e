"""Mixing: which replicas are averaged with which.

    topology        replica k goes on from the mean of                       parameters
    full            all replicas                                             one for all
    hierarchical    those of its group; in every `period`-th round all       one for each group between
    ring            k - 1, k, k + 1                                          its own
    exponential     k, k + 2^(t mod ceil(log2 M)) in round t                 its own

Indices are modulo M, the number of replicas. Where weights are equal and M is a power of two, the one-peer exponential
graph averages exactly in log2 M rounds.

References
----------
Ring and other sparse graphs: Lian et al. 2017, arXiv:1705.09056. One-peer exponential graphs: Ying et al. 2021,
arXiv:2110.13363. Hierarchical averaging: Lin et al. 2020, arXiv:1808.07217.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from dtrain.config.average import MixConfig
from dtrain.errors import InvalidConfig

# Who is averaged with whom --------------------------------------------------------------------------------

Neighbourhoods: TypeAlias = tuple[tuple[int, ...], ...]
"""By replica: the replicas that its next parameters are the mean of, ascending."""
Topology: TypeAlias = Callable[[MixConfig, int, int], Neighbourhoods]
"""(configuration, number of the round from 1, number of replicas) -> neighbourhoods."""


def full(config: MixConfig, number: int, replicas: int) -> Neighbourhoods:
    """Average all replicas: local SGD, FedAvg, DiLoCo."""
    return (tuple(range(replicas)),) * replicas


def hierarchical(config: MixConfig, number: int, replicas: int) -> Neighbourhoods:
    """Average the replicas of each group, runs of neighbours as equal as can be; every `period`-th round all of them.

    Raises
    ------
    InvalidConfig
        There are no groups, or more than replicas.
    """
    if not 1 <= config.groups <= replicas:
        raise InvalidConfig(
            f'average.mix.groups = {config.groups}: with average.mix.topology = "hierarchical", {replicas} replicas '
            "are divided into groups.",
            f"Give 1 to {replicas} groups.",
        )
    if number % config.period == 0:
        return full(config, number, replicas)
    cuts = [group * replicas // config.groups for group in range(config.groups + 1)]
    return tuple(tuple(range(first, after)) for first, after in pairwise(cuts) for _ in range(first, after))


def ring(config: MixConfig, number: int, replicas: int) -> Neighbourhoods:
    """Average each replica with its two neighbours."""
    return tuple(_distinct((k - 1, k, k + 1), replicas) for k in range(replicas))


def exponential(config: MixConfig, number: int, replicas: int) -> Neighbourhoods:
    """Average each replica with one other, at a distance that doubles from round to round and begins again."""
    distance = 1 << ((number - 1) % max(1, (replicas - 1).bit_length()))
    return tuple(_distinct((k, k + distance), replicas) for k in range(replicas))


def _distinct(members: Iterable[int], replicas: int) -> tuple[int, ...]:
    return tuple(sorted({member % replicas for member in members}))


TOPOLOGIES: dict[str, Topology] = {
    "full": full,
    "hierarchical": hierarchical,
    "ring": ring,
    "exponential": exponential,
}
"""By ``average.mix.topology``."""


def neighbourhoods(config: MixConfig, number: int, replicas: int) -> Neighbourhoods:
    """Return, by replica, the replicas that are averaged into its next parameters in a round."""
    return TOPOLOGIES[config.topology](config, number, replicas)


@dataclass(frozen=True, slots=True)
class Average:
    """One mean of a round, computed once for all replicas that receive it."""

    members: tuple[int, ...]
    """The replicas that are averaged, ascending."""
    receivers: tuple[int, ...]
    """The replicas that go on from the mean."""


def averages(members: Neighbourhoods, starts: Sequence[Hashable]) -> tuple[Average, ...]:
    """Join the replicas whose means are equal.

    Parameters
    ----------
    members : tuple of tuple of int
        From `neighbourhoods`.
    starts : sequence of hashable
        By replica: names the values beside its neighbourhood that its mean depends on.

    >>> averages(((0, 1), (0, 1), (2,)), "aab")
    (Average(members=(0, 1), receivers=(0, 1)), Average(members=(2,), receivers=(2,)))
    """
    receivers: dict[tuple[tuple[int, ...], Hashable], list[int]] = {}
    for replica, key in enumerate(zip(members, starts, strict=True)):
        receivers.setdefault(key, []).append(replica)
    return tuple(Average(of, tuple(some)) for (of, _), some in receivers.items())
