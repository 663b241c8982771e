"""The bytes of a round, counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dtrain.algorithm.codec import BLOCK, CODECS, compress, encoded_bytes
from dtrain.algorithm.traffic import Traffic, broadcast_bytes, means_of_cycle, traffic, update_bytes
from dtrain.config.average import AverageConfig, CodecConfig
from dtrain.types import Layout, Parameters

PLAIN = Layout((), 25, 25, 0)
"""100 bytes."""


def of(replicas: int, workers: int, slices: int = 1, layout: Layout = PLAIN, inner: int = 0, **table: Any) -> Traffic:
    return traffic(layout, inner, AverageConfig(**table), replicas=replicas, workers=workers, slices=slices)


@pytest.mark.parametrize(
    ("replicas", "workers", "slices", "there", "back"),
    [
        (1, 1, 1, 0, 0),
        (4, 1, 1, 0, 0),  # nothing leaves the worker
        (1, 3, 1, 0, 0),  # two workers have no replica
        (2, 2, 1, 100, 100),  # one update comes in, the mean goes out
        (4, 2, 1, 200, 100),  # two of the four lie there already; the mean goes once to the other worker
        (3, 2, 1, 100, 100),  # two of the three lie where they are averaged
        (4, 4, 1, 300, 300),  # the reducer receives three and sends three
        (2, 2, 2, 50, 50),  # each worker keeps its own half
        (4, 4, 4, 75, 75),
        (8, 4, 4, 150, 75),
        (4, 4, 2, 150, 150),  # a worker that averages a half receives three, and sends its mean to three
        (2, 2, 4, 50, 50),  # two quarters each
        (2, 2, 3, 200 / 3, 200 / 3),  # two of three thirds are averaged on one worker
    ],
)
def test_the_busiest_link(replicas: int, workers: int, slices: int, there: float, back: float) -> None:
    assert of(replicas, workers, slices).busiest == round(there + back)


def test_a_worker_that_averages_little_is_busy_with_its_own_updates() -> None:
    # 2 halves on 6 workers of 2 replicas each: the reducer of one receives 10 halves, the others send 4 halves
    assert of(12, 6, 2).busiest == 500 + 250
    # back only: updates of one byte a parameter are a quarter of the mean
    small = of(2, 2, layout=Layout((), 128, 128, 0), codec={"name": "int8"})
    assert small.busiest == (128 + 4) + 512


@pytest.mark.parametrize(
    ("table", "slices", "whole"),
    [
        ({}, 1, 100 + 200),  # the state of Adam goes along
        ({}, 2, 100 / 2),
        ({"inner_state": "reset"}, 1, 100),
        ({"inner_state": "average"}, 1, 300),
        ({"inner_state": "reset", "control": True}, 1, 200 + 100),
        ({"inner_state": "reset", "codec": {"name": "int8"}}, 1, 29 + 100),  # with the residual
        ({"inner_state": "reset", "codec": {"name": "int8", "error_feedback": False}}, 1, 29),
    ],
)
def test_small_updates_travel_with_what_the_replica_keeps(table: dict[str, Any], slices: int, whole: float) -> None:
    config = AverageConfig(**table)
    back = broadcast_bytes(PLAIN, 200, config) / slices
    for small, expected in ((200, whole), (0, update_bytes(PLAIN, 200, config) / slices)):
        moved = traffic(PLAIN, 200, config, replicas=2, workers=2, slices=slices, small=small)
        assert moved.busiest == round(expected + back)
        assert moved.sent == 2 * update_bytes(PLAIN, 200, config)  # what is averaged


def test_a_ring_of_workers_receives_two_neighbours_and_sends_to_two() -> None:
    one_each = of(8, 8, mix={"topology": "ring"})
    assert one_each.sent == 8 * 3 * 100
    assert one_each.busiest == 200 + 700  # means stay where they are, and go to worker 0 for the model
    two_each = of(4, 2, mix={"topology": "ring"})
    assert two_each.busiest == 200 + 200  # both neighbours' updates serve both replicas of a worker


def test_pairs_of_workers_exchange_one_update() -> None:
    pairs = of(8, 8, mix={"topology": "exponential"})
    assert (pairs.busiest, pairs.sent) == (100 + 700, 8 * 2 * 100)


def test_groups_meet_in_every_third_round() -> None:
    mix = {"topology": "hierarchical", "groups": 2, "period": 3}
    # each group: one update there, one mean back, and that of the second group to worker 0; then three of each
    assert of(4, 4, mix=mix).busiest == (300 + 300 + 600) / 3
    assert of(4, 4, mix=mix).sent == 400
    config = AverageConfig(mix=mix, outer={})  # groups take steps from different parameters, also in the third round
    assert [len(means) for means in means_of_cycle(config, 4)] == [2, 2, 2]
    assert [len(means) for means in means_of_cycle(AverageConfig(mix=mix), 4)] == [2, 2, 1]


def test_an_all_reduce_sends_everything_twice_but_for_a_share() -> None:
    assert of(1, 1).all_reduce == of(4, 1).all_reduce == 0
    assert of(2, 2).all_reduce == of(8, 2).all_reduce == 100
    assert of(4, 4).all_reduce == 150
    assert of(2, 2, layout=Layout((), 20, 25, 16, 5)).all_reduce == 80  # buffers and frozen parameters have no gradient


def test_what_goes_with_the_parameters() -> None:
    layout = Layout((), 300, 310, 16, num_frozen=1000)
    plain = 4 * 310 + 16
    blocks = 3 * 4  # scales
    for table, inner, sent, received in [
        ({}, 2400, plain, plain),
        ({"inner_state": "average"}, 2400, plain + 2400, plain + 2400),
        ({"inner_state": "reset"}, 2400, plain, plain),
        ({"control": True}, 0, plain + 1200, plain + 1200),
        ({"codec": {"name": "bf16"}}, 0, 600 + 56, plain),
        ({"codec": {"name": "int8"}}, 0, 300 + blocks + 56, plain),
        ({"codec": {"name": "int4"}, "inner_state": "average"}, 80, 150 + blocks + 56 + 80, plain + 80),
    ]:
        config = AverageConfig(**table)  # type: ignore[arg-type]
        assert update_bytes(layout, inner, config) == sent, table
        assert broadcast_bytes(layout, inner, config) == received, table
        assert of(3, 3, layout=layout, inner=inner, **table).sent == 3 * sent  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_the_bytes_of_a_codec_are_those_of_an_update(name: str, size: int) -> None:
    config = CodecConfig(name=name)  # type: ignore[arg-type]
    layout = Layout((), size, size, 0)
    theta, after = (Parameters(layout, np.full(size, value, np.float32), np.zeros(0, np.uint8)) for value in (0, 1))
    assert encoded_bytes(size, config) == compress(theta, after, None, config)[0].nbytes
