"""`batches`: the data path as an iterator of torch batches, for a training loop of your own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

from distributed.system import MEMORY_LIMIT

from dtrain.algorithm.batch import TensorBatch
from dtrain.config.functions import Function
from dtrain.config.schema import DataConfig
from dtrain.config.values import cache_bytes, parse_bytes, plain_value
from dtrain.data.balance import balanced, count_classes
from dtrain.data.coordinate import find_gaps
from dtrain.data.encoding import Scaling
from dtrain.data.given import find_given
from dtrain.data.load.finite import merged, pass_over
from dtrain.data.load.loader import Loader
from dtrain.data.load.statistics import partition_moments, scalings_of
from dtrain.data.plan.footprint import tables_bytes
from dtrain.data.plan.memory import MemoryBudget, Reading, plan_memory
from dtrain.data.plan.multiplicity import multiplicity_text
from dtrain.data.plan.partition import Partition, cell_anchors, counted, plan_data, train_partitions
from dtrain.data.plan.splits import SplitName
from dtrain.data.plan.units import DataPlan
from dtrain.data.read.boxes import BoxReader
from dtrain.data.read.inventory import rows_absent, take_inventory
from dtrain.data.read.joined import open_reader, values_counted
from dtrain.data.samples import Samples, not_samples
from dtrain.errors import InvalidConfig, TooFewSamples, did_you_mean
from dtrain.runtime.tensors import as_tensors, transformed
from dtrain.runtime.usercode import checked_function, load_function
from dtrain.types import Cursor


class Batches:
    """An iterator of torch batches that reads ahead and knows its cursor.

    Made by `batches`. Its threads end when it is exhausted, closed or garbage-collected.
    """

    def __init__(
        self, loader: Loader, prepared: Iterator[TensorBatch], memory: MemoryBudget, shortest: int = 1
    ) -> None:
        self._loader = loader
        self._prepared = prepared
        self._shortest = shortest
        """Samples of the shortest batch that is not left out."""
        self.memory = memory
        """The memory budget that it keeps to, term by term."""

    @property
    def cursor(self) -> Cursor:
        """Where the next batch begins; pass it to `batches` to continue from there."""
        cursor = self._loader.cursor
        if cursor.position and self._loader.pass_size - cursor.position < self._shortest:
            return Cursor(cursor.epoch + 1, 0)
        return cursor

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> TensorBatch:
        try:
            return next(self._prepared)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads."""
        self._loader.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "_loader" in vars(self):
            self.close()


