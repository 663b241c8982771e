from __future__ import annotations

import numpy as np
import pytest

from dtrain.data.plan.units import Box, box_selection, box_shape, box_slices
from dtrain.data.read.units import UnitReader
from tests.data.helpers import open_all


@pytest.fixture
def volume(write_store, tmp_path):
    values = np.arange(12 * 9 * 10, dtype="float32").reshape(12, 9, 10)
    arrays = {
        "v0": {"dims": ("n", "y", "x"), "values": values, "chunks": (3, 4, 5)},
        "v1": {"dims": ("n", "x"), "values": values[:, 0], "chunks": (4, 10)},
        "index": {"dims": ("n",), "values": np.arange(12), "chunks": (3,)},
    }
    return values, open_all(write_store(tmp_path / "s", arrays), arrays, isel={"y": {"start": 1, "stop": 8, "step": 2}})


def test_a_box_is_a_run_of_rows_times_a_block(volume):
    values, samples = volume
    box = Box(3, 7, (("y", 1, 3), ("x", 2, 9)))
    v0, v1 = samples.variable("v0"), samples.variable("v1")
    assert box_selection(samples, v0, box) == ((3, 7, 1), (3, 6, 2), (2, 9, 1))
    assert box_selection(samples, v1, box) == ((3, 7, 1), (2, 9, 1))
    assert box_shape(samples, v0, box) == (4, 2, 7)
    assert box_slices(v1, box) == (slice(2, 9),)
    for reader in ("numcodecs", "zarr"):
        read = UnitReader(samples, reader).read(box)
        np.testing.assert_array_equal(read["v0"][1], values[3:7, 1:8:2][:, 1:3, 2:9])
        np.testing.assert_array_equal(read["v1"][1], values[3:7, 0, 2:9])


def test_without_a_block_rows_are_whole(volume):
    values, samples = volume
    assert box_shape(samples, samples.variables[0], Box(0, 5)) == (5, 4, 10)
    np.testing.assert_array_equal(UnitReader(samples).read(Box(0, 5))["v0"][1], values[:5, 1:8:2])
