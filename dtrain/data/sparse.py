"""Rows of a sparse matrix in memory: their values side by side, and what they are when all columns are written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.encoding import Array

Starts: TypeAlias = npt.NDArray[np.int64]
"""By row: where its values begin; and where those of the last one end."""

PIECE_VALUES = 32 << 10
"""Values are looked at in pieces of rows that hold at most so many, or one row."""
PIECE_VALUE_BYTES = 48
"""What is computed about each value of a piece."""


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Rows of a sparse matrix. Values of a row may stand in any order, and each column at most once."""

    values: Array
    columns: Array
    """Counted within the selected part of a row."""
    starts: Starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def part(self, first: int, after: int) -> SparseRows:
        """Return rows ``first:after``."""
        starts = self.starts[first : after + 1]
        of_values = slice(int(starts[0]), int(starts[-1]))
        return SparseRows(self.values[of_values], self.columns[of_values], starts - starts[0])

    def chosen(self, which: npt.NDArray[np.bool_]) -> SparseRows:
        """Return some of the rows, as flags say."""
        lengths = np.diff(self.starts)
        of_value = np.repeat(which, lengths)
        return SparseRows(self.values[of_value], self.columns[of_value], starts_of(lengths[which]))

    def dense(self, width: int) -> Array:
        """Return the rows with all their columns."""
        rows = np.zeros((len(self), width), self.values.dtype)
        for first, after in pieces(self.starts):
            some = self.starts[first : after + 1]
            scatter(rows[first:after], self.values, self.columns, some[:-1], np.diff(some))
        return rows


def starts_of(lengths: Array) -> Starts:
    """Return where the values of each row begin, from their numbers."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def pieces(starts: Starts, most_values: int = PIECE_VALUES, most_rows: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield runs of rows that hold at most some values, or are one row: the first one, and the one after the last."""
    rows, first = len(starts) - 1, 0
    while first < rows:
        after = int(np.searchsorted(starts, starts[first] + most_values, side="right")) - 1
        after = min(max(after, first + 1), rows if most_rows is None else first + most_rows, rows)
        yield first, after
        first = after


def scatter(out: Array, values: Array, columns: Array, first: Starts, length: Starts) -> None:
    """Write values of rows to their columns.

    Parameters
    ----------
    out : array[row, column]
        C-contiguous. Other places keep what they hold.
    values, columns : array
    first, length : int64[row]
        Where the values of each row begin, and how many they are.
    """
    which = np.arange(int(length.sum()))
    which += np.repeat(first - (np.cumsum(length) - length), length)
    place = np.repeat(np.arange(len(length)) * out.shape[1], length)
    place += columns[which]
    out.reshape(-1)[place] = values[which]
