from __future__ import annotations

import pytest
import torch
from torch import nn

from dtrain.algorithm.optimizers import make_optimizer, optimizer_named
from dtrain.errors import InvalidConfig, UserCodeFailed

NAMES = [
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_of_torch_goes_by_its_name(name):
    kind = getattr(torch.optim, name)
    assert optimizer_named(name) is optimizer_named(name.lower()) is optimizer_named(name.upper()) is kind


def test_torch_has_the_usual_optimizers():
    assert {"SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adadelta", "Adafactor"} <= set(NAMES)


def test_a_misspelt_optimizer_gets_a_guess_and_the_list():
    with pytest.raises(InvalidConfig, match='did you mean "adamw"') as caught:
        optimizer_named("adamww")
    assert "adam, " in caught.value.hint
    assert "lbfgs" not in caught.value.hint
    with pytest.raises(InvalidConfig, match="no such optimizer"):
        optimizer_named("optimizer")


def test_lbfgs_is_refused():
    with pytest.raises(InvalidConfig, match="not supported"):
        optimizer_named("LBFGS")


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (torch.optim.SGD, {"learning_rate": 0.1}, "learning_rate"),
        (torch.optim.SGD, {"lr": -1.0}, "-1.0"),
        (torch.optim.SGD, {"lr": "fast"}, "fast"),
        (torch.optim.SGD, {"lr": 0.1, "nesterov": True}, "momentum"),
        (torch.optim.Adam, {"betas": 0.9}, "betas"),
    ],
)
def test_bad_arguments_are_a_fault_of_the_user(kind, options, said):
    with pytest.raises(UserCodeFailed, match=f"{kind.__name__} does not accept") as caught:
        make_optimizer(kind, list(nn.Linear(1, 1).parameters()), options)
    assert said in caught.value.message
    assert caught.value.code == 3
