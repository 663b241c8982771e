"""What the driver knows of workers that end or freeze while they run tasks: a pure fold of what it hears.

Watched tasks say where they are (`dtrain.runtime.watched`), a nanny says when it ends a worker for its memory, and the
scheduler says which workers there are. Workers that are lost at one place of the user's code again and again are no
accident; two that were killed from outside may be, as long as others are there to try the place once more.
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
"""Workers lost in one function of the user's, until it is taken for no accident; one less if no worker is left."""
SURE_OUTSIDE = 5
"""The same between functions of the user's. Before the first batch nothing says that it is their fault."""
BESIDE = 3
"""Copies of the parameters that a local step makes, with an optimizer that keeps one value a parameter."""
MEMORY_LOSSES = 3
"""Workers that nannies end for their memory, until it is taken for no accident."""
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
class Said:
    """Where a watched task was when it last said so."""

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
    def place(self) -> tuple[str, int, str]:
        """What is compared: the task without what names its attempt, the batch and the function."""
        return ATTEMPT.sub("", self.key), self.batch, self.function


@dataclass(frozen=True, slots=True)
class Full:
    """A nanny has ended a worker for its memory."""

    worker: str
    memory: int


@dataclass(frozen=True, slots=True)
class Death:
    """A worker was lost while it ran a watched task."""

    said: Said
    how: How


@dataclass(frozen=True, slots=True)
class Deaths:
    """What is known since the work was begun for the first time."""

    last: Mapping[str, Said] = field(default_factory=dict)
    """By worker: of watched tasks that run."""
    deaths: tuple[Death, ...] = ()
    full: tuple[Full, ...] = ()
    ended: Mapping[str, int] = field(default_factory=dict)
    """By host: the newest count of processes that its kernel has ended."""

    def heard(self, said: Said) -> Deaths:
        """Return what is known after a watched task has said where it is; what it has passed ended no worker."""
        last = {worker: one for worker, one in self.last.items() if worker != said.worker}
        if not said.key:
            return replace(self, last=last)
        passed = said.place[0], said.batch
        deaths = tuple(
            one for one in self.deaths if not (one.said.place[0] == passed[0] and one.said.batch < passed[1])
        )
        return replace(
            self, last={**last, said.worker: said}, deaths=deaths, ended={**self.ended, said.host: said.ended}
        )

    def filled(self, full: Full) -> Deaths:
        """Return what is known after a nanny has ended a worker."""
        return replace(self, full=(*self.full, full))

    def lost(self, workers: Collection[str], how: How) -> Deaths:
        """Return what is known after workers were lost."""
        lost = [self.last[worker] for worker in workers if worker in self.last]
        last = {worker: said for worker, said in self.last.items() if worker not in workers}
        return replace(self, last=last, deaths=(*self.deaths, *(Death(said, how) for said in lost)))

    def only(self, live: Collection[str]) -> Deaths:
        """Return what is known when only some workers are there."""
        return self.lost([worker for worker in self.last if worker not in live], "ended")

    def is_full(self, death: Death) -> bool:
        """Whether a worker ended for want of memory, as far as nanny, kernel and its own memory say."""
        said = death.said
        by_nanny = any(full.worker == said.worker for full in self.full)
        by_kernel = self.ended.get(said.host, 0) > said.ended
        return by_nanny or by_kernel or (said.limit > 0 and said.memory >= FULL * said.limit)

    def error(self, *, lost: bool, alone: bool = False) -> DtrainError | None:
        """Return the error for what is no accident; None if there is none.

        Parameters
        ----------
        lost : bool
            Whether work of this run was lost. Only then workers count that ended for their memory: others may use
            them too.
        alone : bool
            Whether no worker is left to try a place once more.
        """
        by_place: dict[tuple[str, int, str], list[Death]] = {}
        for death in self.deaths:
            by_place.setdefault(death.said.place, []).append(death)
        for (_, batch, function), deaths in by_place.items():
            many = len(deaths) >= (SURE - alone if function else SURE_OUTSIDE)
            if (many and (function or batch)) or (len(deaths) > 1 and all(map(self.is_full, deaths))):
                return self._named(deaths)
        if lost and len(self.full) >= MEMORY_LOSSES:
            return out_of_memory(self.full)
        return None

    def _named(self, deaths: list[Death]) -> DtrainError:
        said, workers = deaths[-1].said, ", ".join(death.said.worker for death in deaths)
        where = described(said)
        if any(self.is_full(death) for death in deaths):
            return OutOfMemory(
                f"{where}: {len(deaths)} workers ran out of memory ({workers}). {needed(said)}", MORE_MEMORY
            )
        if deaths[-1].how == "frozen":
            what = "did not answer any more"
            cure = "Code that is in C for so long must let go of Python's lock."
        else:
            what = "ended"
            cure = "Does it call os._exit, or crash in native code?"
        return UserCodeFailed(
            f"{where}: {len(deaths)} workers that ran it {what} ({workers}).",
            f'{cure} cluster.scheduler = "serial" runs it in this process.',
        )


MORE_MEMORY = "Give the workers more memory (cluster.memory), or use a smaller train.batch_size or fewer workers."


def out_of_memory(full: Collection[Full]) -> OutOfMemory:
    """Return the error for workers that nannies have ended for their memory."""
    most = max(full, key=lambda one: one.memory)
    return OutOfMemory(
        f"{len(full)} workers were ended because their memory was full; the last one used {format_bytes(most.memory)}.",
        MORE_MEMORY,
    )


def needed(said: Said) -> str:
    """Return what a worker used before it ended, and what a local step takes besides."""
    limit = f" of {format_bytes(said.limit)}" if said.limit else ""
    used = f"Before, a worker used {format_bytes(said.memory)}{limit}."
    if not said.parameters:
        return used
    total = said.memory + BESIDE * said.parameters
    return (
        f"{used} With {format_bytes(said.parameters)} of parameters a step takes about {BESIDE} times that more "
        f"(gradients, the optimizer's state, what is sent), and its activations: over {format_bytes(total)} in all."
    )


def described(said: Said) -> str:
    """Return where a task was, in words."""
    number, replica = ROUND.search(said.key), REPLICA.search(said.key)
    parts = [f"round {number[1]}" if number else "", f"replica {replica[1]}" if replica else ""]
    parts += [words for name, words in WORDS.items() if f"dtrain-{name}-" in said.key]
    parts += [f"batch {said.batch}" if said.batch else "", said.function or "between the user's functions"]
    text = ", ".join(part for part in parts if part)
    return text[0].upper() + text[1:]


def said_from(message: Mapping[str, Any]) -> Said:
    """Return what a watched task has said."""
    return Said(**{name: message[name] for name in Said.__slots__})
