"""One axis of rows for several stores: no stored object lies in two units."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.members import joined_variable, same_length
from dtrain.data.variable import Variable
from tests.data.helpers import variable


@pytest.mark.parametrize(
    ("lengths", "sizes", "most", "expected"),
    [
        ([365, 366, 365], [365, 366, 365], 0, 366),  # an object each
        ([365, 366], [400, 400], 0, 366),  # longer than the store
        ([900, 900], [300, 100], 0, 300),
        ([900, 250], [300, 250], 0, 300),  # the second is a single object, and fits
        ([900, 400], [300, 400], 0, 600),
        ([900, 900], [101, 97], 0, 101),  # 9,797 is more than 4 times the longest
        ([900, 900], [101, 97], 10_000, 9_797),
        ([900, 900, 700], [101, 97, 700], 0, 707),
    ],
)
def test_the_interval_at_which_stores_begin(lengths: list[int], sizes: list[int], most: int, expected: int) -> None:
    assert same_length(lengths, sizes, most) == expected


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 60)), min_size=1, max_size=6))
def test_no_object_lies_in_two_intervals(stores: list[tuple[int, int]]) -> None:
    lengths, sizes = zip(*stores, strict=True)
    common = same_length(lengths, sizes, 10**9)
    for length, size in stores:
        ends = [(start // common, (min(start + size, length) - 1) // common) for start in range(0, length, size)]
        assert all(first == last for first, last in ends)


@given(
    stores=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=5),
    most=st.sampled_from([0, 10**12]),
)
def test_shards_and_chunks_of_all_stores_fit_together(stores: list[tuple[int, int, int]], most: int) -> None:
    members: list[Variable] = [
        variable("x", count, chunk * inner, row=(3,), chunk_rows=chunk) for count, chunk, inner in stores
    ]
    joined = joined_variable(members, 12, most)
    assert joined.object_rows % joined.chunk_rows == 0
    single = [v for v in members if v.shape[0] <= v.object_rows]
    assert all(v.shape[0] <= joined.object_rows for v in single)
    if most:
        assert all(joined.object_rows % v.object_rows == 0 for v in members if v not in single)


def test_yearly_files_in_one_chunk_each() -> None:
    joined = joined_variable([variable("x", days, days, row=(3,)) for days in (365, 366, 365)], 12)
    assert (joined.objects, joined.chunks) == ((366, 3), (366, 3))
    assert math.prod(joined.row_shape) == 3
