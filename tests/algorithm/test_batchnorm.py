"""Recalibration: running statistics are those of all samples that passed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.algorithm.batch import TensorBatch
from dtrain.algorithm.batchnorm import Statistics, norm_layers, take_statistics, with_statistics
from dtrain.algorithm.params import flatten, layout_of, load_into, tensors_of
from dtrain.algorithm.slices import ALIGNMENT, cut_params, join_params, slices_of

SIZES = (5, 7, 4, 6)


def batches(seed: int, sizes: Sequence[int] = SIZES, shape: Sequence[int] = (3,)) -> list[TensorBatch]:
    """Batches of different means and spreads, as in stored order."""
    made = []
    for number, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(100 * seed + number)
        x = torch.randn(size, *shape, generator=generator) * (1 + number) + 5 * number + seed
        made.append(TensorBatch((x,), torch.zeros(size), size))
    return made


def whole(made: Sequence[TensorBatch]) -> TensorBatch:
    x = torch.cat([batch.inputs[0] for batch in made])
    return TensorBatch((x,), torch.zeros(len(x)), len(x))


def recalibrated(module: nn.Module, replicas: Sequence[Sequence[TensorBatch]]) -> nn.Module:
    """Return a copy of a module with the statistics of some batches of each replica."""
    statistics = [take_statistics(copy.deepcopy(module), own, "float32") for own in replicas]
    params, found = flatten(module, layout_of(module)), copy.deepcopy(module)
    load_into(found, with_statistics(params, statistics))
    return found


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items() if "running" in name}


def in_one_batch(module: nn.Module, made: Sequence[TensorBatch]) -> dict[str, torch.Tensor]:
    """Statistics as torch takes them of one batch of everything."""
    module = copy.deepcopy(module).eval()
    for layer in norm_layers(module).values():
        layer.train()
        layer.momentum = 1.0
    with torch.no_grad():
        module(*whole(made).inputs)
    return buffers(module)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


def trained(module: nn.Module) -> nn.Module:
    """A module whose statistics and parameters are not those of a new one."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.data.normal_()
    for layer in norm_layers(module).values():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.normal_()
        layer.running_var.uniform_(1, 2)
    return module


# What they are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 3])
def test_they_are_those_of_one_batch_of_all_samples(replicas: int) -> None:
    module = trained(nn.BatchNorm1d(3))
    made = [batches(seed, SIZES[seed:]) for seed in range(replicas)]
    found = buffers(recalibrated(module, made))
    same(found, in_one_batch(module, [batch for own in made for batch in own]))
    everything = whole([batch for own in made for batch in own]).inputs[0].double()
    torch.testing.assert_close(found["running_mean"].double(), everything.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["running_var"].double(), everything.var(0), rtol=1e-6, atol=0)


def test_two_replicas_by_hand() -> None:
    # 0, 2 | 6, 10, 14: mean 6.4, squares of the differences 40.96 + 19.36 + 0.16 + 12.96 + 57.76, over 5 - 1
    made = [
        [TensorBatch((torch.tensor(values).reshape(-1, 1),), torch.zeros(len(values)), len(values))]
        for values in ([0.0, 2.0], [6.0, 10.0, 14.0])
    ]
    found = buffers(recalibrated(nn.BatchNorm1d(1), made))
    assert found["running_mean"].item() == pytest.approx(6.4)
    assert found["running_var"].item() == pytest.approx(131.2 / 4)


def test_places_count_as_samples_do() -> None:
    module = trained(nn.BatchNorm2d(3))
    made = [batches(seed, shape=(3, 4, 2)) for seed in range(2)]
    same(buffers(recalibrated(module, made)), in_one_batch(module, [batch for own in made for batch in own]))


def test_a_layer_after_a_layer_sees_what_it_sees_in_training() -> None:
    """Batches have statistics of their own: those of the second layer are of normalised batches."""
    module = trained(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)))
    made = batches(0)
    found = buffers(recalibrated(module, [made]))
    hidden = []
    with torch.no_grad():
        for batch in made:
            outputs = module[0](batch.inputs[0])
            first = nn.functional.batch_norm(outputs, None, None, module[1].weight, module[1].bias, training=True)
            hidden.append(torch.relu(first))
    torch.testing.assert_close(found["3.running_mean"], torch.cat(hidden).mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["3.running_var"], torch.cat(hidden).var(0), rtol=1e-4, atol=1e-5)


def test_instance_norm_keeps_the_mean_of_the_variances_within_samples() -> None:
    module = trained(nn.InstanceNorm1d(3, affine=True, track_running_stats=True))
    made = [batches(seed, shape=(3, 8)) for seed in range(2)]
    found = buffers(recalibrated(module, made))
    same(found, in_one_batch(module, [batch for own in made for batch in own]))
    x = whole([batch for own in made for batch in own]).inputs[0]
    torch.testing.assert_close(found["running_var"], x.var(2).mean(0), rtol=1e-5, atol=0)


def test_a_layer_that_is_called_twice_counts_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            called: torch.Tensor = self.norm(x) + self.norm(input=10 * x)
            return called

    found = buffers(recalibrated(Twice(), [batches(0)]))
    both = torch.cat([batch.inputs[0] * factor for batch in batches(0) for factor in (1, 10)])
    torch.testing.assert_close(found["norm.running_mean"], both.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found["norm.running_var"], both.var(0), rtol=1e-5, atol=0)


