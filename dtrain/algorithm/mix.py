"""Mixing: which replicas are averaged with which, and the mean itself.

    mean = sum_k n_k theta_k / sum_k n_k        in float64, with integer weights, in replica order, one division

In this form the result does not depend on the order or the tree of the sum (the usual float32 weighted sum changes
70 % of the elements), and the mean of equal replicas is that replica, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from dtrain.algorithm.params import tensors_of
from dtrain.config.schema import MixConfig
from dtrain.errors import UnsuitableModel
from dtrain.types import Entry, Flat, Parameters

# Who is averaged with whom --------------------------------------------------------------------------------

Neighbourhoods: TypeAlias = tuple[tuple[int, ...], ...]
"""By replica: the replicas that its next parameters are the mean of, ascending."""
Topology: TypeAlias = Callable[[MixConfig, int, int], Neighbourhoods]
"""(configuration, number of the round from 1, number of replicas) -> neighbourhoods."""


def full(config: MixConfig, number: int, replicas: int) -> Neighbourhoods:
    """Average all replicas: local SGD, FedAvg, DiLoCo."""
    return (tuple(range(replicas)),) * replicas


TOPOLOGIES: dict[str, Topology] = {"full": full}
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


# The mean -------------------------------------------------------------------------------------------------

BLOCK = 1 << 20
"""Elements averaged at a time: bounds the float64 copy to 8 MB."""


def weighted_mean(arrays: Sequence[Flat], weights: Sequence[int]) -> Flat:
    """Return ``sum(w * x) / sum(w)`` of float32 arrays, with integer weights, as a new float32 array."""
    total = sum(weights)
    out = np.empty_like(arrays[0])
    for start in range(0, len(out), BLOCK):
        part = slice(start, start + BLOCK)
        mean = np.zeros(len(out[part]), np.float64)
        for array, weight in zip(arrays, weights, strict=True):
            mean += array[part].astype(np.float64) * weight
        out[part] = mean / total
    return out


def mean_of(replicas: Sequence[Parameters], weights: Sequence[int]) -> Parameters:
    """Average parameters and buffers of replicas, given in replica order.

    Parameters and float buffers get the weighted mean, integer buffers (counters) the maximum; bools must agree.

    Raises
    ------
    UnsuitableModel
        A bool buffer differs between replicas.
    """
    layout = replicas[0].layout
    flat = weighted_mean([replica.flat for replica in replicas], weights)
    mixed = replace(replicas[0], flat=flat, extra=replicas[0].extra.copy())
    if layout.num_extra:
        targets = tensors_of(mixed)
        sources = [tensors_of(replica) for replica in replicas]
        for entry in layout.entries:
            if entry.kind == "extra" and not entry.alias:
                targets[entry.name].copy_(_mixed_buffer(entry, [s[entry.name] for s in sources], weights))
    return mixed


def _mixed_buffer(entry: Entry, tensors: Sequence[torch.Tensor], weights: Sequence[int]) -> torch.Tensor:
    stacked = torch.stack(list(tensors))
    if entry.dtype == "bool":
        if not bool((stacked == stacked[0]).all()):
            raise UnsuitableModel(f"The bool buffer {entry.name} differs between replicas; it cannot be averaged.")
        return stacked[0]
    if stacked.is_complex():
        parts = [torch.view_as_real(tensor) for tensor in tensors]
        return torch.view_as_complex(_mixed_buffer(entry, parts, weights).to(parts[0].dtype))
    if not stacked.is_floating_point():
        return torch.from_numpy(np.asarray(stacked.numpy().max(0)))  # torch has no maximum of uint16, 32 and 64
    wide = stacked.double()
    if torch.equal(wide, wide[:1].expand_as(wide)):
        return stacked[0]  # the float64 mean of equal float64 values may be off by one bit
    factors = torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * (stacked.ndim - 1))
    return (wide * factors).sum(0) / sum(weights)
