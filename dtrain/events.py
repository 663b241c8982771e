"""The events of a run, as frozen dataclasses. A reporter is a function of one event."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from dtrain.stages import Limit
from dtrain.types import RoundResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOpening:
    """The cluster is being started or connected to; this takes some seconds."""

    run: str
    """The run's directory."""
    scheduler: str
    """``cluster.scheduler``, or the address of a client that was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """The cluster is ready and the first round begins."""

    run: str
    """The run's directory; empty without one."""
    round: int
    """Rounds that are already committed."""
    rounds: int
    """Rounds of the whole run."""
    replicas: int
    samples: int
    """Training samples."""
    workers: int
    dashboard: str
    """Address of Dask's dashboard; empty without one."""
    eval_every: int = 1
    """Rounds between evaluations."""
    metric: str = "val_loss"
    """``stop.metric``: by which the best round is marked."""
    higher: bool = False
    """Whether larger values of it are better."""
    rows: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    """The rounds that are already committed, as lines of history.jsonl."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The configuration by dotted key, without secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParametersLoaded:
    """A run starts from the tensors of ``train.init``; once, before its first round."""

    path: str
    """The safetensors file."""
    tensors: int
    """How many it has; all are taken."""
    new: tuple[str, ...]
    """Tensors of the model that the file lacks: they start as the user's function builds them."""
    cast: tuple[str, ...]
    """Dtypes of the file that were cast to float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunksFilled:
    """Chunks are not stored, and ``data.missing = "auto"`` fills them: at every start of a run, for each variable."""

    path: str
    """The store."""
    variable: str
    chunks: int
    of: int
    """How many the variable has, as far as it is read."""
    value: float
    """What stands for each of their values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplesLeftOut:
    """Samples hold values that are not finite and are left out (``data.non_finite``): at a run's first start."""

    path: str
    """The store."""
    samples: int
    of: int
    """How many samples it has."""
    by_variable: Mapping[str, int]
    """The samples left out in which a variable has such values; a sample may count for several."""


COUNTING, CLIMATE = -1, -2
"""In the place of a round: the pass that looks for values that are not finite, and that of a climatology."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsTaken:
    """A local task has made progress. Sent a few times a second at most; it may arrive twice, late, or not at all."""

    round: int
    """0: the pass over the rows for ``data.normalize``; its steps are units. `COUNTING`: the one before it."""
    replica: int
    """In the pass of `COUNTING`, the piece of the stores."""
    step: int
    """Finished local steps of the task."""
    steps: int
    """Local steps of the task."""
    samples: int
    """Finished samples of the task."""
    seconds: float
    """Since the task began."""
    worker: str = ""
    """Address of the worker that runs the task; empty without a cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionStarted:
    """A store is about to be predicted (`Run.predict_to`)."""

    out: str
    """Where predictions are written."""
    samples: int
    """Samples that are predicted, with those that were written before."""
    done: int
    """Samples that were written before."""
    workers: int
    nbytes: int
    """Of all predictions, before they are compressed."""
    budget: str
    """The memory that a worker needs, with its terms."""
    dashboard: str = ""
    """Address of Dask's dashboard; empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplesPredicted:
    """Samples have been predicted. Sent a few times a second at most."""

    done: int
    """With those that were written before."""
    samples: int
    new: int
    """Of this call."""
    seconds: float
    """Since the first unit was begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsMeasured:
    """Some rounds have been measured; nothing of them is kept (`dtrain.plan` with ``probe=True``)."""

    rounds: int
    local_steps: int
    seconds: float
    """Median of a round."""


@dataclass(frozen=True, slots=True)
class RoundFinished:
    """A round is averaged, and evaluated if `RunStarted.eval_every` says so."""

    result: RoundResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRejected:
    """A replica's parameters were not finite and were left out of the average."""

    round: int
    replica: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundCommitted:
    """A round has been written to the run directory, complete."""

    round: int
    bytes: int
    seconds: float
    """To check and to move what is written."""
    by: Literal["driver", "workers"] = "driver"
    """Who has written the parameters and the states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentReplayed:
    """Work was lost with a worker and is repeated from the last committed round."""

    round: int
    """The committed round from which training continues."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEvicted:
    """A worker did not answer for long; its tasks run elsewhere."""

    worker: str
    """Its address."""
    seconds: float
    """Of silence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundDamaged:
    """A committed round does not verify; the one before it is used."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished:
    """The run has ended."""

    reason: Literal["rounds", "target", "patience", "max_time"]
    rounds: int
    params_sha256: str
    val_loss: float | None
    run: str
    limited_by: Limit | None = None
    """The stage that limited its rounds; None if its history does not say."""


Event: TypeAlias = (
    ClusterOpening
    | RunStarted
    | ParametersLoaded
    | ChunksFilled
    | SamplesLeftOut
    | StepsTaken
    | PredictionStarted
    | SamplesPredicted
    | RoundsMeasured
    | RoundFinished
    | ReplicaRejected
    | RoundCommitted
    | SegmentReplayed
    | WorkerEvicted
    | RoundDamaged
    | RunFinished
)
Fault: TypeAlias = ChunksFilled | SamplesLeftOut | SegmentReplayed | ReplicaRejected | RoundDamaged | WorkerEvicted
"""Something went wrong or is missing, and the run goes on."""
Reporter: TypeAlias = Callable[[Event], None]
