"""Bytes, counted and printed."""

from __future__ import annotations

from dtrain.data.plan.footprint import format_bytes


def test_bytes_are_written_for_people():
    counts = [0, 999, 1000, 1_500_000, 2_000_000_000, 3_250_000_000_000, 10**16]
    assert [format_bytes(n) for n in counts] == ["0 B", "999 B", "1.0 kB", "1.5 MB", "2.0 GB", "3.2 TB", "10,000.0 TB"]
