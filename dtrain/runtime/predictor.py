"""Predict units in one process: a pure function of (spec, parameters, unit).

read thread     unit k + 1          what it shares with unit k is decoded once
this thread     unit k              the model, batch by batch
write thread    unit k - 1          encoded, and written or handed back
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from dtrain.algorithm.batch import TensorBatch, autocast
from dtrain.algorithm.outputs import (
    OutputFacts,
    blended_results,
    estimate_of,
    facts_of,
    named_tensors,
    results_of,
)
from dtrain.algorithm.params import load_into
from dtrain.algorithm.plan import micro_size
from dtrain.config.functions import Function
from dtrain.config.schema import ClassAxis, TrainConfig
from dtrain.data.encoding import Array, Scaling
from dtrain.data.load.gather import Batch
from dtrain.data.load.units import Blender, UnitBatch, UnitGatherer
from dtrain.data.plan.hashing import UNIT, hash64
from dtrain.data.plan.heads import Head, OutputArray
from dtrain.data.plan.prediction import PredictionPlan, Unit, has_overlap
from dtrain.data.plan.splits import Runs
from dtrain.data.read.boxes import BoxReader
from dtrain.data.read.joined import open_reader
from dtrain.data.read.sweep import PartRows, SweepReader
from dtrain.data.samples import Samples
from dtrain.errors import ShapesDiffer, one_line
from dtrain.runtime.codebytes import unpickle_functions
from dtrain.runtime.module import build_module, isolated, modules_on_device
from dtrain.runtime.resident import Resident
from dtrain.runtime.tensors import as_tensors, on_device, scaling_tensors, transformed
from dtrain.runtime.usercode import user_code
from dtrain.runtime.watched import forward_of, numbered
from dtrain.types import Parameters

SPLIT = "all"
"""What a transform sees as the split of samples that are predicted, as in an evaluation of a whole store."""
TRIED = 2
"""Samples that the model is tried on."""
Values = Mapping[str, Array]
"""By array: the predictions of a unit, in the order of `OutputArray.computed`."""


@dataclass(frozen=True, slots=True)
class TargetShape:
    """What stands for a target where there is none: a transform gets it."""

    shape: tuple[int, ...]
    """Of one sample, cut to a patch."""
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionSpec:
    """All that is fixed while a store is predicted: plain values and bytes, sent to each worker once."""

    run_id: str
    """Names one execution; keys and predictors carry it."""
    samples: Samples
    """Of the inputs alone."""
    scalings: Mapping[str, Scaling]
    """By input of ``data.normalize``."""
    config: TrainConfig
    code: bytes
    """The user's functions (`pickle_functions`)."""
    device: str
    """``cpu`` or ``cuda``."""
    targets: tuple[TargetShape, ...]
    absent: Runs = ()
    """Rows that nobody reads."""


@dataclass(frozen=True, slots=True)
class Work:
    """How a store is predicted, once the outputs of the model are known."""

    plan: PredictionPlan
    heads: tuple[Head, ...]


