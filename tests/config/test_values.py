"""Sizes in bytes, and bytes a second."""

from __future__ import annotations

import pytest

from dtrain.config.schema import TrainConfig
from dtrain.config.values import parse_bandwidth, parse_bytes
from dtrain.errors import InvalidConfig, UsageError


def test_a_size_may_be_a_number_of_bytes():
    data = TrainConfig(data={"memory": 512_000_000, "cache": 0}).data
    assert (parse_bytes(data.memory, "data.memory"), data.cache) == (512_000_000, "0")


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MB", 512 * 10**6), ("2GiB", 2 * 2**30), ("1000", 1000), ("1.5 KiB", 1536), ("1kb", 1000)],
)
def test_sizes_are_parsed(text, size):
    assert parse_bytes(text, "data.memory") == size


@pytest.mark.parametrize("text", ["", "0", "-1MB", "much", "0.1B", "MB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InvalidConfig, match=r"data\.memory"):
        parse_bytes(text, "data.memory")


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("200Mbit", 25e6),
        ("1Gbit", 125e6),
        ("5Gbit/s", 625e6),
        ("25MB/s", 25e6),
        ("2.5 Gbps", 312.5e6),
        (" 56kbit ", 7e3),
        ("1TB", 1e12),
        ("8bit/s", 1.0),
    ],
)
def test_bandwidths_are_parsed(text, speed):
    assert parse_bandwidth(text) == speed


@pytest.mark.parametrize(
    "text", ["", "0Mbit", "-1Mbit", "fast", "200", "200M", "25Mb", "25mb/s", "1Gbit/h", "Mbit", 25e6]
)
def test_what_is_no_bandwidth_is_refused(text):
    with pytest.raises(UsageError, match=r"200Mbit, 5Gbit/s or 25MB/s"):
        parse_bandwidth(text)
