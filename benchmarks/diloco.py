"""Data parallel training and DiLoCo in plain PyTorch loops: the peers of equal_tokens.py.

DiLoCo: Douillard et al. 2023, arXiv:2311.08105.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters


@dataclass(frozen=True)
class Settings:
    steps: int
    """Of the whole training."""
    rate: float
    batch: int
    """Rows of a step, of all replicas together."""
    clip_norm: float = 1.0

    @property
    def warm_up(self) -> int:
        """Steps over which the learning rate rises."""
        return self.steps // 20

    @property
    def weight_decay(self) -> float:
        return 1 / self.steps

    def factor(self, step: int) -> float:
        """Return the factor on the learning rate: a linear rise and a cosine, as dtrain has them."""
        rise = self.warm_up
        return (step + 1) / rise if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (self.steps - rise))


class Replica:
    """A model with its own AdamW and learning-rate schedule."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.clip_norm = copy.deepcopy(model), settings.clip_norm
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), settings.rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, settings.factor)

    def train(self, x: torch.Tensor, y: torch.Tensor, batch: int) -> None:
        """Take a step for each batch of the rows, in their order."""
        for inputs, targets in zip(x.split(batch), y.split(batch), strict=True):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten()).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()
            self.schedule.step()


def data_parallel(model: nn.Module, settings: Settings, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """Train one model with whole batches, as any number of processes that average gradients would."""
    alone = Replica(model, settings)
    alone.train(x, y, settings.batch)
    return alone.model


def diloco(
    model: nn.Module,
    settings: Settings,
    x: torch.Tensor,
    y: torch.Tensor,
    replicas: int,
    every: int,
    outer_rate: float,
) -> nn.Module:
    """Train replicas on equal parts of the rows; after `every` steps one step of Nesterov's momentum on their mean.

    Parameters
    ----------
    model : nn.Module
        What all replicas start from; not changed.
    settings : Settings
    x, y : int64[rows, length]
    replicas, every : int
    outer_rate : float
    """
    own = [Replica(model, settings) for _ in range(replicas)]
    batch = settings.batch // replicas
    theta = nn.Parameter(parameters_to_vector(model.parameters()).detach().clone())
    outer = torch.optim.SGD([theta], outer_rate, momentum=0.9, nesterov=True)
    rows = torch.arange(len(x)).chunk(replicas)
    for round_rows in zip(*(part.split(batch * every) for part in rows), strict=True):
        for replica, taken in zip(own, round_rows, strict=True):
            vector_to_parameters(theta.detach().clone(), replica.model.parameters())
            replica.train(x[taken], y[taken], batch)
        after = [parameters_to_vector(replica.model.parameters()).detach() for replica in own]
        theta.grad = theta.detach() - torch.stack(after).mean(0)
        outer.step()
    vector_to_parameters(theta.detach().clone(), own[0].model.parameters())
    return own[0].model
