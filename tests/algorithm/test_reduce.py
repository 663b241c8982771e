from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dtrain.algorithm import reduce
from dtrain.algorithm.batch import TensorBatch
from dtrain.algorithm.local import run_local_steps
from dtrain.algorithm.losses import mse
from dtrain.algorithm.params import flatten, layout_of, load_into, tensors_of
from dtrain.algorithm.recipe import Recipe
from dtrain.algorithm.reduce import check_reduce, mean_of, middle_mean, reduced, weighted_mean
from dtrain.algorithm.replica import empty_inner_state
from dtrain.algorithm.schedules import constant
from dtrain.config.average import AverageConfig
from dtrain.errors import InvalidConfig, UnsuitableModel
from dtrain.types import Parameters


def across_decades(count, seed=0):
    """float32 numbers from 1e-30 to 1e30."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(count) * 10.0 ** generator.uniform(-30, 30, count)).astype(np.float32)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


# The mean of arrays ---------------------------------------------------------------------------------------------


def test_a_mean_by_hand():
    mean = weighted_mean([np.float32([1.0, -2.0, 0.5]), np.float32([5.0, 6.0, 0.5])], [1, 3])
    assert mean.dtype == np.float32
    assert mean.tolist() == [4.0, 4.0, 0.5]


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [1000, 999, 1001, 3]])
def test_the_mean_does_not_depend_on_the_order(weights):
    # replicas differ as they do in training: each number by a part of itself
    base = across_decades(50_000)
    generator = np.random.default_rng(1)
    replicas = [(base * (1 + 0.1 * generator.standard_normal(len(base)))).astype(np.float32) for _ in weights]
    means = {
        weighted_mean([replicas[k] for k in order], [weights[k] for k in order]).tobytes()
        for order in itertools.permutations(range(4))
    }
    assert len(means) == 1
    # the test can fail: in float32 the order does show
    naive = {
        sum(replicas[k] * np.float32(weights[k] / sum(weights)) for k in order).tobytes()
        for order in itertools.permutations(range(4))
    }
    assert len(naive) > 1


@pytest.mark.parametrize("weights", [[1], [1, 1, 1], [7, 1, 3], [1] * 7, [12_345, 1, 999_983, 2, 77, 50_000_000, 3]])
def test_the_mean_of_equal_replicas_is_that_replica(weights):
    array = np.concatenate([across_decades(20_000), np.float32([0.0, -0.0, 1e-45, 3.4028235e38, -1e-40])])
    mean = weighted_mean([array] * len(weights), weights)
    assert (mean == array).all()
    nonzero = array != 0  # the sign of a zero may be lost
    assert mean[nonzero].tobytes() == array[nonzero].tobytes()


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_the_mean_is_the_exact_one_rounded_once(count, length, data):
    rows = [data.draw(st.lists(finite, min_size=length, max_size=length)) for _ in range(count)]
    weights = data.draw(st.lists(st.integers(1, 10**6), min_size=count, max_size=count))
    mean = weighted_mean([np.array(row, np.float32) for row in rows], weights)
    for place, found in enumerate(mean):
        column = [Fraction(row[place]) for row in rows]
        exact = sum(x * w for x, w in zip(column, weights, strict=True)) / sum(weights)
        scale = sum(abs(x) * w for x, w in zip(column, weights, strict=True)) / sum(weights)
        half = Fraction(float(np.spacing(np.abs(found)))) / 2
        # half a step of float32, and what float64 loses of each product, sum and quotient
        assert abs(Fraction(float(found)) - exact) <= half + scale * Fraction(2 * count + 2, 2**53)


@pytest.mark.parametrize("weights", [[1, 2, 3], [11, 13, 24], [*[1] * 7, 7], [*[3] * 7, 21]])
def test_a_mean_in_the_middle_of_two_floats_goes_to_the_even_one(weights):
    # the last replica has half of the weight and the next larger number: only an exact sum finds the middle
    assert 2 * weights[-1] == sum(weights)
    low = np.abs(across_decades(1000)) + np.float32(1e-30)
    high = np.nextafter(low, np.float32(np.inf))
    even = np.where(low.view(np.uint32) % 2 == 0, low, high)
    assert (weighted_mean([low] * (len(weights) - 1) + [high], weights) == even).all()


@given(st.lists(st.lists(st.integers(-1000, 1000), min_size=3, max_size=3), min_size=1, max_size=6), st.data())
def test_small_integers_give_the_nearest_float(rows, data):
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=len(rows), max_size=len(rows)))
    mean = weighted_mean([np.array(row, np.float32) for row in rows], weights)
    totals = [sum(w * row[place] for w, row in zip(weights, rows, strict=True)) for place in range(3)]
    # float(Fraction) is rounded correctly; quotients this small are never near the middle of two floats
    assert mean.tolist() == [float(np.float32(float(Fraction(total, sum(weights))))) for total in totals]


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 31, 32, 33, 50])
def test_blocks_make_no_difference(monkeypatch, length):
    arrays = [across_decades(length, seed) for seed in range(3)]
    whole = weighted_mean(arrays, [5, 1, 2])
    monkeypatch.setattr(reduce, "BLOCK", 16)
    assert weighted_mean(arrays, [5, 1, 2]).tobytes() == whole.tobytes()


def test_arrays_longer_than_a_block():
    length = reduce.BLOCK + 3
    one, two = np.arange(length, dtype=np.float32), np.ones(length, np.float32)
    mean = weighted_mean([one, two], [1, 3])
    assert (mean == ((np.arange(length) + 3) / 4).astype(np.float32)).all()


def test_arrays_and_weights_must_be_as_many():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        weighted_mean([np.ones(2, np.float32)] * 2, [1])


def test_the_mean_leaves_its_arguments_alone():
    arrays = [read_only(across_decades(100, seed)) for seed in range(3)]
    before = [array.tobytes() for array in arrays]
    mean = weighted_mean(arrays, [1, 2, 3])
    mean[:] = 0
    assert [array.tobytes() for array in arrays] == before


# Parameters and buffers of modules ------------------------------------------------------------------------------


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        for name, dtype in {"wide": "float64", "narrow": "bfloat16", "short": "float16", "turns": "complex64"}.items():
            self.register_buffer(name, torch.zeros(2, 2, dtype=getattr(torch, dtype)))
        self.register_buffer("clock", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("bytes", torch.zeros(2, dtype=torch.uint8))
        self.register_buffer("seeds", torch.zeros(2, dtype=torch.uint32))
        self.register_buffer("alive", torch.tensor([True, False]))


def replica(**values):
    module = Buffers()
    state = module.state_dict()
    for name, value in values.items():
        state[name].copy_(torch.as_tensor(value))
    return flatten(module, layout_of(module))


def mixed(replicas, weights):
    return {name: tensor.clone() for name, tensor in tensors_of(mean_of(replicas, weights)).items()}


def test_float_buffers_get_the_weighted_mean():
    names = ("norm.running_mean", "norm.running_var", "wide", "narrow", "short")
    found = mixed(
        [replica(**dict.fromkeys(names, 1.0)), replica(**dict.fromkeys(names, 9.0))],
        [1, 3],
    )
    for name in names:
        assert found[name].unique().tolist() == [7.0]
    assert (found["wide"].dtype, found["narrow"].dtype) == (torch.float64, torch.bfloat16)


def test_float64_buffers_are_averaged_in_float64():
    third = mixed([replica(wide=1.0), replica(wide=0.0), replica(wide=0.0)], [1, 1, 1])["wide"]
    assert third.unique().tolist() == [1 / 3]


def test_complex_buffers_get_the_weighted_mean():
    found = mixed([replica(turns=1 + 4j), replica(turns=5 - 4j)], [1, 3])
    assert found["turns"].tolist() == [[4 - 2j] * 2] * 2


def test_integer_buffers_get_the_maximum():
    replicas = [
        replica(clock=3, bytes=[200, 1], seeds=torch.tensor([7, 2**32 - 1], dtype=torch.uint32)),
        replica(clock=-5, bytes=[100, 2]),
    ]
    replicas[0].extra.flags.writeable = False
    for weights in ([1, 100], [100, 1]):
        found = mixed(replicas, weights)
        assert found["clock"].item() == 3
        assert found["bytes"].tolist() == [200, 2]
        assert found["seeds"].tolist() == [7, 2**32 - 1]


def test_the_counter_of_batch_norm_is_the_largest():
    big = 2**62 + 1  # beyond what a float64 can hold
    found = mixed([replica(**{"norm.num_batches_tracked": n}) for n in (5, big, 7)], [1, 1, 1])
    assert found["norm.num_batches_tracked"].item() == big


def test_bools_must_agree():
    assert mixed([replica(), replica()], [1, 1])["alive"].tolist() == [True, False]
    with pytest.raises(UnsuitableModel, match="bool buffer alive differs"):
        mean_of([replica(), replica(alive=[True, True])], [1, 1])


def test_a_mask_of_minus_infinity_stays():
    mask = [-float("inf"), 0.0]
    found = mixed([replica(**{"norm.running_mean": mask, "wide": -float("inf")})] * 3, [1, 2, 3])
    assert found["norm.running_mean"].tolist() == mask
    assert found["wide"].unique().tolist() == [-float("inf")]


@pytest.mark.parametrize("weights", [[1, 1, 1], [3, 1, 3], [11, 5, 2, 9, 1, 1, 4]])
def test_the_average_of_equal_replicas_is_that_replica(weights):
    torch.manual_seed(0)
    module = Buffers()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name in ("clock", "bytes", "norm.num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.dtype not in (torch.bool, torch.uint32):
                tensor.copy_(torch.randn(tensor.shape, dtype=torch.complex128 if tensor.is_complex() else None))
    params = flatten(module, layout_of(module))
    found = mean_of([params] * len(weights), weights)
    assert found.flat.tobytes() == params.flat.tobytes()
    assert found.extra.tobytes() == params.extra.tobytes()


def test_equal_float64_buffers_stay_as_they_are():
    module = nn.Linear(1, 1)
    module.register_buffer("wide", torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    params = flatten(module, layout_of(module))
    assert mean_of([params] * 3, [3, 1, 3]).extra.tobytes() == params.extra.tobytes()


def test_the_average_leaves_its_arguments_alone():
    layout = layout_of(Buffers())
    replicas = [replica(clock=3, wide=0.1), replica(clock=9, wide=0.7)]
    given = [Parameters(layout, read_only(r.flat), read_only(r.extra)) for r in replicas]
    before = [(r.flat.tobytes(), r.extra.tobytes()) for r in given]
    found = mean_of(given, [2, 5])
    found.flat[:] = 0
    found.extra[:] = 0
    assert [(r.flat.tobytes(), r.extra.tobytes()) for r in given] == before


def test_tied_weights_are_averaged_once():
    def tied(value):
        module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        module[1].weight = module[0].weight
        module.register_buffer("one", torch.full((2,), value, dtype=torch.float64))
        module.register_buffer("two", module.one)
        with torch.no_grad():
            module[0].weight.fill_(value)
        return flatten(module, layout_of(module))

    found = tensors_of(mean_of([tied(1.0), tied(2.0)], [1, 1]))
    assert [found[name].unique().tolist() for name in ("0.weight", "1.weight", "one", "two")] == [[1.5]] * 4


# What averaging means -------------------------------------------------------------------------------------------


def regression(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]]) + 0.1 * torch.randn(count, 1, generator=generator)


def after_steps(params, parts, rate):
    """Train a linear model from `params`, one SGD step for each part."""
    module = nn.Linear(4, 1)
    load_into(module, params)
    recipe = Recipe(mse, torch.optim.SGD, {"lr": rate}, constant, 0.0)
    steps = [(len(x), [TensorBatch((x,), y, len(x))]) for x, y in parts]
    run_local_steps(module, recipe, empty_inner_state(), steps, first_step=0, total_steps=len(steps))
    return flatten(module, params.layout)


def linear_model(seed):
    torch.manual_seed(seed)
    module = nn.Linear(4, 1)
    return flatten(module, layout_of(module))


@pytest.mark.parametrize("sizes", [[64], [7, 30, 27], [1, 2, 3, 5, 8, 13, 32]])
def test_one_full_step_on_each_partition_is_one_step_on_all_data(sizes):
    x, y = regression(64)
    start = linear_model(2)
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    found = mean_of([after_steps(start, [part], 0.1) for part in parts], sizes)
    whole = after_steps(start, [(x, y)], 0.1)
    np.testing.assert_allclose(found.flat, whole.flat, rtol=1e-6)
    assert np.abs(whole.flat - start.flat).max() > 0.1
    if len(sizes) > 1:  # the weights matter
        unweighted = mean_of([after_steps(start, [part], 0.1) for part in parts], [1] * len(sizes))
        assert np.abs(unweighted.flat - whole.flat).max() > 1e-3


@pytest.mark.parametrize("replicas", [2, 4])
def test_averaging_after_every_step_is_training_with_the_large_batch(replicas):
    x, y = regression(320, seed=1)
    large = small = linear_model(3)
    for round_x, round_y in zip(x.split(16 * replicas), y.split(16 * replicas), strict=True):
        large = after_steps(large, [(round_x, round_y)], 0.05)
        each = zip(round_x.split(16), round_y.split(16), strict=True)
        small = mean_of([after_steps(small, [part], 0.05) for part in each], [16] * replicas)
    np.testing.assert_allclose(small.flat, large.flat, rtol=1e-6, atol=1e-6)


def test_averaging_after_several_steps_is_not():
    x, y = regression(64)
    start = linear_model(2)
    halves = [(x[:32], y[:32]), (x[32:], y[32:])]
    found = mean_of([after_steps(start, [half] * 4, 0.1) for half in halves], [32, 32])
    whole = after_steps(start, [(x, y)] * 4, 0.1)
    assert np.abs(found.flat - whole.flat).max() > 1e-3


# Median and trimmed mean ----------------------------------------------------------------------------------------


def test_median_and_trimmed_mean_by_hand():
    arrays = [np.array(values, np.float32) for values in ([1, 5, 0], [2, 1, 0], [4, 3, 9], [8, 2, 0], [100, 4, 0])]
    assert middle_mean(arrays, 2).tolist() == [4, 3, 0]
    assert middle_mean(arrays[:4], 1).tolist() == [3, 2.5, 0]
    assert middle_mean(arrays, 1).tolist() == [(2 + 4 + 8) / np.float32(3), 3, 0]
    assert middle_mean(arrays[:1], 0).tolist() == [1, 5, 0]


@given(st.integers(1, 9), st.integers(1, 40), st.data())
def test_they_are_those_of_numpy_and_do_not_depend_on_the_order(count, length, data):
    arrays = [across_decades(length, seed) for seed in range(count)]
    cut = data.draw(st.integers(0, (count - 1) // 2))
    found = middle_mean(arrays, cut)
    kept = np.sort(np.array(arrays, np.float64), axis=0)[cut : count - cut]
    np.testing.assert_allclose(found, kept.mean(axis=0), rtol=1e-6)
    assert middle_mean(data.draw(st.permutations(arrays)), cut).tobytes() == found.tobytes()
    median = middle_mean(arrays, (count - 1) // 2)
    np.testing.assert_allclose(median, np.median(np.array(arrays, np.float64), axis=0), rtol=1e-6)


def test_blocks_of_rows_make_no_difference(monkeypatch):
    arrays = [across_decades(1000, seed) for seed in range(5)]
    whole = middle_mean(arrays, 1)
    monkeypatch.setattr(reduce, "BLOCK", 7)
    assert middle_mean(arrays, 1).tobytes() == whole.tobytes()


@pytest.mark.parametrize("config", [{"reduce": "median"}, {"reduce": "trimmed", "trim": 0.3}])
def test_a_minority_that_sends_anything_does_no_harm(config):
    honest = [linear_model(seed) for seed in range(3)]
    poisoned = [linear_model(7), linear_model(8)]
    for params, value in zip(poisoned, (1e30, -1e30), strict=True):
        params.flat[:] = value
    each = [poisoned[0], *honest, poisoned[1]]
    found = reduced(each, [1000, 1, 1, 1, 1000], AverageConfig(**config)).flat
    low, high = (bound([one.flat for one in honest], axis=0) for bound in (np.min, np.max))
    assert ((low <= found) & (found <= high)).all()
    assert (
        not np.isfinite(mean_of(each, [1] * 5).flat).all() or np.abs(mean_of(each, [2, 1, 1, 1, 1]).flat).max() > 1e20
    )


@pytest.mark.parametrize("config", [{}, {"reduce": "median"}, {"reduce": "trimmed", "trim": 0.3}])
def test_equal_replicas_become_that_replica(config):
    one = linear_model(3)
    found = reduced([one] * 5, [1, 2, 3, 4, 5], AverageConfig(**config))
    assert found.flat.tobytes() == one.flat.tobytes()


def test_a_trim_that_leaves_out_nobody_or_everybody_is_refused():
    for trim, replicas in ((0.1, 4), (0.3, 3), (0.4, 2), (0.49, 1)):
        with pytest.raises(InvalidConfig, match=f"of {replicas} replicas leaves out 0 at each end"):
            check_reduce(AverageConfig(reduce="trimmed", trim=trim), replicas)
    for trim, replicas in ((0.1, 10), (0.1, 30), (0.34, 3), (0.49, 100)):
        check_reduce(AverageConfig(reduce="trimmed", trim=trim), replicas)
    check_reduce(AverageConfig(reduce="median"), 1)
