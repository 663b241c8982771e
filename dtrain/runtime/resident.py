"""What a process keeps of a run between tasks: a cache of speed, never of truth.

A task finds here the opened arrays, the partitions and a template of the model. All of it can be made again from
the `RunSpec`; nothing in it changes what a task computes.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from dtrain.algorithm.evaluate import FROM_LOSS, METRICS, Metric, mean_metric, metric_key
from dtrain.algorithm.local import Recipe, optimizer_named
from dtrain.algorithm.losses import LOSSES
from dtrain.algorithm.plan import endless_sizes, schedule_named, with_warmup
from dtrain.config import TrainConfig
from dtrain.data.encoding import Scaling
from dtrain.data.load.gather import Allocate
from dtrain.data.load.loader import Loader
from dtrain.data.plan.memory import LoaderBudget, MemoryBudget
from dtrain.data.plan.partition import JointPlan, Partition, eval_partitions
from dtrain.data.plan.splits import SplitName
from dtrain.data.plan.units import DataPlan
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import Samples
from dtrain.errors import NotAModule
from dtrain.runtime.usercode import unpickle_functions, user_code
from dtrain.types import Cursor


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One store of a run."""

    samples: Samples
    plan: DataPlan
    memory: MemoryBudget
    workers: tuple[str, ...] = ()
    """The only workers that may read it; any, if there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """All that is fixed during a run, as it travels to the workers: plain values and bytes."""

    run_id: str
    """Names one execution of a run; keys and residents carry it."""
    sources: tuple[Source, ...]
    held_out: Source | None
    """The store of ``data.val_path``, all of which is the split "val"."""
    scalings: Mapping[str, Scaling]
    """By variable of ``data.normalize``."""
    config: TrainConfig
    code: bytes
    """The user's functions (`pickle_functions`)."""
    threads: int
    """Threads of torch in a task; they decide bits."""
    device: str
    """``cpu`` or ``cuda``."""

    @property
    def plan(self) -> JointPlan:
        """The plans of all stores."""
        return JointPlan(tuple(source.plan for source in self.sources))


class Resident:
    """The objects of one run in one process. `lock` lets one task at a time use torch's global state."""

    lock = threading.Lock()

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self._pieces: dict[SplitName, tuple[tuple[Source, Partition], ...]] = {}
        self._readers: dict[int, UnitReader] = {}
        self._loaders: OrderedDict[tuple[str, int], Loader] = OrderedDict()

    @cached_property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """The user's functions by config key."""
        with user_code("Loading the code of the run"):
            return unpickle_functions(self.spec.code)

    @cached_property
    def partitions(self) -> tuple[Partition, ...]:
        """The partition of each replica."""
        return self.spec.plan.partitions()

    @cached_property
    def stores(self) -> tuple[int, ...]:
        """The number of each replica's store."""
        return self.spec.plan.stores()

    def pieces(self, split: SplitName) -> tuple[tuple[Source, Partition], ...]:
        """Return the pieces of an evaluation, each with its store."""
        if split not in self._pieces:
            held_out = self.spec.held_out if split == "val" else None
            if held_out is not None:
                found = tuple((held_out, piece) for piece in eval_partitions(held_out.plan, "all"))
            else:
                found = tuple((self.spec.sources[store], piece) for store, piece in self.spec.plan.pieces(split))
            self._pieces[split] = found
        return self._pieces[split]

    # Loaders ------------------------------------------------------------------------------------------------

    def reader(self, source: Source) -> UnitReader:
        """Return the reader of a store: opened once in a process."""
        if id(source) not in self._readers:
            threads = source.memory.train.limits.threads
            self._readers[id(source)] = UnitReader(
                source.samples, self.spec.config.data.reader, threads, source.plan.absent
            )
        return self._readers[id(source)]

    def train_loader(self, replica: int, cursor: Cursor) -> Loader:
        """Return the loader of a replica at a cursor: the one that is there, or a new one."""
        source = self.spec.sources[self.stores[replica]]
        law = source.memory.train
        partition = self.partitions[replica]
        sizes = endless_sizes(partition.num_samples, self.spec.config.train)
        shuffle = source.plan.shuffle
        return self._loader(("train", replica), source, partition, cursor, sizes, law, replica, shuffle)

    def eval_loader(self, split: SplitName, piece: int, sizes: Sequence[int]) -> Loader:
        """Return the loader of a piece of a split, at its beginning."""
        source, partition = self.pieces(split)[piece]
        law = source.memory.evaluate or source.memory.train
        key, endless = (split, piece), itertools.cycle(sizes)
        return self._loader(key, source, partition, Cursor(0, 0), endless, law, 0, False)

    def _loader(
        self,
        key: tuple[str, int],
        source: Source,
        partition: Partition,
        cursor: Cursor,
        sizes: Iterator[int],
        law: LoaderBudget,
        replica: int,
        shuffle: bool,
    ) -> Loader:
        found = self._loaders.pop(key, None)
        if found is not None:
            # passes that are not shuffled are all the same
            there = replace(found.cursor, epoch=cursor.epoch) if not shuffle else found.cursor
            if found.alive and there == cursor:
                self._loaders[key] = found
                return found
            found.close()
        kind = [other for other in self._loaders if (other[0] == "train") == (key[0] == "train")]
        for other in kind[: max(0, len(kind) + 1 - max(1, law.kept))]:  # the ones that were used longest ago
            self._loaders.pop(other).close()
        loader = Loader(
            self.reader(source),
            partition,
            cursor,
            sizes,
            replica=replica,
            shuffle=shuffle,
            limits=law.limits,
            scalings=self.spec.scalings,
            allocate=self._allocate,
        )
        self._loaders[key] = loader
        return loader

    def release(self, key: tuple[str, int]) -> None:
        """Close a loader that is not kept."""
        loader = self._loaders.pop(key, None)
        if loader is not None:
            loader.close()

    @property
    def _allocate(self) -> Allocate:
        if self.spec.device == "cpu":
            return np.empty
        return _pinned

    def close(self) -> None:
        """Close all loaders."""
        for key in list(self._loaders):
            self.release(key)

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
            precision=train.precision,
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
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
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


def _pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Return an array in memory from which a GPU copies by itself."""
    return torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, pin_memory=True).numpy().view(dtype)


# Residents of this process, by run_id. The plugin of each run puts its own here and takes it away.
_RESIDENTS: dict[str, Resident] = {}


def install(spec: RunSpec) -> None:
    """Keep a resident for a run in this process."""
    _RESIDENTS[spec.run_id] = Resident(spec)


def remove(run_id: str) -> None:
    """Forget a run; its loaders end in their own time."""
    resident = _RESIDENTS.pop(run_id, None)
    if resident is not None:
        threading.Thread(target=resident.close, name="dtrain-close", daemon=True).start()


def resident_of(run_id: str) -> Resident:
    """Return the resident of a run in this process."""
    return _RESIDENTS[run_id]
