"""Attribute lost workers to a place in the user's code: a pure fold of reports.

Watched tasks report their place (`dtrain.runtime.watched`), a nanny reports that it ends a worker for its memory, and
the scheduler lists the workers. If several workers are lost at one place, the code is at fault. Two losses alone are no
proof while other workers can try the place again: somebody may kill workers from outside.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from dask.utils import format_bytes

from dtrain.errors import DtrainError, OutOfMemory, UserCodeFailed

How: TypeAlias = Literal["ended", "frozen"]
FULL = 0.8
"""A process that used this share of its limit before it ended has most likely ended for want of memory."""
SURE = 3
"""So many workers lost in one function of the user's prove that it is at fault; one less if no worker is left."""
SURE_OUTSIDE = 5
"""The same between functions of the user's, in a batch. Before the first batch there is no proof."""
BESIDE = 3
"""Copies of the parameters that a local step makes, with an optimizer that keeps one value a parameter."""
MEMORY_LOSSES = 3
"""So many workers that nannies end for their memory prove that the run needs more."""
ATTEMPT = re.compile(r"(-[0-9a-f]{8})+-a\d+-watched$")
"""The end of a key: hashes of the submission and of the run, and the number of the attempt."""
ROUND = re.compile(r"-r0*(\d+)")
WORDS = {
    "eval-val": "evaluation",
    "eval-test": "evaluation",
    "eval-all": "evaluation",
    "units": "evaluation",
    "initialise": "the first step",
    "try": "trying the model",
    "predict": "prediction",
}
"""By name of a task, what it is called besides its round and replica."""
REPLICA = re.compile(r"-k(\d+)")


@dataclass(frozen=True, slots=True)
class TaskPlace:
    """The place that a watched task has reported last."""

    worker: str
    key: str
    """Empty: the task is done."""
    batch: int
    """0: before the first."""
    function: str
    """Config key and name of the function that was entered; empty: none of the user's."""
    parameters: int
    """Bytes of the model's; 0 before it is built."""
    memory: int
    """Bytes of the process."""
    limit: int
    """0: none."""
    host: str
    ended: int
    """Processes that the kernel of the host had ended for want of memory."""

    @property
    def identity(self) -> tuple[str, int, str]:
        """The parts that are compared: the task without its attempt, the batch and the function."""
        return ATTEMPT.sub("", self.key), self.batch, self.function


@dataclass(frozen=True, slots=True)
class MemoryExceeded:
    """A nanny has ended a worker for its memory."""

    worker: str
    memory: int


@dataclass(frozen=True, slots=True)
class WorkerLoss:
    """A worker was lost while it ran a watched task."""

    place: TaskPlace
    how: How