class Predictor:
    """The objects that a process keeps to predict: the model, the opened arrays. They never change a result.

    Parameters
    ----------
    spec : PredictionSpec
    params : Parameters
    """

    def __init__(self, spec: PredictionSpec, params: Parameters) -> None:
        self.spec, self._params = spec, params
        self._module: nn.Module | None = None
        self._state: list[tuple[int, int]] = []

    @cached_property
    def functions(self) -> dict[str, Function]:
        """The user's functions by config key."""
        with user_code("Loading the code of the run"):
            return modules_on_device(unpickle_functions(self.spec.code), self.spec.device)

    @cached_property
    def reader(self) -> BoxReader:
        """The reader of the store."""
        return open_reader(self.spec.samples, self.spec.samples.config.reader, absent=self.spec.absent)

    # The model ------------------------------------------------------------------------------------------------

    def _loaded(self) -> nn.Module:
        """Return the model in eval mode; one whose parameters or buffers a call has changed is built anew."""
        if self._module is not None and _state_of(self._module) == self._state:
            return self._module
        config = self.spec.config
        module = build_module(self.functions["model"], config.model_args, config.train.seed)
        load_into(module, self._params)
        self._module = module.to(self.spec.device).eval()
        self._state = _state_of(self._module)
        forward_of(self._module, config.model)
        return self._module

    def try_outputs(self) -> tuple[OutputFacts, ...]:
        """Call the model with zeros, and return what comes out; nothing is read.

        Raises
        ------
        ShapesDiffer
            It does not accept the inputs, or returns no tensors.
        """
        samples = self.spec.samples
        shapes = [(samples.field_shape(field), self._input_dtype(field.name)) for field in samples.fields]
        inputs = tuple(np.zeros((TRIED, *shape), dtype) for shape, dtype in shapes)
        with self._isolated(0, "Trying the model"):
            (batch,) = self._tensors(iter([inputs]), 0, [TRIED])
            try:
                return facts_of(self._outputs(batch), TRIED)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                if isinstance(error, ShapesDiffer):
                    raise
                names = ", ".join(
                    f"{name} {t.dtype}{list(t.shape)}".replace("torch.", "")
                    for name, t in zip(samples.config.inputs, batch.inputs, strict=True)
                )
                raise ShapesDiffer(
                    f"The model does not accept the inputs {names} of {samples.path}: {one_line(error)}",
                    "Give data whose samples have the shape of those that it was trained on.",
                ) from error

    def _input_dtype(self, name: str) -> np.dtype[np.float32] | np.dtype[np.int64]:
        variable = self.spec.samples.variable(name)
        is_float = name in self.spec.scalings or variable.model_dtype.kind == "f"
        return np.dtype(np.float32) if is_float else np.dtype(np.int64)

    @contextmanager
    def _isolated(self, unit: int, doing: str) -> Iterator[None]:
        config = self.spec.config
        seed = int(hash64(config.train.seed, UNIT, unit)) >> 1
        with (
            Resident.lock,
            isolated(seed, config.cluster.threads),
            user_code(doing),
        ):
            yield

    def _outputs(self, batch: TensorBatch) -> object:
        module = self._loaded()
        with torch.inference_mode(), autocast(self.spec.config.train.precision, batch):
            return module(*batch.inputs)

    def _tensors(self, inputs: Iterator[tuple[Array, ...]], unit: int, sizes: Sequence[int]) -> Iterator[TensorBatch]:
        """Yield inputs as the model takes them: as tensors, transformed, on the device."""
        pairs = zip(inputs, sizes, strict=True)
        tensors = as_tensors((Batch(own, self._no_targets(size)) for own, size in pairs), SPLIT)
        transform = self.functions.get("data.transform")
        if transform is not None:
            tensors = transformed(tensors, transform, self.spec.config.train.seed, unit, 0)
        return tensors if self.spec.device == "cpu" else on_device(tensors, self.spec.device)

    def _no_targets(self, size: int) -> tuple[Array, ...]:
        """Return what stands for targets: NaN for numbers, class 0 for classes."""
        shapes = self.spec.targets or (TargetShape((), "float32"),)
        return tuple(np.full((size, *one.shape), np.nan if one.dtype == "float32" else 0, one.dtype) for one in shapes)

    # Units ----------------------------------------------------------------------------------------------------

    def predict(self, work: Work, unit: Unit, parts: Sequence[PartRows]) -> tuple[dict[str, Array], int]:
        """Return the predictions of a unit, and how many samples were left out.

        Parameters
        ----------
        work : Work
        unit : Unit
        parts : sequence of PartRows
            Its inputs.

        Raises
        ------
        ShapesDiffer
            An output has another shape than the first ones.
        UserCodeFailed, OutOfMemory
        """
        size = micro_size(self.spec.config.train)
        total = (unit.stop - unit.start) * len(work.plan.tiles(unit))
        sizes = [min(size, total - start) for start in range(0, total, size)]
        gatherer = UnitGatherer(self.spec.samples, self.reader.statics, self.spec.scalings, work.plan)
        collect = _Blended if has_overlap(work.plan.axes) else _Direct
        collectors = [collect(head, work.plan, unit, self.spec.config.train.class_axis) for head in work.heads]
        waiting: deque[UnitBatch] = deque()  # a GPU is given the next batch before this one is used
        own, left_out = np.array(work.plan.own_tiles(unit)), 0

        def inputs() -> Iterator[tuple[Array, ...]]:
            for batch in gatherer.batches(unit, parts, size):
                waiting.append(batch)
                yield batch.inputs

        with self._isolated(unit.number, "Predicting"):
            for tensors in numbered(self._tensors(inputs(), unit.number, sizes)):
                batch, named = waiting.popleft(), named_tensors(self._outputs(tensors))
                for collector in collectors:
                    collector.add(batch, named)
                left_out += 0 if batch.kept is None else int((~batch.kept & own[batch.tile]).sum())
        return {name: values for collector in collectors for name, values in collector.arrays().items()}, left_out


