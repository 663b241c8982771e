from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.algorithm.params import (
    flatten,
    from_tensors,
    is_finite,
    layout_of,
    load_into,
    params_sha256,
    tensors_of,
    with_frozen,
    without_frozen,
)
from dtrain.algorithm.replica import empty_inner_state
from dtrain.errors import UnsuitableModel
from dtrain.types import InnerState, Parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.hidden = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight


class Zoo(nn.Module):
    """Buffers of many dtypes and shapes, before and after the parameters."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.first = nn.Linear(2, 3)
        self.register_buffer("scale", torch.randn(2, 2))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("wide", torch.randn(3, dtype=torch.float64))
        self.register_buffer("narrow", torch.randn(5).to(torch.bfloat16))
        self.register_buffer("rate", torch.tensor(0.5))
        self.register_buffer("nothing", torch.zeros(0, 4, dtype=torch.int64))
        self.register_buffer("turns", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("forgotten", torch.randn(9), persistent=False)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 1)
        self.first.bias.requires_grad_(False)


def transposed():
    module = nn.Linear(4, 3)
    module.weight = nn.Parameter(torch.randn(4, 3).t())
    module.register_buffer("wide", torch.randn(4, 3, dtype=torch.float64).t())
    assert not module.weight.is_contiguous()
    return module


MODULES = {
    "linear": lambda: nn.Linear(3, 2),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
    "tied": Tied,
    "zoo": Zoo,
    "not contiguous": transposed,
}
modules = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES.keys())


def scrambled(module):
    """Give every tensor of a module's state other values."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            drawn = torch.randint(-3, 4, tensor.shape, generator=generator)
            tensor.copy_(drawn > 0 if tensor.dtype == torch.bool else drawn)
    return module


