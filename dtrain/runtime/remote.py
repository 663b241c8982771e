"""The tasks of `tasks.py` as Dask calls them: with the name of the run, and with results that are not taken apart yet.

A large result is taken apart by tasks of its own, which copy nothing, so that its parts go to different workers. A
small one is sent whole, and taken apart here, where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import numpy as np
import numpy.typing as npt
from distributed import get_worker

from dtrain.algorithm.average import AverageFacts, Combined, Mean, Update
from dtrain.algorithm.batchnorm import Statistics, with_statistics
from dtrain.algorithm.ema import next_ema
from dtrain.algorithm.evaluate import Sums, Term
from dtrain.algorithm.mix import Average
from dtrain.algorithm.params import with_frozen
from dtrain.algorithm.pattern import model_of, summarise
from dtrain.algorithm.slices import Slice, cut_update, join_broadcast, join_outer, join_params
from dtrain.config.average import AverageConfig, CodecConfig
from dtrain.data.load.climate import PlaceSums
from dtrain.data.load.finite import Seen
from dtrain.data.load.moments import Moments
from dtrain.data.plan.splits import SplitName
from dtrain.events import StepsTaken
from dtrain.runtime import tasks
from dtrain.runtime.resident import RunOver, is_over, remove, resident_of
from dtrain.runtime.trial import Initial, initialise
from dtrain.runtime.watched import watching
from dtrain.types import (
    Broadcast,
    Flat,
    InitFile,
    InnerState,
    LocalTask,
    OuterState,
    Parameters,
    ReplicaState,
    RoundSummary,
)

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")

CLOSE_SECONDS = 5.0
"""How long the end of a run waits for a worker's reads under way."""


def forget(run_id: str) -> None:
    """Forget a run in this process, and wait a while for its loaders to be closed."""
    closing = remove(run_id)
    if closing is not None:
        closing.join(CLOSE_SECONDS)


def topic(run_id: str) -> str:
    """Return the topic that workers send their progress to."""
    return f"dtrain-{run_id}"


def _progress(run_id: str, event: StepsTaken) -> None:
    if is_over(run_id):
        raise RunOver(run_id)  # no further step
    worker = get_worker()
    worker.log_event(topic(run_id), {"steps": asdict(replace(event, worker=worker.address))})  # Dask adds a key


# Parts of results -----------------------------------------------------------------------------------------


def update_of(trained: tuple[Update, ReplicaState] | Update) -> Update:
    """Return what a replica sends."""
    return trained if isinstance(trained, Update) else trained[0]


def update_slice(trained: tuple[Update, ReplicaState], at: Slice, codec: CodecConfig | None) -> Update:
    """Return a slice of what a replica sends."""
    return cut_update(trained[0], at, codec)


def state_of(trained: tuple[Update, ReplicaState] | ReplicaState) -> ReplicaState:
    """Return what a replica keeps."""
    return trained if isinstance(trained, ReplicaState) else trained[1]


def broadcast_of(combined: Combined | Broadcast) -> Broadcast:
    """Return what the next round starts from, or a slice of it."""
    return combined if isinstance(combined, Broadcast) else combined.broadcast


def outer_of(combined: Combined | OuterState) -> OuterState:
    """Return the state of the outer optimizer, or a slice of it."""
    return combined if isinstance(combined, tuple) else combined.outer


def facts_of(result: Combined | Mean | AverageFacts) -> AverageFacts:
    """Return what is small about a mean."""
    return result if isinstance(result, AverageFacts) else result.facts


def model_in(value: Combined | Broadcast | Parameters) -> Parameters:
    """Return the parameters that are evaluated, or a slice of them."""
    return value if isinstance(value, Parameters) else broadcast_of(value).params


def whole_model(slices: Sequence[Combined | Broadcast | Parameters], frozen: Flat | None) -> Parameters:
    """Return the parameters that are evaluated, with the frozen ones."""
    return with_frozen(join_params([model_in(one) for one in slices]), frozen)


def whole_replica(
    trained: tuple[Update, ReplicaState] | ReplicaState, start: Sequence[Combined | Broadcast] | None
) -> ReplicaState:
    """Return what a replica keeps, with the averaged state of inner optimizers that it starts from, if it is given."""
    own = state_of(trained)
    inner = None if start is None else join_broadcast([broadcast_of(one) for one in start]).inner
    return own if inner is None else replace(own, inner=inner)


def whole_control(start: Sequence[Combined | Broadcast]) -> Flat:
    """Return the mean of the control variates."""
    control = join_broadcast([broadcast_of(one) for one in start]).control
    assert control is not None, "a round has been averaged"
    return control


def whole_outer(outer: Sequence[Combined | OuterState], start: Sequence[Combined | Broadcast]) -> InnerState:
    """Return the state of the outer optimizer that goes with what a replica starts from."""
    (whole,) = join_outer([outer_of(one) for one in outer], [broadcast_of(one).params.num_params for one in start])
    return whole


def called(function: Callable[..., Value], *given: Any) -> Value:
    """Call a function: of arguments that are values here, and futures for Dask's client."""
    return function(*given)


# Tasks ----------------------------------------------------------------------------------------------------


def places_topic(run_id: str) -> str:
    """Return the topic of the reports of watched tasks."""
    return f"{topic(run_id)}-places"


