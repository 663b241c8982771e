"""MLflow itself, in an environment of its own, gets each point of a run once, also of one that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
import time
import venv
from pathlib import Path

import pytest

import dtrain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(dtrain.__file__).parents[1]
PACKAGE = "mlflow-skinny>=3"
CONFIG = """
model = "model:build"
data = { path = "DATA", inputs = ["x"], targets = ["y"] }
train = { loss = "cross_entropy", metrics = ["accuracy"], rounds = 6, batch_size = 40 }
average = { replicas = 2 }
cluster = { scheduler = "serial" }
run = { trackers = ["mlflow", "tensorboard"], commit_every = 2 }
"""
MODEL = """
import os, time
from torch import nn

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
    def forward(self, x):
        time.sleep(float(os.environ.get("NAP", "0")))
        return self.layer(x)

def build():
    return Slow()
"""
READ = """
import json, sys
from mlflow import MlflowClient
client, run_id = MlflowClient(), sys.argv[1]
run = client.get_run(run_id)
names = ("train_loss", "val_loss", "val_accuracy", "replica_loss/1", "round/samples")
points = {name: sorted((p.step, p.value) for p in client.get_metric_history(run_id, name)) for name in names}
artifacts = sorted(file.path for file in client.list_artifacts(run_id))
runs = len(client.search_runs([run.info.experiment_id]))
print(json.dumps({"status": run.info.status, "params": run.data.params, "tags": run.data.tags, "points": points,
                  "artifacts": artifacts, "runs": runs}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with MLflow, which finds dtrain and all else in this one."""
    folder = tmp_path_factory.mktemp("mlflow") / "venv"
    venv.create(folder, with_pip=True)
    own = folder / "bin" / "python"
    done = subprocess.run([own, "-m", "pip", "install", "-q", PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mlflow cannot be installed here: {done.stderr.strip()[-300:]}")
    (site,) = folder.glob("lib/python*/site-packages")
    paths = [sysconfig.get_paths()["purelib"], str(ROOT), str(ROOT / "cli")]
    (site / "zz-dtrain.pth").write_text("\n".join(paths) + "\n")
    return own


def test_a_run_that_is_killed_and_continued(python: Path, blobs: Path, tmp_path: Path) -> None:
    (tmp_path / "dtrain.toml").write_text(CONFIG.replace("DATA", str(blobs)))
    (tmp_path / "model.py").write_text(MODEL)
    env = {**os.environ, "MLFLOW_TRACKING_URI": f"file:{tmp_path}/store", "MLFLOW_ALLOW_FILE_STORE": "true"}
    train = [python, "-c", "from dtrain_cli.main import main; main()", "train", "dtrain.toml", "--run", "r"]
    run, history = tmp_path / "runs/r", tmp_path / "runs/r/history.jsonl"

    process = subprocess.Popen(train, cwd=tmp_path, env={**env, "NAP": "0.02"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (history.exists() and history.read_text().count("\n") >= 3 and (run / "mlflow.json").exists()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()

    done = subprocess.run(train, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert "fails" not in done.stderr
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    found = json.loads(subprocess.run([python, "-c", READ, run_id], env=env, capture_output=True, check=True).stdout)
    assert (found["status"], found["runs"]) == ("FINISHED", 1)
    for name in ("train_loss", "val_loss", "val_accuracy"):
        assert found["points"][name] == [[row["round"], pytest.approx(row[name])] for row in rows]
    assert [step for step, _ in found["points"]["replica_loss/1"]] == [1, 2, 3, 4, 5, 6]
    assert found["params"]["train.rounds"] == "6"
    assert found["tags"]["dtrain.params_sha256"] == rows[-1]["params_sha256"]
    assert found["tags"]["dtrain.version"] == dtrain.__version__
    assert found["artifacts"] == ["config.toml", "plan.json"]
    _compare_event_files(run, rows)

    again = subprocess.run(train, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert "done" in again.stdout
    after = subprocess.run([python, "-c", READ, run_id], env=env, capture_output=True, check=True).stdout
    assert json.loads(after)["points"] == found["points"]


def _compare_event_files(run: Path, rows: list[dict[str, float]]) -> None:
    """Compare the event files of the same run with its history."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("train_loss", "val_loss"):
        points = [(point.step, point.value) for point in events.Scalars(name)]
        assert points == [(row["round"], pytest.approx(row[name])) for row in rows]


def test_a_server_that_is_not_there_stops_nothing(python: Path, blobs: Path, tmp_path: Path) -> None:
    (tmp_path / "dtrain.toml").write_text(CONFIG.replace("DATA", str(blobs)).replace(', "tensorboard"', ""))
    (tmp_path / "model.py").write_text(MODEL)
    env = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    train = [python, "-c", "from dtrain_cli.main import main; main()", "train", "dtrain.toml", "--run", "r"]
    done = subprocess.run(train, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert "done (rounds): 6 rounds" in done.stdout
    assert done.stderr.count('run.trackers: "mlflow" fails, and training goes on') == 1
