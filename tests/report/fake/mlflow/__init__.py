"""A stand-in for MLflow: its client's calls, kept in a file. tests/others/test_mlflow.py has the real one.

Like MLflow's file store it keeps a point that is sent twice twice, and refuses to change a parameter.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

from mlflow.exceptions import MlflowException


def get_tracking_uri():
    return os.environ["MLFLOW_TRACKING_URI"]


class MlflowClient:
    fails_after = None
    """Requests of points until the server is gone; None: it stays."""

    def __init__(self):
        self._file = Path(get_tracking_uri().removeprefix("file://").rpartition("@")[2])

    def _read(self):
        return json.loads(self._file.read_text()) if self._file.exists() else {"experiments": ["Default"], "runs": {}}

    def _changed(self, run_id, **changes):
        content = self._read()
        content["runs"][run_id].update(changes)
        self._file.write_text(json.dumps(content))

    def get_experiment_by_name(self, name):
        names = self._read()["experiments"]
        return SimpleNamespace(experiment_id=str(names.index(name))) if name in names else None

    def create_experiment(self, name):
        content = self._read()
        content["experiments"].append(name)
        self._file.write_text(json.dumps(content))
        return str(len(content["experiments"]) - 1)

    def create_run(self, experiment, run_name):
        content = self._read()
        run_id = f"id-{len(content['runs'])}"
        new = {"experiment": experiment, "name": run_name, "params": {}, "tags": {}, "metrics": [], "artifacts": []}
        content["runs"][run_id] = {**new, "status": "RUNNING"}
        self._file.write_text(json.dumps(content))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def _run(self, run_id):
        runs = self._read()["runs"]
        if run_id not in runs:
            raise MlflowException(f"Run {run_id} not found", "RESOURCE_DOES_NOT_EXIST")
        return runs[run_id]

    def get_run(self, run_id):
        run = self._run(run_id)
        info = SimpleNamespace(run_id=run_id, status=run["status"], lifecycle_stage="active")
        return SimpleNamespace(info=info, data=SimpleNamespace(params=run["params"], tags=run["tags"]))

    def update_run(self, run_id, status):
        self._changed(run_id, status=status)

    def set_terminated(self, run_id, status):
        self._changed(run_id, status=status)

    def set_tag(self, run_id, key, value):
        self._changed(run_id, tags={**self._run(run_id)["tags"], key: value})

    def log_artifact(self, run_id, path):
        self._changed(run_id, artifacts=[*self._run(run_id)["artifacts"], Path(path).name])

    def log_batch(self, run_id, metrics=(), params=()):
        run = self._run(run_id)
        assert len(params) <= 100
        for param in params:
            if run["params"].get(param.key, param.value) != param.value:
                raise MlflowException(f"Changing param values is not allowed: {param.key}", "INVALID_PARAMETER_VALUE")
            run["params"][param.key] = param.value
        for metric in metrics:
            if MlflowClient.fails_after == 0:
                self._changed(run_id, **run)
                raise ConnectionError("the server is gone")
            if MlflowClient.fails_after is not None:
                MlflowClient.fails_after -= 1
            run["metrics"].append([metric.key, metric.value, metric.step])
        self._changed(run_id, **run)

    def get_metric_history(self, run_id, key):
        return [SimpleNamespace(value=v, step=s) for k, v, s in self._run(run_id)["metrics"] if k == key]