def batches(
    samples: Samples,
    *,
    batch_size: int = 100,
    split: SplitName = "train",
    epochs: int | None = 1,
    drop_last: bool = False,
    replica: int = 0,
    replicas: int = 1,
    seed: int = 0,
    cursor: Cursor | None = None,
    memory: str | None = None,
    cache: str | None = None,
    reader: str | None = None,
) -> Batches:
    """Iterate over torch batches in this process: dtrain's data path for a loop of your own.

    Where ``data.non_finite`` leaves samples out, a pass over all of them comes first, in this call.

    Parameters
    ----------
    samples : Samples
        From `open_samples`: variables, windows, patches, splits, shuffling, normalisation and transform.
    batch_size : int
        Samples of a batch.
    split : {"train", "val", "test", "all"}
        Only "train" is shuffled.
    epochs : int, optional
        Number of passes, counted from `cursor`: at the beginning of a pass it is the first, within a pass the rest of
        it is. The last batch of a pass may be short. None: passes without end, in full batches that go on from one
        pass to the next.
    drop_last : bool
        Leave out the short batch at the end of a pass.
    replica, replicas : int
        The training split is divided into `replicas` equal partitions; read partition number `replica`.
    seed : int
        Determines partitions and order.
    cursor : Cursor, optional
        Where to begin: the value of `Batches.cursor` at an earlier time. That of an iterator that is exhausted is the
        beginning of the next pass, which is shuffled anew.
    memory, cache, reader : str, optional
        Replace the keys of the same name in ``[data]``.

    Returns
    -------
    Batches
        An iterator of objects with `inputs` (a tuple), `targets` (a tensor, or a tuple of several) and `size`. Missing
        labels of an integer target are class -100, which torch's losses of classes leave out. With ``data.weight``,
        `weight` has a float32 tensor of the shape of each target; else it is None.

    Raises
    ------
    TooFewSamples
        The split is empty.
    OutOfMemory, ChunkTooLarge
        `memory` does not suffice.
    DtrainError
        The data are missing or damaged.

    Examples
    --------
    >>> for (image,), label in batches(samples, batch_size=64):  # doctest: +SKIP
    ...     loss = criterion(model(image), label)
    """
    _check_samples(samples)
    batch_size, epochs, replica, replicas, seed = plain_value((batch_size, epochs, replica, replicas, seed))
    _check_positive(batch_size=batch_size, replicas=replicas, **({} if epochs is None else {"epochs": epochs}))
    _check_name("split", split, get_args(SplitName))
    if reader is not None:
        _check_name("reader", reader, get_args(DataConfig.model_fields["reader"].annotation))
    _check_start(seed, cursor, replica, replicas)
    samples = _read_by(samples, reader)
    config = samples.config
    if config.missing in ("auto", "error"):
        take_inventory(samples, full=False, digests=False, presence=True)
    plan = _counted(samples, _plan(samples, replicas, seed))
    partition = train_partitions(plan)[replica] if split == "train" else _whole(plan, split)
    shuffle = plan.shuffle and split == "train"
    budget = _memory_of(samples, partition, batch_size, shuffle, memory, cache)
    limits = budget.train.limits
    start = cursor or Cursor(0, 0)
    consumed = _consumed(start, partition)
    opened = open_reader(samples, config.reader, limits.threads, plan.absent)
    transform = _transform_of(samples)
    loader = Loader(
        opened,
        partition,
        start,
        _sizes(partition.num_samples, batch_size, start, epochs),
        replica=replica,
        shuffle=shuffle,
        limits=limits,
        scalings=_scalings(opened, plan),
        total=None if epochs is None else epochs * partition.num_samples - start.position,
    )
    tensors = as_tensors(loader.stream(), split)
    if transform is not None:
        tensors = transformed(tensors, transform, seed, replica, consumed)
    if drop_last:
        tensors = (batch for batch in tensors if batch.size == batch_size)
    return Batches(loader, tensors, budget, shortest=batch_size if drop_last and epochs is not None else 1)


# Parts of `batches` ------------------------------------------------------------------------------------------


def _transform_of(samples: Samples) -> Function | None:
    """Return the function of ``data.transform``: the one that was given, or the one that it names."""
    key, name = "data.transform", samples.config.transform
    if samples.transform is not None:
        return checked_function(key, samples.transform)
    return checked_function(key, load_function(key, name, Path.cwd())) if name else None


def _read_by(samples: Samples, reader: str | None) -> Samples:
    if reader is None:
        return samples
    return replace(samples, config=samples.config.model_copy(update={"reader": reader}))


def _plan(samples: Samples, replicas: int, seed: int) -> DataPlan:
    absent = rows_absent(samples) if samples.config.missing == "skip" else ()
    given = find_given(samples, seed, absent).splits
    jumps = find_gaps(samples).jumps
    plan = plan_data(samples, replicas=replicas, seed=seed, absent=absent, jumps=jumps, given=given)
    return values_counted(samples, plan)


