"""Text of known entropy: rows of an order-2 Markov source, for equal_tokens.py.

The next symbol c after a, b has the logits ``scale * tanh(P[a] + Q[b]) @ O[c]`` with random matrices, so that a small
model can learn the source without a table of all pairs. Each row starts from the stationary distribution and is
independent of the others. So the least loss of a model that sees one row is known: the first prediction has only one
symbol before it, all others have two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def entropy(shares: Floats) -> Floats:
    """Return the entropy in nats along the last axis."""
    found: Floats = -(shares * np.log(np.maximum(shares, 1e-300))).sum(-1)
    return found


@dataclass(frozen=True)
class Source:
    """An order-2 Markov source."""

    symbols: int = 64
    rank: int = 16
    scale: float = 1.0
    seed: int = 7

    @cached_property
    def next(self) -> Floats:
        """float64[symbols, symbols, symbols]: the shares of the next symbol after each pair."""
        rng = np.random.default_rng(self.seed)
        first, second, out = rng.normal(size=(3, self.symbols, self.rank))
        logits = self.scale * np.tanh(first[:, None] + second[None, :]) @ out.T
        shares: Floats = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return shares

    @cached_property
    def pairs(self) -> Floats:
        """float64[symbols, symbols]: how often each pair occurs, the fixed point of the source."""
        shares = np.full((self.symbols, self.symbols), self.symbols**-2.0)
        for _ in range(200):
            shares = np.einsum("ab,abc->bc", shares, self.next)
        return shares

    def least_loss(self, length: int) -> float:
        """Return the least mean loss in nats of predicting `length` symbols from those before them in a row."""
        after_one = entropy(self.pairs.ravel()) - entropy(self.pairs.sum(1))
        after_two = (self.pairs * entropy(self.next)).sum()
        return float((after_one + (length - 1) * after_two) / length)

    def rows(self, count: int, length: int, seed: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return inputs and targets, uint8[count, length] each: the targets are the inputs' next symbols."""
        rng = np.random.default_rng((self.seed, seed))
        ends = self.next.cumsum(-1)
        text = np.empty((count, length + 1), np.int64)
        text[:, 0], text[:, 1] = divmod(rng.choice(self.symbols**2, size=count, p=self.pairs.ravel()), self.symbols)
        for place in range(2, length + 1):
            drawn = rng.random((count, 1)) > ends[text[:, place - 2], text[:, place - 1]]
            text[:, place] = np.minimum(drawn.sum(1), self.symbols - 1)
        small = text.astype(np.uint8)
        return small[:, :-1], small[:, 1:]
