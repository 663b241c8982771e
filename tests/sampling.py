"""How much `make test` tries of what `make test-all` tries in full: examples of hypothesis, and cases of parameters."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import settings

IS_THOROUGH = os.environ.get("DTRAIN_THOROUGH", "") == "1"
"""As in `make test-all`."""
SHARE, LEAST = 4, 6


def examples(number: int) -> settings:
    """Return the settings of a test of so many examples, of which `make test` tries a quarter."""
    return settings(max_examples=number if IS_THOROUGH else max(LEAST, number // SHARE))


def spread(count: int, number: int) -> set[int]:
    """Return so many of the first `count` integers, evenly spread from the first to the last."""
    if number >= count:
        return set(range(count))
    return {round(i * (count - 1) / max(1, number - 1)) for i in range(number)}


def mark_extra(items: Sequence[pytest.Item]) -> None:
    """Mark the cases of a test with `@pytest.mark.sampled(number)` as extra, but for so many of them."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for own in cases.values():
        marker = own[0].get_closest_marker("sampled")
        assert marker is not None
        kept = spread(len(own), marker.args[0])
        for number, item in enumerate(own):
            if number not in kept:
                item.add_marker(pytest.mark.extra)
