"""Models that end, freeze or fill the process that runs them."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable

import torch
from torch import nn


class Mine(nn.Module):
    """Does something at its call of a number, in each process."""

    def __init__(self, act: Callable[[], object], at: int, trains: bool, token: str) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.act, self.at, self.trains, self.token = act, at, trains, token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training == self.trains:
            self.count()
        return self.linear(x)

    def count(self) -> None:
        COUNTS[self.token] = COUNTS.get(self.token, 0) + 1
        if COUNTS[self.token] >= self.at:
            self.act()


COUNTS: dict[str, int] = {}
"""Calls in this process, by test."""


def fill() -> None:
    """Take memory until there is no more."""
    held = []
    while True:
        held.append(bytearray(os.urandom(1)) * (32 << 20))
        time.sleep(0.05)


def hold_the_lock() -> None:
    """Sleep in C without letting go of Python's lock."""
    ctypes.PyDLL(None).sleep(3600)


def interrupt() -> None:
    raise KeyboardInterrupt


class Odd(BaseException):
    """Not an Exception."""


def odd() -> None:
    raise Odd("odd")


ACTS: dict[str, Callable[[], object]] = {
    "os._exit": lambda: os._exit(0),
    "abort": os.abort,
    "segfault": lambda: ctypes.string_at(0),
    "sys.exit": lambda: sys.exit(0),
    "KeyboardInterrupt": interrupt,
    "BaseException": odd,
    "GeneratorExit": lambda: (_ for _ in ()).throw(GeneratorExit()),
    "fill": fill,
    "hold the lock": hold_the_lock,
}


def acting(act: str, token: str, at: int = 40, trains: bool = True) -> nn.Module:
    """Return a model that acts at its call of a number; a token names the test."""
    return Mine(ACTS[act], at, trains, token)


def built(act: str) -> nn.Module:
    """Act while the model is built."""
    ACTS[act]()
    return nn.Linear(6, 3)


class Later(nn.Module):
    """Ends its process when it is evaluated, once a variable of the environment says so."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and os.environ.get("DTRAIN_TESTS_END"):
            os._exit(0)
        return self.linear(x)


def later() -> nn.Module:
    return Later()