def test_bfloat16_activations_give_float32_statistics() -> None:
    module = trained(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    taken = take_statistics(copy.deepcopy(module), batches(0), "bfloat16")
    exact = take_statistics(copy.deepcopy(module), batches(0), "float32")
    np.testing.assert_allclose(taken["1"].mean, exact["1"].mean, rtol=0.05, atol=0.1)
    np.testing.assert_allclose(taken["1"].variance, exact["1"].variance, rtol=0.05)


# What is left alone -----------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Norm layers under several names, dropout, and layers without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.BatchNorm1d(4, affine=False)
        )
        self.alias = self.layers[2]
        self.without = nn.BatchNorm1d(4, track_running_stats=False)
        self.unused = nn.BatchNorm1d(2)
        self.wide = nn.BatchNorm1d(4, affine=False).double()
        self.tail = nn.Linear(4, 4)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.wide(self.without(self.layers(x)).double())
        out: torch.Tensor = self.tail(hidden.float())
        return out


CALLED = ("layers.2", "alias", "layers.4")


def test_before_and_after_differ_only_in_the_statistics_of_layers_that_are_called() -> None:
    module = trained(Mixed())
    module.layers[2].num_batches_tracked.fill_(17)
    before, after = module.state_dict(), recalibrated(module, [batches(0), batches(1)]).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.{key}" for name in CALLED for key in ("running_mean", "running_var")}


def test_dropout_is_off() -> None:
    module = trained(Mixed())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = take_statistics(copy.deepcopy(module), batches(0), "float32")
    assert torch.equal(torch.get_rng_state(), state)
    module.layers[1].p = 0.0
    second = take_statistics(copy.deepcopy(module), batches(0), "float32")
    assert bits(first) == bits(second)


def bits(statistics: Statistics) -> Any:
    return {
        name: (one.count, one.mean.tobytes(), one.variance.tobytes(), one.within) for name, one in statistics.items()
    }


def test_layers_that_stay_in_evaluation_mode_in_training_keep_their_statistics() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fixed, self.free = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def train(self, mode: bool = True) -> Fixed:
            super().train(mode)
            self.fixed.eval()
            return self

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.free(self.fixed(x))
            return out

    module = trained(Fixed())
    before, after = buffers(module), buffers(recalibrated(module, [batches(0)]))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "free.running_mean",
        "free.running_var",
    }


def test_the_names_of_a_module_that_is_itself_a_norm_layer() -> None:
    module = nn.BatchNorm1d(3)
    assert list(norm_layers(module)) == [""]
    assert set(tensors_of(flatten(module, layout_of(module)))) >= {"running_mean", "running_var"}
    assert not torch.equal(recalibrated(module, [batches(0)]).running_var, module.running_var)


def test_a_model_without_norm_layers_stays_as_it_is() -> None:
    module = nn.Linear(3, 2)
    assert take_statistics(copy.deepcopy(module), batches(0), "float32") == {}
    params = flatten(module, layout_of(module))
    assert with_statistics(params, [{}, {}]).flat.tobytes() == params.flat.tobytes()


def test_a_layer_that_only_some_replicas_call_has_their_statistics() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.large = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.large(x) if x.mean() > 100 else self.always(x)
            return out

    module, high = Sometimes(), [TensorBatch((torch.randn(9, 3) + 200,), torch.zeros(9), 9)]
    found = recalibrated(module, [batches(0), high])
    torch.testing.assert_close(found.large.running_var, high[0].inputs[0].var(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.always.running_mean, whole(batches(0)).inputs[0].mean(0), rtol=1e-5, atol=0)


def test_the_last_slice_has_the_statistics_and_arguments_are_not_changed() -> None:
    module = trained(nn.Sequential(nn.Linear(3, 2 * ALIGNMENT), nn.BatchNorm1d(2 * ALIGNMENT)))
    params = flatten(module, layout_of(module))
    params.flat.flags.writeable = False
    statistics = [take_statistics(copy.deepcopy(module), batches(0), "float32")]
    expected = with_statistics(params, statistics)
    assert expected.flat.tobytes() != params.flat.tobytes()
    for count in (2, 5):
        *parts, last = [cut_params(params, at) for at in slices_of(params.layout, count)]
        assert join_params([*parts, with_statistics(last, statistics)]).flat.tobytes() == expected.flat.tobytes()


def test_variances_stay_positive_and_exact_far_from_zero() -> None:
    made = [TensorBatch((torch.full((4, 3), 1e4) + torch.randn(4, 3),), torch.zeros(4), 4) for _ in range(5)]
    found = buffers(recalibrated(nn.BatchNorm1d(3), [made[:2], made[2:]]))
    torch.testing.assert_close(found["running_var"].double(), whole(made).inputs[0].double().var(0), rtol=1e-2, atol=0)
    constant = [TensorBatch((torch.full((4, 3), 0.1),), torch.zeros(4), 4)] * 3
    assert buffers(recalibrated(nn.BatchNorm1d(3), [constant]))["running_var"].tolist() == [0.0] * 3
