r"""The reducer: what several replicas become. Weighted mean, coordinate-wise median, or trimmed mean.

    mean      sum_k n_k theta_k / sum_k n_k        in float64, with integer weights, in replica order, one division
    median    of each coordinate; of an even number the mean of the two in the middle
    trimmed   the mean of each coordinate without the floor(trim * M) smallest and largest values

In this form the mean does not depend on the order or the tree of the sum (the usual float32 weighted sum changes 70 %
of the elements), and the mean of equal replicas is that replica, bit for bit. Median and trimmed mean ignore weights:
they hold against a minority of replicas that send anything at all.

References
----------
Median and trimmed mean: Yin et al. 2018, arXiv:1803.01498.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dtrain.algorithm.params import extra_tensors
from dtrain.config.average import AverageConfig
from dtrain.errors import InvalidConfig, UnsuitableModel
from dtrain.types import Flat, Parameters

BLOCK = 1 << 18
"""Elements averaged at a time: bounds a float64 copy to 2 MB."""


def check_reduce(config: AverageConfig, replicas: int) -> None:
    """Refuse a trimmed mean that leaves out nobody, or everybody.

    Raises
    ------
    InvalidConfig
    """
    if config.reduce != "trimmed":
        return
    cut = cut_off(config.trim, replicas)
    if not 0 < 2 * cut < replicas:
        raise InvalidConfig(
            f"average.trim = {config.trim:g} of {replicas} replicas leaves out {cut} at each end, of which something "
            "must remain and something must go.",
            f"Give at least {1 / replicas:.3g}, and less than 0.5." if replicas > 2 else "Use at least 3 replicas.",
        )


def cut_off(trim: float, replicas: int) -> int:
    """Return how many values a trimmed mean leaves out at each end."""
    return int(trim * replicas + 1e-9)  # 0.1 * 30 is a little less than 3


def reduced(replicas: Sequence[Parameters], weights: Sequence[int], config: AverageConfig) -> Parameters:
    """Return what replicas, given in replica order, become.

    Float buffers are treated as parameters are. Integer buffers (counters) become the maximum; bools must agree.

    Raises
    ------
    UnsuitableModel
        A bool buffer differs between replicas.
    """
    if config.reduce == "mean":
        return mean_of(replicas, weights)
    cut = (len(replicas) - 1) // 2 if config.reduce == "median" else cut_off(config.trim, len(replicas))
    mixed = mean_of(replicas, [1] * len(replicas))  # of buffers of other dtypes than float32
    return replace(mixed, flat=middle_mean([replica.flat for replica in replicas], cut))


def middle_mean(arrays: Sequence[Flat], cut: int) -> Flat:
    """Return the mean of each coordinate of float32 arrays without its `cut` smallest and largest values."""
    out = np.empty_like(arrays[0])
    size = max(1, BLOCK // len(arrays))
    for start in range(0, len(out), size):
        part = slice(start, start + size)
        stacked = np.sort(np.stack([array[part] for array in arrays]), axis=0)[cut : len(arrays) - cut]
        out[part] = stacked.astype(np.float64).mean(axis=0)
    return out


def weighted_mean(arrays: Sequence[Flat], weights: Sequence[int]) -> Flat:
    """Return ``sum(w * x) / sum(w)`` of float32 arrays, with integer weights, as a new float32 array."""
    total, size = sum(weights), min(len(arrays[0]), BLOCK)
    out, mean, term = np.empty_like(arrays[0]), np.empty(size), np.empty(size)
    for start in range(0, len(out), BLOCK):
        part = slice(start, start + BLOCK)
        own, wide = mean[: len(out[part])], term[: len(out[part])]
        own[:] = arrays[0][part]  # arithmetic on float64 is twice as fast as arithmetic that converts
        own *= weights[0]
        for array, weight in zip(arrays[1:], weights[1:], strict=True):
            wide[:] = array[part]
            wide *= weight
            own += wide
        own /= total
        out[part] = own
    return out


def moved(
    mean: Parameters,
    starts: Sequence[Parameters],
    replicas: Sequence[Parameters],
    weights: Sequence[int],
    coefficients: Sequence[float],
) -> Parameters:
    """Return `mean` with the parameters ``theta + sum_k c_k (theta_k - start_k)``, in float64, in replica order.

    theta is what all replicas started from, or the weighted mean of what they did. Buffers are those of the mean.
    """
    end, first = mean.num_params, starts[0].flat
    is_shared = all(start.flat is first for start in starts)
    theta = first[:end] if is_shared else weighted_mean([start.flat[:end] for start in starts], weights)
    flat = mean.flat.copy()
    for begin in range(0, end, BLOCK):
        part = slice(begin, min(begin + BLOCK, end))
        reached = theta[part].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            for start, replica, coefficient in zip(starts, replicas, coefficients, strict=True):
                update = np.subtract(replica.flat[part], start.flat[part], dtype=np.float64)
                update[replica.flat[part] == start.flat[part]] = 0.0  # infinity less itself: a mask stays
                reached += update * coefficient
            flat[part] = reached
    return replace(mean, flat=flat)


def mean_of(replicas: Sequence[Parameters], weights: Sequence[int]) -> Parameters:
    """Average parameters and buffers of replicas, given in replica order.

    Parameters and float buffers get the weighted mean, integer buffers (counters) the maximum; bools must agree.

    Raises
    ------
    UnsuitableModel
        A bool buffer differs between replicas.
    """
    flat = weighted_mean([replica.flat for replica in replicas], weights)
    mixed = replace(replicas[0], flat=flat, extra=replicas[0].extra.copy())
    sources = [extra_tensors(replica) for replica in replicas]
    for name, target in extra_tensors(mixed).items():
        target.copy_(mixed_tensor(name, [source[name] for source in sources], weights))
    return mixed


def mixed_tensor(name: str, tensors: Sequence[torch.Tensor], weights: Sequence[int]) -> torch.Tensor:
    """Average a tensor that is no parameter: floats to the weighted mean, integers to the maximum.

    Raises
    ------
    UnsuitableModel
        Bools differ between replicas.
    """
    stacked = torch.stack(list(tensors))
    if stacked.dtype == torch.bool:
        if not bool((stacked == stacked[0]).all()):
            raise UnsuitableModel(f"The bool buffer {name} differs between replicas; it cannot be averaged.")
        return stacked[0]
    if stacked.is_complex():
        parts = [torch.view_as_real(tensor) for tensor in tensors]
        return torch.view_as_complex(mixed_tensor(name, parts, weights).to(parts[0].dtype))
    if not stacked.is_floating_point():
        return torch.from_numpy(np.asarray(stacked.numpy().max(0)))  # torch has no maximum of uint16, 32 and 64
    wide = stacked.double()
    if torch.equal(wide, wide[:1].expand_as(wide)):
        return stacked[0]  # the float64 mean of equal float64 values may be off by one bit
    factors = torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * (stacked.ndim - 1))
    return (wide * factors).sum(0) / sum(weights)
