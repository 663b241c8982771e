"""The page of a run in Dask's dashboard: what it knows, where it is mounted, and that it harms nobody."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import dask
import pytest
from dask.utils import key_split
from distributed import Client

import dtrain
from dtrain.events import ReplicaRejected, RoundCommitted, RoundFinished, RunFinished, RunStarted, SegmentReplayed
from dtrain.report.history import row_of
from dtrain.report.messages import MOST_ROUNDS, messages_of
from dtrain.runtime import dashboard
from dtrain.runtime.board import state as states
from dtrain.runtime.board import texts
from dtrain.runtime.board.plugin import NAME, BoardPlugin
from dtrain.runtime.board.state import Board
from dtrain.runtime.dashboard import Messages, dashboard_link, open_page
from tests.report.helpers import result_of
from tests.runtime import models

START = {"event": "start", "run": "aaaa1111", "name": "demo", "rounds": 10, "round": 0, "replicas": 2, "client": "c1"}


def rounds(*numbers: int, run: str = "aaaa1111") -> dict[str, Any]:
    rows = [{**messages_of(RoundFinished(result_of(n)))[0], "bytes": 100} for n in numbers]
    return {"event": "rounds", "run": run, "rows": rows}


def board_of(*messages: dict[str, Any]) -> Board:
    board = Board()
    for message in messages:
        board.message(message)
    return board


def started(run: str = "runs/demo", **changes: Any) -> RunStarted:
    values = {"round": 0, "rounds": 10, "replicas": 2, "samples": 20, "workers": 2, "dashboard": "", **changes}
    return RunStarted(run=run, **values)


# What it knows --------------------------------------------------------------------------------------------------


def test_events_are_messages_of_plain_values() -> None:
    assert messages_of(started()) == [
        {"event": "start", "name": "demo", "round": 0, "rounds": 10, "replicas": 2, "samples": 20, "workers": 2}
    ]
    many = tuple(row_of(result_of(n)) for n in range(1, MOST_ROUNDS + 101))
    assert [m["event"] for m in messages_of(started(rows=many))] == ["start", *["round"] * MOST_ROUNDS]
    assert messages_of(RoundFinished(result_of(3, metrics={}, train_loss=float("nan"), stop="rounds"))) == [
        {
            **{"event": "round", "round": 3, "train_loss": None, "val_loss": None, "samples": 20, "seconds": 1.2346},
            **{"retried": 1, "rejected": 0, "bytes": 800},
        },
        {"event": "end", "text": "done (rounds)"},
    ]
    lost = messages_of(SegmentReplayed(round=4, reason="gone"))
    assert lost == [{"event": "fault", "text": "lost work with a worker; going on from round 4 (gone)", "back_to": 4}]
    assert [m["event"] for m in messages_of(ReplicaRejected(round=1, replica=0))] == ["fault"]
    assert messages_of(RoundCommitted(round=1, bytes=1, seconds=0.1)) == []
    done = RunFinished(reason="max_time", rounds=1, params_sha256="", val_loss=None, run="r")
    assert messages_of(done) == [{"event": "end", "text": "ended (max_time)"}]


def test_a_run_is_known_from_its_messages() -> None:
    board = board_of(START, rounds(1, 2), {"event": "fault", "run": "aaaa1111", "text": "lost", "back_to": 1})
    state = board.runs["aaaa1111"]
    assert (state.name, state.round, state.bytes) == ("demo", 1, 200)
    board.message(rounds(2, 3))
    assert [row["round"] for row in state.rounds.items()] == [1, 2, 3]
    board.steps("aaaa1111", {"replica": 1, "round": 4, "step": 3, "steps": 10})
    assert board.as_json()["runs"][0]["steps"] == [{"replica": 1, "round": 4, "step": 3, "steps": 10}]
    board.message({"event": "end", "run": "aaaa1111", "text": "done (rounds)"})
    assert (state.end, state.steps) == ("done (rounds)", {})
    json.dumps(board.as_json())


def test_messages_of_other_versions_and_of_unknown_runs_are_passed_over() -> None:
    board = board_of(rounds(1), {"event": "end", "run": "x"}, {}, {"event": "of tomorrow", "run": "aaaa1111"}, START)
    board.message({"event": "of tomorrow", "run": "aaaa1111"})
    board.message(
        {"event": "rounds", "run": "aaaa1111", "rows": [{"round": 1, "samples": 5, "seconds": 1.0, "new": 1}]}
    )
    assert board.as_json()["runs"][0]["history"] == [
        {"round": 1, "train_loss": None, "val_loss": None, "samples": 5, "seconds": 1.0}
        | {"bytes": None, "retried": None, "rejected": None}
    ]


def test_memory_is_bounded_and_the_whole_curve_stays() -> None:
    board = board_of({**START, "replicas": 5000})
    for n in range(1, 20 * states.MOST_ROUNDS):
        board.message(rounds(n))
        board.task(f"dtrain-train-r{n:05d}-k1-aaaa1111-a1", "w", [{"action": "compute", "start": n, "stop": n + 1}])
        board.steps("aaaa1111", {"replica": n, "round": n, "step": 1, "steps": 2})
        board.message({"event": "fault", "run": "aaaa1111", "text": "x"})
    state = board.runs["aaaa1111"]
    kept = [row["round"] for row in state.rounds.items()]
    assert len(kept) <= states.MOST_ROUNDS + 1
    assert (kept[0], kept[-1]) == (1, 20 * states.MOST_ROUNDS - 1)
    assert len({after - before for before, after in pairwise(kept[:-1])}) == 1
    assert len(state.spans) == states.MOST_SPANS
    assert len(state.faults) == states.MOST_FAULTS
    assert len(state.steps) == states.MOST_REPLICAS
    for n in range(100):
        board.message({**START, "run": f"run{n}"})
    assert list(board.runs) == [f"run{n}" for n in range(100 - states.MOST_RUNS, 100)]


def test_the_newest_run_that_trains_is_shown() -> None:
    assert Board().newest() is None
    board = board_of(START, {**START, "run": "bbbb2222"}, {**START, "run": "cccc3333"})
    assert board.newest().run == "cccc3333"  # type: ignore[union-attr]
    board.message({"event": "end", "run": "cccc3333", "text": "done"})
    assert board.newest().run == "bbbb2222"  # type: ignore[union-attr]
    board.client_left("c2")
    board.client_left("c1")
    assert [state.end for state in board.runs.values()] == [*["stopped: its client has left"] * 2, "done"]
    assert board.newest().run == "cccc3333"  # type: ignore[union-attr]


def test_the_timeline_is_made_of_finished_tasks() -> None:
    board = board_of(START)
    times = [
        {"action": "transfer", "start": 0.0, "stop": 1.0},
        {"action": "compute", "start": 1.0, "stop": 3.0},
    ]
    for key in (
        "dtrain-train-r00003-k1-aaaa1111-a1",
        "dtrain-eval-val-r00003-p0-0badcafe-aaaa1111-a1",
        "dtrain-reduce-r00003-aaaa1111-a1",
        "dtrain-summary-r00003-aaaa1111-a1",  # not shown
        "dtrain-train-r00003-k1-eeee5555-a1",  # of another run
        "dtrain-train-r00001-k0-aaaa1111-f-a1",  # of a pass before the run
        "dtrain-ready-0badcafe",
        "dtrain-",
        "sum-123",
    ):
        board.task(key, "tcp://w", times)
    spans = list(board.runs["aaaa1111"].spans)
    assert [(one["what"], one["row"], one["round"]) for one in spans] == [
        ("train", 1, 3),
        ("eval", -1, 3),
        ("reduce", -2, 3),
    ]
    assert (spans[0]["start"], spans[0]["stop"], spans[0]["worker"]) == (1.0, 3.0, "tcp://w")
    board.task("dtrain-train-r00003-k1-aaaa1111-a1", "tcp://w", ())
    assert len(spans) == 3


def test_dask_groups_the_tasks_of_a_run_by_what_they_do() -> None:
    suffix = "0badcafe-a1"
    names = ("train-r00001-k0", "eval-val-r00001-p0-deadbeef", "reduce-r00001-s1", "summary-r00001", "initialise")
    groups = [key_split(f"dtrain-{name}-{suffix}") for name in names]
    assert groups == ["dtrain-train", "dtrain-eval-val", "dtrain-reduce", "dtrain-summary", "dtrain-initialise"]


def test_what_others_wrote_is_escaped() -> None:
    bad = "<script>alert(1)</script>"
    board = board_of({**START, "name": bad, "rounds": bad, "replicas": bad, "workers": bad})
    board.message({"event": "fault", "run": "aaaa1111", "text": bad})
    board.steps("aaaa1111", {"replica": 1, "round": 4, "step": 3, "steps": 10, "worker": bad})
    state = board.runs["aaaa1111"]
    for html in (texts.summary_html(state), texts.faults_html(state)):
        assert "<script" not in html
        assert "&lt;script&gt;" in html


# Messages -------------------------------------------------------------------------------------------------------


class Loop:
    """The loop of a client that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def add_callback(self, function: Any, client: Any, message: dict[str, Any]) -> None:
        self.sent.append(message)


