"""The seconds of a read at the store."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dtrain.data.plan.units import Box
from dtrain.data.read import clock as module
from dtrain.data.read.clock import FetchClock, fetches_counted, fetching
from tests.data.helpers import open_all, reader_of, vector


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
    with fetches_counted() as clock, pytest.raises(OSError, match="gone"), fetching():
        raise OSError("gone")
    assert clock.seconds == 2.0


def test_requests_outside_of_a_read_are_nobodys():
    with fetches_counted() as clock:
        pass
    with fetching():
        pass
    assert clock.seconds == 0.0


@pytest.mark.parametrize("reader", ["numcodecs", "zarr"])
def test_each_reader_counts_its_requests(write_store, tmp_path, monkeypatch, reader):
    arrays = {name: vector(np.arange(30), 10) for name in ("v0", "index")}
    samples = open_all(write_store(tmp_path / "a.zarr", arrays), ["v0"])
    units = reader_of(samples, reader)
    ticks = itertools.count()
    monkeypatch.setattr(module, "perf_counter", lambda: float(next(ticks)))
    with fetches_counted() as clock:
        units.read(Box(0, 30))
    # six files one after the other, a tick each; zarr asks for three at once: from one tick for all to one for each
    assert clock.seconds == 6.0 if reader == "numcodecs" else 2.0 <= clock.seconds <= 6.0
