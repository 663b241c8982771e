"""The time of local steps, and what of it the data took."""

from __future__ import annotations

import os

import pytest

from dtrain.data.load.counted import Counted
from dtrain.runtime import stopwatch as module
from dtrain.runtime.stopwatch import Stopwatch, process_name


def test_a_thread_that_neither_waits_nor_runs_has_lost_its_core(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, running = iter([100.0, 110.0, 100.0, 110.0]), iter([1.0, 5.0, 1.0, 5.0])
    monkeypatch.setattr(module, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(module, "thread_time", lambda: next(running))
    counted = Counted(waited=3.0, parts=1.0, fetch=1.0, read_cpu=8.0)
    on_cpu = Stopwatch().measured(counted, shares_cores=True)  # 10 s: 3 of waiting, 4 of running
    assert (on_cpu.seconds, on_cpu.data.fetch, on_cpu.data.decode) == (10.0, 3.0, 3.0)
    on_gpu = Stopwatch().measured(counted, shares_cores=False)
    assert (on_gpu.seconds, on_gpu.data.fetch, on_gpu.data.decode) == (10.0, 3.0, 0.0)


def test_a_process_is_named_by_its_number() -> None:
    assert process_name().endswith(f":{os.getpid()}")
