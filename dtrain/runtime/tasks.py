"""The tasks that run on a worker: pure functions of (resident, arguments).

A task never changes its arguments: on a cluster they may be shared with other tasks of the process.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

from dtrain.algorithm.average import Combined, Mean, Update, average, combine, contribute, stepped
from dtrain.algorithm.batch import TensorBatch
from dtrain.algorithm.batchnorm import BATCHES, Statistics, take_statistics
from dtrain.algorithm.drift import Squares, norm_of
from dtrain.algorithm.evaluate import Sums, Term, evaluate
from dtrain.algorithm.local import LocalResult, run_local_steps
from dtrain.algorithm.params import flatten, with_frozen, without_frozen
from dtrain.algorithm.plan import micro_size, micro_sizes, pass_size, step_sizes
from dtrain.algorithm.scaffold import ControlledSteps, Controls
from dtrain.config.average import AverageConfig
from dtrain.data.load.climate import PlaceSums, partition_sums
from dtrain.data.load.finite import Seen, pass_over
from dtrain.data.load.gather import Batch, target_scalings
from dtrain.data.load.loader import Loader
from dtrain.data.load.moments import Moments
from dtrain.data.load.statistics import partition_moments
from dtrain.data.plan.splits import SplitName
from dtrain.events import CLIMATE, COUNTING, StepsTaken
from dtrain.runtime.contexts import breakdown_of, context_maker
from dtrain.runtime.module import isolated
from dtrain.runtime.resident import Resident
from dtrain.runtime.stopwatch import Measured, Stopwatch, process_name
from dtrain.runtime.tensors import as_tensors, decoder, on_device, transformed
from dtrain.runtime.usercode import user_code
from dtrain.runtime.watched import numbered
from dtrain.types import Broadcast, Cursor, Flat, LocalTask, OuterState, Parameters, ReplicaState

Progress: TypeAlias = Callable[[StepsTaken], None]

PROGRESS_SECONDS = 0.5


def train_local(
    resident: Resident,
    task: LocalTask,
    start: Broadcast,
    state: ReplicaState,
    frozen: Flat | None,
    progress: Progress = lambda event: None,
) -> tuple[Update, ReplicaState]:
    """Run the local steps of one replica in one round; return what it sends and what it keeps.

    Parameters
    ----------
    resident : Resident
    task : LocalTask
    start : Broadcast
        What the round starts from.
    state : ReplicaState
        What the replica kept from the round before.
    frozen : float32[num_frozen] or None
        The parameters that are not trained, if there are some.
    progress : callable
        Called at most every `PROGRESS_SECONDS` with the finished steps.
    """
    given = replace(start, params=with_frozen(start.params, frozen), inner=start.inner or state.inner)
    local, after, measured = _local_steps(resident, task, given, state, progress)
    began = time.monotonic()
    update, kept = contribute(start, after, state, local, task, resident.spec.config.average)
    counted, data = measured.counted, measured.data
    contribution = replace(
        update.contribution,
        units_decoded=counted.units,
        bytes_read=counted.bytes,
        seconds=measured.seconds + time.monotonic() - began,
        waited=counted.waited,
        fetch=data.fetch,
        decode=data.decode,
        gather=data.gather,
        process=process_name(),
    )
    return replace(update, contribution=contribution), kept


def _local_steps(
    resident: Resident, task: LocalTask, start: Broadcast, state: ReplicaState, progress: Progress
) -> tuple[LocalResult, Parameters, Measured]:
    spec, partition, layout = resident.spec, resident.replicas[task.replica].partition, start.params.layout
    assert start.inner is not None
    doing = f"Round {task.round}, replica {task.replica}"
    with resident.lock, isolated(task.seed, spec.threads), user_code(doing):
        watch = Stopwatch()
        module = resident.module_with(start.params)
        module.to(spec.device)
        controls = Controls(start.control, state.control)
        used = pass_size(partition.num_samples, spec.config.train)
        sizes = list(step_sizes(task, used, spec.config.train))
        loader = resident.train_loader(task.replica, task.cursor)
        dropped = micro_sizes(partition.num_samples - used, spec.config.train.micro_batch)
        read = _without_last(loader, sizes, dropped, len(sizes) // max(1, task.num_epochs))
        batches = prepared(resident, read, "train", task.replica, task.cursor, used)
        result = run_local_steps(
            module,
            resident.recipe,
            start.inner,
            numbered((sum(step), _taken(batches, len(step))) for step in sizes),
            first_step=task.step,
            total_steps=task.total_steps,
            controlled=ControlledSteps(module, layout, controls) if spec.config.average.control else None,
            on_step=_at_intervals(progress, task.round, task.replica, task.num_steps),
        )
        deque(batches, maxlen=0)  # the loader goes on where the next task begins
        after = without_frozen(flatten(module, layout))
        return result, after, watch.measured(loader.counted(), shares_cores=spec.device == "cpu")


def _without_last(
    loader: Loader, steps: Sequence[tuple[int, ...]], dropped: tuple[int, ...], steps_a_pass: int
) -> Iterator[Batch]:
    """Yield the batches of steps; the samples that ``drop_last`` leaves out at the end of a pass are passed over."""
    for number, step in enumerate(steps, start=1):
        yield from loader.batches(step)
        if dropped != (0,) and number % steps_a_pass == 0:
            deque(loader.batches(dropped), maxlen=0)


def evaluate_piece(resident: Resident, params: Parameters, split: SplitName, piece: int) -> Sums:
    """Evaluate one piece of a split."""
    started = time.monotonic()
    train, stream = resident.spec.config.train, resident.pieces(split)[piece]
    size = micro_size(train)
    with resident.lock, isolated(train.seed, resident.spec.threads), user_code(f"Evaluating on {split}"):
        module = resident.module_with(params)
        module.to(resident.spec.device)
        total = stream.partition.num_samples
        sizes = [min(size, total - start) for start in range(0, total, size)]
        loader = resident.eval_loader(split, piece, sizes)
        batches = prepared(resident, loader.batches(sizes), split, piece, Cursor(0, 0), total)
        try:
            decode = decoder(target_scalings(stream.source.samples, resident.spec.scalings))
            sums = evaluate(
                module,
                resident.recipe.loss,
                resident.metrics,
                numbered(batches),
                train.precision,
                decode,
                context_of=context_maker(resident.spec, stream.source, stream.partition, sizes, decode),
                breakdown=breakdown_of(resident.spec),
            )
            return replace(sums, seconds=time.monotonic() - started)
        finally:
            memory = stream.source.memory.evaluate
            if memory is None or not memory.kept:
                resident.release(stream.key)


def losses_by_part(resident: Resident, params: Parameters, number: int) -> list[Term]:
    """Return the loss of each part of a stream of `Resident.by_unit`: its sum, and the number of its terms.

    Samples are prepared as in an evaluation: a transform that augments the training split leaves them as they are.
    """
    train, stream = resident.spec.config.train, resident.by_unit[number]
    with resident.lock, isolated(train.seed, resident.spec.threads), user_code("Evaluating unit by unit"):
        module = resident.module_with(params)
        module.to(resident.spec.device)
        parts = [micro_sizes(int(size), micro_size(train)) for size in stream.partition.part_sizes]
        sizes = [size for part in parts for size in part]
        loader = resident.loader_of(stream, sizes)
        try:
            read = loader.batches(sizes)
            batches = prepared(resident, read, "val", number, Cursor(0, 0), stream.partition.num_samples)
            each = (_taken(batches, len(part)) for part in parts)
            return [evaluate(module, resident.recipe.loss, {}, part, train.precision).loss for part in each]
        finally:
            resident.release(stream.key)


def recalibrate(resident: Resident, params: Parameters, replica: int) -> Statistics:
    """Return the running statistics of norm layers over some training batches of a replica."""
    train, stream = resident.spec.config.train, resident.recalibration(replica)
    with resident.lock, isolated(train.seed, resident.spec.threads), user_code("Recalibrating batch norm"):
        module = resident.module_with(params)
        module.to(resident.spec.device)
        total, size = stream.partition.num_samples, micro_size(train)
        sizes = [size] * min(total // size, BATCHES) or [total]  # norm layers refuse a last batch of one sample
        loader = resident.loader_of(stream, sizes)
        try:
            batches = prepared(resident, loader.batches(sizes), "train", replica, Cursor(0, 0), total)
            return take_statistics(module, batches, train.precision)
        finally:
            resident.release(stream.key)


def reduce(
    start: Broadcast,
    starts: Sequence[Broadcast] | None,
    updates: Sequence[Update],
    outer: OuterState,
    config: AverageConfig,
    factor: float,
) -> Combined:
    """Average replicas, and measure the time; arguments as those of `combine`."""
    began = time.monotonic()
    combined = combine(start, starts, updates, outer, config, factor)
    return replace(combined, facts=replace(combined.facts, seconds=time.monotonic() - began))


def reduce_first(
    start: Broadcast, starts: Sequence[Broadcast] | None, updates: Sequence[Update], config: AverageConfig
) -> Mean:
    """Average a slice of replicas, and measure the time: the first half of `reduce`."""
    began = time.monotonic()
    mean = average(start, starts, updates, config)
    return replace(mean, facts=replace(mean.facts, seconds=time.monotonic() - began))


def reduce_then(
    start: Broadcast,
    mean: Mean,
    outer: OuterState,
    config: AverageConfig,
    factor: float,
    squares: Sequence[Squares],
) -> Combined:
    """Take the outer step of a slice, given the squares of all slices' pseudo-gradients: the second half."""
    began = time.monotonic()
    combined = stepped(start, mean, outer, config, factor, norm_of(squares))
    seconds = mean.facts.seconds + time.monotonic() - began
    return replace(combined, facts=replace(combined.facts, seconds=seconds))