def _counted(samples: Samples, plan: DataPlan) -> DataPlan:
    """Return the plan without the samples that ``data.non_finite`` leaves out, and with those that repeat."""
    if samples.config.min_valid is not None:
        whole = cell_anchors(plan, "all")
        reader = open_reader(samples, samples.config.reader, absent=plan.absent)
        values, left_out = merged(samples, whole, [pass_over(reader, whole, range(len(whole.units)))])
        plan = counted(samples, plan, values, left_out.named)
    if samples.config.balance:
        values = balanced(samples, plan, count_classes(samples, plan))
        plan = replace(plan, multiplicity=multiplicity_text(values))
    return plan


def _whole(plan: DataPlan, split: SplitName) -> Partition:
    """Return a whole split as one partition."""
    partition = cell_anchors(plan, split)
    if not partition.num_samples:
        raise TooFewSamples(f'The split "{split}" holds no samples.', "Choose another, or hold out more.")
    return partition


def _memory_of(
    samples: Samples, partition: Partition, batch_size: int, shuffle: bool, memory: str | None, cache: str | None
) -> MemoryBudget:
    """Return the memory budget; `memory` and `cache` replace those of ``[data]``."""
    config = samples.config
    limit, name = int(MEMORY_LIMIT) // 2, "half of this machine's memory"
    if (wanted := config.memory if memory is None else memory) != "auto":
        limit, name = parse_bytes(wanted, "memory"), "memory"
    kept = config.cache if cache is None else cache
    reading = Reading(
        samples=samples,
        plan=partition.plan,
        loaders=1,
        units=len(partition.units),
        batch_size=batch_size,
        shuffle=shuffle,
        tables=tables_bytes(samples, partition.plan, partition.nbytes),
        largest=partition.largest,
    )
    return plan_memory(reading, None, limit, name, None if kept == "auto" else cache_bytes(kept))


def _scalings(reader: BoxReader, plan: DataPlan) -> dict[str, Scaling]:
    """Return how variables are standardised: by the rows of the whole training split, in one pass over it."""
    names = reader.samples.config.normalize
    if not names:
        return {}
    return scalings_of(partition_moments(reader, _whole(plan, "train"), names), reader.samples.variables)


def _consumed(start: Cursor, partition: Partition) -> int:
    """Return the samples before a cursor, in all passes."""
    if start.position >= partition.num_samples:
        raise InvalidConfig(
            f"cursor = {start}: a pass over this split holds {partition.num_samples:,} samples.",
            "A cursor is valid only for the split and the partition that it was taken from.",
        )
    return start.epoch * partition.num_samples + start.position


def _sizes(size: int, batch: int, start: Cursor, epochs: int | None) -> Iterator[int]:
    """Yield the sizes of the batches of so many passes; the first one begins at the cursor."""
    if epochs is None:
        yield from itertools.repeat(batch)
    position = start.position
    for _ in range(epochs or 0):
        full, rest = divmod(size - position, batch)
        yield from itertools.repeat(batch, full)
        if rest:
            yield rest
        position = 0


# Checks of arguments ----------------------------------------------------------------------------------------


def _check_samples(samples: Samples) -> None:
    if not isinstance(samples, Samples):
        raise not_samples(samples)


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidConfig(f"{name} = {value!r}: a positive integer is needed.")


def _check_name(key: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise InvalidConfig(f'{key} = "{given}": allowed are {", ".join(allowed)}{did_you_mean(str(given), allowed)}')


def _check_start(seed: int, cursor: Cursor | None, replica: int, replicas: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InvalidConfig(f"seed = {seed!r}: an integer is needed.")
    if not isinstance(cursor, Cursor | None):
        raise InvalidConfig(
            f"cursor = {cursor!r}: a dtrain.Cursor(epoch, position) is needed, or the value of Batches.cursor."
        )
    if cursor is not None and min(cursor.epoch, cursor.position) < 0:
        raise InvalidConfig(f"cursor = {cursor!r}: epoch and position count from 0.")
    if not 0 <= replica < replicas:
        raise InvalidConfig(f"replica = {replica}: allowed are 0 to {replicas - 1}, as replicas = {replicas}.")
