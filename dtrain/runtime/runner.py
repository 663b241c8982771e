"""The interface between the loop and the place where a run is executed.

A runner turns a state into handles and returns handles: values in `SerialRunner`, futures on a cluster. The loop never
looks inside; it may submit a round against handles whose values do not exist yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dtrain.algorithm.evaluate import Sums, Term
from dtrain.algorithm.metrics.state import Metric
from dtrain.data.load.finite import Seen
from dtrain.data.load.moments import Moments
from dtrain.data.plan.splits import SplitName
from dtrain.errors import ClusterLost, DtrainError, OutOfMemory, UserCodeFailed
from dtrain.events import StepsTaken, WorkerEvicted
from dtrain.runtime.spec import RunSpec
from dtrain.runtime.trial import Initial
from dtrain.runtime.worker_losses import MORE_MEMORY
from dtrain.types import InitFile, Parameters, Position, RoundPlan, RoundSummary, StoredState, TrainState

Held = TypeVar("Held")
"""The state after a round, as a runner holds it."""


class SegmentLost(Exception):
    """A value that a segment needs is lost with a worker; the segment can be replayed from its root.

    Not a `DtrainError`: the loop catches it, a user never meets it.

    Parameters
    ----------
    reason : str
        Dask's own words.
    killed : str
        The key of a task that took several workers down with it; empty if there is none.
    full : bool
        Whether workers ended for want of memory.
    gone : bool
        Whether workers are gone: others may come.
    left : bool
        Whether workers are left.
    """

    def __init__(
        self, reason: str, killed: str = "", *, full: bool = False, gone: bool = False, left: bool = False
    ) -> None:
        super().__init__(reason, killed)
        self.reason = reason
        self.killed = killed
        self.full = full
        self.gone = gone
        self.left = left


def given_up(lost: SegmentLost, doing: str, times: int, kept: str) -> DtrainError:
    """Return the error for work that was lost too often.

    Parameters
    ----------
    lost : SegmentLost
        The last time.
    doing : str
        Names the work, as the beginning of a sentence.
    times : int
        How often it was lost.
    kept : str
        Says what stays.
    """
    if lost.full:
        return OutOfMemory(f"{doing} was lost {times} times, for want of memory: {lost.reason}", MORE_MEMORY)
    if lost.killed:
        return UserCodeFailed(
            f"{doing} was lost {times} times: the task {lost.killed} ended each worker that ran it.",
            'Does the code call os._exit, or crash? cluster.scheduler = "serial" runs it in this process.',
        )
    return ClusterLost(
        f"{doing} was lost {times} times in a row: {lost.reason}", f"{kept} Run the same command again to continue."
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the driver learns about one round."""

    summary: RoundSummary
    sums: Sums | None
    """Loss and metrics on the validation split; None without one, and in rounds without an evaluation."""
    ema_sums: Sums | None = None
    """The same of the moving average of models; None without ``average.ema`` too."""


class Runner(Protocol[Held]):
    """Executes the tasks of one run."""

    spec: RunSpec
    num_workers: int
    """Workers at the start; a serial runner counts as 2."""
    look_ahead: int | None
    """Rounds to submit ahead; None: as many as the loop likes. 0 where `submit` itself trains the round."""
    on_progress: Callable[[StepsTaken], None]
    """Called with the progress of local tasks, while a method waits for values."""
    on_evicted: Callable[[WorkerEvicted], None]
    """Called with each worker that is given up because it does not answer."""

    def open_dashboard(self) -> str:
        """Add a page for a run to the place's dashboard, and return its address; empty without a dashboard."""
        ...

    def publish(self, message: Mapping[str, Any]) -> None:
        """Show a message on that page (`dtrain.report.messages`), without waiting."""
        ...

    def initialise(self, init: InitFile | None = None) -> Initial:
        """Build the model, take the tensors of a file into it, and try it on one batch."""
        ...

    def moments(self, most_units: int | None) -> dict[str, Moments]:
        """Return the moments of ``data.normalize``, from one pass over the training rows."""
        ...

    def place_means(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return, by variable of ``RunSpec.climate_plan``, the means of the training rows at each place."""
        ...

    def seen(self) -> list[Seen]:
        """Return, by piece (`Resident.counted`), which samples hold values that are not finite: one pass over all."""
        ...

    def evaluate(self, params: Parameters, split: SplitName) -> Sums | None:
        """Evaluate parameters on a split; None if it is empty."""
        ...

    def losses_by_part(self, params: Parameters) -> list[list[Term]]:
        """Return, by stream of `Resident.by_unit`, the loss of each of its parts."""
        ...

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics that are computed batch by batch, to take the values of their states."""
        ...

    @property
    def has_lost_workers(self) -> bool:
        """Whether workers have been lost since the segment was placed."""
        ...

    def place(self, state: TrainState | StoredState, again: int = 0) -> Held:
        """Root a segment: turn a state into handles; `again` counts the times it was lost."""
        ...

    def submit(self, held: Held, plan: RoundPlan) -> Held:
        """Submit a round and the evaluation of its model; return the handles after it."""
        ...

    def collect(self, held: Held, finished: int | None = None) -> Outcome:
        """Wait for the scalars of a submitted round.

        Parameters
        ----------
        held : handles
        finished : int, optional
            A round of the segment that has been collected, and that a replay would commit sooner. Given, the segment
            is lost once workers do this round or an earlier one again.

        Raises
        ------
        SegmentLost
            A value cannot be had; replay from the root of the segment.
        ClusterLost
            The cluster is gone.
        """
        ...

    def gather(
        self, held: Held, position: Position, directory: Callable[[int], Path] | None = None
    ) -> TrainState | StoredState:
        """Bring the state after a submitted round to the driver; equal handles stay one object.

        Where workers hold it, it becomes files instead, in the directory that is made for the round, if one may be.
        """
        ...

    def sees(self, directory: Path) -> bool | None:
        """Return whether workers seem to see a directory of the driver; None: this process is the worker."""
        ...

    def close(self) -> None:
        """Release all that the run holds."""
        ...