def take_moments(resident: Resident, replica: int, most_units: int | None, progress: Progress) -> dict[str, Moments]:
    """Return the moments of the variables of ``data.normalize`` over the rows of a replica's partition."""
    stream, names = resident.replicas[replica], resident.spec.config.data.normalize
    units = len(names) * min(len(stream.partition.units), most_units or len(stream.partition.units))
    on_unit = _at_intervals(progress, 0, replica, units)
    return partition_moments(resident.reader(stream.source), stream.partition, names, most_units, on_unit)


def take_places(resident: Resident, replica: int, progress: Progress) -> dict[str, PlaceSums]:
    """Return the sums of the training rows of a replica at each place, for a climatology."""
    stream, plan = resident.replicas[replica], resident.spec.climate_plan
    assert plan is not None
    units, store = len(plan.names) * len(stream.partition.units), resident.spec.plan.stores[replica]
    on_unit = _at_intervals(progress, CLIMATE, replica, units)
    reader = resident.reader(stream.source)
    return partition_sums(reader, stream.partition, plan.names, plan.periods[store], plan.count, on_unit)


def take_seen(resident: Resident, piece: int, progress: Progress) -> Seen:
    """Return which samples of a piece of the stores hold values that are not finite."""
    source, partition, parts = resident.counted[piece]
    return pass_over(resident.reader(source), partition, parts, _at_intervals(progress, COUNTING, piece, len(parts)))


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


def _at_intervals(progress: Progress, round: int, replica: int, steps: int) -> Callable[[int, int], None]:
    """Return a function of finished steps and samples that reports them every `PROGRESS_SECONDS`."""
    began = last = time.monotonic()

    def on_step(step: int, samples: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS:
            last, seconds = now, now - began
            progress(StepsTaken(round=round, replica=replica, step=step, steps=steps, samples=samples, seconds=seconds))

    return on_step
