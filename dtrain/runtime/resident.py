"""The objects that a process keeps between the tasks of a run. They save time; they never change a result.

These are the opened arrays, the partitions, the loaders and a template of the model. All of them can be made again
from the `RunSpec`.
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dtrain.algorithm.freeze import freeze
from dtrain.algorithm.metrics.state import Metric
from dtrain.algorithm.params import load_into
from dtrain.algorithm.plan import endless_sizes
from dtrain.algorithm.recipe import Recipe, metrics_of, recipe_of
from dtrain.config.functions import Function
from dtrain.data.load.finite import parts_of
from dtrain.data.load.loader import Loader
from dtrain.data.plan.memory import LoaderBudget
from dtrain.data.plan.partition import Partition, cell_anchors, eval_partitions
from dtrain.data.plan.splits import SplitName
from dtrain.data.read.boxes import BoxReader
from dtrain.data.read.joined import open_reader
from dtrain.runtime.codebytes import live_functions, unpickle_functions
from dtrain.runtime.module import build_module, modules_on_device
from dtrain.runtime.spec import PlannedSource, RunSpec
from dtrain.runtime.usercode import user_code
from dtrain.runtime.watched import forward_of
from dtrain.types import Cursor, Parameters

StreamKey: TypeAlias = tuple[str, int]
"""``("train", replica)``, ``("recalibration", replica)``, or a split and the number of one of its pieces."""
TRAINING = ("train", "recalibration")


@dataclass(frozen=True, slots=True)
class Stream:
    """The samples that a loader reads."""

    key: StreamKey
    source: PlannedSource
    partition: Partition
    shuffle: bool

    @property
    def budget(self) -> LoaderBudget:
        """The memory budget of the loader."""
        memory = self.source.memory
        return memory.train if self.trains else memory.evaluate or memory.train

    @property
    def trains(self) -> bool:
        """Whether it is read as training reads: its loader is one of those that the budget keeps for training."""
        return self.key[0] in TRAINING

    @property
    def replica(self) -> int:
        """Names the order of the samples, if they are shuffled."""
        return self.key[1] if self.trains else 0


class RunOver(Exception):
    """A task of a run that is over in this process. Not a `DtrainError`: nobody waits for the task."""


class Resident:
    """The objects of one run in one process. `lock` lets one task at a time use torch's global state."""

    lock = threading.Lock()

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self._live = live_functions(spec.code)  # now: a task may look for them when the run is over
        self._pieces: dict[SplitName, tuple[Stream, ...]] = {}
        self._readers: dict[int, BoxReader] = {}
        self._loaders: OrderedDict[StreamKey, Loader] = OrderedDict()
        self._loading = threading.RLock()
        """Of the loaders."""
        self._closed = False

    @cached_property
    def functions(self) -> dict[str, Function]:
        """The user's functions by config key."""
        if self._live is not None:
            return modules_on_device(self._live, self.spec.device)
        with user_code("Loading the code of the run"):
            return modules_on_device(unpickle_functions(self.spec.code), self.spec.device)

    @cached_property
    def recipe(self) -> Recipe:
        """Loss, optimizer and schedule of the local steps."""
        config = self.spec.config
        return recipe_of(config.train, self.functions, config.average.prox, self._finite_targets)

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The metrics that are computed batch by batch."""
        return metrics_of(self.spec.config.train, self.functions, self._finite_targets)

    @cached_property
    def metrics_here(self) -> dict[str, Metric]:
        """The same in the process that has sent the functions, to take the values of states: on no device."""
        return metrics_of(self.spec.config.train, self._live or {}, self._finite_targets)

    @property
    def _finite_targets(self) -> bool:
        """Whether targets that are not finite do not count."""
        return any(source.samples.config.fills_inputs for source in self.spec.sources)

    def _build(self) -> nn.Module:
        config = self.spec.config
        module = build_module(self.functions["model"], config.model_args, config.train.seed)
        freeze(module, config.train.freeze)
        forward_of(module, config.model)
        return module

    @cached_property
    def _template(self) -> nn.Module | None:
        """The module to copy; None if it refuses (a lock, a tensor that was computed), or copies are not trainable."""
        module = self._build()
        try:
            copied = copy.deepcopy(module)
        except Exception:  # whatever its parts raise
            return None
        return module if all(p.is_leaf for p in copied.parameters()) else None  # copies of scripted modules are not

    def module(self) -> nn.Module:
        """Return a module as the user's function built it; tasks do not see each other's changes.

        It is a copy, or built anew where the module cannot be copied: the same, since the function runs under the
        run's seed.
        """
        return self._build() if self._template is None else copy.deepcopy(self._template)

    def module_with(self, params: Parameters) -> nn.Module:
        """Return a module as `module` does, with other parameters; those of the template are not copied first."""
        if self._template is None:
            module = self._build()
        else:
            plain = [own for own in self._template.parameters() if type(own) is nn.Parameter]
            blank = [nn.Parameter(torch.empty_like(own.data), own.requires_grad) for own in plain]
            module = copy.deepcopy(self._template, {id(own): new for own, new in zip(plain, blank, strict=True)})
        load_into(module, params)
        forward_of(module, self.spec.config.model)
        return module

    # Samples ------------------------------------------------------------------------------------------------

    @cached_property
    def replicas(self) -> tuple[Stream, ...]:
        """The training samples of each replica."""
        plan = self.spec.plan
        stores = zip(plan.stores, plan.partitions, strict=True)
        return tuple(
            Stream(("train", k), self.spec.sources[store], partition, partition.plan.shuffle)
            for k, (store, partition) in enumerate(stores)
        )

    def pieces(self, split: SplitName) -> tuple[Stream, ...]:
        """Return the pieces that the evaluation of a split is cut into."""
        if split not in self._pieces:
            self._pieces[split] = tuple(
                Stream((split, number), source, partition, shuffle=False)
                for number, (source, partition) in enumerate(self._cut(split))
            )
        return self._pieces[split]

    def _cut(self, split: SplitName) -> list[tuple[PlannedSource, Partition]]:
        held_out = self.spec.held_out
        if split == "val" and held_out is not None:
            return [(held_out, piece) for piece in eval_partitions(held_out.plan, "all", held_out.lost)]
        sources = self.spec.sources
        return [(source, piece) for source in sources for piece in eval_partitions(source.plan, split, source.lost)]

    @cached_property
    def counted(self) -> tuple[tuple[PlannedSource, Partition, range], ...]:
        """The pieces of a pass over all samples of all stores: their parts, store by store."""
        spec = self.spec
        sources = [*spec.sources, *([spec.held_out] if spec.held_out is not None else [])]
        wholes = ((source, cell_anchors(source.plan, "all")) for source in sources)
        return tuple(
            (source, whole, parts) for source, whole in wholes for parts in parts_of(whole, source.plan.eval_pieces)
        )

    @cached_property
    def by_unit(self) -> tuple[Stream, ...]:
        """All samples, to be evaluated unit by unit: those of each replica in stored order, then the held-out ones."""
        replicas = (replace(own, key=("units", own.key[1]), shuffle=False) for own in self.replicas)
        return (*replicas, *self.pieces("val"), *self.pieces("test"))

    # Loaders ------------------------------------------------------------------------------------------------

    def reader(self, source: PlannedSource) -> BoxReader:
        """Return the reader of a store; it is opened once in a process."""
        if id(source) not in self._readers:
            threads, reader = source.memory.train.limits.threads, self.spec.config.data.reader
            absent = (*source.plan.absent, *source.lost)
            self._readers[id(source)] = open_reader(source.samples, reader, threads, absent)
        return self._readers[id(source)]

    def train_loader(self, replica: int, cursor: Cursor) -> Loader:
        """Return the loader of a replica at a cursor: the one that is there, or a new one."""
        stream = self.replicas[replica]
        return self._loader(stream, cursor, endless_sizes(stream.partition.num_samples, self.spec.config.train))

    def eval_loader(self, split: SplitName, piece: int, sizes: Sequence[int]) -> Loader:
        """Return the loader of a piece of a split, at its beginning."""
        return self.loader_of(self.pieces(split)[piece], sizes)

    def recalibration(self, replica: int) -> Stream:
        """Return the training samples of a replica from the beginning: stored order may be sorted by class."""
        return replace(self.replicas[replica], key=("recalibration", replica))

    def loader_of(self, stream: Stream, sizes: Sequence[int]) -> Loader:
        """Return the loader of a stream at its beginning."""
        return self._loader(stream, Cursor(0, 0), itertools.cycle(sizes))

    def _loader(self, stream: Stream, cursor: Cursor, sizes: Iterator[int]) -> Loader:
        with self._loading:
            if self._closed:
                raise RunOver(self.spec.run_id)
            return self._kept_loader(stream, cursor, sizes)

    def _kept_loader(self, stream: Stream, cursor: Cursor, sizes: Iterator[int]) -> Loader:
        kept = self._loaders.pop(stream.key, None)
        if kept is None or not _goes_on(kept, stream, cursor):
            if kept is not None:
                kept.close()
            self._make_way(stream)
            kept = Loader(
                self.reader(stream.source),
                stream.partition,
                cursor,
                sizes,
                replica=stream.replica,
                shuffle=stream.shuffle,
                limits=stream.budget.limits,
                scalings=self.spec.scalings,
                allocate=np.empty if self.spec.device == "cpu" else _pinned,
            )
        self._loaders[stream.key] = kept
        return kept

    def _make_way(self, stream: Stream) -> None:
        """Close the least recently used loaders, so that no more are kept than the budget allows."""
        if stream.source.memory.in_turn:
            for key in [key for key in self._loaders if (key[0] in TRAINING) != stream.trains]:
                self.release(key)
        alike = [key for key in self._loaders if (key[0] in TRAINING) == stream.trains]
        for key in alike[: max(0, len(alike) + 1 - max(1, stream.budget.kept))]:
            self.release(key)

    def release(self, key: StreamKey) -> None:
        """Close a loader, if it is there."""
        with self._loading:
            loader = self._loaders.pop(key, None)
        if loader is not None:
            loader.close()

    def close(self) -> None:
        """Close all loaders, and make no others: a task that still runs ends with its batches."""
        with self._loading:
            self._closed = True
        for key in list(self._loaders):
            self.release(key)


def _goes_on(loader: Loader, stream: Stream, cursor: Cursor) -> bool:
    """Whether a loader continues at a cursor; passes that are not shuffled are all the same."""
    there = loader.cursor if stream.shuffle else replace(loader.cursor, epoch=cursor.epoch)
    return loader.alive and there == cursor


def _pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return an array in pinned memory, from which a GPU copies asynchronously."""
    return torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, pin_memory=True).numpy().view(dtype)


