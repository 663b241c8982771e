"""The seam between the loop and where it runs.

A runner is given handles and gives handles back: the values themselves in `SerialRunner`, futures on a cluster.
The loop never looks inside; it may submit against handles whose values do not exist yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dtrain.data.plan.splits import SplitName
from dtrain.events import StepsTaken
from dtrain.runtime.resident import RunSpec
from dtrain.runtime.tasks import Initial
from dtrain.types import RoundPlan, TrainState


class SegmentLost(Exception):
    """Something that a segment needs is gone with a worker; the segment can be replayed from its root.

    Not a `DtrainError`: the loop catches it, a user never meets it.

    Parameters
    ----------
    reason : str
        What Dask said.
    killed : bool
        Whether one task took several workers down with it.
    """

    def __init__(self, reason: str, killed: bool = False) -> None:
        super().__init__(reason, killed)
        self.reason = reason
        self.killed = killed


class Runner(Protocol):
    """Executes the tasks of one run."""

    spec: RunSpec
    num_workers: int
    """Workers at the start; a serial runner counts as 2."""
    on_progress: Callable[[StepsTaken], None]
    """Is told how far local tasks are, while `collect` waits."""
    dashboard: str
    """Address of Dask's dashboard; empty without one."""

    def initialise(self) -> Initial:
        """Build the model and try it on one batch."""
        ...

    def place(self, state: TrainState[Any]) -> TrainState[Any]:
        """Root a segment: turn a state held by the driver into handles."""
        ...

    def submit_round(self, state: TrainState[Any], plan: RoundPlan) -> tuple[TrainState[Any], Any]:
        """Submit a round; return the state after it and its `RoundSummary`, both as handles."""
        ...

    def submit_moments(self, most_units: int | None) -> Any:
        """Submit a pass over the training rows; return the moments of ``data.normalize`` as a handle."""
        ...

    def submit_evaluation(self, params: Any, split: SplitName) -> Any:
        """Submit the evaluation of parameters on a split; return its `Sums` as a handle, None for an empty split."""
        ...

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for values and return them.

        Raises
        ------
        SegmentLost
            A value cannot be had; replay from the root of the segment.
        ClusterLost
            The cluster is gone.
        """
        ...

    def gather(self, state: TrainState[Any]) -> TrainState[Any]:
        """Bring a whole state to the driver; equal handles stay one object."""
        ...

    def close(self) -> None:
        """Release what the run holds."""
        ...