class FakeClient:
    id = "c1"

    def __init__(self) -> None:
        self.loop = Loop()


def test_rounds_that_end_soon_after_one_another_are_sent_together() -> None:
    client, clock = FakeClient(), [100.0]
    messages = Messages(client, "aaaa1111", lambda: clock[0])  # type: ignore[arg-type]
    for event in (started(), *(RoundFinished(result_of(n)) for n in range(1, 101))):
        for message in messages_of(event):
            clock[0] += 0.01
            messages.publish(message)
    messages.close()
    messages.close()
    sent = client.loop.sent
    assert [m["event"] for m in sent] == ["start", *["rounds"] * (len(sent) - 2), "end"]
    assert [row["round"] for m in sent[1:-1] for row in m["rows"]] == list(range(1, 101))
    assert len(sent) <= 2 + 4
    assert all((m["run"], m["client"]) == ("aaaa1111", "c1") for m in sent)
    assert sent[-1]["text"] == "stopped"


def test_a_run_that_is_done_is_not_stopped() -> None:
    client = FakeClient()
    messages = Messages(client, "aaaa1111")  # type: ignore[arg-type]
    for event in (started(), RoundFinished(result_of(1, stop="rounds"))):
        for message in messages_of(event):
            messages.publish(message)
    messages.close()
    assert [m.get("text") for m in client.loop.sent if m["event"] == "end"] == ["done (rounds)"]
    unused = Messages(client, "bbbb2222")  # type: ignore[arg-type]
    unused.close()
    assert all(m["run"] == "aaaa1111" for m in client.loop.sent)


