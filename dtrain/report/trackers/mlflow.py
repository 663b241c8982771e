"""MLflow: where MLflow's own environment variables say (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``).

A run of dtrain is one run of MLflow, also after kills and resume: its id is kept in mlflow.json of the run's directory.
Points that it has already are not sent again; rounds that it lacks are taken from the history.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from dtrain.errors import RunDamaged
from dtrain.events import Event, RoundFinished, RunFinished, RunStarted
from dtrain.files import write_text
from dtrain.report.history import Row, row_of
from dtrain.report.points import LAST, points, rows_between, settings_of
from dtrain.runfiles import parse_json, read_file
from dtrain.urls import bare_url

PACKAGE = "mlflow"
EXTRA = "mlflow"
LOOK = "mlflow ui"
FILE = "mlflow.json"
"""In the run's directory: where the run of MLflow is, and its id."""
ARTIFACTS = ("config.toml", "plan.json")
LONGEST = 500
"""Characters of a parameter; some versions refuse longer ones."""
MOST_PARAMS, MOST_METRICS = 100, 1000
"""Of one request."""
Item = TypeVar("Item")


class Tracker:
    """Sends parameters and tags at the start, metrics of each round, and the state at the end."""

    def __init__(self) -> None:
        self._start: RunStarted | None = None
        self._directory = Path()
        self._run: _MlflowRun | None = None

    def __call__(self, event: Event) -> None:
        """Take an event. Where MLflow did not answer at the start, each round tries again."""
        match event:
            case RunStarted():
                self._start, self._directory, self._run = event, Path(event.run).absolute(), None
                self._open(event.round)
            case RoundFinished(result) if self._start is not None:
                self._open(result.round - 1).log([row_of(result)])
            case RunFinished() if self._start is not None:
                run = self._open(event.rounds)
                run.set_tags({"dtrain.params_sha256": event.params_sha256, "dtrain.ended": event.reason})
                run.end("KILLED" if event.reason == "max_time" else "FINISHED")
                self._start = None

    def close(self) -> None:
        """Mark a run that was stopped; a run that has ended stays as it is."""
        if self._start is not None and self._run is not None:
            self._run.end("KILLED")

    def _open(self, rounds: int) -> _MlflowRun:
        """Return the run of MLflow, with all rounds up to one."""
        assert self._start is not None
        if self._run is None:
            self._run = _MlflowRun(self._start, self._directory)
        if rounds > self._run.logged:
            self._run.log(rows_between(self._directory, self._run.logged, rounds))
        return self._run


class _MlflowRun:
    """A run of MLflow: that of mlflow.json, or a new one."""

    def __init__(self, start: RunStarted, directory: Path) -> None:
        from mlflow import MlflowClient, get_tracking_uri

        self._api: Any = MlflowClient()
        uri = bare_url(get_tracking_uri())
        known = _known_run(directory, uri)
        self._id = known if known is not None and self._exists(known) else self._new_run(directory.name)
        write_text(directory / FILE, json.dumps({"tracking_uri": uri, "run_id": self._id}) + "\n")
        self._api.update_run(self._id, status="RUNNING")
        self._log_settings(start, directory)
        self._steps = {point.step for point in self._api.get_metric_history(self._id, LAST)}
        self.logged = next(number - 1 for number in range(1, len(self._steps) + 2) if number not in self._steps)
        """The last of the rounds, from the first one on, that it has."""
        self._is_sure = False
        """Whether it has no point of the next round: a process that was killed, or a request that failed, may have
        sent some of them."""

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._api.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _new_run(self, name: str) -> str:
        run_id: str = self._api.create_run(self._group_id(), run_name=name).info.run_id
        return run_id

    def _group_id(self) -> str:
        """Return the id of the group of runs that MLflow's environment variables name, or of its default one."""
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        found = self._api.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._api.create_experiment(name))

    def _log_settings(self, start: RunStarted, directory: Path) -> None:
        """Send what it does not have yet: a parameter keeps its first value; tags say what a continued run changes."""
        from mlflow.entities import Param

        settings = {**settings_of(start.settings), "replicas": start.replicas, "samples": start.samples}
        known = self._api.get_run(self._id).data.params
        texts = {key: str(value)[:LONGEST] for key, value in settings.items()}
        new = [Param(key, text) for key, text in texts.items() if key not in known]
        for some in _pieces(new, MOST_PARAMS):
            self._api.log_batch(self._id, params=some)
        changed = {f"dtrain.now.{key}": text for key, text in texts.items() if known.get(key, text) != text}
        self.set_tags({"dtrain.run": str(directory), "dtrain.version": version("dtrain"), **changed})
        for name in ARTIFACTS if new else ():
            self._api.log_artifact(self._id, str(directory / name))

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags."""
        for key, text in tags.items():
            self._api.set_tag(self._id, key, text)

    def log(self, rows: Sequence[Row]) -> None:
        """Send the points of rounds that it lacks."""
        from mlflow.entities import Metric

        for row in rows:
            number = row["round"]
            if number in self._steps:
                continue
            values = points(row)
            if not self._is_sure:
                values = {name: value for name, value in values.items() if not self._has(name, number)}
            self._is_sure, now = False, int(time.time() * 1000)
            metrics = [Metric(name, value, now, number) for name, value in values.items()]
            for some in _pieces(metrics, MOST_METRICS):
                self._api.log_batch(self._id, metrics=some)
            self._is_sure, self.logged = True, number
            self._steps.add(number)

    def _has(self, name: str, step: int) -> bool:
        return any(point.step == step for point in self._api.get_metric_history(self._id, name))

    def end(self, status: str) -> None:
        """Mark the run as ended."""
        self._api.set_terminated(self._id, status)


def _known_run(directory: Path, uri: str) -> str | None:
    """Return the id that mlflow.json has for a tracking URI, if it has one."""
    try:
        stored = parse_json(directory / FILE, read_file(directory / FILE))
        return str(stored["run_id"]) if stored["tracking_uri"] == uri else None
    except (RunDamaged, LookupError):
        return None


def _pieces(items: Sequence[Item], most: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while some := list(islice(rest, most)):
        yield some
