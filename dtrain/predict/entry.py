"""`Run.predict` and `Run.predict_to`: from a run and what was asked for to predictions."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from distributed import Client

from dtrain.algorithm.recipe import Functions
from dtrain.config.schema import TrainConfig
from dtrain.data.samples import Samples, not_samples
from dtrain.data.write.open import open_sink
from dtrain.events import Reporter
from dtrain.job import with_scheduler
from dtrain.predict.lazy import lazy_dataset
from dtrain.predict.prepare import Options, RunFacts, prepare
from dtrain.predict.request import OtherData, Request, request_of
from dtrain.predict.write import Written, check_output, write_predictions
from dtrain.runtime.codebytes import pickle_functions, sent
from dtrain.runtime.place import PLACE_NAMES, ClusterPlace, SerialPlace, open_place
from dtrain.runtime.predicting import ClusterExecutor, Executor, SerialExecutor
from dtrain.runtime.where import Where, client_of, scheduler_text

if TYPE_CHECKING:
    import xarray as xr

Data: TypeAlias = Samples | str | Path | Sequence[str | Path]
"""Samples, the path of a store, or those of several that are one."""
FUNCTIONS = ("model", "data.transform")
"""Keys of the functions that a prediction calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A run, and the data that are to be predicted with it."""

    facts: RunFacts
    functions: Functions
    given: Samples | OtherData | None
    """None: the run's own."""

    def request(self) -> Request:
        """Describe what is to be predicted."""
        return request_of(self.facts.config, self.facts.resolved, self.facts.base, self.given)


def data_paths(given: object) -> str | tuple[str, ...]:
    """Return the path that was given as data, or several.

    Raises
    ------
    InvalidConfig
        It is something else.
    """
    if isinstance(given, str | Path):
        return str(given)
    if isinstance(given, list | tuple) and given and all(isinstance(one, str | Path) for one in given):
        return tuple(map(str, given))
    raise not_samples(given)


def lazy(call: Call, options: Options) -> xr.Dataset:
    """Return predictions that are computed when they are asked for.

    Raises
    ------
    DtrainError
        The store, the model and the options do not fit together.
    """
    place, executor = SerialPlace(), SerialExecutor()
    code = pickle_functions(call.functions, call.facts.base)
    prepared = prepare(
        call.facts,
        call.request(),
        options,
        code=code,
        run_id=uuid.uuid4().hex[:8],
        device=place.device,
        memory=place.memory,
        memory_name=place.memory_name,
        try_outputs=executor.try_outputs,
        look=False,
    )
    return lazy_dataset(prepared)


def written(
    call: Call, options: Options, out: str, *, cluster: Where, goes_on: bool, tell: Reporter = lambda event: None
) -> Written:
    """Write predictions, or what is lacking of them.

    Raises
    ------
    DtrainError
        As `lazy`; or the output is there, was begun with other settings, or cannot be written.
    """
    sink = open_sink(out, Path.cwd())
    check_output(sink, goes_on=goes_on)
    request, run_id = call.request(), uuid.uuid4().hex[:8]
    config = with_scheduler(call.facts.config, scheduler_text(cluster, PLACE_NAMES))
    with (
        client_of(cluster) as client,
        _executor(config, call.facts.base, client, run_id) as (executor, place),
        sent(call.functions, call.facts.base) as code,
    ):
        prepared = prepare(
            replace(call.facts, config=config),
            request,
            options,
            code=code,
            run_id=run_id,
            device=place.device,
            memory=place.memory,
            memory_name=place.memory_name,
            try_outputs=executor.try_outputs,
            look=True,
        )
        return write_predictions(prepared, sink, executor, goes_on=goes_on, tell=tell)


@contextmanager
def _executor(
    config: TrainConfig, base: Path, client: Client | None, run_id: str
) -> Iterator[tuple[Executor, SerialPlace | ClusterPlace]]:
    """Open the place that the configuration names, and give what predicts there."""
    with open_place(config.cluster, base, client) as place:
        if isinstance(place, ClusterPlace):
            executor = ClusterExecutor(place.connection, run_id)
            try:
                yield executor, place
            finally:
                executor.close()
        else:
            assert isinstance(place, SerialPlace)
            yield SerialExecutor(), place
