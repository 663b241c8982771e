"""The mean of inner optimizers' states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.algorithm.momenta import is_finite_state, mean_state
from dtrain.algorithm.replica import carried, empty_inner_state, pack_inner_state, unpack_inner_state
from dtrain.errors import UnsuitableModel
from dtrain.types import InnerState

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
}


def state_of(kind: str, gradients: list[float], dtype: torch.dtype = torch.float32) -> InnerState:
    make, options = KINDS[kind]
    parameter = nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = make([parameter], **options)
    fresh = carried(optimizer)
    for gradient in gradients:
        parameter.grad = torch.full((3,), gradient, dtype=dtype)
        optimizer.step()
    return pack_inner_state(optimizer, [parameter], fresh)


def values(kind: str, state: InnerState) -> dict[str, Any]:
    make, options = KINDS[kind]
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = make([parameter], **options)
    unpack_inner_state(state, optimizer, [parameter])
    found: dict[str, Any] = {
        key: value.tolist() if isinstance(value, torch.Tensor) else value
        for key, value in optimizer.state[parameter].items()
    }
    return found


def test_momentum_by_hand() -> None:
    mean = mean_state([state_of("sgd", [1.0, 1.0]), state_of("sgd", [3.0, 0.0])], [1, 3])
    # momentum 0.9 * 1 + 1 = 1.9 and 0.9 * 3 + 0 = 2.7
    assert values("sgd", mean)["momentum_buffer"] == pytest.approx([(1.9 + 3 * 2.7) / 4] * 3)


def test_moments_by_hand() -> None:
    found = values("adam", mean_state([state_of("adam", [1.0]), state_of("adam", [3.0])], [1, 1]))
    assert found["exp_avg"] == pytest.approx([0.1 * 2.0] * 3)
    assert found["exp_avg_sq"] == pytest.approx([0.001 * 5.0] * 3)
    assert found["step"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_mean_of_equal_states_and_of_one_is_that_state(kind: str, dtype: torch.dtype) -> None:
    one = state_of(kind, [0.3, -0.7, 0.123], dtype)
    for states, weights in (([one], [7]), ([one] * 3, [1, 2, 5])):
        mean = mean_state(states, weights)
        assert mean.slots == one.slots
        assert mean.data.tobytes() == one.data.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_makes_no_difference_and_nothing_is_changed(kind: str) -> None:
    states = [state_of(kind, list(np.random.default_rng(seed).normal(size=4))) for seed in range(4)]
    before = [state.data.tobytes() for state in states]
    mean = mean_state(states, [5, 1, 2, 9])
    turned = mean_state(states[::-1], [9, 2, 1, 5])
    assert mean.data.tobytes() == turned.data.tobytes()
    assert [state.data.tobytes() for state in states] == before


def test_counters_become_the_largest_and_numbers_the_mean() -> None:
    def plain(value: Any) -> InnerState:
        from dtrain.types import Slot

        return InnerState((Slot(0, "k", "", (), 0, 0, value, "group"),), np.zeros(0, np.uint8))

    def mean(values: list[Any], weights: list[int]) -> Any:
        return mean_state([plain(value) for value in values], weights).slots[0].value

    assert mean([3, 5, 4], [1, 1, 1]) == 5
    assert mean([1.0, 2.0], [1, 3]) == 1.75
    assert mean([1, 2.0], [1, 1]) == 1.5
    assert mean([True, True], [1, 1]) is True
    assert mean([[1.0], [1.0]], [1, 1]) == [1.0]
    for other in ([True, False], ["a", "b"], [[1.0], [2.0]], [None, 1]):
        with pytest.raises(UnsuitableModel, match="inner_state"):
            mean(other, [1, 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_state_is_finite_if_all_its_floats_are(kind: str, dtype: torch.dtype) -> None:
    assert is_finite_state(state_of(kind, [0.3, -0.7], dtype))
    assert not is_finite_state(state_of(kind, [0.3, float("nan")], dtype))
    assert not is_finite_state(state_of(kind, [0.3, float("inf")], dtype))
    assert is_finite_state(empty_inner_state())


def test_a_second_moment_can_be_infinite_where_the_parameters_are_finite() -> None:
    assert not is_finite_state(state_of("adam", [1e30]))


def test_states_of_different_parts_are_refused() -> None:
    with pytest.raises(UnsuitableModel, match="different parts") as caught:
        mean_state([state_of("adam", [1.0]), empty_inner_state()], [1, 1])
    assert '"keep" or "reset"' in caught.value.hint
