"""`batches`: the data path as an iterator of torch batches, for a training loop of your own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

from distributed.system import MEMORY_LIMIT

from dtrain.algorithm.batch import TensorBatch
from dtrain.config.schema import DataConfig
from dtrain.config.values import cache_bytes, parse_bytes
from dtrain.data.load.loader import Loader
from dtrain.data.load.statistics import partition_moments, scalings_of
from dtrain.data.plan.memory import MemoryBudget, Reading, plan_memory
from dtrain.data.plan.partition import Partition, cell_anchors, plan_data, train_partitions
from dtrain.data.plan.splits import SplitName
from dtrain.data.plan.units import DataPlan
from dtrain.data.read.presence import absent_rows, check_presence
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import Samples
from dtrain.errors import InvalidConfig, TooFewSamples, did_you_mean
from dtrain.runtime.tensors import as_tensors, transformed
from dtrain.runtime.usercode import load_function
from dtrain.types import Cursor


class Batches:
    """An iterator of torch batches that reads ahead, and knows how far it is.

    Made by `batches`. It ends its threads when it is exhausted, closed or forgotten.
    """

    def __init__(self, loader: Loader, prepared: Iterator[TensorBatch]) -> None:
        self._loader = loader
        self._prepared = prepared

    @property
    def cursor(self) -> Cursor:
        """Where the next batch begins: give it to `batches` to go on from there."""
        return self._loader.cursor

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

    Parameters
    ----------
    samples : Samples
        From `open_samples`: variables, windows, patches, splits, shuffling, normalisation and transform.
    batch_size : int
        Samples of a batch.
    split : {"train", "val", "test", "all"}
        Only "train" is shuffled.
    epochs : int, optional
        Passes; the last batch of a pass may be short. None: full batches of one pass after the other, for ever.
    drop_last : bool
        Leave out the short batch at the end of a pass.
    replica, replicas : int
        Which of several equal partitions of the training split to read.
    seed : int
        Of partitions and order.
    cursor : Cursor, optional
        Where to begin: what `Batches.cursor` was.
    memory, cache, reader : str, optional
        As the keys of ``[data]``, in whose place they stand.

    Returns
    -------
    Batches
        Of objects with `inputs` (a tuple), `targets` (a tensor, or a tuple of several) and `size`.

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
    if not isinstance(samples, Samples):
        raise InvalidConfig(f"samples is a {type(samples).__name__}, not what open_samples returns.")
    _check(batch_size=batch_size, replicas=replicas, **({} if epochs is None else {"epochs": epochs}))
    _check_name("split", split, get_args(SplitName))
    if reader is not None:
        _check_name("reader", reader, get_args(DataConfig.model_fields["reader"].annotation))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InvalidConfig(f"seed = {seed!r}: an integer is needed.")
    if not isinstance(cursor, Cursor | None):
        raise InvalidConfig(
            f"cursor = {cursor!r}: what Batches.cursor was is needed, or dtrain.Cursor(epoch, position)."
        )
    if not 0 <= replica < replicas:
        raise InvalidConfig(f"replica = {replica}: allowed are 0 to {replicas - 1}, as replicas = {replicas}.")
    samples = _read_by(samples, reader)
    config = samples.config
    if config.missing == "error":
        check_presence(samples)
    plan = _plan(samples, replicas, seed)
    found = train_partitions(plan) if split == "train" else _whole(plan, split)
    partition = found[replica if split == "train" else 0]
    shuffle = plan.shuffle and split == "train"
    law = _law(samples, partition, batch_size, shuffle, memory, cache)
    threads = law.train.limits.threads
    opened = UnitReader(samples, config.reader, threads, plan.absent)
    scalings = {}
    if config.normalize:
        moments = partition_moments(opened, _whole(plan, "train")[0], config.normalize)
        scalings = scalings_of(moments, samples.variables)
    start = cursor or Cursor(0, 0)
    if start.position >= partition.num_samples:
        raise InvalidConfig(
            f"cursor = {start}: a pass over this split holds {partition.num_samples:,} samples.",
            "A cursor goes on only in the split and the partition that it is of.",
        )
    consumed = start.epoch * partition.num_samples + start.position
    loader = Loader(
        opened,
        partition,
        start,
        _sizes(partition.num_samples, batch_size, start, epochs),
        replica=replica,
        shuffle=shuffle,
        limits=law.train.limits,
        scalings=scalings,
        total=None if epochs is None else max(0, epochs * partition.num_samples - consumed),
    )
    tensors = as_tensors(loader.stream(), split)
    if config.transform:
        transform = load_function("data.transform", config.transform, Path.cwd())
        tensors = transformed(tensors, transform, seed, replica, consumed)
    if drop_last:
        tensors = (batch for batch in tensors if batch.size == batch_size)
    return Batches(loader, tensors)


def law_of(
    samples: Samples,
    *,
    batch_size: int = 100,
    replicas: int = 1,
    memory: str | None = None,
    cache: str | None = None,
    reader: str | None = None,
) -> MemoryBudget:
    """Return the memory law that `batches` keeps to with these arguments, on the training split."""
    samples = _read_by(samples, reader)
    plan = _plan(samples, replicas, 0)
    return _law(samples, train_partitions(plan)[0], batch_size, plan.shuffle, memory, cache)


def _read_by(samples: Samples, reader: str | None) -> Samples:
    if reader is None:
        return samples
    return replace(samples, config=samples.config.model_copy(update={"reader": reader}))


def _plan(samples: Samples, replicas: int, seed: int) -> DataPlan:
    absent = absent_rows(samples) if samples.config.missing == "skip" else ()
    return plan_data(samples, replicas=replicas, seed=seed, absent=absent)


def _law(
    samples: Samples, partition: Partition, batch_size: int, shuffle: bool, memory: str | None, cache: str | None
) -> MemoryBudget:
    config = samples.config
    limit, what = int(MEMORY_LIMIT) // 2, "half of this machine's memory"
    if (asked := config.memory if memory is None else memory) != "auto":
        limit, what = parse_bytes(asked, "memory"), "memory"
    kept = config.cache if cache is None else cache
    reading = Reading(
        samples=samples,
        plan=partition.plan,
        loaders=1,
        units=len(partition.units),
        batch_size=batch_size,
        shuffle=shuffle,
    )
    return plan_memory(reading, None, limit, what, None if kept == "auto" else cache_bytes(kept))


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidConfig(f"{name} = {value!r}: a positive integer is needed.")


def _check_name(key: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise InvalidConfig(f'{key} = "{given}": allowed are {", ".join(allowed)}{did_you_mean(str(given), allowed)}')


def _whole(plan: DataPlan, split: SplitName) -> tuple[Partition, ...]:
    """Return a whole split as one partition."""
    found = cell_anchors(plan, split)
    if not found.num_samples:
        raise TooFewSamples(f'The split "{split}" holds no samples.', "Choose another, or hold out more.")
    return (found,)


def _sizes(size: int, batch: int, start: Cursor, epochs: int | None) -> Iterator[int]:
    """Yield the sizes of the batches of passes that begin at a cursor."""
    if epochs is None:
        yield from itertools.repeat(batch)
    position = start.position
    for _ in range(start.epoch, epochs or 0):
        full, rest = divmod(size - position, batch)
        yield from itertools.repeat(batch, full)
        if rest:
            yield rest
        position = 0
