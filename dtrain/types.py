"""The nouns that several layers share. All are frozen: a new state is made, the old one is never changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Flat: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]


# Where a run stands ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a replica has read into its partition."""

    epoch: int
    """Finished passes over the partition."""
    position: int
    """Samples of the current pass that are already read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a run stands, in plain numbers: the plan of the next round depends on nothing else."""

    round: int
    """Finished rounds."""
    cursors: tuple[Cursor, ...]
    """By replica."""
    steps: tuple[int, ...]
    """By replica: finished local steps."""


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
    evaluates: bool = True
    """Whether the model is evaluated after the round."""


# A module's state as flat arrays --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the state_dict and its place in the flat arrays."""

    name: str
    kind: Literal["param", "buffer", "extra", "frozen"]
    """Parameter that is trained, or float32 buffer (in `Parameters.flat`); buffer of another dtype (in
    `Parameters.extra`); parameter that does not require a gradient (in `Parameters.frozen`)."""
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """In elements of `flat` or `frozen`, in bytes of `extra`."""
    size: int
    """In elements of `flat` or `frozen`, in bytes of `extra`."""
    alias: bool = False
    """Whether another name owns the tensor (tied weights)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The place of each tensor of a module's state_dict in `Parameters`."""

    entries: tuple[Entry, ...]
    num_params: int
    """Elements of `flat` that are trained parameters; the rest are float32 buffers."""
    num_flat: int
    num_extra: int
    num_frozen: int = 0
    """Elements of parameters that do not require a gradient."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters and buffers of one replica."""

    layout: Layout
    flat: Flat
    """float32[layout.num_flat]"""
    extra: Bytes
    """uint8[layout.num_extra]"""
    frozen: Flat = field(default_factory=lambda: np.zeros(0, np.float32))
    """float32[layout.num_frozen]; empty where the frozen parameters are kept apart: they never change, so that they
    are sent to a worker once, and neither averaged nor returned."""
    start: int = 0
    """Of a slice: the place of its first element in the whole of `flat`. Only the last slice has `extra`."""

    @property
    def num_params(self) -> int:
        """Elements of `flat` that are trained parameters."""
        return min(max(self.layout.num_params - self.start, 0), len(self.flat))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.flat.nbytes + self.extra.nbytes + self.frozen.nbytes

    def __sizeof__(self) -> int:  # Dask's memory accounting asks this
        return object.__sizeof__(self) + self.nbytes


@dataclass(frozen=True, slots=True)
class InitFile:
    """The safetensors file of ``train.init``."""

    name: str
    """Its path, as it is shown."""
    data: Bytes
    """uint8[size]"""

    def __sizeof__(self) -> int:  # Dask's memory accounting asks this
        return object.__sizeof__(self) + self.data.nbytes


# States of optimizers and replicas ------------------------------------------------------------------------