def bits(tensors):
    """The names and the bytes of a state_dict, whatever its dtypes."""
    return {
        name: (t.dtype, tuple(t.shape), t.detach().clone().contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, t in tensors.items()
    }


def read_only(params):
    flat, extra, frozen = params.flat.copy(), params.extra.copy(), params.frozen.copy()
    flat.flags.writeable = extra.flags.writeable = frozen.flags.writeable = False
    return Parameters(params.layout, flat, extra, frozen)


# There and back ---------------------------------------------------------------------------------------------


@modules
def test_a_state_goes_into_flat_arrays_and_back(build):
    torch.manual_seed(0)
    module = build()
    params = flatten(module, layout_of(module))
    other = scrambled(build())
    assert bits(other.state_dict()) != bits(module.state_dict())
    load_into(other, params)
    assert bits(other.state_dict()) == bits(module.state_dict())
    assert bits(tensors_of(params)) == bits(module.state_dict())


@modules
def test_read_only_arrays_as_dask_gives_them_can_be_loaded(build):
    module = build()
    params = read_only(flatten(module, layout_of(module)))
    other = scrambled(build())
    load_into(other, params)
    assert bits(other.state_dict()) == bits(module.state_dict())
    assert params_sha256(params) == params_sha256(flatten(module, layout_of(module)))
    assert is_finite(params)


@modules
def test_flat_arrays_are_copies_and_loading_copies_too(build):
    module = build()
    layout = layout_of(module)
    before = flatten(module, layout)
    kept = bits(tensors_of(before))
    load_into(module, before)
    scrambled(module)
    assert bits(tensors_of(before)) == kept


@modules
def test_two_builds_of_a_model_have_the_same_layout(build):
    assert layout_of(build()) == layout_of(build())


def test_loading_keeps_parameters_the_same_objects():
    module = Tied()
    weight = module.embed.weight
    load_into(module, flatten(scrambled(Tied()), layout_of(module)))
    assert module.embed.weight is weight
    assert module.out.weight is weight


@modules
def test_the_tensors_of_a_file_give_the_same_arrays(build):
    module = build()
    layout = layout_of(module)
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert params_sha256(from_tensors(tensors, layout)) == params_sha256(flatten(module, layout))


def test_tensors_that_do_not_fit_are_named():
    module = nn.Linear(2, 1)
    layout = layout_of(module)
    good = dict(module.state_dict())
    with pytest.raises(UnsuitableModel, match="extra differ in name"):
        from_tensors({**good, "extra": torch.zeros(1)}, layout)
    with pytest.raises(UnsuitableModel, match="bias differ in name"):
        from_tensors({"weight": good["weight"]}, layout)
    with pytest.raises(UnsuitableModel, match=r"weight is float32\[1, 3\], but the model has float32\[1, 2\]"):
        from_tensors({**good, "weight": torch.zeros(1, 3)}, layout)
    with pytest.raises(UnsuitableModel, match=r"bias is float64\[1\]"):
        from_tensors({**good, "bias": torch.zeros(1, dtype=torch.float64)}, layout)


# Where things lie -------------------------------------------------------------------------------------------


@modules
def test_parameters_come_first_and_nothing_overlaps(build):
    module = build()
    layout = layout_of(module)
    assert layout.num_params == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert layout.num_frozen == sum(p.numel() for p in module.parameters() if not p.requires_grad)
    own = [entry for entry in layout.entries if not entry.alias]
    used = {
        "flat": np.zeros(layout.num_flat, int),
        "extra": np.zeros(layout.num_extra, int),
        "frozen": np.zeros(layout.num_frozen, int),
    }
    for entry in own:
        used[entry.kind if entry.kind in used else "flat"][entry.offset : entry.offset + entry.size] += 1
        if entry.kind == "frozen":
            continue
        if entry.kind != "extra":
            assert (entry.offset < layout.num_params) == (entry.kind == "param")
        else:
            assert entry.offset % 8 == 0
    assert used["flat"].tolist() == [1] * layout.num_flat
    assert used["frozen"].tolist() == [1] * layout.num_frozen
    assert used["extra"].max(initial=0) <= 1
    assert sorted(entry.name for entry in layout.entries) == sorted(module.state_dict())


def test_the_zoo_lies_where_it_should():
    layout = layout_of(Zoo())
    # 2*3 (first), 3 + 3 (norm), 3 + 1 (last); then scale 4, rate 1, running mean and variance 3 + 3; the first bias
    # is frozen
    assert (layout.num_params, layout.num_flat, layout.num_frozen) == (16, 27, 3)
    # mask 3 -> 8, count 8, wide 24, narrow 10 -> 16, nothing 0, turns 24, num_batches_tracked 8
    assert layout.num_extra == 88
    kinds = {entry.name: entry.kind for entry in layout.entries}
    assert {name for name, kind in kinds.items() if kind == "buffer"} == {
        "scale",
        "rate",
        "norm.running_mean",
        "norm.running_var",
    }
    assert (kinds["first.weight"], kinds["first.bias"]) == ("param", "frozen")
    assert "forgotten" not in kinds


def test_tied_weights_stand_once():
    layout = layout_of(Tied())
    assert layout.num_params == layout.num_flat == 5 * 3 + 3 * 3 + 3
    tied = {entry.name: entry for entry in layout.entries}
    assert not tied["embed.weight"].alias
    assert tied["out.weight"].alias
    assert tied["out.weight"].offset == tied["embed.weight"].offset


def test_the_first_elements_of_flat_are_the_parameters_in_order():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    with torch.no_grad():
        for value, tensor in enumerate(module.state_dict().values()):
            tensor.fill_(value)
    flat = flatten(module, layout_of(module)).flat
    # weight 0, bias 1, running_mean 2, running_var 3, num_batches_tracked 4 (no float), weight 5, bias 6
    assert flat.tolist() == [0, 0, 1, 1, 5, 5, 6, 2, 2, 3, 3]


# The name of a set of parameters ------------------------------------------------------------------------------


def sha256_by_the_contract(module):
    digest = hashlib.sha256()
    state = module.state_dict()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        shape = ",".join(str(n) for n in tensor.shape)
        digest.update(name.encode() + b"\0" + str(tensor.dtype).split(".")[1].encode() + b"\0" + shape.encode() + b"\0")
        digest.update(bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
    return digest.hexdigest()


@modules
def test_the_sha256_is_that_of_the_contract(build):
    module = build()
    assert sys.byteorder == "little"
    assert params_sha256(flatten(module, layout_of(module))) == sha256_by_the_contract(module)


def test_the_sha256_of_two_numbers_by_hand():
    module = nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(1.0)
        module.bias.fill_(-2.0)
    # 1.0 is 0x3f800000, -2.0 is 0xc0000000, little-endian
    told = b"bias\0float32\x001\0" + bytes([0, 0, 0, 0xC0]) + b"weight\0float32\x001,1\0" + bytes([0, 0, 0x80, 0x3F])
    assert params_sha256(flatten(module, layout_of(module))) == hashlib.sha256(told).hexdigest()


def test_the_sha256_sees_every_tensor():
    module = Zoo()
    layout = layout_of(module)
    seen = {params_sha256(flatten(module, layout))}
    for tensor in module.state_dict().values():
        if tensor.numel():
            raw = tensor.reshape(-1).view(torch.uint8)
            raw[-1] ^= 1
            seen.add(params_sha256(flatten(module, layout)))
            raw[-1] ^= 1
    assert len(seen) == 1 + sum(t.numel() > 0 for t in module.state_dict().values())
    assert params_sha256(flatten(module, layout)) in seen


# Models that cannot be trained --------------------------------------------------------------------------------


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


class Hidden(nn.Linear):
    def state_dict(self, **kwargs):
        state = super().state_dict(**kwargs)
        del state["bias"]
        return state


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: nn.Linear(2, 1).double(), "parameter weight is float64; parameters must be float32"),
        (lambda: nn.Linear(2, 1).half(), "parameter weight is float16"),
        (lambda: nn.Linear(2, 1).bfloat16(), "parameter weight is bfloat16"),
        (lambda: nn.Sequential(nn.Linear(2, 1), nn.LazyLinear(3)), r"parameter 1.weight has no shape yet"),
        (nn.ReLU, "ReLU has no parameters"),
        (nn.Identity, "Identity has no parameters"),
        (lambda: WithExtraState(1, 1), "_extra_state'] is dict; only tensors"),
        (lambda: Hidden(1, 1), r"parameter bias is not in state_dict\(\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_an_unsuitable_model_is_refused_with_exit_code_3(build, said):
    with pytest.raises(UnsuitableModel, match=said) as caught:
        layout_of(build())
    assert caught.value.code == 3


# Finite or not ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["first.weight", "last.bias", "scale", "rate", "wide", "narrow", "turns", "norm.running_var"]
)
def test_one_bad_number_makes_a_state_not_finite(name, bad):
    module = Zoo()
    layout = layout_of(module)
    before = flatten(module, layout)
    assert is_finite(before)
    module.state_dict()[name].view(-1)[-1] = bad
    assert not is_finite(flatten(module, layout))
    assert not is_finite(flatten(module, layout), before)


def test_a_mask_that_was_infinite_before_is_fine():
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((2, 2), -float("inf")).triu(1))
    layout = layout_of(module)
    before = flatten(module, layout)
    assert not is_finite(before)
    assert is_finite(flatten(module, layout), before)
    module.mask[0, 1] = float("nan")
    assert not is_finite(flatten(module, layout), before)
    module.mask[0, 1] = float("inf")
    assert not is_finite(flatten(module, layout), before)


