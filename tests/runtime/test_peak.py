"""The peak of a process's memory while something runs."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dtrain.runtime.peak import INTERVAL, PeakMemory


def test_memory_that_is_freed_again_counts() -> None:
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        for _ in range(3):  # a look may come late on a busy machine
            held = np.ones(100 << 17)  # 100 MB
            time.sleep(20 * INTERVAL)
            del held
    assert peak.bytes > before.bytes + 50_000_000


def test_it_ends_with_an_error() -> None:
    with pytest.raises(ValueError, match="of the block"), PeakMemory() as peak:
        raise ValueError("of the block")
    assert not peak._thread.is_alive()
    assert peak.bytes > 0
