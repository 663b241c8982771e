"""Build the model and try it on one real batch, before anything is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from dtrain.algorithm.batch import TensorBatch, autocast, non_finite_values
from dtrain.algorithm.batchnorm import norm_layers
from dtrain.algorithm.local import run_local_steps
from dtrain.algorithm.losses import compared, mean_of_batch
from dtrain.algorithm.metrics.state import Metric, Parts
from dtrain.algorithm.params import flatten, layout_of, load_into
from dtrain.algorithm.plan import first_step, pass_size, smallest_batch
from dtrain.algorithm.replica import empty_inner_state
from dtrain.algorithm.warmstart import warm_start
from dtrain.config.average import AverageConfig
from dtrain.config.schema import TrainTable
from dtrain.data.load.gather import Batch, target_scalings
from dtrain.data.load.loader import read_batches
from dtrain.errors import DtrainError, FirstLossNotFinite, InvalidConfig, ShapesDiffer, one_line
from dtrain.events import ParametersLoaded
from dtrain.runtime.module import isolated
from dtrain.runtime.peak import PeakMemory
from dtrain.runtime.resident import Resident
from dtrain.runtime.tasks import prepared
from dtrain.runtime.tensors import decoder
from dtrain.runtime.usercode import user_code
from dtrain.types import Cursor, InitFile, Parameters

DTYPE_WORDS = ("dtype", "scalar type", "Input type", "Long", "not implemented for")
"""Words of torch's errors about dtypes."""
MEASURED_SECONDS, MOST_MEASURED = 0.2, 9
"""A step is measured until this time is over, or so many have been."""
Outputs: TypeAlias = Any
"""Whatever the user's module returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Initial:
    """Parameters of round 0, and what one real batch says about the model."""

    params: Parameters
    loss: float
    """Of the first micro-batch of replica 0."""
    inputs: tuple[str, ...]
    """Name, dtype and shape of each input of that batch."""
    outputs: str
    num_params: int
    """Trainable and frozen parameters, tied ones once."""
    num_frozen: int
    """Frozen ones among them."""
    seconds: float
    """Of one local step."""
    evaluate_seconds: float
    """Of evaluating one sample, by a model that has been called before."""
    process_bytes: int
    """Memory of the process that tried the model, at its peak."""
    inner_bytes: int
    """Of the state of the inner optimizer after a step."""
    has_batchnorm: bool
    """Whether layers of the model keep running statistics."""
    metric_bytes: Mapping[str, int] = field(default_factory=dict)
    """By metric: of its state, which each task of an evaluation keeps and sends."""
    loaded: ParametersLoaded | None = None
    """What was taken from ``train.init``."""


def initialise(resident: Resident, init: InitFile | None = None) -> Initial:
    """Build the model, and try it on one real micro-batch: no more memory is needed than to train.

    Parameters
    ----------
    resident : Resident
    init : InitFile, optional
        The model starts from its tensors.

    Raises
    ------
    RunDamaged, InvalidConfig
        The file cannot be read, or does not fit the model.
    NotAModule, UnsuitableModel, UserCodeFailed
        The model cannot be built or trained.
    ShapesDiffer
        It does not accept the inputs, or its output does not fit the targets.
    FirstLossNotFinite
        The loss of that batch is NaN or infinite.
    InvalidConfig
        ``average.recalibrate_batchnorm`` is set, and no layer keeps running statistics.
    """
    spec = resident.spec
    with resident.lock, isolated(spec.config.train.seed, spec.threads):
        module = resident.module()
        has_batchnorm = _has_batchnorm(module, spec.config.average)
        layout = layout_of(module)
        params, loaded = flatten(module, layout), None
        if init is not None:
            start = warm_start(params, init, spec.config.train.freeze)
            params = start.params
            loaded = ParametersLoaded(path=init.name, tensors=start.tensors, new=start.new, cast=start.cast)
            load_into(module, params)
        batch = _first_batch(resident)
        module.to(spec.device)
        loss, outputs, state_bytes = _first_loss(resident, module, batch)
        with user_code("The first local step"), PeakMemory() as peak:
            inner_bytes = _timed_step(resident, module, batch)[1]  # the first step is slower, and not measured
            seconds = _median_seconds(lambda: _timed_step(resident, module, batch)[0])
            evaluate_seconds = _median_seconds(lambda: _timed_evaluation(resident, module, batch)) / batch.size
        _try_smallest(resident, module, batch)
        return Initial(
            params=params,
            loss=loss,
            inputs=_named(spec.config.data.inputs, batch.inputs),
            outputs=described(outputs),
            num_params=layout.num_params + layout.num_frozen,
            num_frozen=layout.num_frozen,
            seconds=seconds * len(first_step(resident.replicas[0].partition.num_samples, spec.config.train)),
            evaluate_seconds=evaluate_seconds,
            process_bytes=peak.bytes,
            inner_bytes=inner_bytes,
            has_batchnorm=has_batchnorm,
            metric_bytes=state_bytes,
            loaded=loaded,
        )


def _has_batchnorm(module: nn.Module, average: AverageConfig) -> bool:
    """Whether layers keep running statistics; refuses to recalibrate a model without them."""
    found = bool(norm_layers(module))
    if average.recalibrate_batchnorm and not found:
        raise InvalidConfig(
            "average.recalibrate_batchnorm = true is for layers that keep running statistics, such as BatchNorm; "
            f"{type(module).__name__} has none.",
            "Leave recalibrate_batchnorm out.",
        )
    return found


def _first_batch(resident: Resident) -> TensorBatch:
    """Return the first micro-batch of replica 0, read by a loader of its own."""
    stream = resident.replicas[0]
    total = stream.partition.num_samples
    batches = read_batches(
        resident.reader(stream.source),
        stream.partition,
        Cursor(0, 0),
        first_step(total, resident.spec.config.train)[:1],
        replica=0,
        shuffle=stream.shuffle,
        limits=replace(stream.source.memory.train.limits, cached=0),
        scalings=resident.spec.scalings,
    )
    with closing(batches):
        read = next(batches)
        if stream.source.samples.config.non_finite == "skip":  # for `plan`, they are not left out so far
            read = without_non_finite(read)
        return next(prepared(resident, iter([read]), "train", 0, Cursor(0, 0), total))


def without_non_finite(batch: Batch) -> Batch:
    """Return a batch without the samples that hold values that are not finite; as it is if all of them do."""
    is_kept = np.ones(batch.size, bool)
    for values in (*batch.inputs, *batch.targets):
        if values.dtype.kind == "f":
            is_kept &= np.isfinite(values).reshape(batch.size, -1).all(axis=1)
    if is_kept.all() or not is_kept.any():
        return batch
    inputs, targets = (tuple(v[is_kept] for v in own) for own in (batch.inputs, batch.targets))
    weights = tuple(v if len(v) == 1 else v[is_kept] for v in batch.weights)
    return replace(batch, inputs=inputs, targets=targets, weights=weights)


def _timed_step(resident: Resident, module: nn.Module, batch: TensorBatch) -> tuple[float, int]:
    """Return the seconds of a local step, and the bytes of the inner optimizer's state after it."""
    started = time.monotonic()
    steps = [(batch.size, [batch])]
    local = run_local_steps(module, resident.recipe, empty_inner_state(), steps, first_step=0, total_steps=1)
    return time.monotonic() - started, local.inner.nbytes


