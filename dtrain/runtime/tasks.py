"""What runs on a worker: pure functions of (resident, arguments). The only place where numpy becomes torch.

A task never changes its arguments: on a cluster they may be shared with other tasks of the process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from dtrain.algorithm.evaluate import Sums, evaluate, merge
from dtrain.algorithm.local import TensorBatch, autocast, run_local_steps
from dtrain.algorithm.mix import average
from dtrain.algorithm.outer import outer_step
from dtrain.algorithm.params import (
    InnerState,
    Parameters,
    empty_inner_state,
    flatten,
    is_finite,
    layout_of,
    load_into,
    params_sha256,
)
from dtrain.algorithm.plan import step_sizes
from dtrain.config import AverageConfig
from dtrain.data.load.gather import Batch
from dtrain.data.load.loader import read_batches
from dtrain.data.load.statistics import Moments, partition_moments
from dtrain.data.plan.splits import SplitName
from dtrain.errors import DtrainError, FirstLossNotFinite, ShapesDiffer
from dtrain.events import StepsTaken
from dtrain.runtime.resident import Resident, isolated
from dtrain.runtime.tensors import as_tensors, on_device, transformed
from dtrain.runtime.usercode import user_code
from dtrain.types import Contribution, Cursor, LocalTask, RoundSummary

Progress: TypeAlias = Callable[[StepsTaken], None]

PROGRESS_SECONDS = 0.5
EVAL_BATCH = 1024
"""Samples of an evaluation batch if training has no batch size."""


@dataclass(frozen=True, slots=True)
class Update:
    """What a local task returns; `parameters_of` and `inner_of` take it apart."""

    params: Parameters
    inner: InnerState
    contribution: Contribution

    def __sizeof__(self) -> int:  # Dask's memory accounting asks this
        return self.params.__sizeof__() + self.inner.__sizeof__()


@dataclass(frozen=True, slots=True, kw_only=True)
class Initial:
    """Parameters of round 0, and what one real batch says about the model."""

    params: Parameters
    inner: InnerState
    loss: float
    """Of the first batch of replica 0."""
    inputs: tuple[str, ...]
    """Name, dtype and shape of each input of that batch."""
    outputs: str
    num_params: int
    """Trainable and frozen parameters, tied ones once."""
    seconds: float
    """Of one local step."""


def initialise(resident: Resident) -> Initial:
    """Build the model, and try it on one real batch.

    Raises
    ------
    NotAModule, UnsuitableModel, UserCodeFailed
        The model cannot be built or trained.
    ShapesDiffer
        It does not accept the inputs, or its output does not fit the targets.
    FirstLossNotFinite
        The loss of that batch is NaN or infinite.
    """
    spec = resident.spec
    train = spec.config.train
    with resident.lock, isolated(train.seed, spec.threads):
        module = resident.module()
        layout = layout_of(module)
        params = flatten(module, layout)
        source, partition = spec.sources[0], resident.partitions[0]
        size = min(partition.num_samples, EVAL_BATCH if train.batch_size == "full" else train.batch_size)
        batches = read_batches(
            resident.reader(source),
            partition,
            Cursor(0, 0),
            [size],
            replica=0,
            shuffle=source.plan.shuffle,
            limits=replace(source.memory.train.limits, cached=0),
            scalings=spec.scalings,
        )
        with closing(batches):
            batch = next(prepared(resident, batches, "train", 0, Cursor(0, 0), partition.num_samples))
        module.to(spec.device)
        loss, outputs = _first_loss(resident, module, batch)
        with user_code("The first local step"):
            seconds = [_timed_step(resident, module, batch) for _ in range(2)][-1]  # the first one is slower
        names = zip(spec.config.data.inputs, batch.inputs, strict=True)
        return Initial(
            params=params,
            inner=empty_inner_state(),
            loss=loss,
            inputs=tuple(f"{name} {_described(tensor)}" for name, tensor in names),
            outputs=_described(outputs),
            num_params=layout.num_params,
            seconds=seconds,
        )


def _timed_step(resident: Resident, module: torch.nn.Module, batch: TensorBatch) -> float:
    started = time.monotonic()
    steps = [(batch.size, [batch])]
    run_local_steps(module, resident.recipe, empty_inner_state(), steps, first_step=0, total_steps=1)
    return time.monotonic() - started


def _first_loss(resident: Resident, module: torch.nn.Module, batch: TensorBatch) -> tuple[float, Any]:
    """Return the loss of a batch and the model's outputs; errors of torch become sentences about shapes."""
    config, precision = resident.spec.config.data, resident.spec.config.train.precision
    with torch.no_grad(), user_code("The first batch"), autocast(precision, batch):
        module.train()
        said = ", ".join(f"{n} {_described(t)}" for n, t in zip(config.inputs, batch.inputs, strict=True))
        along = f"Samples lie along {resident.spec.sources[0].samples.sample_dim} (data.sample_dim)."
        with _shapes(f"The model does not accept the inputs {said}", f"Change the model, or data.inputs. {along}"):
            outputs = module(*batch.inputs)
        targets = batch.targets if isinstance(batch.targets, tuple) else (batch.targets,)
        said = ", ".join(f"{n} {_described(t)}" for n, t in zip(config.targets, targets, strict=True))
        if "train.loss" in resident.functions:
            loss = resident.recipe.loss(outputs, batch.targets)
        with _shapes(
            f"The model's output {_described(outputs)} does not fit the targets {said}",
            "Change the model, the loss, the metrics or data.targets.",
        ):
            if "train.loss" not in resident.functions:
                loss = resident.recipe.loss(outputs, batch.targets)
            for metric in resident.metrics.values():
                metric(outputs, batch.targets)
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        raise ShapesDiffer(
            f"The loss returned {_described(loss)}; it must be a scalar tensor, the mean over the batch."
        )
    if not math.isfinite(loss.item()):
        raise FirstLossNotFinite(
            f"The loss of the first batch is {loss.item()} before any training.",
            "Look at the scale of the inputs and at the model's initialisation.",
        )
    return loss.item(), outputs


