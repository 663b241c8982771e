"""Build the user's module, and isolate the global state of torch, numpy and random from task to task."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from dtrain.config.compare import has_redacted
from dtrain.config.functions import Function, described, takes_weight
from dtrain.errors import InvalidConfig, NotAModule
from dtrain.runtime.usercode import user_code


def build_module(build: Callable[..., nn.Module], arguments: Mapping[str, object], seed: int) -> nn.Module:
    """Call the user's function under the run's seed.

    Raises
    ------
    NotAModule
        It returned something else.
    UserCodeFailed
        It raised an exception.
    InvalidConfig
        An argument is a URL of which a run has not kept all.
    """
    if has_redacted(arguments):
        raise InvalidConfig(
            "model_args: a run keeps no user, query or fragment of a URL, since they may be secrets.",
            "Give it again: --set model_args.NAME=URL; or let the function take it from the environment.",
        )
    with isolated(seed, torch.get_num_threads()), user_code("The function given as model"):
        module = build(**arguments)
    if not isinstance(module, nn.Module):
        hint = "Return the module from the function." if module is None else ""
        raise NotAModule(f"The function given as model returned {type(module).__name__}, not a torch.nn.Module.", hint)
    return module


def check_builder(build: Callable[..., object]) -> None:
    """Refuse a module in place of a function that builds one.

    Raises
    ------
    NotAModule
        It is a module.
    """
    if isinstance(build, nn.Module):
        kind = type(build).__name__
        raise NotAModule(
            f"The model is a module, an instance of {kind}; dtrain needs a function that builds it.",
            f"Give the class and model_args, or a function: def build(): return {kind}(...).",
        )


def check_loss(loss: Callable[..., object], weight: str = "") -> None:
    """Refuse a loss whose parameters would stay as they are, or that would leave out the weight of samples.

    Parameters
    ----------
    loss : callable
        Of the user's.
    weight : str
        ``data.weight``.

    Raises
    ------
    InvalidConfig
        It is a module with parameters that require a gradient, or does not take a weight that is there.
    """
    if weight and not takes_weight(loss):
        raise InvalidConfig(
            f"train.loss is {described(loss)}, which takes no weight of samples, and data.weight = "
            f'"{weight}": a loss of your own is called as (outputs, targets, weight).',
            "Take the weight as third argument and return (sum of weight * term, sum of weight); or leave data.weight "
            "out.",
        )
    named = loss.named_parameters() if isinstance(loss, nn.Module) else ()
    if trainable := [name for name, parameter in named if parameter.requires_grad]:
        raise InvalidConfig(
            f"train.loss is {described(loss)} with parameters of its own ({', '.join(trainable[:3])}): only the "
            "model's are trained.",
            "Make them part of the model, or call loss.requires_grad_(False).",
        )


def modules_on_device(functions: dict[str, Function], device: str) -> dict[str, Function]:
    """Return functions; those that are modules, such as losses with class weights, are copied to the device."""
    return {
        key: copy.deepcopy(function).to(device) if isinstance(function, nn.Module) and device != "cpu" else function
        for key, function in functions.items()
    }


@contextmanager
def isolated(seed: int, threads: int) -> Iterator[None]:
    """Seed torch, numpy and random for one task, and restore all global state afterwards."""
    states = random.getstate(), np.random.get_state()
    before = torch.get_num_threads()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        _seed_torch(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            random.setstate(states[0])
            np.random.set_state(states[1])


def _seed_torch(seed: int) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        torch.manual_seed(seed)
    else:  # torch.manual_seed collects a stack for each accelerator that may be there later: 5 ms
        torch.default_generator.manual_seed(seed)