def _state_of(module: nn.Module) -> list[tuple[int, int]]:
    """Return what differs once a parameter or a buffer of a module has been changed or replaced."""
    tensors = [*module.parameters(), *module.buffers()]
    return [(id(tensor), -1 if tensor.is_inference() else tensor._version) for tensor in tensors]


# Predictions of a unit --------------------------------------------------------------------------------------


class _Collector(ABC):
    """Collects what a unit's batches give for one head."""

    def __init__(self, head: Head, plan: PredictionPlan, unit: Unit, class_axis: ClassAxis) -> None:
        self._head, self._class_axis = head, class_axis
        self._num_places, self._extents = unit.stop - unit.start, plan.extents(unit)

    def add(self, batch: UnitBatch, named: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Add the outputs of a batch.

        Raises
        ------
        ShapesDiffer
            The output has another shape than the first ones.
        """
        output = named[self._head.tensor][1] if self._head.tensor < len(named) else None
        if output is None or tuple(output.shape[1:]) != self._head.output:
            found = "no tensor" if output is None else f"a tensor of shape {list(output.shape[1:])} a sample"
            raise ShapesDiffer(
                f"The model gave {found} for {self._head.arrays[0].name}; at first it was {list(self._head.output)}.",
                "Outputs must have one shape for all samples.",
            )
        self._add(batch, output)

    @abstractmethod
    def _add(self, batch: UnitBatch, output: torch.Tensor) -> None: ...

    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """Return the predictions of the unit, by array."""


class _Direct(_Collector):
    """Of samples that are no patches, or whole rows."""

    def __init__(self, head: Head, plan: PredictionPlan, unit: Unit, class_axis: ClassAxis) -> None:
        super().__init__(head, plan, unit, class_axis)
        self._scaling = None if head.scaling is None else scaling_tensors(head.scaling)
        self._values = [_empty(array, self._num_places, plan, self._extents) for array in head.arrays]

    def _add(self, batch: UnitBatch, output: torch.Tensor) -> None:
        results = results_of(self._head.kind, output, self._head.target, self._class_axis, self._scaling)
        for array, values, result in zip(self._head.arrays, self._values, results, strict=False):
            values[batch.place] = result.cpu().numpy()
            if batch.kept is not None:
                values[batch.place[~batch.kept]] = array.fill

    def arrays(self) -> dict[str, Array]:
        return {array.name: values for array, values in zip(self._head.arrays, self._values, strict=True)}


class _Blended(_Collector):
    """Of patches, which are put together."""

    def __init__(self, head: Head, plan: PredictionPlan, unit: Unit, class_axis: ClassAxis) -> None:
        super().__init__(head, plan, unit, class_axis)
        self._blender = Blender(head, plan, unit)

    def _add(self, batch: UnitBatch, output: torch.Tensor) -> None:
        estimate = estimate_of(self._head.kind, output, self._head.target, self._class_axis)
        self._blender.add(batch, estimate.cpu().numpy())

    def arrays(self) -> dict[str, Array]:
        estimate, unknown = self._blender.estimate()
        results = blended_results(self._head.kind, estimate, self._head.scaling)
        arrays = {}
        for array, result in zip(self._head.arrays, results, strict=False):
            if unknown is None:
                arrays[array.name] = result.astype(array.numpy_dtype, copy=False)
                continue
            nowhere = unknown if result.ndim == unknown.ndim else unknown.any(axis=1)
            arrays[array.name] = np.where(nowhere, np.asarray(array.fill), result).astype(array.numpy_dtype)
        return arrays


def _empty(array: OutputArray, places: int, plan: PredictionPlan, extents: Mapping[str, int]) -> Array:
    lengths = array.lengths
    shape = (extents.get(dim, lengths[dim]) for dim in array.computed[1:])
    return np.empty((places, *shape), array.numpy_dtype)


# A run of units ---------------------------------------------------------------------------------------------


def predict_units(
    predictor: Predictor,
    work: Work,
    numbers: Sequence[int],
    put: Callable[[Unit, Values], None],
    *,
    ahead: bool = True,
    on_unit: Callable[[int], None] = lambda samples: None,
) -> tuple[int, int]:
    """Predict units in order; return the samples that were left out, and the bytes that were decoded.

    Parameters
    ----------
    predictor : Predictor
    work : Work
    numbers : sequence of int
        Of the units.
    put : callable
        Called with each unit and its predictions, in a thread of its own, one at a time.
    ahead : bool
        Read the next unit while this one is predicted, and write the one before.
    on_unit : callable
        Called with the number of samples that are done.
    """
    reader, units, left_out, done = SweepReader(predictor.reader, work.plan), map(work.plan.unit, numbers), 0, 0
    with ThreadPoolExecutor(1, "dtrain-read") as reading, ThreadPoolExecutor(1, "dtrain-write") as writing:
        written: Future[None] | None = None
        for unit, parts in _read_ahead(reading, reader, units, ahead):
            values, lost = predictor.predict(work, unit, parts)
            del parts
            left_out += lost
            if written is not None:
                written.result()
            written = writing.submit(put, unit, values)
            if not ahead:
                written.result()
            del values
            done += work.plan.samples_in(unit)
            on_unit(done)
        if written is not None:
            written.result()
    return left_out, reader.decoded


def _read_ahead(
    pool: ThreadPoolExecutor, reader: SweepReader, units: Iterator[Unit], ahead: bool
) -> Iterator[tuple[Unit, list[PartRows]]]:
    """Yield units with their inputs; the next one is read meanwhile."""
    waiting: deque[tuple[Unit, Future[list[PartRows]]]] = deque()
    for unit in itertools.islice(units, 1):
        waiting.append((unit, pool.submit(reader.read, unit)))
    while waiting:
        unit, future = waiting.popleft()
        parts = future.result()
        if ahead:
            waiting.extend((one, pool.submit(reader.read, one)) for one in itertools.islice(units, 1))
        yield unit, parts
        del parts, future
        if not ahead:
            waiting.extend((one, pool.submit(reader.read, one)) for one in itertools.islice(units, 1))


# Predictors of this process ---------------------------------------------------------------------------------

KEPT = 2
"""Predictors that a process keeps."""
_PREDICTORS: OrderedDict[str, Predictor] = OrderedDict()
_LOCK = threading.Lock()


def predictor_of(spec: PredictionSpec, params: Parameters) -> Predictor:
    """Return the predictor of an execution in this process; it is made at the first call."""
    with _LOCK:
        if spec.run_id not in _PREDICTORS:
            _PREDICTORS[spec.run_id] = Predictor(spec, params)
        _PREDICTORS.move_to_end(spec.run_id)
        while len(_PREDICTORS) > KEPT:
            _PREDICTORS.popitem(last=False)
        return _PREDICTORS[spec.run_id]


def forget(run_id: str) -> None:
    """Forget the predictor of an execution."""
    with _LOCK:
        _PREDICTORS.pop(run_id, None)
