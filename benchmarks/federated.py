"""The papers' federated algorithms in a plain PyTorch loop, all replicas in every round: the peer of heterogeneity.py.

FedAvg: McMahan et al. 2017, arXiv:1602.05629. FedProx: Li et al. 2020, arXiv:1812.06127. FedNova: Wang et al. 2020,
arXiv:2007.07481. FedAvgM: Hsu et al. 2019, arXiv:1909.06335. FedAdam: Reddi et al. 2021, arXiv:2003.00295. SCAFFOLD:
Karimireddy et al. 2020, arXiv:1910.06378 (option II, replicas weighted by their rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters


@dataclass(frozen=True)
class Settings:
    method: str
    rate: float
    """Of the local SGD steps."""
    own: float = 0.0
    """FedProx's mu, FedAvgM's momentum or FedAdam's outer learning rate."""


def local_steps(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    epochs: int,
    batch: int,
    rate: float,
    pull: float,
    shift: float | torch.Tensor,
) -> int:
    """Take SGD steps along ``grad + pull (theta - start) + shift`` over some passes; return how many.

    Parameters
    ----------
    model : nn.Module
        Holds the parameters to start from; changed.
    x, y : tensor
        The rows of a replica.
    epochs, batch : int
    rate, pull : float
    shift : float or float32[n]
        SCAFFOLD's ``c - c_k``, as one vector.
    """
    parameters = list(model.parameters())
    start, steps = parameters_to_vector(parameters).detach().clone(), 0
    for rows in (rows for _ in range(epochs) for rows in torch.randperm(len(x)).split(batch)):
        loss = F.cross_entropy(model(x[rows]), y[rows])
        gradient = parameters_to_vector(torch.autograd.grad(loss, parameters))
        theta = parameters_to_vector(parameters).detach()
        vector_to_parameters(theta - rate * (gradient + pull * (theta - start) + shift), parameters)
        steps += 1
    return steps


def mean(vectors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted sum of vectors."""
    return torch.stack([weight * vector for weight, vector in zip(weights, vectors, strict=True)]).sum(0)


def pseudo_gradient(
    method: str, updates: Sequence[torch.Tensor], shares: Sequence[float], steps: Sequence[int]
) -> torch.Tensor:
    """Return the mean of ``theta - theta_k``; with FedNova that of one step, times the mean number of steps."""
    if method != "FedNova":
        return mean(updates, shares)
    length = sum(share * taken for share, taken in zip(shares, steps, strict=True))
    return mean(updates, [length * share / taken for share, taken in zip(shares, steps, strict=True)])


def outer_optimizer(settings: Settings, theta: nn.Parameter) -> torch.optim.Optimizer:
    """Return the optimizer of the server; SGD with rate 1 takes the mean as it is."""
    if settings.method == "FedAdam":
        return torch.optim.Adam([theta], settings.own, betas=(0.9, 0.99), eps=1e-3)
    return torch.optim.SGD([theta], 1.0, momentum=settings.own if settings.method == "FedAvgM" else 0.0)


def train(
    model: nn.Module,
    settings: Settings,
    x: torch.Tensor,
    y: torch.Tensor,
    parts: Sequence[torch.Tensor],
    rounds: int,
    epochs: int,
    batch: int,
) -> None:
    """Train a model on the rows of several replicas; `epochs` passes a round.

    Parameters
    ----------
    model : nn.Module
        Changed.
    settings : Settings
    x, y : tensor
    parts : sequence of int64[n_k]
        The rows of each replica.
    rounds, epochs, batch : int
    """
    theta = nn.Parameter(parameters_to_vector(model.parameters()).detach().clone())
    outer, pull = outer_optimizer(settings, theta), settings.own if settings.method == "FedProx" else 0.0
    shares = [len(rows) / sum(map(len, parts)) for rows in parts]
    control = torch.zeros_like(theta)
    own = [control for _ in parts]  # SCAFFOLD's c_k
    for _ in range(rounds):
        updates, steps = [], []
        for rows, variate in zip(parts, own, strict=True):
            vector_to_parameters(theta.detach().clone(), model.parameters())
            steps.append(local_steps(model, x[rows], y[rows], epochs, batch, settings.rate, pull, control - variate))
            updates.append(theta.detach() - parameters_to_vector(model.parameters()).detach())
        if settings.method == "SCAFFOLD":
            paths = zip(own, updates, steps, strict=True)
            own = [variate - control + update / (taken * settings.rate) for variate, update, taken in paths]
            control = mean(own, shares)
        theta.grad = pseudo_gradient(settings.method, updates, shares, steps)
        outer.step()
    vector_to_parameters(theta.detach().clone(), model.parameters())
