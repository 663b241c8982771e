"""The built-in trackers write each point of each round once: after kills, torn files, replays and lost servers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.summary.writer import event_file_writer

import dtrain
from dtrain.events import Event, RoundFinished, RunFinished, RunStarted
from dtrain.report.history import row_of
from dtrain.report.journal import cut_history, journal
from dtrain.report.points import points
from dtrain.report.trackers import mlflow, tensorboard
from tests.report.helpers import result_of
from tests.runtime import models
from tests.training import trained

SETTINGS = {"train.rounds": 5, "model": "m:f", "model_args": {"width": 3}, "data.shuffle": True}
FAKE = Path(__file__).parent / "fake"


def started(run: Path, rounds: int = 0) -> RunStarted:
    return RunStarted(
        run=str(run), round=rounds, rounds=5, replicas=2, samples=40, workers=2, dashboard="", settings=SETTINGS
    )


def finished(number: int) -> RoundFinished:
    return RoundFinished(result_of(number, train_loss=1 / number))


def ended(run: Path, reason: Any = "rounds") -> RunFinished:
    return RunFinished(reason=reason, rounds=5, params_sha256="ab", val_loss=0.1, run=str(run))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # readers take the files of a folder by their names, which end with this number where one second has several
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    (tmp_path / "run-1").mkdir()
    for name in ("config.toml", "plan.json"):
        (tmp_path / "run-1" / name).write_text("{}")
    return tmp_path / "run-1"


def train(tracker: Any, run: Path, begin: int, end: int, *, lost: tuple[int, ...] = ()) -> None:
    """Train the rounds after one, up to another one; the tracker does not get those that are `lost`."""
    tracker(started(run, begin))
    for number in range(begin + 1, end + 1):
        event = finished(number)
        journal(run, event)
        if number not in lost:
            tracker(event)


# TensorBoard -------------------------------------------------------------------------------------------------------


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={SCALARS: 0})
    found.Reload()
    return {name: [(point.step, point.value) for point in found.Scalars(name)] for name in found.Tags()[SCALARS]}


def expected(last: int) -> dict[str, list[tuple[int, float]]]:
    names = points(row_of(result_of(1)))
    rows = {number: points(row_of(finished(number).result)) for number in range(1, last + 1)}
    return {name: [(number, pytest.approx(rows[number][name])) for number in rows] for name in names}


def files(run: Path) -> list[Path]:
    return sorted((run / "tensorboard").iterdir())


def test_all_points_of_all_rounds(run: Path) -> None:
    tracker = tensorboard.Tracker()
    train(tracker, run, 0, 5)
    tracker(ended(run))
    assert scalars(run) == expected(5)


def test_a_continued_run_has_each_point_once(run: Path) -> None:
    train(tensorboard.Tracker(), run, 0, 3)  # killed: nothing is closed
    train(tensorboard.Tracker(), run, 3, 5)
    assert scalars(run) == expected(5)


def test_rounds_that_are_trained_again_replace_those_of_before(run: Path) -> None:
    train(tensorboard.Tracker(), run, 0, 4)
    cut_history(run, 2)  # the newest commit
    train(tensorboard.Tracker(), run, 2, 5)
    assert scalars(run) == expected(5)


@pytest.mark.parametrize("cut", [1, 40, 200, 900])
def test_a_file_that_was_torn(run: Path, cut: int) -> None:
    train(tensorboard.Tracker(), run, 0, 3)
    (file,) = files(run)
    file.write_bytes(file.read_bytes()[:-cut])
    train(tensorboard.Tracker(), run, 3, 5)
    assert scalars(run) == expected(5)


def test_rounds_that_it_has_missed_come_from_the_history(run: Path) -> None:
    for number in (1, 2, 3):  # trained without it
        journal(run, finished(number))
    train(tensorboard.Tracker(), run, 3, 5, lost=(4,))
    assert scalars(run) == expected(5)


def test_a_run_that_is_complete_gets_what_it_lacks_and_no_file_more(run: Path) -> None:
    tracker = tensorboard.Tracker()
    train(tracker, run, 0, 5, lost=(5,))
    tracker.close()
    for _ in range(3):
        tracker = tensorboard.Tracker()
        tracker(started(run, 5))
        tracker(ended(run))
    assert scalars(run) == expected(5)
    assert len(files(run)) == 2


def test_rounds_without_a_finite_loss_are_written_once_too(run: Path) -> None:
    for begin in (0, 2):
        tracker = tensorboard.Tracker()
        tracker(started(run, begin))
        for number in (begin + 1, begin + 2):
            event = RoundFinished(result_of(number, train_loss=float("nan")))
            journal(run, event)
            tracker(event)
    found = scalars(run)
    assert [step for step, _ in found["round/samples"]] == [step for step, _ in found["val_loss"]] == [1, 2, 3, 4]
    assert "train_loss" not in found


def test_settings_are_text_and_hyper_parameters(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for begin in (0, 2):
        train(tensorboard.Tracker(), run, begin, begin + 2)
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    (text,) = found.Tensors("settings/text_summary")
    assert "| model_args.width | 3 |" in text.tensor_proto.string_val[0].decode()
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    parameters = HParamsPluginData.FromString(content).session_start_info.hparams
    assert parameters["train.rounds"].number_value == 5
    assert parameters["data.shuffle"].number_value == 1


# MLflow, with a stand-in -------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(FAKE)
    before = {name for name in sys.modules if name.partition(".")[0] == "mlflow"}
    assert not before
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://me:secret@{tmp_path / 'server.json'}")
    import mlflow as fake

    yield fake.MlflowClient
    fake.MlflowClient.fails_after = None
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
        del sys.modules[name]


def stored(run: Path) -> dict[str, Any]:
    runs: dict[str, Any] = json.loads((run.parent / "server.json").read_text())["runs"]
    (only,) = runs.values()
    return only


def metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for key, value, step in stored(run)["metrics"]:
        found.setdefault(key, []).append((step, value))
    return found


def test_params_metrics_tags_and_artifacts(run: Path, server: Any) -> None:
    tracker = mlflow.Tracker()
    train(tracker, run, 0, 5)
    tracker(ended(run))
    tracker.close()
    assert metrics(run) == expected(5)
    found = stored(run)
    assert found["name"] == "run-1"
    assert found["params"] == {
        "train.rounds": "5",
        "model": "m:f",
        "model_args.width": "3",
        "data.shuffle": "True",
        "replicas": "2",
        "samples": "40",
    }
    assert found["tags"] == {
        "dtrain.run": str(run),
        "dtrain.version": dtrain.__version__,
        "dtrain.params_sha256": "ab",
        "dtrain.ended": "rounds",
    }
    assert found["artifacts"] == ["config.toml", "plan.json"]
    assert found["status"] == "FINISHED"


def test_a_continued_run_is_the_same_run_of_mlflow(run: Path, server: Any) -> None:
    tracker = mlflow.Tracker()
    train(tracker, run, 0, 3)
    tracker.close()
    assert stored(run)["status"] == "KILLED"
    train(mlflow.Tracker(), run, 3, 4)
    assert stored(run)["status"] == "RUNNING"
    cut_history(run, 2)
    tracker = mlflow.Tracker()
    train(tracker, run, 2, 5)
    tracker(ended(run, "max_time"))
    assert metrics(run) == expected(5)
    assert stored(run)["status"] == "KILLED"


def test_a_setting_that_a_continued_run_changes_is_a_tag(run: Path, server: Any, monkeypatch: Any) -> None:
    train(mlflow.Tracker(), run, 0, 2)
    monkeypatch.setitem(SETTINGS, "train.rounds", 9)
    train(mlflow.Tracker(), run, 2, 5)
    assert stored(run)["params"]["train.rounds"] == "5"
    assert stored(run)["tags"]["dtrain.now.train.rounds"] == "9"


def test_the_file_in_the_run_keeps_no_password(run: Path, server: Any) -> None:
    train(mlflow.Tracker(), run, 0, 1)
    text = (run / "mlflow.json").read_text()
    assert json.loads(text) == {"tracking_uri": f"file://{run.parent / 'server.json'}", "run_id": "id-0"}
    assert "secret" not in text


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tracking_uri": "file:///other", "run_id": "id-0"}', None])
def test_another_server_or_a_run_that_was_deleted_is_a_new_run(run: Path, server: Any, content: str | None) -> None:
    train(mlflow.Tracker(), run, 0, 2)
    if content is None:
        (run.parent / "server.json").unlink()
    else:
        (run / "mlflow.json").write_text(content)
    train(mlflow.Tracker(), run, 2, 3)
    runs = json.loads((run.parent / "server.json").read_text())["runs"]
    newest = list(runs.values())[-1]
    assert len(runs) == (1 if content is None else 2)
    assert [step for key, _, step in newest["metrics"] if key == "train_loss"] == [1, 2, 3]


@pytest.mark.parametrize("requests", [0, 1, 7, 23, 24, 40])
def test_a_server_that_goes_away_lacks_nothing_in_the_end(run: Path, server: Any, requests: int) -> None:
    """A point that has arrived before the server failed does not arrive twice."""
    tracker = mlflow.Tracker()
    server.fails_after = requests
    tracker(started(run))
    failed = 0
    for number in (1, 2, 3):
        event = finished(number)
        journal(run, event)
        try:
            tracker(event)
        except ConnectionError:
            failed += 1
    assert failed > 0
    server.fails_after = None
    if requests % 2:  # it comes back while training goes on; else a process of its own goes on
        event = finished(4)
        journal(run, event)
        tracker(event)
        assert {k: sorted(v) for k, v in metrics(run).items()} == expected(4)
    train(mlflow.Tracker(), run, 4 if requests % 2 else 3, 5)
    assert {k: sorted(v) for k, v in metrics(run).items()} == expected(5)


def test_the_experiment_is_the_one_of_mlflows_variables(run: Path, server: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "storms")
    train(mlflow.Tracker(), run, 0, 1)
    assert stored(run)["experiment"] == "1"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    (run / "mlflow.json").unlink()
    train(mlflow.Tracker(), run, 1, 2)
    runs = json.loads((run.parent / "server.json").read_text())["runs"]
    assert [each["experiment"] for each in runs.values()] == ["1", "7"]


# Whole runs --------------------------------------------------------------------------------------------------------

TABLE = {"loss": "cross_entropy", "rounds": 3, "batch_size": 40}


def test_a_run_with_trackers_has_the_bits_of_one_without(samples: dtrain.Samples, tmp_path: Path, server: Any) -> None:
    seen: list[Event] = []
    plain = trained(models.plain, samples, tmp_path / "plain", TABLE)
    trackers = ["tensorboard", "mlflow", seen.append]
    tracked = trained(models.plain, samples, tmp_path / "tracked", TABLE, trackers=trackers)
    assert [row["params_sha256"] for row in tracked.rows] == [row["params_sha256"] for row in plain.rows]
    found = scalars(tracked.directory)
    assert [step for step, _ in found["val_loss"]] == [1, 2, 3]
    assert [value for _, value in found["train_loss"]] == pytest.approx([row["train_loss"] for row in tracked.rows])
    assert isinstance(seen[0], RunStarted)
    assert isinstance(seen[-1], RunFinished)
    assert seen[0].settings["train.rounds"] == 3
    assert tracked.config.run.trackers == ("tensorboard", "mlflow", "builtins:list.append()")
    server_runs = json.loads((tmp_path / "server.json").read_text())["runs"]
    (sent,) = server_runs.values()
    assert sent["status"] == "FINISHED"
    assert sent["tags"]["dtrain.params_sha256"] == tracked.rows[-1]["params_sha256"]
    assert (tracked.directory / "history.jsonl").read_text().count("\n") == 3


def test_nothing_is_imported_or_written_unless_asked(samples: dtrain.Samples, tmp_path: Path) -> None:
    done = trained(models.plain, samples, tmp_path / "runs", TABLE)
    assert done.config.run.trackers == ()
    assert sorted(path.name for path in done.directory.iterdir()) == [
        *("config.toml", "env.json", "events.jsonl", "history.jsonl", "plan.json", "rounds")
    ]
    code = "import dtrain, sys; print({'tensorboard', 'mlflow', 'torch.utils.tensorboard'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_tracker_that_fails_stops_nothing(
    samples: dtrain.Samples, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def track(event: Event) -> None:
        raise ConnectionError("the server is gone")

    done = trained(models.plain, samples, tmp_path / "runs", TABLE, trackers=[track])
    assert len(done.rows) == 3
    assert caplog.text.count("the server is gone") == 1


def test_trackers_in_the_configuration_and_as_argument(samples: dtrain.Samples, tmp_path: Path) -> None:
    seen: list[Event] = []
    config = dtrain.TrainConfig(train=TABLE, average={"replicas": 2}, run={"trackers": [seen.append]})
    where = {"run": "a", "run_dir": tmp_path, "cluster": "serial", "progress": False}
    done = dtrain.train(models.plain, samples, config=config, **where)
    assert len([event for event in seen if isinstance(event, RoundFinished)]) == 3
    with pytest.raises(dtrain.errors.InvalidConfig, match=r'trackers = \["tensorboard"\], and config has run.trackers'):
        dtrain.train(models.plain, samples, config=config, trackers=["tensorboard"], **where)
    with pytest.raises(dtrain.errors.InvalidConfig, match=r'"builtins:list.append\(\)" was given in Python'):
        dtrain.train(models.plain, samples, config=dtrain.load_run(done.directory).config, **where)
    more = config.model_copy(update={"train": config.train.model_copy(update={"rounds": 4})})
    seen.clear()
    dtrain.train(models.plain, samples, config=more, **where)
    assert [event.result.round for event in seen if isinstance(event, RoundFinished)] == [4]


def test_a_list_is_asked_for() -> None:
    with pytest.raises(dtrain.errors.InvalidConfig, match=r"run.trackers is the function print; it is a list"):
        dtrain.TrainConfig(run={"trackers": print})