def _unless_over(task: Callable[Concatenate[str, Arguments], Value]) -> Callable[Concatenate[str, Arguments], Value]:
    """Let a task of a run that is over end without an error: nobody waits for its result, or reads of its failure.

    A task whose key asks for it is watched.
    """

    @wraps(task)
    def run(run_id: str, /, *arguments: Arguments.args, **options: Arguments.kwargs) -> Value:
        try:
            with watching(places_topic(run_id), lambda: resident_of(run_id).functions):
                return task(run_id, *arguments, **options)
        except Exception:
            if is_over(run_id):
                return cast(Value, None)
            raise

    return run


@_unless_over
def initialise_run(run_id: str, init: InitFile | None) -> Initial:
    """Build the model and try it."""
    return initialise(resident_of(run_id), init)


@_unless_over
def train_replica(
    run_id: str,
    task: LocalTask,
    start: Sequence[Combined | Broadcast],
    state: tuple[Update, ReplicaState] | ReplicaState,
    frozen: Flat | None,
) -> tuple[Update, ReplicaState]:
    """Run the local steps of a replica."""
    given = join_broadcast([broadcast_of(one) for one in start])
    return tasks.train_local(resident_of(run_id), task, given, state_of(state), frozen, partial(_progress, run_id))


def combine_replicas(
    config: AverageConfig,
    start: Combined | Broadcast,
    starts: Sequence[Combined | Broadcast] | None,
    updates: Sequence[tuple[Update, ReplicaState] | Update],
    outer: Combined | OuterState,
    factor: float,
) -> Combined:
    """Average replicas."""
    sent = [update_of(one) for one in updates]
    return tasks.reduce(broadcast_of(start), _broadcasts(starts), sent, outer_of(outer), config, factor)


def average_slice(
    config: AverageConfig,
    start: Combined | Broadcast,
    starts: Sequence[Combined | Broadcast] | None,
    updates: Sequence[Update],
) -> Mean:
    """Average a slice, before the norm of the whole pseudo-gradient is known."""
    return tasks.reduce_first(broadcast_of(start), _broadcasts(starts), updates, config)


def step_slice(
    config: AverageConfig,
    start: Combined | Broadcast,
    mean: Mean,
    outer: OuterState,
    factor: float,
    facts: Sequence[AverageFacts],
) -> Combined:
    """Take the outer step of a slice."""
    squares = [one.squares for one in facts]
    return tasks.reduce_then(broadcast_of(start), mean, outer, config, factor, squares)


def _broadcasts(starts: Sequence[Combined | Broadcast] | None) -> list[Broadcast] | None:
    return None if starts is None else [broadcast_of(start) for start in starts]


def mean_model(means: tuple[Average, ...], combined: Sequence[Combined | Broadcast]) -> Parameters:
    """Return the mean of replicas that go on from different parameters."""
    return model_of(means, [model_in(one) for one in combined])


def next_average(before: Parameters | None, model: Combined | Broadcast | Parameters, decay: float) -> Parameters:
    """Return the moving average of models after a round, or a slice of it."""
    return next_ema(before, model_in(model), decay)


@_unless_over
def recalibrate(
    run_id: str, model: Sequence[Combined | Broadcast | Parameters], replica: int, frozen: Flat | None
) -> Statistics:
    """Return the running statistics of norm layers over some training batches of a replica."""
    return tasks.recalibrate(resident_of(run_id), whole_model(model, frozen), replica)


def recalibrated(model: Combined | Broadcast | Parameters, replicas: Sequence[Statistics]) -> Parameters:
    """Return the slice of the model that has the buffers, with the replicas' statistics."""
    return with_statistics(model_in(model), replicas)


def summarise_round(
    facts: Sequence[Sequence[Combined | AverageFacts]],
    model: Sequence[Combined | Broadcast | Parameters],
    frozen: Flat | None,
) -> RoundSummary:
    """Return the scalars of a round; the next round does not wait for their hash."""
    return summarise([[facts_of(one) for one in slices] for slices in facts], whole_model(model, frozen))


@_unless_over
def evaluate_piece(
    run_id: str,
    model: Sequence[Combined | Broadcast | Parameters],
    split: SplitName,
    piece: int,
    frozen: Flat | None,
) -> Sums:
    """Evaluate one piece of a split."""
    return tasks.evaluate_piece(resident_of(run_id), whole_model(model, frozen), split, piece)


@_unless_over
def losses_by_part(run_id: str, params: Parameters, number: int) -> list[Term]:
    """Return the loss of each part of a stream."""
    return tasks.losses_by_part(resident_of(run_id), params, number)


@_unless_over
def take_moments(run_id: str, replica: int, most_units: int | None) -> dict[str, Moments]:
    """Return the moments of the rows of a replica."""
    return tasks.take_moments(resident_of(run_id), replica, most_units, partial(_progress, run_id))


@_unless_over
def take_places(run_id: str, replica: int) -> dict[str, PlaceSums]:
    """Return the sums of the training rows of a replica at each place."""
    return tasks.take_places(resident_of(run_id), replica, partial(_progress, run_id))


def place_means(sums: dict[str, PlaceSums]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the means at each place of the training rows of all replicas."""
    return {name: own.means for name, own in sums.items()}


@_unless_over
def take_seen(run_id: str, piece: int) -> Seen:
    """Return which samples of a piece of the stores hold values that are not finite."""
    return tasks.take_seen(resident_of(run_id), piece, partial(_progress, run_id))