# Residents of this process, by run_id; the plugin of each run adds and removes its own, once for each worker.
_RESIDENTS: dict[str, Resident] = {}
_WORKERS: Counter[str] = Counter()
"""By run_id: the workers of this process; they share a resident."""
_OVER: deque[str] = deque(maxlen=1000)
"""Runs that have ended in this process."""
_LOCK = threading.Lock()


def install(spec: RunSpec) -> None:
    """Keep a resident for a run in this process."""
    with _LOCK:
        _WORKERS[spec.run_id] += 1
        if spec.run_id not in _RESIDENTS:
            _RESIDENTS[spec.run_id] = Resident(spec)


def remove(run_id: str) -> threading.Thread | None:
    """Forget a run, unless it has another worker in this process; return the thread that closes its loaders."""
    with _LOCK:
        _WORKERS[run_id] -= 1
        if _WORKERS[run_id] > 0:
            return None
        del _WORKERS[run_id]
        resident = _RESIDENTS.pop(run_id, None)
        _OVER.append(run_id)
    if resident is None:
        return None
    closing = threading.Thread(target=resident.close, name="dtrain-close", daemon=True)
    closing.start()
    return closing


def resident_of(run_id: str) -> Resident:
    """Return the resident of a run in this process."""
    return _RESIDENTS[run_id]


def is_over(run_id: str) -> bool:
    """Return True if a run has ended in this process."""
    return run_id in _OVER and run_id not in _RESIDENTS
