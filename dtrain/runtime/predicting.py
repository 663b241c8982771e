"""Predict the units of a store: in this process, or as tasks of a Dask cluster, each a run of neighbouring units.

A task writes its units itself where it reaches what the driver writes to, and else hands the encoded chunks back. It is
a pure function, so that one that is lost with its worker runs elsewhere.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

from distributed import Future, get_worker
from distributed.protocol.pickle import dumps

from dtrain.algorithm.outputs import OutputFacts
from dtrain.config.functions import Function
from dtrain.data.plan.heads import OutputArray
from dtrain.data.plan.prediction import Unit
from dtrain.data.write.documents import ArraySpec, Objects, encode
from dtrain.data.write.sink import Writer
from dtrain.errors import ClusterLost
from dtrain.runtime.client import TaskClient
from dtrain.runtime.connect import Connection
from dtrain.runtime.plugins import RESOURCE, RunPlugin, call_in_thread
from dtrain.runtime.predictor import PredictionSpec, Predictor, Values, Work, forget, predict_units, predictor_of
from dtrain.runtime.remote import places_topic, topic
from dtrain.runtime.resident import RunOver
from dtrain.runtime.runner import SegmentLost, given_up
from dtrain.runtime.watched import watching
from dtrain.types import Parameters

MAX_LOST = 3
"""Times in a row that tasks are lost before it is given up."""
KEPT = "What is written stays; --continue goes on."
TASKS_A_WORKER = 2
"""Tasks on their way to a worker, so that none waits for the driver."""
PROGRESS_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Payload:
    """What every task needs, sent to each worker once."""

    spec: PredictionSpec
    params: Parameters
    work: Work
    specs: Mapping[str, ArraySpec]
    """By array: how it is written."""
    writer: Writer
    ahead: bool


@dataclass(frozen=True, slots=True)
class SpanDone:
    """What a task gives back."""

    span: int
    samples: int
    left_out: int
    decoded: int
    """Bytes."""
    written: int
    """Bytes of encoded chunks."""
    receipt: Any
    """What the driver settles, if there is something to settle."""
    objects: Objects | None
    """The chunks, where the task does not reach what the driver writes to."""
    worker: str = ""


def predict_span(
    payload: Payload, span: int, numbers: Sequence[int], on_unit: Callable[[int], None] = lambda samples: None
) -> SpanDone:
    """Predict some units, and write them or hand them back."""
    predictor, writer = predictor_of(payload.spec, payload.params), payload.writer.fresh()
    objects: Objects | None = None if writer.is_reached() else {}
    arrays = {array.name: array for head in payload.work.heads for array in head.arrays}
    written = 0

    def put(unit: Unit, values: Values) -> None:
        nonlocal written
        for name, own in values.items():
            for key, chunk in encoded_unit(payload, arrays[name], unit, own):
                written += len(chunk)
                if objects is None:
                    writer.put({key: chunk})
                else:
                    objects[key] = chunk

    left_out, decoded = predict_units(predictor, payload.work, numbers, put, ahead=payload.ahead, on_unit=on_unit)
    plan = payload.work.plan
    samples = sum(plan.samples_in(unit) for unit in map(plan.unit, numbers))
    receipt = writer.receipt() if objects is None else None
    return SpanDone(span, samples, left_out, decoded, written, receipt, objects)


def encoded_unit(payload: Payload, array: OutputArray, unit: Unit, values: Any) -> Iterator[tuple[str, bytes]]:
    """Yield the chunks of an array that a unit owns."""
    order = [array.computed.index(dim) for dim in array.dims]
    return encode(payload.specs[array.name], payload.work.plan.region(array, unit), values.transpose(order))


class Executor(Protocol):
    """Where units are predicted."""

    num_workers: int
    dashboard: str

    def try_outputs(self, spec: PredictionSpec, params: Parameters) -> tuple[OutputFacts, ...]:
        """Call the model with zeros, and return what comes out."""
        ...

    def is_reached(self, writer: Writer) -> bool:
        """Return True if all workers reach what the driver writes to."""
        ...

    def run(
        self,
        payload: Payload,
        spans: Sequence[Sequence[int]],
        done: Callable[[SpanDone], None],
        on_samples: Callable[[int], None],
    ) -> None:
        """Predict runs of units; call `done` with what each gives, and `on_samples` with the samples so far."""
        ...


class SerialExecutor:
    """The process itself."""

    num_workers = 1
    dashboard = ""

    def try_outputs(self, spec: PredictionSpec, params: Parameters) -> tuple[OutputFacts, ...]:
        """Call the model with zeros."""
        return Predictor(spec, params).try_outputs()

    def is_reached(self, writer: Writer) -> bool:
        """Return True."""
        return True

    def run(
        self,
        payload: Payload,
        spans: Sequence[Sequence[int]],
        done: Callable[[SpanDone], None],
        on_samples: Callable[[int], None],
    ) -> None:
        """Predict runs of units one after the other."""
        before = 0
        try:
            for number, numbers in enumerate(spans):
                finished = predict_span(payload, number, numbers, partial(_after, on_samples, before))
                before += finished.samples
                done(finished)
        finally:
            forget(payload.spec.run_id)


def _after(on_samples: Callable[[int], None], before: int, samples: int) -> None:
    on_samples(before + samples)


# On a cluster -----------------------------------------------------------------------------------------------

_OVER: deque[str] = deque(maxlen=1000)
"""Executions that have ended in this process."""


def _import() -> None:
    """Do nothing: this module and PyTorch are imported for it."""


def _forget(run_id: str) -> None:
    """Forget an execution, and free its predictor: a task that still runs ends with its unit."""
    _OVER.append(run_id)
    forget(run_id)


def _predict_span(payload: Payload, span: int, numbers: Sequence[int]) -> SpanDone | None:
    """Predict some units on a worker; None if nobody waits for them any more."""
    run_id, last = payload.spec.run_id, time.monotonic()

    def on_unit(samples: int) -> None:
        nonlocal last
        if run_id in _OVER:
            raise RunOver(run_id)
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            get_worker().log_event(topic(run_id), {"predicted": {"span": span, "samples": samples}})

    def functions() -> Mapping[str, Function]:
        return predictor_of(payload.spec, payload.params).functions

    try:
        with watching(places_topic(run_id), functions):
            finished = predict_span(payload, span, numbers, on_unit)
    except Exception:
        if run_id in _OVER:
            return None
        raise
    return SpanDone(
        finished.span,
        finished.samples,
        finished.left_out,
        finished.decoded,
        finished.written,
        finished.receipt,
        finished.objects,
        str(get_worker().address),
    )


def _reaches(writer: Writer) -> bool:
    return writer.is_reached()


class ClusterExecutor:
    """A Dask cluster.

    Parameters
    ----------
    connection : Connection
    run_id : str
        Names the execution.
    """

    def __init__(self, connection: Connection, run_id: str) -> None:
        self.dashboard = connection.dashboard
        self._client = TaskClient(connection.client, run_id, places_topic(run_id), started=connection.started)
        self._plugin = RunPlugin(topic(run_id), _import, partial(_forget, run_id))
        self._progress: SimpleQueue[tuple[int, int]] = SimpleQueue()
        self._client.register(self._plugin)
        self.num_workers = len(self._client.workers())  # without those that did not answer
        connection.client.subscribe_topic(
            self._plugin.name,
            lambda event: self._progress.put((event[1]["predicted"]["span"], event[1]["predicted"]["samples"])),
        )

    def try_outputs(self, spec: PredictionSpec, params: Parameters) -> tuple[OutputFacts, ...]:
        """Call the model with zeros, on a worker."""

        def submit() -> list[Future]:
            sent = self._client.scatter((spec, params), self._client.workers()[:1])
            return [self._client.submit(_tried, "try", sent, resources=RESOURCE)]

        outputs: tuple[OutputFacts, ...] = self._client.done("Trying the model", submit, watched=True)[0]
        return outputs

    def is_reached(self, writer: Writer) -> bool:
        """Return True if all workers reach what the driver writes to."""
        pickled = dumps(partial(_reaches, writer))
        return all(self._client.on_all(lambda: self._client.dask.run(call_in_thread, pickled)).values())

    def run(
        self,
        payload: Payload,
        spans: Sequence[Sequence[int]],
        done: Callable[[SpanDone], None],
        on_samples: Callable[[int], None],
    ) -> None:
        """Predict runs of units as tasks, a few a worker at a time; what is lost is predicted again."""
        left, finished, lost = dict(enumerate(spans)), _Progress(), 0
        while left:
            try:
                self._client.begin(lost)
                for one in self._results(payload, left, lambda: on_samples(finished.heard(self._progress))):
                    left.pop(one.span)
                    finished.settle(one)
                    done(one)
                    lost = 0
                    on_samples(finished.total)
            except SegmentLost as error:
                lost += 1
                if lost > MAX_LOST:
                    raise given_up(error, "The prediction", lost, KEPT) from error
            except ClusterLost as error:
                raise _cluster_lost(error) from error

    def _results(self, payload: Payload, left: Mapping[int, Sequence[int]], meanwhile: Callable[[], None]) -> Any:
        """Yield what tasks give, as they end."""
        workers = self._client.workers()
        sent = self._client.scatter(payload, workers)
        waiting, running, loads = deque(left.items()), dict[Future, str](), Counter[str]()
        while waiting or running:
            workers = self._client.workers()
            while waiting and len(running) < TASKS_A_WORKER * len(workers):
                span, numbers = waiting.popleft()
                at = min(workers, key=lambda address: loads[address])
                future = self._client.submit(
                    _predict_span, f"predict-{span:06d}", sent, span, list(numbers), at=at, resources=RESOURCE
                )
                running[future] = at
                loads[at] += 1
            for future, result in self._client.first_done(list(running), meanwhile):
                loads[running.pop(future)] -= 1
                del future
                yield result

    def close(self) -> None:
        """Cancel what is not done, and take the predictors away from the workers."""
        self._client.close(self._plugin.name)


def _tried(both: tuple[PredictionSpec, Parameters]) -> tuple[OutputFacts, ...]:
    predictor = Predictor(*both)
    with watching(places_topic(both[0].run_id), lambda: predictor.functions):
        return predictor.try_outputs()


class _Progress:
    """The samples that are done, of tasks that have ended and of those that still run."""

    def __init__(self) -> None:
        self._ended = 0
        self._settled: set[int] = set()
        self._running: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Samples that are done."""
        return self._ended + sum(self._running.values())

    def settle(self, one: SpanDone) -> None:
        """Count a task that has ended."""
        self._settled.add(one.span)
        self._running.pop(one.span, None)
        self._ended += one.samples

    def heard(self, progress: SimpleQueue[tuple[int, int]]) -> int:
        """Count what tasks have said; return the samples that are done."""
        while not progress.empty():
            span, samples = progress.get()
            if span not in self._settled:
                self._running[span] = samples
        return self.total


def _cluster_lost(error: ClusterLost) -> ClusterLost:
    message = error.message.replace(" Committed rounds are safe.", "")
    return ClusterLost(message, "What is written stays: run the same command with --continue.")
