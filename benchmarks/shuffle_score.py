"""How well an order of rows is shuffled, in two numbers: 0 is the order of the store, 1 what a random permutation has.

A loader is as fast as its shuffle is poor, so a speed is read beside these (as SLAF and insitubatch publish them).

within
    The mean distance of consecutive rows of a batch. It is 1 in the order of the store, (rows + 1) / 3 at random.
across
    The store is cut into 64 equal bins. The mean, over batches, of the L1 distance between the shares of the bins in
    a batch and their shares in the store: the greatest in the order of the store; at random, what chance leaves.

Each is scaled linearly. A batch of rows that alternate between two distant places has a high score within, and a low
one across.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

BINS = 64


def scores(labels: npt.NDArray[np.int64], batch: int) -> tuple[float, float]:
    """Return the scores within and across batches.

    Parameters
    ----------
    labels : numpy.ndarray
        int64 [rows], the numbers of the rows in the order of delivery, each once. If not all rows of the store came,
        those that came count as the store.
    batch : int
        Rows of a batch; a last one with fewer does not count.

    Raises
    ------
    ValueError
        If there are fewer than two batches, or two rows a batch.
    """
    rows = len(labels)
    if batch < 2 or rows < 2 * batch:
        raise ValueError(f"{rows} rows in batches of {batch}: at least two batches of at least two rows are needed.")
    stored = np.arange(rows)
    order = np.empty(rows, np.int64)
    order[np.argsort(labels, kind="stable")] = stored
    return (
        (step(order, batch) - 1) / ((rows + 1) / 3 - 1),
        scaled(unevenness(order, batch), unevenness(stored, batch), random_unevenness(rows, batch)),
    )


def scaled(value: float, sequential: float, random: float) -> float:
    return (sequential - value) / (sequential - random)


def batches_of(order: npt.NDArray[np.int64], batch: int) -> npt.NDArray[np.int64]:
    return order[: len(order) // batch * batch].reshape(-1, batch)


def step(order: npt.NDArray[np.int64], batch: int) -> float:
    """Return the mean distance of consecutive rows of a batch."""
    return float(np.abs(np.diff(batches_of(order, batch), axis=1)).mean())


def bins(rows: int) -> npt.NDArray[np.int64]:
    """Return how many rows each bin has."""
    return np.bincount(np.arange(rows) * BINS // rows, minlength=BINS)


def unevenness(order: npt.NDArray[np.int64], batch: int) -> float:
    """Return the mean L1 distance between the bins' shares in a batch and in the store."""
    found = batches_of(order, batch) * BINS // len(order)
    found += np.arange(len(found))[:, None] * BINS
    counts = np.bincount(found.ravel(), minlength=len(found) * BINS).reshape(-1, BINS)
    return float(np.abs(counts / batch - bins(len(order)) / len(order)).sum(axis=1).mean())


def random_unevenness(rows: int, batch: int) -> float:
    """Return the expectation of `unevenness` for a random permutation: a bin's count is hypergeometric."""
    total = math.comb(rows, batch)
    expected = 0.0
    sizes = bins(rows).tolist()
    for size in set(sizes):
        for count in range(min(batch, size) + 1):
            chance = math.comb(size, count) * math.comb(rows - size, batch - count) / total
            expected += sizes.count(size) * chance * abs(count / batch - size / rows)
    return expected
