"""What of a file goes into a model, what may be new, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from dtrain.algorithm.freeze import freeze
from dtrain.algorithm.params import flatten, layout_of, tensors_of
from dtrain.algorithm.warmstart import WarmStart, warm_start
from dtrain.errors import InvalidConfig, RunDamaged
from dtrain.types import InitFile

Tensors = Mapping[str, torch.Tensor]


class Adapted(nn.Module):
    """Two layers and a batch norm; with adapters a product of two matrices beside the first layer."""

    def __init__(self, adapted: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        if adapted:
            self.lora_a, self.lora_b = nn.Parameter(torch.randn(1, 3)), nn.Parameter(torch.zeros(4, 1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


BASE = ["first.*", "norm.*", "head.*"]


def file_of(tensors: Tensors, name: str = "base.safetensors") -> InitFile:
    return InitFile(name, np.frombuffer(save({key: t.clone() for key, t in tensors.items()}), np.uint8))


def started(
    tensors: Tensors, patterns: Sequence[str] = (), model: Callable[[], nn.Module] = Adapted
) -> tuple[WarmStart, Tensors]:
    """The start, and the model as it was built."""
    module = model()
    freeze(module, patterns)
    built = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return warm_start(flatten(module, layout_of(module)), file_of(tensors), patterns), built


def refused(tensors: Tensors, patterns: Sequence[str] = (), model: Callable[[], nn.Module] = Adapted) -> InvalidConfig:
    with pytest.raises(InvalidConfig) as caught:
        started(tensors, patterns, model)
    assert caught.value.code == 3
    return caught.value


def base() -> dict[str, torch.Tensor]:
    """The state of the model without adapters, buffers that have seen data among it."""
    module = Adapted(adapted=False)
    for _ in range(3):
        module.norm(module.first(torch.randn(8, 3)))
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# Taken ------------------------------------------------------------------------------------------------------------


def test_a_whole_state_is_taken_without_any_freezing() -> None:
    tensors = base()
    start, _ = started(tensors, model=lambda: Adapted(adapted=False))
    taken = tensors_of(start.params)
    assert all(torch.equal(taken[name], tensor) for name, tensor in tensors.items())
    assert (start.tensors, start.new, start.cast) == (9, (), ())
    assert taken["norm.num_batches_tracked"].tolist() == 3


def test_what_is_new_begins_as_it_was_built() -> None:
    tensors = base()
    start, built = started(tensors, BASE)
    taken = tensors_of(start.params)
    assert set(taken) == set(built)
    assert all(torch.equal(taken[name], tensors.get(name, built[name])) for name in taken)
    assert (start.tensors, start.new) == (9, ("lora_a", "lora_b"))


def test_a_head_that_is_left_out_of_the_file_begins_anew() -> None:
    tensors = {name: tensor for name, tensor in base().items() if not name.startswith("head.")}
    start, built = started(tensors, ["first.*", "norm.*"], lambda: Adapted(adapted=False))
    assert start.new == ("head.weight", "head.bias")
    assert torch.equal(tensors_of(start.params)["head.weight"], built["head.weight"])


def test_a_buffer_may_be_new_too() -> None:
    tensors = base()
    del tensors["norm.num_batches_tracked"]  # files of old versions of torch
    assert started(tensors, BASE)[0].new == ("lora_a", "lora_b", "norm.num_batches_tracked")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_floats_are_cast_exactly(dtype: torch.dtype) -> None:
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in base().items()}
    start, _ = started(tensors, model=lambda: Adapted(adapted=False))
    assert start.cast == (str(dtype).removeprefix("torch."),)
    taken = tensors_of(start.params)
    assert taken["first.weight"].dtype == torch.float32
    assert all(torch.equal(taken[name].to(tensor.dtype), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("left", ["embed.weight", "head.weight"])
def test_one_name_of_a_tied_tensor_is_enough(left: str) -> None:
    start, _ = started({left: torch.arange(15.0).reshape(5, 3)}, model=Tied)
    taken = tensors_of(start.params)
    assert taken["embed.weight"].flatten().tolist() == taken["head.weight"].flatten().tolist() == list(range(15))
    assert start.new == ()


def test_both_names_of_a_tied_tensor_must_agree() -> None:
    tensors = {"embed.weight": torch.ones(5, 3), "head.weight": torch.ones(5, 3)}
    assert started(tensors, model=Tied)[0].tensors == 2
    tensors["head.weight"][4, 2] = 1.5
    said = refused(tensors, model=Tied).message
    assert "embed.weight and head.weight are one tensor in the model, and differ" in said


# Refused ----------------------------------------------------------------------------------------------------------


def test_more_tensors_than_the_model_has_are_named() -> None:
    error = refused({**base(), "frist.weight": torch.zeros(4, 3)}, model=lambda: Adapted(adapted=False))
    assert error.message == "train.init: the model has no frist.weight, of the 10 tensors of base.safetensors"
    assert 'if k not in ["frist.weight"]' in error.hint


def test_the_nearest_name_that_the_file_lacks_is_proposed() -> None:
    tensors = base()
    tensors["frist.weight"] = tensors.pop("first.weight")
    assert 'did you mean "first.weight"?' in refused(tensors).message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_a_prefix_of_the_file_is_named(prefix: str) -> None:
    error = refused({prefix + name: tensor for name, tensor in base().items()}, BASE)
    assert error.hint == f'Only in the file names begin with "{prefix}": save it with name.removeprefix("{prefix}").'


def test_a_prefix_of_the_model_is_named() -> None:
    tensors = {name.removeprefix("first."): t for name, t in base().items() if name.startswith("first.")}
    error = refused(tensors)
    assert error.hint == 'The model has them below "first.": save the file with "first." + name.'


def test_another_shape_says_how_to_leave_it_out() -> None:
    tensors = {**base(), "head.weight": torch.zeros(10, 4), "head.bias": torch.zeros(10)}
    error = refused(tensors, BASE)
    assert "head.weight is [10, 4] in base.safetensors, and [2, 4] in the model; 1 more do not fit." in error.message
    line = (
        'save_file({k: t for k, t in load_file("base.safetensors").items() if k not in ["head.weight", "head.bias"]}, '
    )
    assert line in error.hint
    assert "train.freeze" in error.hint


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("head.bias", torch.float64, "head.bias is float64 in base.safetensors, and float32 in the model"),
        ("head.bias", torch.int32, "head.bias is int32"),
        ("norm.num_batches_tracked", torch.int32, "int32 in base.safetensors, and int64 in the model"),
        ("norm.num_batches_tracked", torch.float16, "float16 in base.safetensors, and int64 in the model"),
    ],
)
def test_other_dtypes_are_not_cast(name: str, dtype: torch.dtype, said: str) -> None:
    tensors = base()
    tensors[name] = tensors[name].to(dtype)
    error = refused(tensors, BASE)
    assert said in error.message
    assert error.hint.startswith("Save it as tensor.to(torch.")


def test_new_tensors_need_train_freeze() -> None:
    error = refused(base())
    assert "base.safetensors lacks 2 of the 11 tensors of the model: lora_a, lora_b." in error.message
    assert "train.freeze" in error.hint


def test_what_is_frozen_by_hand_does_not_stand_for_train_freeze() -> None:
    def by_hand() -> nn.Module:
        module = Adapted()
        module.first.requires_grad_(False)
        return module

    assert "lacks 2 of the 11" in refused(base(), model=by_hand).message


def test_a_new_tensor_must_not_be_frozen() -> None:
    error = refused(base(), ["first.*", "lora_a"])
    assert "base.safetensors has no values for lora_a, and frozen they would stay as" in error.message
    assert "Leave them out of train.freeze" in error.hint


@pytest.mark.parametrize("data", [b"", b"nothing", save({"first.weight": torch.zeros(4, 3)})[:-1]])
def test_a_file_that_is_damaged_is_exit_code_5(data: bytes) -> None:
    module = Adapted()
    with pytest.raises(RunDamaged, match=r"base.safetensors cannot be read as safetensors: \w+") as caught:
        warm_start(
            flatten(module, layout_of(module)), InitFile("base.safetensors", np.frombuffer(data, np.uint8)), BASE
        )
    assert caught.value.code == 5


def test_an_empty_file_lacks_all() -> None:
    assert "lacks 9 of the 9 tensors" in refused({}, model=lambda: Adapted(adapted=False)).message