@dataclass(frozen=True, slots=True)
class WorkerLosses:
    """Reports and losses since the work was begun for the first time."""

    last: Mapping[str, TaskPlace] = field(default_factory=dict)
    """By worker: of watched tasks that run."""
    losses: tuple[WorkerLoss, ...] = ()
    full: tuple[MemoryExceeded, ...] = ()
    ended: Mapping[str, int] = field(default_factory=dict)
    """By host: the newest count of processes that its kernel has ended."""

    def reported(self, place: TaskPlace) -> WorkerLosses:
        """Return the losses after a report; those at a place that the task has passed are dropped."""
        last = {worker: one for worker, one in self.last.items() if worker != place.worker}
        if not place.key:
            return replace(self, last=last)
        passed = place.identity[0], place.batch
        losses = tuple(
            one for one in self.losses if not (one.place.identity[0] == passed[0] and one.place.batch < passed[1])
        )
        return replace(
            self, last={**last, place.worker: place}, losses=losses, ended={**self.ended, place.host: place.ended}
        )

    def exceeded(self, full: MemoryExceeded) -> WorkerLosses:
        """Return the losses after a nanny has ended a worker."""
        return replace(self, full=(*self.full, full))

    def lost(self, workers: Collection[str], how: How) -> WorkerLosses:
        """Return the losses with more lost workers."""
        lost = [self.last[worker] for worker in workers if worker in self.last]
        last = {worker: place for worker, place in self.last.items() if worker not in workers}
        return replace(self, last=last, losses=(*self.losses, *(WorkerLoss(place, how) for place in lost)))

    def only(self, live: Collection[str]) -> WorkerLosses:
        """Return the losses once only some workers are there."""
        return self.lost([worker for worker in self.last if worker not in live], "ended")

    def is_full(self, loss: WorkerLoss) -> bool:
        """Whether a worker ended for want of memory, as far as nanny, kernel and its own memory say."""
        place = loss.place
        by_nanny = any(full.worker == place.worker for full in self.full)
        by_kernel = self.ended.get(place.host, 0) > place.ended
        return by_nanny or by_kernel or (place.limit > 0 and place.memory >= FULL * place.limit)

    def error(self, *, lost: bool, alone: bool = False) -> DtrainError | None:
        """Return the error for losses that are proof; None if there are none.

        Parameters
        ----------
        lost : bool
            Whether work of this run was lost. Otherwise nannies may have ended workers for the work of others.
        alone : bool
            Whether no worker is left to try a place once more.
        """
        by_place: dict[tuple[str, int, str], list[WorkerLoss]] = {}
        for loss in self.losses:
            by_place.setdefault(loss.place.identity, []).append(loss)
        for (_, batch, function), losses in by_place.items():
            many = len(losses) >= (SURE - alone if function else SURE_OUTSIDE)
            if (many and (function or batch)) or (len(losses) > 1 and all(map(self.is_full, losses))):
                return self._named(losses)
        if lost and len(self.full) >= MEMORY_LOSSES:
            return out_of_memory(self.full)
        return None

    def _named(self, losses: list[WorkerLoss]) -> DtrainError:
        place, workers = losses[-1].place, ", ".join(loss.place.worker for loss in losses)
        where = described(place)
        if any(self.is_full(loss) for loss in losses):
            return OutOfMemory(
                f"{where}: {len(losses)} workers ran out of memory ({workers}). {needed(place)}", MORE_MEMORY
            )
        if losses[-1].how == "frozen":
            what = "did not answer any more"
            cure = "Code that is in C for so long must let go of Python's lock."
        else:
            what = "ended"
            cure = "Does it call os._exit, or crash in native code?"
        return UserCodeFailed(
            f"{where}: {len(losses)} workers that ran it {what} ({workers}).",
            f'{cure} cluster.scheduler = "serial" runs it in this process.',
        )


MORE_MEMORY = "Give the workers more memory (cluster.memory), or use a smaller train.batch_size or fewer workers."


def out_of_memory(full: Collection[MemoryExceeded]) -> OutOfMemory:
    """Return the error for workers that nannies have ended for their memory."""
    most = max(full, key=lambda one: one.memory)
    return OutOfMemory(
        f"{len(full)} workers were ended because their memory was full; the last one used {format_bytes(most.memory)}.",
        MORE_MEMORY,
    )


def needed(place: TaskPlace) -> str:
    """Return what a worker used before it ended, and what a local step takes besides."""
    limit = f" of {format_bytes(place.limit)}" if place.limit else ""
    used = f"Before, a worker used {format_bytes(place.memory)}{limit}."
    if not place.parameters:
        return used
    total = place.memory + BESIDE * place.parameters
    return (
        f"{used} With {format_bytes(place.parameters)} of parameters a step takes about {BESIDE} times that more "
        f"(gradients, the optimizer's state, what is sent), and its activations: over {format_bytes(total)} in all."
    )


def described(place: TaskPlace) -> str:
    """Return where a task was, in words."""
    number, replica = ROUND.search(place.key), REPLICA.search(place.key)
    parts = [f"round {number[1]}" if number else "", f"replica {replica[1]}" if replica else ""]
    parts += [words for name, words in WORDS.items() if f"dtrain-{name}-" in place.key]
    parts += [f"batch {place.batch}" if place.batch else "", place.function or "between the user's functions"]
    text = ", ".join(part for part in parts if part)
    return text[0].upper() + text[1:]


def task_place(message: Mapping[str, Any]) -> TaskPlace:
    """Return the place in a message of a watched task."""
    return TaskPlace(**{name: message[name] for name in TaskPlace.__slots__})