@contextmanager
def _shapes(message: str, hint: str) -> Iterator[None]:
    """Turn what torch raises of wrong shapes and dtypes into `ShapesDiffer`."""
    try:
        yield
    except DtrainError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ShapesDiffer(f"{message}: {' '.join(str(error).split())}", hint) from error


def train_local(
    resident: Resident, task: LocalTask, params: Parameters, inner: InnerState, progress: Progress = lambda event: None
) -> Update:
    """Run the local steps of one replica in one round.

    A replica whose parameters are not finite afterwards keeps the inner state it came with. `progress` is told how
    far it is, every `PROGRESS_SECONDS`.
    """
    spec = resident.spec
    train = spec.config.train
    partition = resident.partitions[task.replica]
    started = time.monotonic()
    doing = f"Round {task.round}, replica {task.replica}"
    with resident.lock, isolated(task.seed, spec.threads), user_code(doing):
        module = resident.module()
        load_into(module, params)
        module.to(spec.device)
        sizes = list(step_sizes(task, partition.num_samples, train))
        loader = resident.train_loader(task.replica, task.cursor)
        found = loader.batches(micro for step in sizes for micro in step)
        batches = prepared(resident, found, "train", task.replica, task.cursor, partition.num_samples)
        result = run_local_steps(
            module,
            resident.recipe,
            inner,
            ((sum(step), _taken(batches, len(step))) for step in sizes),
            first_step=task.step,
            total_steps=task.total_steps,
            on_step=_at_intervals(progress, task.round, task.replica, task.num_steps),
        )
        after = flatten(module, params.layout)
        counted = loader.counted()
    finite = is_finite(after, params)
    return Update(
        params=after,
        inner=result.inner if finite else inner,
        contribution=Contribution(
            replica=task.replica,
            samples=result.samples,
            steps=result.steps,
            loss_sum=result.loss_sum,
            finite=finite,
            units_decoded=counted.units,
            bytes_read=counted.bytes,
            seconds=time.monotonic() - started,
            waited=counted.waited,
        ),
    )


