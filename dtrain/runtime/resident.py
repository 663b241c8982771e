"""What a process keeps of a run between tasks: a cache of speed, never of truth.

A task finds here the opened arrays, the partitions and a template of the model. All of it can be made again from
the `RunSpec`; nothing in it changes what a task computes.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from dtrain.algorithm.evaluate import FROM_LOSS, METRICS, Metric, mean_metric, metric_key
from dtrain.algorithm.local import Recipe, optimizer_named
from dtrain.algorithm.losses import LOSSES
from dtrain.algorithm.plan import schedule_named, with_warmup
from dtrain.config import TrainConfig
from dtrain.data.partition import DataPlan, Partition, SplitName, eval_partitions, train_partitions
from dtrain.data.read import UnitReader
from dtrain.data.samples import Samples
from dtrain.errors import NotAModule
from dtrain.runtime.usercode import unpickle_functions, user_code


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """All that is fixed during a run, as it travels to the workers: plain values and bytes."""

    run_id: str
    """Names one execution of a run; keys and residents carry it."""
    samples: Samples
    plan: DataPlan
    held_out: tuple[Samples, DataPlan] | None
    """The store of ``data.val_path``, all of which is the split "val"."""
    config: TrainConfig
    code: bytes
    """The user's functions (`pickle_functions`)."""
    threads: int
    """Threads of torch in a task; they decide bits."""


class Resident:
    """The objects of one run in one process. `lock` lets one task at a time use torch's global state."""

    lock = threading.Lock()

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec

    @cached_property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """The user's functions by config key."""
        with user_code("Loading the code of the run"):
            return unpickle_functions(self.spec.code)

    @cached_property
    def partitions(self) -> tuple[Partition, ...]:
        """The partition of each replica."""
        return train_partitions(self.spec.plan)

    @cached_property
    def _eval_partitions(self) -> dict[SplitName, tuple[Partition, ...]]:
        return {}

    def eval_partitions(self, split: SplitName) -> tuple[Partition, ...]:
        """Return the pieces of an evaluation."""
        if split not in self._eval_partitions:
            held_out = self.spec.held_out if split == "val" else None
            plan, within = (self.spec.plan, split) if held_out is None else (held_out[1], "all")
            self._eval_partitions[split] = eval_partitions(plan, within)
        return self._eval_partitions[split]

    def reader(self, split: SplitName = "train") -> UnitReader:
        """Return a reader of a split, with fresh counters."""
        if split == "val" and self.spec.held_out is not None:
            return UnitReader(*self.spec.held_out)
        return UnitReader(self.spec.samples, self.spec.plan)

    @cached_property
    def _template(self) -> nn.Module:
        return build_module(self.functions["model"], self.spec.config.model_args, self.spec.config.train.seed)

    def module(self) -> nn.Module:
        """Return a module as the user's function built it: a copy, so that no task sees what another one did."""
        return copy.deepcopy(self._template)

    @cached_property
    def recipe(self) -> Recipe:
        """Loss, optimizer and schedule of the local steps."""
        train, own = self.spec.config.train, self.functions
        return Recipe(
            loss=own["train.loss"] if "train.loss" in own else LOSSES[train.loss],
            optimizer=own["train.optimizer"] if "train.optimizer" in own else optimizer_named(train.optimizer),
            optimizer_args=train.optimizer_args,
            schedule=with_warmup(own["train.schedule"], train.warmup_steps)
            if "train.schedule" in own
            else schedule_named(train.schedule, train.warmup_steps),
            clip_norm=train.clip_norm,
        )

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The metrics that are computed batch by batch, by the name they are reported with."""
        found: dict[str, Metric] = {}
        for name in self.spec.config.train.metrics:
            if name not in FROM_LOSS:
                own = self.functions.get(f"train.metrics.{name}")
                found[metric_key(name)] = mean_metric(own) if own else METRICS[name]
        return found


def build_module(build: Callable[..., Any], arguments: dict[str, Any], seed: int) -> nn.Module:
    """Call the user's function under the run's seed.

    Raises
    ------
    NotAModule
        It returned something else.
    UserCodeFailed
        It raised an exception.
    """
    with isolated(seed, torch.get_num_threads()), user_code("The function given as model"):
        module = build(**arguments)
    if not isinstance(module, nn.Module):
        hint = "Return the module from the function." if module is None else ""
        raise NotAModule(f"The function given as model returned {type(module).__name__}, not a torch.nn.Module.", hint)
    return module


@contextmanager
def isolated(seed: int, threads: int) -> Iterator[None]:
    """Seed torch, numpy and random for one task, and put all global state back afterwards."""
    states = random.getstate(), np.random.get_state()
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            random.setstate(states[0])
            np.random.set_state(states[1])


# Residents of this process, by run_id. The plugin of each run puts its own here and takes it away.
_RESIDENTS: dict[str, Resident] = {}


def install(spec: RunSpec) -> None:
    """Keep a resident for a run in this process."""
    _RESIDENTS[spec.run_id] = Resident(spec)


def remove(run_id: str) -> None:
    """Forget a run."""
    _RESIDENTS.pop(run_id, None)


def resident_of(run_id: str) -> Resident:
    """Return the resident of a run in this process."""
    return _RESIDENTS[run_id]
