"""The moving average of models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.algorithm import ema
from dtrain.algorithm.ema import next_ema
from dtrain.algorithm.slices import ALIGNMENT, cut_params, join_params, slices_of
from dtrain.types import Entry, Layout, Parameters
from tests.algorithm.helpers import vector


def test_rounds_by_hand() -> None:
    # from 8: 0.75 * 8 + 0.25 * 0 = 6, 0.75 * 6 + 0.25 * 2 = 5
    first = next_ema(None, vector([8.0, 1.0]), 0.75)
    second = next_ema(first, vector([0.0, 1.0]), 0.75)
    third = next_ema(second, vector([2.0, 1.0]), 0.75)
    assert [one.flat.tolist() for one in (first, second, third)] == [[8, 1], [6, 1], [5, 1]]


def test_in_the_first_round_it_is_the_model() -> None:
    model = vector([1.0], [2.0], [3.0])
    assert next_ema(None, model, 0.9) is model


def test_buffers_and_frozen_parameters_are_those_of_the_newest_model() -> None:
    before, model = vector([4.0], [1.0, -5.0], [2.0]), vector([0.0], [3.0, 7.0], [9.0])
    found = next_ema(before, replace(model, frozen=np.float32([6.0])), 0.5)
    assert found.flat.tolist() == [2.0, 3.0, 7.0]
    assert found.extra.tobytes() == model.extra.tobytes()
    assert found.frozen.tolist() == [6.0]


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.999])
def test_the_average_of_equal_models_is_that_model(decay: float) -> None:
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    model = vector([*values.tolist(), -np.inf, np.finfo(np.float32).max, 1e-45])
    average = model
    for _ in range(3):
        average = next_ema(average, model, decay)
    assert average.flat.tobytes() == model.flat.tobytes()


def test_it_is_computed_in_float64_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before, model = (vector(np.random.default_rng(seed).normal(size=100).tolist(), [1.0]) for seed in range(2))
    for params in (before, model):
        params.flat.flags.writeable = False
    found = next_ema(before, model, 0.9).flat
    expected = 0.9 * before.flat.astype(np.float64) + (1 - 0.9) * model.flat.astype(np.float64)
    assert found[:100].tolist() == expected.astype(np.float32)[:100].tolist()
    monkeypatch.setattr(ema, "BLOCK", 7)
    assert next_ema(before, model, 0.9).flat.tobytes() == found.tobytes()


@given(st.integers(1, 4 * ALIGNMENT), st.integers(1, 7), st.integers(0, 9))
def test_slices_give_the_bits_of_the_whole(size: int, count: int, buffers: int) -> None:
    entries = (
        Entry("w", "param", "float32", (size,), 0, size),
        Entry("b", "buffer", "float32", (buffers,), size, buffers),
    )
    layout = Layout(entries, size, size + buffers, 8)
    before, model = (
        Parameters(
            layout,
            np.random.default_rng(seed).normal(size=size + buffers).astype(np.float32),
            np.full(8, seed, np.uint8),
        )
        for seed in (1, 2)
    )
    whole = next_ema(before, model, 0.9)
    slices = slices_of(layout, count)
    parts = join_params([next_ema(cut_params(before, at), cut_params(model, at), 0.9) for at in slices])
    first = join_params([next_ema(None, cut_params(model, at), 0.9) for at in slices])
    assert (parts.flat.tobytes(), parts.extra.tobytes()) == (whole.flat.tobytes(), whole.extra.tobytes())
    assert (first.flat.tobytes(), first.extra.tobytes()) == (model.flat.tobytes(), model.extra.tobytes())
