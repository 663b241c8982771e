from __future__ import annotations

import numpy as np
import pytest

from benchmarks import shuffle_score

BATCH = 256


def shuffled(values: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(values)


@pytest.mark.parametrize("rows", [65_536, 100_003])
def test_sequential_is_0(rows: int) -> None:
    assert shuffle_score.scores(np.arange(rows), BATCH) == pytest.approx((0, 0), abs=0.01)


@pytest.mark.parametrize("rows", [65_536, 100_003])
@pytest.mark.parametrize("seed", range(3))
def test_a_random_permutation_is_1(rows: int, seed: int) -> None:
    assert shuffle_score.scores(shuffled(np.arange(rows), seed), BATCH) == pytest.approx((1, 1), abs=0.02)


def test_consecutive_batches_in_random_order_are_0() -> None:
    batches = shuffled(np.arange(65_536).reshape(-1, BATCH))
    assert shuffle_score.scores(batches.ravel(), BATCH) == pytest.approx((0, 0), abs=0.01)


def test_rows_shuffled_within_consecutive_batches_are_nearly_0() -> None:
    batches = np.random.default_rng(0).permuted(np.arange(65_536).reshape(-1, BATCH), axis=1)
    assert shuffle_score.scores(batches.ravel(), BATCH) == pytest.approx((BATCH / 65_536, 0), abs=0.01)


def test_wider_windows_score_higher() -> None:
    blocks = shuffled(np.arange(2**20).reshape(-1, 4096))
    scores = []
    for window in (1, 4, 16, 64):
        rows = np.concatenate([shuffled(part.ravel()) for part in np.split(blocks, len(blocks) // window)])
        scores.append(shuffle_score.scores(rows, BATCH))
    assert np.all(np.diff(scores, axis=0) > 0.02)
    # rows of 4 blocks: three of four steps lead to another block, a third of the store away
    assert scores[1][0] == pytest.approx(3 / 4, abs=0.05)


def test_alternating_between_two_places_is_good_within_only() -> None:
    halves = np.arange(65_536).reshape(2, -1).T.ravel()
    within, across = shuffle_score.scores(halves, BATCH)
    assert within == pytest.approx(1.5, abs=0.02)
    assert across < 0.1


def test_worked_out_by_hand() -> None:
    # 4 rows, bins of one row each: in each batch two bins have 1/2 and two have 0, their shares are 1/4: L1 = 1
    assert shuffle_score.unevenness(np.array([0, 3, 1, 2]), 2) == pytest.approx(1)
    assert shuffle_score.step(np.array([0, 3, 1, 2]), 2) == 2
    # 128 rows, bins of two, batches of two: both rows from one bin with chance 1/127
    same, other = 2 * (1 - 1 / 64), 2 * (1 / 2 - 1 / 64) + 62 / 64
    assert shuffle_score.random_unevenness(128, 2) == pytest.approx(same / 127 + other * 126 / 127)


def test_a_sample_of_the_store_counts_as_the_store() -> None:
    sample = np.sort(np.random.default_rng(1).choice(10**6, 4096, replace=False))
    assert shuffle_score.scores(sample, BATCH) == pytest.approx((0, 0), abs=0.01)
    order = shuffled(np.arange(4096))
    assert shuffle_score.scores(sample[order], BATCH) == shuffle_score.scores(order, BATCH)


@pytest.mark.parametrize(("rows", "batch"), [(511, 256), (10, 1)])
def test_too_few_rows(rows: int, batch: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows in batches of {batch}: at least two batches"):
        shuffle_score.scores(np.arange(rows), batch)
