"""Norms of updates, and the mean cosine between them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.algorithm import drift
from dtrain.algorithm.average import combine, contribute
from dtrain.algorithm.drift import BLOCK, block_squares, cosine_terms, mean_cosine, norm_of
from dtrain.algorithm.pattern import summarise
from dtrain.algorithm.replica import fresh_replica
from dtrain.config.average import AverageConfig, CodecConfig
from dtrain.types import Broadcast, RoundSummary
from tests.algorithm.helpers import locked, result, task, vector


def norm(one: Any, other: Any) -> float:
    return norm_of([block_squares(np.array(one, np.float32), np.array(other, np.float32))])


# Norms ------------------------------------------------------------------------------------------------------------


def test_a_norm_by_hand() -> None:
    assert norm([3.0, 0.0, 1.0], [0.0, 4.0, 1.0]) == 5.0
    assert norm([], []) == 0.0
    assert norm_of([]) == 0.0
    assert block_squares(np.full(BLOCK + 2, 2, np.float32), np.zeros(BLOCK + 2, np.float32)).tolist() == [4 * BLOCK, 8]


def test_sums_of_blocks_are_added_exactly() -> None:
    assert norm_of([np.array([2.0**53]), np.ones(100)]) == math.sqrt(2**53 + 100)  # 2 ** 53 + 1 is no float64


def test_the_difference_is_taken_in_float64() -> None:
    assert norm([1e8], [-1.0]) == 1e8 + 1  # no float32
    assert norm([3.4028235e38], [-3.4028235e38]) == 2 * float(np.finfo(np.float32).max)


def test_a_mask_of_minus_infinity_does_not_move() -> None:
    assert norm([-np.inf, 3.0], [-np.inf, 7.0]) == 4.0
    assert norm([-np.inf], [0.0]) == np.inf


@given(st.integers(0, 5 * BLOCK + 9), st.sets(st.integers(1, 5), max_size=5), st.integers(0, 99))
def test_the_norm_has_the_same_bits_in_any_number_of_slices(length: int, cuts: set[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    one, other = (generator.normal(size=(2, length)) * 10.0 ** generator.uniform(-9, 9, length)).astype(np.float32)
    bounds = [0, *(cut * BLOCK for cut in sorted(cuts) if cut * BLOCK < length), length]
    parts = [block_squares(locked(one[begin:end]), locked(other[begin:end])) for begin, end in pairwise(bounds)]
    assert norm_of(parts) == norm(one, other) == norm_of(reversed(parts))
    assert norm(one, other) == pytest.approx(np.linalg.norm(one.astype(np.float64) - other), rel=1e-12)


def test_passes_over_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = np.random.default_rng(0).normal(size=(2, 9 * BLOCK + 7)).astype(np.float32)
    whole = block_squares(one, other)
    for blocks in (1, 2, 4):
        monkeypatch.setattr(drift, "AT_ONCE", blocks)
        assert block_squares(one, other).tobytes() == whole.tobytes()


# The cosine -------------------------------------------------------------------------------------------------------


def cosine(vectors: list[list[float]], coefficients: list[float]) -> float | None:
    each = np.array(vectors, np.float64)
    total = float(np.linalg.norm(np.array(coefficients) @ each))
    return mean_cosine([cosine_terms([float(np.linalg.norm(one)) for one in each], coefficients, total)])


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([[3, 4], [3, 4]], 1.0),
        ([[3, 4], [6, 8]], 1.0),
        ([[1, 0], [0, 5]], 0.0),
        ([[1, 2], [-1, -2]], -1.0),
        ([[1, 0], [1, 1]], math.sqrt(0.5)),
        ([[1, 0], [0, 1], [1, 0]], 1 / 3),  # the mean of 0, 1 and 0
        ([[2, 0], [0, 1], [2, 0]], 4 / 8),  # pairs count by their norms: 4 of 2 + 4 + 2
    ],
)
def test_cosines_by_hand(vectors: list[list[float]], expected: float) -> None:
    assert cosine(vectors, [1 / len(vectors)] * len(vectors)) == pytest.approx(expected, abs=1e-12)


def test_weights_count() -> None:
    # pairs: 1 . 0.25 * 0.25 of equal, 0 . 2 * 0.25 * 0.5 of orthogonal vectors
    assert cosine([[1, 0], [1, 0], [0, 1]], [0.25, 0.25, 0.5]) == pytest.approx(0.0625 / (0.0625 + 0.25))


def test_no_cosine_of_one_update_or_of_none_that_moved() -> None:
    assert mean_cosine([]) is None
    assert cosine([[0, 0], [0, 0]], [0.5, 0.5]) is None
    assert cosine([[0, 0], [1, 2]], [0.5, 0.5]) is None
    for value in np.random.default_rng(0).uniform(0.1, 10, 20_000).tolist():
        assert mean_cosine([cosine_terms([value], [1.0], value)]) is None  # not noise over noise
        assert mean_cosine([cosine_terms([value, 0.0], [0.5, 0.0], value / 2)]) is None


def test_the_cosine_of_several_means_is_that_of_all_their_pairs() -> None:
    equal, orthogonal = cosine_terms([1.0, 1.0], [0.5, 0.5], 1.0), cosine_terms([1.0, 1.0], [0.5, 0.5], math.sqrt(0.5))
    assert mean_cosine([equal, orthogonal]) == pytest.approx(0.5)


def test_what_is_not_finite_has_no_cosine() -> None:
    assert mean_cosine([cosine_terms([1.0, 1.0], [0.5, 0.5], math.inf)]) is None
    assert mean_cosine([cosine_terms([1.0, 1.0], [0.5, 0.5], math.nan)]) is None
    assert mean_cosine([(math.inf, 1.0), (math.nan, 1.0)]) is None


# In a round -------------------------------------------------------------------------------------------------------


def summary(afters: list[list[float]], samples: list[int] | None = None, norms: Any = None, **average: Any) -> Any:
    """The summary of a round from (0, 0) and a buffer."""
    config, start = AverageConfig(**average), Broadcast(vector([0.0, 0.0], [0.0]))
    weights, steps = samples or [1] * len(afters), norms or [1.0] * len(afters)
    sent = [
        contribute(
            start,
            vector(after, [9.0 * k]),
            fresh_replica(),
            result(samples=weights[k], step_norm=steps[k]),
            task(k),
            config,
        )[0]
        for k, after in enumerate(afters)
    ]
    combined = combine(start, [start] * len(sent), sent, (), config)
    found: RoundSummary = summarise([[combined.facts]], combined.broadcast.params)
    return found


def update_norms(found: RoundSummary) -> list[float]:
    return [one.update_norm for one in found.contributions]


def test_a_round_by_hand() -> None:
    found = summary([[3.0, 4.0], [0.0, 2.0]])  # buffers do not count
    assert update_norms(found) == [5.0, 2.0]
    assert found.update_cosine == pytest.approx(0.8)
    assert summary([[1.0, 0.0], [0.0, 1.0]], [1, 3]).update_cosine == pytest.approx(0.0, abs=1e-12)
    assert summary([[1.0, 0.0], [-1.0, 0.0]]).update_cosine == pytest.approx(-1.0)
    assert summary([[1.0, 0.0]]).update_cosine is None


def test_samples_weigh_the_pairs_of_a_round() -> None:
    afters = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    # 8 * 1 of equal, 8 * 1 and 1 * 1 of orthogonal updates
    assert summary(afters, [8, 1, 1]).update_cosine == pytest.approx(8 / 17)
    assert summary(afters, [8, 1, 1], weights="uniform").update_cosine == pytest.approx(1 / 3)


def test_a_rejected_replica_has_no_part_in_it() -> None:
    found = summary([[np.nan, 1.0], [3.0, 4.0], [6.0, 8.0], [0.0, 1.0]])
    others = summary([[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]])
    assert update_norms(found) == [0.0, *update_norms(others)]
    assert found.update_cosine == pytest.approx(others.update_cosine)


def test_with_a_codec_the_update_is_the_decoded_one() -> None:
    # the scale is 1, so that 0.25 becomes 0
    found = summary([[7.0, 0.25], [7.0, -0.25]], codec=CodecConfig(name="int4"))
    assert update_norms(found) == [7.0, 7.0]
    assert found.update_cosine == pytest.approx(1.0)
    assert summary([[7.0, 0.25], [7.0, -0.25]]).update_cosine < 1.0 - 1e-4


def test_with_fednova_the_coefficients_are_those_of_its_step() -> None:
    afters, samples, norms = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [1, 1, 1], [1.0, 2.0, 4.0]
    # each update is divided by its norm: 1 * 1/2 of equal, 1/4 and 1/8 of orthogonal updates
    found = summary(afters, samples, norms, weights="fednova").update_cosine
    assert found == pytest.approx(0.5 / (0.5 + 0.25 + 0.125))


@pytest.mark.parametrize("reduce", ["median", "trimmed"])
def test_what_is_no_sum_of_updates_has_no_cosine(reduce: str) -> None:
    found = summary([[1.0, 0.0]] * 3, reduce=reduce, **({"trim": 0.4} if reduce == "trimmed" else {}))
    assert found.update_cosine is None
    assert update_norms(found) == [1.0] * 3