# On a scheduler -------------------------------------------------------------------------------------------------


def address_of(client: Client) -> str:
    return f"http://127.0.0.1:{client.scheduler_info()['services']['dashboard']}"


def state_of(address: str) -> dict[str, Any]:
    with urlopen(f"{address}/dtrain/state.json", timeout=10) as answer:
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        content: dict[str, Any] = json.load(answer)
    return content


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it has not happened within 20 s")


@pytest.fixture
def clean(client: Client) -> Iterator[Client]:
    """A client of a cluster without the page; it goes again."""
    _remove(client)
    yield client
    _remove(client)


def _remove(client: Client) -> None:
    def remove(dask_scheduler: Any) -> None:
        for name, plugin in list(dask_scheduler.plugins.items()):
            if name.startswith("dtrain-board"):
                plugin.stop()
                dask_scheduler.remove_plugin(name)

    client.run_on_scheduler(remove)


def plugins(client: Client) -> list[str]:
    def names(dask_scheduler: Any) -> list[str]:
        return [name for name in dask_scheduler.plugins if name.startswith("dtrain-board")]

    return list(client.run_on_scheduler(names))


def train(samples: dtrain.Samples, client: Client, run_dir: Path, **options: Any) -> dtrain.Run:
    table = {"loss": "cross_entropy", "rounds": 4, "local_steps": 2, "batch_size": 16, "eval_every": 1}
    return dtrain.train(
        models.small,
        samples,
        train=table,
        average={"replicas": 2},
        cluster=client,
        run_dir=run_dir,
        progress=False,
        **options,
    )


