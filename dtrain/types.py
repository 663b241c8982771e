"""The nouns that several layers share. All are frozen: a new state is made, the old one is never changed.

Parameters are held *by replica* and the outer optimizer's state *by slice*: under full averaging all replicas
have the same parameters, and the entries of `TrainState.params` are one and the same object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

Handle = TypeVar("Handle")
"""Where a value lies: the value itself (serial, on the driver) or a future of it (on a cluster)."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a replica has read into its partition."""

    epoch: int
    """Finished passes over the partition."""
    position: int
    """Samples of the current pass that are behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTask:
    """What one replica does in one round, without its parameters: small, picklable, printable."""

    round: int
    """The round that this task is part of; the first is 1."""
    replica: int
    cursor: Cursor
    """Where it starts to read."""
    step: int
    """Local steps that the replica has finished before; the schedule is a function of it."""
    total_steps: int
    """Local steps that the replica will have taken at the end of the run."""
    num_steps: int
    """Local steps of this task."""
    num_samples: int
    """Samples that they consume."""
    num_epochs: int
    """Whole passes to make; 0: `num_steps` full batches of a cyclic stream."""
    seed: int
    """Seeds torch for this task."""


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """What every replica does in one round."""

    round: int
    tasks: tuple[LocalTask, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState(Generic[Handle]):
    """All that changes from round to round, and all that resume needs."""

    round: int
    """Finished rounds."""
    params: tuple[Handle, ...]
    """By replica: the parameters it starts the next round from."""
    inner: tuple[Handle, ...]
    """By replica: the state of its inner optimizer."""
    outer: tuple[Handle, ...]
    """By slice: the state of the outer optimizer; empty without one."""
    cursors: tuple[Cursor, ...]
    """By replica."""
    steps: tuple[int, ...]
    """By replica: finished local steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What the driver learns of one replica's round: scalars only."""

    replica: int
    samples: int
    """Samples consumed: the replica's weight."""
    steps: int
    loss_sum: float
    """Sum over the samples of the losses seen while training."""
    finite: bool
    """Whether its parameters are; if not, it is left out of the average."""
    units_decoded: int
    bytes_read: int
    """Decoded bytes."""
    seconds: float
    waited: float = 0.0
    """Of them, seconds that the steps waited for batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSummary:
    """What the driver learns of one round's average: scalars only."""

    contributions: tuple[Contribution, ...]
    """In replica order."""
    params_sha256: str
    finite: bool
    """Whether the averaged parameters are."""
    bytes_reduced: int
    """Bytes of parameters that were averaged, over all replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """What `train_rounds` yields."""

    round: int
    train_loss: float
    """Mean over the samples of the losses seen while training in this round."""
    metrics: dict[str, float]
    """``val_loss`` and ``val_<metric>`` of the averaged parameters; empty without a validation split."""
    samples: int
    """Samples consumed in this round, by all replicas."""
    steps: int
    """Local steps taken in this round, by all replicas."""
    seconds: float
    bytes_reduced: int
    rejected: int
    """Replicas left out of the average because their parameters were not finite."""
    retried: int
    """Times that this round was begun again."""
    params_sha256: str
    replica_loss: tuple[float, ...]
    contributions: tuple[Contribution, ...]
    state: TrainState[Any] | None
    """The state after the round, on the driver, in rounds that are to be committed."""
    stop: Literal["target", "patience"] | None
    """The rule of ``[stop]`` that makes this round the last."""