def _timed_evaluation(resident: Resident, module: nn.Module, batch: TensorBatch) -> float:
    """Return the seconds that a batch takes without a gradient."""
    started = time.monotonic()
    module.eval()
    with torch.inference_mode(), autocast(resident.spec.config.train.precision, batch):
        outputs = module(*batch.inputs)
        compared(resident.recipe.loss, outputs, batch.targets, batch.weight)
    module.train()
    return time.monotonic() - started


def _median_seconds(measure: Callable[[], float]) -> float:
    """Return the median of some measurements: of one that takes long, else of several."""
    seconds = [measure()]
    while len(seconds) < MOST_MEASURED and sum(seconds) < MEASURED_SECONDS:
        seconds.append(measure())
    return median(seconds)


def _try_smallest(resident: Resident, module: nn.Module, batch: TensorBatch) -> None:
    """Take a step of the smallest micro-batch of the run: layers such as BatchNorm do not accept one sample."""
    train = resident.spec.config.train
    sizes = [pass_size(size, train) for size in resident.spec.plan.sizes]
    smallest, replica = smallest_batch(sizes, train)
    if smallest >= batch.size:
        return
    few = replace(
        batch,
        inputs=tuple(tensor[:smallest] for tensor in batch.inputs),
        targets=_first_of(batch.targets, smallest),
        size=smallest,
        weight=_first_of(batch.weight, smallest),
    )
    try:
        _timed_step(resident, module, few)
    except (RuntimeError, ValueError, TypeError, IndexError, DtrainError) as error:
        samples = "a single sample" if smallest == 1 else f"{smallest} samples"
        raise ShapesDiffer(
            f"The model was trained on {batch.size} samples, but not on {samples}, the last batch of a pass of replica "
            f"{replica}: {one_line(error)}",
            _other_batches(sizes, train),
        ) from error


def _first_of(tensors: Any, count: int) -> Any:
    """Return the first samples of a tensor or of a tuple of tensors; None of None."""
    if isinstance(tensors, tuple):
        return tuple(tensor[:count] for tensor in tensors)
    return None if tensors is None else tensors[:count]