def test_a_run_on_a_cluster_shows_itself(samples: dtrain.Samples, clean: Client, tmp_path: Path) -> None:
    links = []

    def report(event: Any) -> None:
        if isinstance(event, RunStarted):
            links.append(event.dashboard)

    run = train(samples, clean, tmp_path, run="mine", report=report)
    address = address_of(clean)
    assert links == [f"{address}/dtrain"]
    wait_for(lambda: bool(state_of(address)["runs"]) and state_of(address)["runs"][-1]["end"] == "done (rounds)")
    shown = state_of(address)["runs"][-1]
    assert (shown["name"], shown["round"], shown["replicas"], shown["faults"]) == ("mine", 4, 2, [])
    assert [row["train_loss"] for row in shown["history"]] == [row["train_loss"] for row in run.rows]
    assert shown["bytes"] == sum(row["bytes_reduced"] for row in run.rows)
    tasks = {(task["what"], task["row"], task["round"]) for task in shown["tasks"]}
    assert tasks >= {("train", k, n) for k in (0, 1) for n in (1, 2, 3, 4)} | {("reduce", -2, 4), ("eval", -1, 4)}
    assert {task["worker"] for task in shown["tasks"]} <= set(clean.nthreads())
    again = train(samples, clean, tmp_path).directory.name  # several runs on one scheduler
    wait_for(lambda: state_of(address)["runs"][-1]["name"] == again and state_of(address)["runs"][-1]["end"] != "")
    assert [run["name"] for run in state_of(address)["runs"]][-2:] == ["mine", again]


def test_the_page_and_the_panes_are_mounted_and_show_the_numbers(clean: Client) -> None:
    pytest.importorskip("bokeh")
    from bokeh.client import pull_session

    address = address_of(clean)
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{address}/dtrain", timeout=10)
    link = open_page(clean, dashboard_link(clean))
    assert link == f"{address}/dtrain"
    with urlopen(link, timeout=10) as answer:
        page = answer.read().decode()
    assert 'href="dtrain"' in page  # among Dask's pages
    with urlopen(f"{address}/individual-plots.json", timeout=10) as answer:
        panes = {name: path for name, path in json.load(answer).items() if "Dtrain" in name}
    assert panes == {
        f"Individual Dtrain {name}": f"/individual-dtrain-{name.lower()}"
        for name in ("Loss", "Timeline", "Throughput", "Bytes", "Faults", "Summary")
    }
    messages = Messages(clean, "aaaa1111")
    for message in (*messages_of(started("runs/<b>")), *messages_of(RoundFinished(result_of(1, train_loss=0.25)))):
        messages.publish(message)
    messages.publish({"event": "fault", "text": "<script>"})
    wait_for(lambda: bool(state_of(address)["runs"]) and bool(state_of(address)["runs"][-1]["faults"]))
    for path in ("/dtrain", *panes.values()):
        session = pull_session(url=f"{address}{path}")
        data = [s.data for s in session.document.select({"type": _class("ColumnDataSource")})]
        text = " ".join(div.text for div in session.document.select({"type": _class("Div")}))
        session.close()
        if path in ("/dtrain", "/individual-dtrain-loss"):
            assert [0.25] in [list(one.get("y", ())) for one in data]
        if path in ("/dtrain", "/individual-dtrain-faults"):
            assert "&lt;script&gt;" in text
        assert "<script>" not in text
    messages.close()


def _class(name: str) -> Any:
    from bokeh import models as bokeh_models

    return getattr(bokeh_models, name)


def test_the_same_plugin_is_registered_once_and_a_newer_one_takes_its_place(clean: Client) -> None:
    address = address_of(clean)
    for _ in range(3):
        open_page(clean, "")
    (first,) = plugins(clean)
    messages = Messages(clean, "cccc3333")
    messages.publish(messages_of(started())[0])
    wait_for(lambda: state_of(address)["runs"][-1:] != [] and state_of(address)["runs"][-1]["run"] == "cccc3333")
    clean.register_plugin(BoardPlugin((0, 0, 1), "old"))
    assert set(plugins(clean)) == {first, f"{NAME}-old"}  # it is there, and does nothing
    assert state_of(address)["runs"]
    clean.register_plugin(BoardPlugin((99,), "new"))
    assert plugins(clean) == [f"{NAME}-new"]
    assert state_of(address)["runs"][-1]["name"] == "demo"  # from the messages that the scheduler keeps
    for message in (*messages_of(RoundFinished(result_of(1))), {"event": "fault", "text": "x"}):
        messages.publish(message)
    wait_for(lambda: state_of(address)["runs"][-1]["round"] == 1)
    messages.close()