Plain: TypeAlias = "float | int | bool | str | tuple[Plain, ...] | list[Plain] | None"
"""A value that a state keeps as it is."""
Owner: TypeAlias = Literal["param", "group", "state", "attribute"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One value of an optimizer's state: a tensor in `InnerState.data`, or a plain value."""

    param: int
    """Index of the parameter among those that the optimizer was given, or of the group; else 0."""
    key: str
    dtype: str
    """Of the tensor; empty for a plain value."""
    shape: tuple[int, ...]
    offset: int
    size: int
    """In bytes."""
    value: Plain = None
    owner: Owner = "param"
    """Where the optimizer keeps it: in the state of a parameter, in a parameter group, under a key of ``state`` that
    is no parameter, or as an attribute of its own."""


@dataclass(frozen=True, slots=True)
class InnerState:
    """The state of one optimizer, its tensors in one byte array."""

    slots: tuple[Slot, ...]
    data: Bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.data.nbytes

    def __sizeof__(self) -> int:  # Dask's memory accounting asks this
        return object.__sizeof__(self) + self.nbytes


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """All that a replica keeps for itself from round to round."""

    inner: InnerState
    """Of its inner optimizer."""
    residual: Flat | None = None
    """float32[num_params]: the part of its update that the codec lost (error feedback); None without it."""
    control: Flat | None = None
    """float32[num_params]: its control variate (``average.control``); None without it, and before its first round."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.inner.nbytes + sum(0 if own is None else own.nbytes for own in (self.residual, self.control))

    def __sizeof__(self) -> int:  # Dask's memory accounting asks this
        return object.__sizeof__(self) + self.nbytes


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What a replica is given at the start of a round: theta, and what some methods give with it."""

    params: Parameters
    inner: InnerState | None = None
    """The mean of the inner optimizers' states (``average.inner_state = "average"``); None: the replica has its own."""
    control: Flat | None = None
    """float32[num_params]: the mean of the replicas' control variates; None without them, and in the first round."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.params.nbytes + sum(0 if more is None else more.nbytes for more in (self.inner, self.control))

    def __sizeof__(self) -> int:  # Dask's memory accounting asks this
        return object.__sizeof__(self) + self.nbytes


OuterState: TypeAlias = tuple[InnerState, ...]
"""The state of an outer optimizer, by slice of the parameters; empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """All that changes from round to round, and all that resume needs.

    Replicas that share a value hold the same object: under full averaging all entries of `broadcast` and of `outer`
    are one and the same.
    """

    position: Position
    model: Parameters
    """What is evaluated and saved: the mean of the replicas' parameters."""
    broadcast: tuple[Broadcast, ...]
    """By replica: what it starts the next round from."""
    replicas: tuple[ReplicaState, ...]
    """By replica: what it keeps for itself."""
    outer: tuple[OuterState, ...]
    """By replica: the outer optimizer's state beside its parameters."""
    ema: Parameters | None = None
    """The moving average of the models of all rounds (``average.ema``); None without it, and before the first round."""

    @property
    def round(self) -> int:
        """Finished rounds."""
        return self.position.round


@dataclass(frozen=True, slots=True)
class StateFile:
    """A part of a state as a file."""

    path: Path
    nbytes: int
    sha256: str
    slots: tuple[Slot, ...] = ()
    """Of the optimizer's state that it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredState:
    """A `TrainState` as files, of which nothing is held in memory.

    Replicas that share a value share a file.
    """

    position: Position
    layout: Layout
    vectors: tuple[StateFile, ...]
    """Distinct parameters, those of the model first."""
    broadcast: tuple[int, ...]
    """By replica: the number of the parameters that it starts the next round from."""
    replicas: tuple[StateFile, ...]
    """By replica: what it keeps."""
    outers: tuple[tuple[StateFile, ...], ...]
    """Distinct states of the outer optimizer; one without files, if there is no outer optimizer."""
    outer: tuple[int, ...]
    """By replica: the number of its outer optimizer's state."""
    ema: StateFile | None = None
    control: StateFile | None = None
    """The mean of the replicas' control variates."""
    by_workers: bool = False
    """Whether workers have written all of them."""

    @property
    def round(self) -> int:
        """Finished rounds."""
        return self.position.round


# What the driver learns -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What the driver learns about one replica's round: scalars only."""

    replica: int
    samples: int
    """Samples consumed: the replica's weight."""
    steps: int
    loss_sum: float
    """Sum of the losses seen while training, over the terms that count."""
    loss_count: float
    """Number of these terms: of samples, or of the targets that are not ignored."""
    finite: bool
    """Whether all that it sends is finite; if not, it is left out of the average."""
    non_finite: int = 0
    """NaN and infinite values in the batches whose loss was not finite."""
    units_decoded: int = 0
    bytes_read: int = 0
    """Decoded bytes."""
    update_norm: float = 0.0
    """Euclidean norm of the update that is averaged, over the trained parameters; 0 if it is left out."""
    step_norm: float = 0.0
    """Sum of the weights of the round's gradients in the update (`dtrain.algorithm.fednova`)."""
    seconds: float = 0.0
    waited: float = 0.0
    """Of them, seconds that the steps waited for batches."""
    fetch: float = 0.0
    decode: float = 0.0
    gather: float = 0.0
    """Of `seconds`, those that the three stages of the data took (`dtrain.data.load.counted`): the steps waited, or
    their core was used."""
    process: str = ""
    """The process that took the steps: those of one process take turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSummary:
    """What the driver learns about one round's average: scalars only."""

    contributions: tuple[Contribution, ...]
    """In replica order."""
    params_sha256: str
    """Of the model that is evaluated and saved."""
    finite: bool
    """Whether its parameters are finite."""
    bytes_reduced: int
    """Bytes that the replicas sent to be averaged."""
    update_cosine: float | None = None
    """Mean cosine between the updates of two replicas (`dtrain.algorithm.drift`); None where it is not defined."""
    reduce_seconds: float = 0.0
    """Of the longest task that averaged replicas."""

    @property
    def rejected(self) -> tuple[int, ...]:
        """The replicas that were left out of the average."""
        return tuple(c.replica for c in self.contributions if not c.finite)


StopReason: TypeAlias = Literal["rounds", "target", "patience"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """One round, as `train_rounds` yields it."""

    round: int
    train_loss: float
    """Mean of the losses seen while training in this round, over the replicas that were averaged."""
    metrics: dict[str, float]
    """``val_loss`` and ``val_<metric>`` of the averaged parameters; empty in rounds without an evaluation."""
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
    update_cosine: float | None = None
    """Mean cosine between the updates of two replicas; None where it is not defined."""
    reduce_seconds: float = 0.0
    """Of the longest task that averaged replicas."""
    evaluate_seconds: float = 0.0
    """Of all tasks that evaluated the model, together; 0 in a round without evaluation."""
    stop_metric: float | None = None
    """The value of ``stop.metric``; NaN if it is not finite, None if no rule counts this round."""
    stop: StopReason | None = None
    """Why this round is the last: all rounds are done, or a rule of ``[stop]``; None if others follow."""
    state: TrainState | StoredState | None = None
    """The state after the round, in rounds that are to be committed: on the driver, or as files of the run."""


History: TypeAlias = tuple[float | None, ...]
"""``stop.metric`` of the finished rounds, in order."""