def _other_batches(sizes: Sequence[int], train: TrainTable) -> str:
    """Return how to avoid small batches."""
    if train.batch_size == "full" or train.local_steps or train.micro_batch:
        return "Choose train.micro_batch so that it divides the batch, or change the model."
    cure = "Set train.drop_last = true, or change the model."
    candidates = range(train.batch_size + 1, 2 * train.batch_size)
    better = next((b for b in candidates if all((size % b or b) >= b // 2 for size in sizes)), None)
    return cure if better is None else f"Set train.drop_last = true, or for example train.batch_size = {better}."


def _first_loss(resident: Resident, module: nn.Module, batch: TensorBatch) -> tuple[float, Outputs, Mapping[str, int]]:
    """Return the loss of a batch, the model's outputs, and by metric the bytes of its state.

    torch's errors about shapes become sentences.
    """
    config, precision = resident.spec.config.data, resident.spec.config.train.precision
    with torch.no_grad(), user_code("The first batch"), autocast(precision, batch):
        module.train()
        with _Shapes(
            f"The model does not accept the inputs {', '.join(_named(config.inputs, batch.inputs))}",
            f"Change the model, or data.inputs. Samples lie along {resident.spec.sources[0].samples.sample_dim} "
            "(data.sample_dim).",
            _float_hint(config.inputs, batch.inputs),
        ):
            outputs = module(*batch.inputs)
        targets = batch.targets if isinstance(batch.targets, tuple) else (batch.targets,)
        mismatch = _Shapes(
            f"The model's output {described(outputs)} does not fit the targets "
            f"{', '.join(_named(config.targets, targets))}",
            "Change the model, the loss, the metrics or data.targets.",
        )
        # an error inside a loss of the user's is the user's
        with nullcontext() if "train.loss" in resident.functions else mismatch:
            loss = mean_of_batch(compared(resident.recipe.loss, outputs, batch.targets, batch.weight), batch.size).value
        decode = decoder(target_scalings(resident.spec.sources[0].samples, resident.spec.scalings))
        with mismatch:
            pair = decode(outputs, batch.targets)
            states = {name: _state_of(metric, *pair, batch.weight) for name, metric in resident.metrics.items()}
    return _checked(loss, batch), outputs, {name: sum(part.nbytes for part in state) for name, state in states.items()}


def _state_of(metric: Metric, outputs: Any, targets: Any, weight: Any) -> Parts:
    """Return the state of a batch, whose value must be a number; differences from 0 stand for anomalies."""
    if metric.needs_climate:
        climate = torch.zeros_like(targets) if isinstance(targets, torch.Tensor) else None
        state = metric.of_batch(outputs, targets, weight, climate=climate)
    else:
        state = compared(metric.of_batch, outputs, targets, weight)
    metric.value(*state)
    return state


def _checked(loss: torch.Tensor, batch: TensorBatch) -> float:
    if not math.isfinite(loss.item()):
        if values := non_finite_values(batch):
            raise FirstLossNotFinite(
                f"The loss of the first batch is {loss.item()}: its {batch.size:,} samples hold {values:,} NaN or "
                "infinite values of the data.",
                "Replace them in data.transform, or choose other data; data.non_finite says how they are met.",
            )
        raise FirstLossNotFinite(
            f"The loss of the first batch is {loss.item()} before any training, and its data are finite.",
            "Look at the scale of the inputs and at the model's initialisation, or at the file of train.init.",
        )
    return loss.item()


class _Shapes(AbstractContextManager[None]):
    """Turns torch's errors about wrong shapes and dtypes into `ShapesDiffer`; can be entered several times."""

    def __init__(self, message: str, hint: str, dtype_hint: str = "") -> None:
        self._message = message
        self._hint = hint
        self._dtype_hint = dtype_hint or hint

    def __exit__(self, kind: object, error: BaseException | None, frames: object) -> None:
        wrong = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)
        if isinstance(error, wrong) and not isinstance(error, DtrainError):
            text = one_line(error)
            is_of_dtype = any(
                word in text for word in ("dtype", "scalar type", "Input type", "Long", "not implemented for")
            )
            raise ShapesDiffer(f"{self._message}: {text}", self._dtype_hint if is_of_dtype else self._hint) from error


def _float_hint(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> str:
    """Return what to do about layers that want floats; empty if all inputs are floats."""
    integers = [name for name, tensor in zip(names, tensors, strict=True) if not tensor.is_floating_point()]
    if not integers:
        return ""
    return (
        f"Integers arrive as int64, for embeddings. Call .float() on {' and '.join(integers)} in the model's forward, "
        f'or standardise: data.normalize = ["{integers[0]}"].'
    )


def _named(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
    return tuple(f"{name} {described(tensor)}" for name, tensor in zip(names, tensors, strict=True))


def described(value: Any) -> str:
    """Return dtype and shape of a tensor, or the type of another value."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(described, value))})"
    return type(value).__name__
