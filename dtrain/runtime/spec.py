"""What is fixed during a run: its stores and all that workers need, as plain values and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dtrain.config.schema import DataConfig, TrainConfig
from dtrain.data.by import Grouping
from dtrain.data.climatology import ClimatePlan, Climatology, Periods
from dtrain.data.encoding import Scaling
from dtrain.data.plan.memory import MemoryBudget
from dtrain.data.plan.missing import AbsentChunks
from dtrain.data.plan.partition import JointPlan
from dtrain.data.plan.splits import Runs
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One store of a run."""

    config: DataConfig
    """Its ``[data]`` table, with the path of this store."""
    samples: Samples | None
    """None until one of its workers has described it."""
    workers: tuple[str, ...] = ()
    """The only workers that may read it; empty: all may."""
    replicas: int | None = None
    """None: as ``average.replicas`` says."""

    @property
    def described(self) -> Samples:
        """Its samples; they must be known."""
        assert self.samples is not None
        return self.samples


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """A store with the plan of its samples, and the memory budget of a worker that reads it."""

    source: Source
    plan: DataPlan
    memory: MemoryBudget
    absent: Mapping[str, AbsentChunks] = field(default_factory=dict)
    """By variable: the chunks that are not stored, where they were counted."""
    lost: Runs = ()
    """Rows that an evaluation leaves out since they are not stored any more."""

    @property
    def samples(self) -> Samples:
        """Its samples."""
        return self.source.described

    @property
    def workers(self) -> tuple[str, ...]:
        """The only workers that may read it; empty: all may."""
        return self.source.workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What an evaluation tells beside the metrics of everything."""

    groupings: tuple[Grouping, ...] = ()
    """What it is broken down by."""
    shared: tuple[npt.NDArray[np.bool_], ...] = ()
    """By store: the rows that are valid times of all leads; empty: all count."""
    baselines: tuple[str, ...] = ()
    """Forecasts that stand beside the model's."""
    notes: tuple[str, ...] = ()
    """Sentences about what counts."""

    @property
    def names(self) -> str:
        """What it is broken down by, for messages."""
        return ", ".join(one.name for one in self.groupings)

    @property
    def is_whole(self) -> bool:
        """Whether metrics of everything are all that is asked for."""
        return not self.groupings and not self.baselines


@dataclass(frozen=True, slots=True, eq=False)
class Climate:
    """A climatology, and the period of each row that is evaluated."""

    climatology: Climatology
    periods: tuple[Periods, ...]
    """By store, that of ``data.val_path`` last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """All that is fixed during a run: plain values and bytes, sent to each worker once."""

    run_id: str
    """Names one execution of a run; keys and residents carry it."""
    sources: tuple[PlannedSource, ...]
    plan: JointPlan
    """The plans of all sources."""
    held_out: PlannedSource | None
    """The store of ``data.val_path``; all of it is the split "val"."""
    scalings: Mapping[str, Scaling]
    """By variable of ``data.normalize``."""
    config: TrainConfig
    code: bytes
    """The user's functions (`pickle_functions`)."""
    device: str
    """``cpu`` or ``cuda``."""
    eval_every: int = 1
    """Rounds between evaluations."""
    asked: Asked = Asked()
    """Of an evaluation."""
    climate: Climate | None = None
    """What anomalies are differences from."""
    climate_plan: ClimatePlan | None = None
    """Of the pass that computes a climatology."""
    outer_factors: tuple[float, ...] = ()
    """By round: the factor on the learning rate of the outer optimizer; empty without a schedule of it."""

    def outer_factor(self, number: int) -> float:
        """Return the factor on the learning rate of the outer optimizer in a round."""
        return self.outer_factors[number - 1] if self.outer_factors else 1.0

    @property
    def threads(self) -> int:
        """Threads of torch in a task; they decide bits."""
        return self.config.cluster.threads
