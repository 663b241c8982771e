"""The plan of a round: the steps, batches, cursors and seeds of every replica. Integers and pure functions.

A round of ``local_steps = H`` is H full batches of a cyclic stream (remainders carry over into the next pass); of
``local_epochs = E`` it is E passes, the last batch of a pass may be short, or left out (``drop_last``). The first
``sync_rounds`` rounds are one step each: post-local SGD (Lin et al. 2020, arXiv:1808.07217). All of this is known
before a round has run, so that round r + 1 can be planned while round r is still running.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

from dtrain.config.schema import FULL_BATCH_MICRO, TrainTable
from dtrain.types import Cursor, LocalTask, Position, RoundPlan

EVALUATED_SHARE = 0.3
"""With ``train.eval_every = "auto"``, at most so many samples are evaluated for each that is trained on."""


def first_position(replicas: int) -> Position:
    """Return the position of a run that has not started."""
    return Position(round=0, cursors=(Cursor(0, 0),) * replicas, steps=(0,) * replicas)


def plan_round(position: Position, sizes: Sequence[int], train: TrainTable, eval_every: int = 1) -> RoundPlan:
    """Plan the round after `position`.

    Parameters
    ----------
    position : Position
    sizes : sequence of int
        Samples of a pass of each replica (`pass_size`).
    train : TrainTable
    eval_every : int
        The model is evaluated after every so many rounds, and after the last one.
    """
    number = position.round + 1
    tasks = tuple(
        LocalTask(
            round=number,
            replica=replica,
            cursor=position.cursors[replica],
            step=position.steps[replica],
            total_steps=steps_of_run(size, train),
            num_steps=steps_a_round(size, train, number),
            num_samples=samples_a_round(size, train, number),
            num_epochs=0 if train.local_steps else train.local_epochs,
            seed=task_seed(train.seed, number, replica),
        )
        for replica, size in enumerate(sizes)
    )
    return RoundPlan(number, tasks, is_evaluated(number, eval_every, train))


def is_evaluated(number: int, eval_every: int, train: TrainTable) -> bool:
    """Whether the cadence of a run evaluates the model after a round: every `eval_every` rounds, and after the last."""
    return number % eval_every == 0 or number == train.rounds


def eval_cadence(validation: int, samples: int, train: TrainTable) -> int:
    """Return the rounds between evaluations.

    With ``train.eval_every = "auto"`` an evaluation costs at most about as much as a tenth of the steps between: it is
    one pass forward, a step is about three.

    Parameters
    ----------
    validation : int
        Samples of the validation split.
    samples : int
        Samples of a round after ``train.sync_rounds``, of all replicas.
    train : TrainTable

    >>> eval_cadence(180, 1437, TrainTable()), eval_cadence(8000, 320, TrainTable())
    (1, 84)
    """
    if train.eval_every != "auto":
        return train.eval_every
    return max(1, math.ceil(validation / (EVALUATED_SHARE * samples))) if samples else 1


def position_after(plan: RoundPlan, sizes: Sequence[int]) -> Position:
    """Return the position after a round."""
    return Position(
        round=plan.round,
        cursors=tuple(cursor_after(task, size) for task, size in zip(plan.tasks, sizes, strict=True)),
        steps=tuple(task.step + task.num_steps for task in plan.tasks),
    )


def pass_size(size: int, train: TrainTable) -> int:
    """Return the samples of a pass over a partition of `size` samples: fewer with ``drop_last``."""
    if not train.drop_last or train.local_steps or train.batch_size == "full":
        return size
    return size - size % train.batch_size


def steps_a_round(size: int, train: TrainTable, number: int | None = None) -> int:
    """Return the local steps that a replica with `size` samples takes in round `number`; None: after the short ones."""
    if train.local_steps:
        return 1 if number is not None and number <= train.sync_rounds else train.local_steps
    return train.local_epochs * (1 if train.batch_size == "full" else math.ceil(size / train.batch_size))


def steps_of_run(size: int, train: TrainTable) -> int:
    """Return the local steps that a replica with `size` samples takes in all rounds."""
    short = min(train.sync_rounds, train.rounds)
    return short + (train.rounds - short) * steps_a_round(size, train)


def samples_a_round(size: int, train: TrainTable, number: int | None = None) -> int:
    """Return the samples that a replica with `size` samples consumes in round `number`; None: after the short ones."""
    if not train.local_steps:
        return train.local_epochs * size
    return steps_a_round(size, train, number) * (size if train.batch_size == "full" else train.batch_size)


def step_sizes(task: LocalTask, size: int, train: TrainTable) -> Iterator[tuple[int, ...]]:
    """Yield, for each local step of a task, the sizes of its micro-batches."""
    if train.batch_size == "full":
        yield from (micro_sizes(size, micro_size(train)) for _ in range(task.num_steps))
    elif task.num_epochs == 0:
        yield from (micro_sizes(train.batch_size, train.micro_batch) for _ in range(task.num_steps))
    else:
        for _ in range(task.num_epochs):
            for start in range(0, size, train.batch_size):
                yield micro_sizes(min(train.batch_size, size - start), train.micro_batch)


def endless_sizes(size: int, train: TrainTable) -> Iterator[int]:
    """Yield the sizes of a replica's micro-batches without end, from the start of any of its tasks."""
    while True:
        if train.batch_size == "full":
            yield from micro_sizes(size, micro_size(train))
        elif train.local_steps:
            yield from micro_sizes(train.batch_size, train.micro_batch)
        else:
            for start in range(0, size, train.batch_size):
                yield from micro_sizes(min(train.batch_size, size - start), train.micro_batch)


