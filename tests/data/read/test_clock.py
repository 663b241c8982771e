"""The seconds of a read at the store."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dtrain.data.read import clock as module
from dtrain.data.read.clock import FetchClock, fetches_counted, fetching
from tests.data.helpers import WHOLE, open_all, reader_of, vector


def test_requests_that_overlap_count_once(monkeypatch):
    times = iter([10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr(module, "perf_counter", lambda: next(times))
    clock = FetchClock()
    with clock, clock:
        pass
    with clock:
        pass
    assert clock.seconds == 4.0 + 1.0


def test_a_request_that_fails_counts(monkeypatch):
    times = iter([1.0, 3.0])
    monkeypatch.setattr(module, "perf_counter", lambda: next(times))
    with fetches_counted() as clock:
        with pytest.raises(OSError, match="gone"), fetching():
            raise OSError("gone")
    assert clock.seconds == 2.0


def test_requests_outside_of_a_read_are_nobodys():
    with fetches_counted() as clock:
        pass
    with fetching():
        pass
    assert clock.seconds == 0.0


@pytest.mark.parametrize(("reader", "fetches"), [("numcodecs", 3), ("zarr", 1)])
def test_each_reader_counts_its_requests(write_store, tmp_path, monkeypatch, reader, fetches):
    path = write_store(tmp_path / "a.zarr", {"v0": vector(np.arange(30, dtype="float32"), 10)})
    units = reader_of(open_all(path, ["v0"], split=WHOLE), reader)
    ticks = itertools.count()
    monkeypatch.setattr(module, "perf_counter", lambda: float(next(ticks)))
    variable = units.samples.variables[0]
    with fetches_counted() as clock:
        units._fill(variable, variable.selection(0, 30), np.empty(30, "float32"))
    # files one after the other, a tick each; zarr asks in its event loop, for several at once or one after the other
    assert clock.seconds == fetches if reader == "numcodecs" else 1 <= clock.seconds <= 5