def test_pages_can_be_taken_out(clean: Client) -> None:
    address = address_of(clean)
    open_page(clean, "")
    state_of(address)
    _remove(clean)
    for path in ("dtrain/state.json", "dtrain", "individual-dtrain-loss"):
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"{address}/{path}", timeout=10)


def test_the_switch_of_dasks_configuration(samples: dtrain.Samples, clean: Client, tmp_path: Path) -> None:
    with dask.config.set({"dtrain.dashboard": False}):
        train(samples, clean, tmp_path)
    assert plugins(clean) == []


# Failures -------------------------------------------------------------------------------------------------------


def test_a_scheduler_that_refuses_the_page_is_told_of_in_one_sentence(
    samples: dtrain.Samples,
    clean: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise ValueError("Cannot register a scheduler plugin as the scheduler has been explicitly disallowed")

    register = Client.register_plugin
    monkeypatch.setattr(
        Client,
        "register_plugin",
        lambda self, plugin, *a, **o: refuse() if isinstance(plugin, BoardPlugin) else register(self, plugin, *a, **o),
    )
    with caplog.at_level(logging.WARNING, "dtrain"):
        run = train(samples, clean, tmp_path)
    assert len(run.rows) == 4
    (record,) = [record for record in caplog.records if "dashboard" in record.getMessage()]
    assert record.getMessage() == (
        "The page dtrain could not be added to Dask's dashboard: Cannot register a scheduler plugin as the scheduler "
        "has been explicitly disallowed. Training goes on."
    )


def test_a_page_that_fails_harms_no_task(samples: dtrain.Samples, clean: Client, tmp_path: Path) -> None:
    open_page(clean, "")

    def break_it(dask_scheduler: Any) -> None:
        plugin = next(p for name, p in dask_scheduler.plugins.items() if name.startswith("dtrain-board"))
        plugin.board.runs = None

    clean.run_on_scheduler(break_it)
    assert len(train(samples, clean, tmp_path).rows) == 4


def test_a_lost_message_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeClient):
        class Scheduler:
            async def log_event(self, **message: Any) -> None:
                raise OSError("gone")

        scheduler = Scheduler()

    import asyncio

    with caplog.at_level(logging.INFO, "dtrain"):
        asyncio.run(dashboard._sent(Broken(), {"event": "end"}))  # type: ignore[arg-type]
    assert [record.getMessage() for record in caplog.records] == ["A message to the page dtrain was lost: gone"]


# Schedulers that were started by hand ---------------------------------------------------------------------------

BY_HAND = """
import sys
hidden = sys.argv.pop(1).split(",")
for name in hidden:
    sys.modules[name] = None
from distributed.cli.dask_scheduler import main
main()
"""


@contextmanager
def by_hand(tmp_path: Path, *hidden: str) -> Iterator[Client]:
    """A client of a scheduler in a process of its own that lacks some packages."""
    file = tmp_path / "scheduler.json"
    command = [sys.executable, "-c", BY_HAND, ",".join(hidden), "--host", "127.0.0.1", "--port", "0"]
    command += ["--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: file.exists() and bool(file.read_text()))
            with Client(scheduler_file=str(file), timeout=30) as client:
                yield client
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.parametrize("bokeh", [True, False])
def test_the_plugin_needs_neither_dtrain_nor_torch_on_the_scheduler(tmp_path: Path, bokeh: bool) -> None:
    with by_hand(tmp_path, "dtrain", "torch", "zarr", *([] if bokeh else ["bokeh"])) as client:
        address = address_of(client)
        link = open_page(client, dashboard_link(client))
        assert link == (f"{address}/dtrain" if bokeh else "")
        messages = Messages(client, "aaaa1111")
        for message in messages_of(started()):
            messages.publish(message)
        wait_for(lambda: [run["name"] for run in state_of(address)["runs"]] == ["demo"])
        with urlopen(f"{address}/dtrain", timeout=10) as answer:
            page = answer.read().decode()
        assert ("bokeh" in page) if bokeh else ("dtrain/state.json" in page)