def _at_intervals(progress: Progress, round: int, replica: int, steps: int) -> Callable[[int, int], None]:
    began = last = time.monotonic()

    def on_step(step: int, samples: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS:
            last = now
            event = StepsTaken(
                round=round,
                replica=replica,
                step=step,
                steps=steps,
                samples=samples,
                seconds=now - began,
            )
            progress(event)

    return on_step


# The parts of an update and of a reduced round go to different places. Large ones are taken apart by tasks of their
# own, which copy nothing; small ones travel whole, and are taken apart where they are used.


def parameters_of(update: Update | tuple[Parameters, Contribution]) -> tuple[Parameters, Contribution]:
    """Return what the average needs of an update."""
    return (update.params, update.contribution) if isinstance(update, Update) else update


def inner_of(update: Update | InnerState) -> InnerState:
    """Return what only the replica itself needs of an update."""
    return update.inner if isinstance(update, Update) else update


def mixed_of(reduced: Reduced | Parameters) -> Parameters:
    """Return the parameters that the next round starts from."""
    return reduced.params if isinstance(reduced, Reduced) else reduced


def outer_of(reduced: Reduced | InnerState, piece: int) -> InnerState:
    """Return the outer optimizer's state for one slice."""
    return reduced.outer[piece] if isinstance(reduced, Reduced) else reduced


@dataclass(frozen=True, slots=True)
class Reduced:
    """What a reduce task returns; `mixed_of`, `outer_of` and `summarise` take it apart."""

    params: Parameters
    outer: tuple[InnerState, ...]
    contributions: tuple[Contribution, ...]
    bytes_reduced: int

    def __sizeof__(self) -> int:
        return self.params.__sizeof__() + sum(state.__sizeof__() for state in self.outer)


def reduce_round(
    config: AverageConfig,
    updates: Sequence[Update | tuple[Parameters, Contribution]],
    theta: Reduced | Parameters,
    outer: Sequence[Reduced | InnerState],
) -> Reduced:
    """Average the replicas of a round, in replica order, and take the step of the outer optimizer.

    Replicas that are not finite are left out. If none is finite the first one stands for all: the driver stops the
    run by the summary.

    Parameters
    ----------
    config : AverageConfig
    updates : sequence of Update or (Parameters, Contribution)
        In replica order.
    theta : Reduced or Parameters
        What the round started from.
    outer : sequence of Reduced or InnerState
        The outer optimizer's state by slice; empty without one.
    """
    pairs = [parameters_of(update) for update in updates]
    before, states = mixed_of(theta), tuple(outer_of(state, piece) for piece, state in enumerate(outer))
    kept = [(params, c) for params, c in pairs if c.finite] or pairs[:1]
    counts = [c.samples if config.weights == "samples" else 1 for _, c in kept]
    mixed = average([params for params, _ in kept], counts)
    if config.outer is not None:
        end = mixed.layout.num_params  # buffers never reach the outer optimizer
        stepped, state = outer_step(before.flat[:end], mixed.flat[:end], states[0], config.outer)
        mixed, states = replace(mixed, flat=np.concatenate([stepped, mixed.flat[end:]])), (state,)
    contributions = tuple(contribution for _, contribution in pairs)
    return Reduced(mixed, states, contributions, sum(params.nbytes for params, _ in pairs))


def summarise(reduced: Reduced, theta: Reduced | Parameters) -> RoundSummary:
    """Return the scalars of a round that started from `theta`; the next round does not wait for their hash."""
    return RoundSummary(
        contributions=reduced.contributions,
        params_sha256=params_sha256(reduced.params),
        finite=is_finite(reduced.params, mixed_of(theta)),
        bytes_reduced=reduced.bytes_reduced,
    )


def evaluate_piece(resident: Resident, params: Parameters, split: SplitName, piece: int) -> Sums:
    """Evaluate one piece of a split."""
    spec = resident.spec
    source, partition = resident.pieces(split)[piece]
    batch_size = spec.config.train.batch_size
    size = spec.config.train.micro_batch or (EVAL_BATCH if batch_size == "full" else batch_size)
    with resident.lock, isolated(spec.config.train.seed, spec.threads), user_code(f"Evaluating on {split}"):
        module = resident.module()
        load_into(module, params)
        module.to(spec.device)
        total = partition.num_samples
        sizes = [min(size, total - start) for start in range(0, total, size)]
        loader = resident.eval_loader(split, piece, sizes)
        batches = prepared(resident, loader.batches(sizes), split, piece, Cursor(0, 0), total)
        try:
            return evaluate(module, resident.recipe.loss, resident.metrics, batches, spec.config.train.precision)
        finally:
            if not source.memory.evaluate or not source.memory.evaluate.kept:
                resident.release((split, piece))


def take_moments(resident: Resident, replica: int, most_units: int | None, progress: Progress) -> dict[str, Moments]:
    """Return the moments of the variables of ``data.normalize`` over the rows of a replica's partition."""
    spec = resident.spec
    source, partition = spec.sources[resident.stores[replica]], resident.partitions[replica]
    reader = resident.reader(source)
    names = spec.config.data.normalize
    units = len(names) * min(len(partition.units), most_units or len(partition.units))
    return partition_moments(reader, partition, names, most_units, _at_intervals(progress, 0, replica, units))


def merge_pieces(pieces: list[Sums]) -> Sums:
    """Add the pieces of an evaluation in order."""
    return merge(pieces)


def prepared(
    resident: Resident, batches: Iterator[Batch], split: SplitName, stream: int, cursor: Cursor, pass_size: int
) -> Iterator[TensorBatch]:
    """Yield batches as the model takes them: as tensors, transformed, on the device."""
    spec, transform = resident.spec, resident.functions.get("data.transform")
    tensors = as_tensors(batches, split)
    if transform is not None:
        position = cursor.epoch * pass_size + cursor.position
        tensors = transformed(tensors, transform, spec.config.train.seed, stream, position)
    return tensors if spec.device == "cpu" else on_device(tensors, spec.device)


def _taken(batches: Iterator[TensorBatch], count: int) -> Iterable[TensorBatch]:
    for _ in range(count):
        yield next(batches)


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_described, value))})"
    return type(value).__name__