def micro_size(train: TrainTable) -> int:
    """Return the most samples that are passed through the model at once."""
    return train.micro_batch or (FULL_BATCH_MICRO if train.batch_size == "full" else train.batch_size)


def first_step(size: int, train: TrainTable) -> tuple[int, ...]:
    """Return the sizes of the micro-batches of a full step of a replica with `size` samples.

    A partition with fewer samples than a batch has steps as short as a pass, unless batches go on from pass to pass.
    """
    if train.batch_size == "full":
        return micro_sizes(size, micro_size(train))
    batch = train.batch_size if train.local_steps else min(size, train.batch_size)
    return micro_sizes(batch, train.micro_batch)


def smallest_batch(sizes: Sequence[int], train: TrainTable) -> tuple[int, int]:
    """Return the samples of the smallest micro-batch of a run, and the replica that has it.

    Parameters
    ----------
    sizes : sequence of int
        Samples of a pass of each replica (`pass_size`).
    train : TrainTable
    """
    return min((_smallest_of(size, train), replica) for replica, size in enumerate(sizes))


def _smallest_of(size: int, train: TrainTable) -> int:
    if train.batch_size == "full":
        return micro_sizes(size, micro_size(train))[-1]
    if train.local_steps:
        return micro_sizes(train.batch_size, train.micro_batch)[-1]
    batches = {min(size, train.batch_size), size % train.batch_size or train.batch_size}
    return min(micro_sizes(batch, train.micro_batch)[-1] for batch in batches if batch <= size)


def micro_sizes(batch: int, micro: int) -> tuple[int, ...]:
    """Cut a batch into micro-batches; ``micro = 0`` leaves it whole.

    >>> micro_sizes(100, 32), micro_sizes(100, 0)
    ((32, 32, 32, 4), (100,))
    """
    if micro == 0 or micro >= batch:
        return (batch,)
    full, rest = divmod(batch, micro)
    return (micro,) * full + ((rest,) if rest else ())


def cursor_after(task: LocalTask, size: int) -> Cursor:
    """Return the cursor after a task."""
    consumed = task.cursor.epoch * size + task.cursor.position + task.num_samples
    return Cursor(*divmod(consumed, size))


def task_seed(seed: int, round_number: int, replica: int) -> int:
    """Return the seed of a task: a hash, so that no two tasks of a run share a stream."""
    digest = hashlib.sha256(f"{seed}/{round_number}/{replica}/local".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
