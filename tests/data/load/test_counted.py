"""What a loader counts, split among the stages by hand."""

from __future__ import annotations

import pytest

from dtrain.data.load.counted import Counted, DataSeconds, data_seconds


def test_what_steps_wait_for_is_what_the_assembler_and_the_readers_do():
    # 8 s of waiting, 3/4 of them for parts: 6 s, of which 2/3 at the store
    counted = Counted(waited=8.0, fetch=20.0, decode=10.0, gather=1.0, parts=3.0)
    assert data_seconds(counted) == DataSeconds(fetch=4.0, decode=2.0, gather=2.0)


def test_work_that_nobody_waits_for_does_not_count():
    assert data_seconds(Counted(fetch=20.0, decode=10.0, gather=5.0, parts=3.0)).total == 0.0


def test_a_core_that_is_shared_counts_up_to_what_the_threads_run():
    counted = Counted(decode=10.0, gather=5.0, read_cpu=3.0, gather_cpu=1.0)
    assert data_seconds(counted, stolen=2.0) == DataSeconds(fetch=0.0, decode=1.5, gather=0.5)
    assert data_seconds(counted, stolen=9.0) == DataSeconds(fetch=0.0, decode=3.0, gather=1.0)  # the rest is others'
    assert data_seconds(counted, stolen=-1.0).total == 0.0


def test_nothing_is_lost_or_made_up():
    both = data_seconds(Counted(waited=5.0, fetch=1.0, decode=2.0, gather=3.0, parts=4.0, read_cpu=1.0), stolen=0.5)
    assert both.total == pytest.approx(5.5)
    assert data_seconds(Counted(waited=2.0)) == DataSeconds(fetch=0.0, decode=0.0, gather=2.0)


def test_what_has_been_counted_since():
    first = Counted(units=1, bytes=10, waited=1.0, fetch=2.0)
    assert Counted(units=3, bytes=15, waited=1.5, fetch=2.0, parts=1.0).since(first) == Counted(
        units=2, bytes=5, waited=0.5, parts=1.0
    )
