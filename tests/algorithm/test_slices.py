from __future__ import annotations

import pytest

from dtrain.algorithm.slices import SLICE_BYTES, SLICE_TASKS, num_slices
from dtrain.types import Layout


def layout_of(slices: int) -> Layout:
    """A layout of parameters that fill so many slices."""
    elements = slices * SLICE_BYTES // 4
    return Layout((), elements, elements, 0)


@pytest.mark.parametrize(
    ("slices", "workers", "replicas", "expected"),
    [
        (10, 4, 4, 4),  # one a worker
        (3, 4, 4, 3),  # of 8 MB each
        (1000, 64, 64, 64),  # 4,096 tasks
        (1000, 65, 65, 63),
        (1000, 1000, 1000, 4),
        (1000, 4096, 4097, 1),
        (0, 4, 4, 1),
    ],
)
def test_auto_cuts_into_a_slice_a_worker_and_a_bounded_number_of_tasks(slices, workers, replicas, expected):
    assert num_slices("auto", layout_of(slices), workers, replicas) == expected
    assert expected == 1 or expected * replicas <= SLICE_TASKS


def test_a_given_number_is_taken():
    assert num_slices(10, layout_of(1000), 1000, 1000) == 10