def test_integers_are_always_finite():
    module = nn.Linear(1, 1)
    module.register_buffer("count", torch.tensor([2**63 - 1, -(2**63)]))
    assert is_finite(flatten(module, layout_of(module)))


# Dask's memory accounting -------------------------------------------------------------------------------------


def test_sizeof_counts_the_arrays():
    module = nn.Linear(100, 100)
    module.register_buffer("wide", torch.zeros(1000, dtype=torch.float64))
    params = flatten(module, layout_of(module))
    assert params.nbytes == 4 * 10_100 + 8 * 1000
    assert params.nbytes <= sys.getsizeof(params) < params.nbytes + 1000
    inner = InnerState((), np.zeros(12345, np.uint8))
    assert 12345 <= sys.getsizeof(inner) < 12345 + 1000
    assert sys.getsizeof(empty_inner_state()) < 1000


# Frozen parameters and extra state --------------------------------------------------------------------------------


def test_frozen_parameters_can_be_kept_apart():
    module = scrambled(Zoo())
    whole = flatten(module, layout_of(module))
    rest = without_frozen(whole)
    assert rest.nbytes == whole.nbytes - 4 * 3
    assert set(tensors_of(whole)) - set(tensors_of(rest)) == {"first.bias"}
    assert is_finite(rest, rest)
    again = with_frozen(rest, whole.frozen)
    assert params_sha256(again) == params_sha256(whole)
    assert bits(tensors_of(again)) == bits(module.state_dict())
    assert with_frozen(whole, rest.frozen) is whole


def test_without_frozen_parameters_nothing_is_kept_apart():
    module = Tied()
    params = flatten(module, layout_of(module))
    assert without_frozen(params) is params
    assert with_frozen(params, params.frozen) is params


def test_a_model_without_a_gradient_is_refused():
    module = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(UnsuitableModel, match="No parameter of Linear requires a gradient") as caught:
        layout_of(module)
    assert "train.freeze" in caught.value.hint


class Remembering(nn.Module):
    """Keeps a tensor as extra state: `state_dict` holds a copy of it."""

    def __init__(self, value=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.scale = torch.full((3,), value)

    def get_extra_state(self):
        return self.scale.clone()

    def set_extra_state(self, state):
        self.scale = state.clone()


def test_extra_state_is_loaded():
    source = nn.Sequential(Remembering(5.0), Remembering(7.0))
    params = flatten(source, layout_of(source))
    module = nn.Sequential(Remembering(), Remembering())
    load_into(module, params)
    assert [part.scale.tolist() for part in module] == [[5.0] * 3, [7.0] * 3]
    assert params_sha256(flatten(module, params.layout)) == params_sha256(params)


class Hooked(nn.Module):
    """Saves a buffer under another name, as modules do that were renamed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("now", torch.zeros(2))
        self.register_state_dict_post_hook(lambda module, state, prefix, metadata: self._rename(state, prefix))
        self.register_load_state_dict_pre_hook(lambda module, state, prefix, *rest: self._back(state, prefix))

    @staticmethod
    def _rename(state, prefix):
        state[f"{prefix}before"] = state.pop(f"{prefix}now") * 2

    @staticmethod
    def _back(state, prefix):
        state[f"{prefix}now"] = state.pop(f"{prefix}before") / 2


def test_what_hooks_make_of_the_state_is_loaded():
    source = Hooked()
    source.now.fill_(3.0)
    params = flatten(source, layout_of(source))
    module = Hooked()
    load_into(module, params)
    assert module.now.tolist() == [3.0, 3.0]
