"""Progress in a notebook: one output that is updated; and what an interrupt says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import dtrain
from dtrain.config.schema import RunConfig
from dtrain.errors import Interrupted
from dtrain.events import (
    ClusterOpening,
    Event,
    ParametersLoaded,
    ReplicaRejected,
    RoundCommitted,
    RoundFinished,
    RunFinished,
    RunStarted,
    SegmentReplayed,
    StepsTaken,
)
from dtrain.report import notebook
from dtrain.report.history import row_of
from dtrain.report.notebook import is_notebook
from dtrain.report.page import RunPage
from dtrain.report.view import SHOWN_ROUNDS
from dtrain.stages import Limit
from tests.report.helpers import result_of
from tests.runtime import models

STARTED = RunStarted(
    run="runs/a", round=0, rounds=30, replicas=2, samples=1234, workers=2, dashboard="http://h:1/status"
)


class Handle:
    def __init__(self, shown: list[Any]) -> None:
        self.shown = shown

    def update(self, page: Any) -> None:
        self.shown.append(page)


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """A kernel with a front end: by output, everything that it has shown."""
    outputs: list[list[Any]] = []

    def display(page: Any, *, display_id: bool) -> Handle:
        assert display_id
        outputs.append([page])
        return Handle(outputs[-1])

    module, displays = ModuleType("IPython"), ModuleType("IPython.display")
    module.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    displays.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", displays)
    return outputs


def train(samples: dtrain.Samples, **options: Any) -> dtrain.Run:
    table = {"loss": "cross_entropy", "rounds": 6, "local_steps": 2, "batch_size": 16, "eval_every": 1}
    tables = {"train": table, "average": {"replicas": 2}, "config": None}
    if "config" in options:
        tables = {"config": dtrain.TrainConfig(train=table, average={"replicas": 2}, run=options.pop("config"))}
    return dtrain.train(models.small, samples, cluster="serial", **tables, **options)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# One output -------------------------------------------------------------------------------------------------------


def test_a_run_has_one_output_that_is_updated(
    samples: dtrain.Samples, outputs: list[list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_notebook()
    run = train(samples)
    train(samples, progress=False)
    assert len(outputs) == 1
    html = outputs[0][-1]._repr_html_()
    assert f"{run.rows[-1]['val_loss']:.4f}</td>" in html
    assert ">6 of 6</th>" in html
    assert html.count("<polyline") == 2  # train and val
    assert "done (rounds): 6 rounds" in html
    assert capsys.readouterr().err == ""
    train(samples, run="run-1")  # complete
    assert "done (rounds)" in outputs[1][-1]._repr_html_()


def test_updates_are_few(outputs: list[list[Any]]) -> None:
    clock = [0.0]
    sent: list[RunPage] = []
    reporter = notebook._Notebook(RunPage(), sent.append, lambda: clock[0])
    for number in range(1, 1001):
        clock[0] += 0.01
        reporter(RoundFinished(result_of(number)))
    assert len(sent) == pytest.approx(10 / notebook.UPDATE_SECONDS, abs=2)
    assert reporter.page.view.finished == 1000
    assert all(len(curve.points) <= 241 for curve in reporter.page.view.curves.values())


def test_what_fails_stays_shown(outputs: list[list[Any]]) -> None:
    def fail() -> None:
        with notebook.notebook_progress() as report:
            report(STARTED)
            report(RoundFinished(result_of(1)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "stopped" in repr(outputs[0][-1])
    assert "train_loss 0.5000" in repr(outputs[0][-1])


def test_elsewhere_there_are_lines(
    samples: dtrain.Samples, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for shell in (None, SimpleNamespace()):  # IPython is imported by a script; a prompt in a terminal
        module = ModuleType("IPython")
        module.get_ipython = lambda shell=shell: shell  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", module)
        assert not is_notebook()
        train(samples)
        assert "round 6 " in capsys.readouterr().err


# What is shown ----------------------------------------------------------------------------------------------------


def page_of(*events: Event, at: float = 0.0) -> RunPage:
    page = RunPage()
    for event in events:
        page = page.after(event, 0.0)
    return page.at(at)


def test_the_title_says_what_a_run_starts_from() -> None:
    loaded = ParametersLoaded(path="a.safetensors", tensors=9, new=("head",), cast=())
    title = "2 replicas on 2 workers, starting from 9 tensors of a.safetensors; 1 new: head"
    assert repr(page_of(STARTED, loaded)).splitlines()[0].endswith(title)


def test_the_page_of_a_run() -> None:
    opening = ClusterOpening(run="runs/a", scheduler="local")
    assert repr(page_of(opening)) == "runs/a: starting local workers"
    steps = [StepsTaken(round=1, replica=k, step=k + 1, steps=10, samples=50, seconds=0.5) for k in (1, 0)]
    assert repr(page_of(opening, STARTED, *steps)).splitlines() == [
        "runs/a: 1,234 training samples, 2 replicas on 2 workers",
        "round 1: replica 0 1/10, replica 1 2/10, 200 samples/s",
    ]
    many = [RoundFinished(result_of(n, metrics={"val_loss": 1e-7} if n % 2 else {})) for n in range(1, 31)]
    faults = [ReplicaRejected(round=3, replica=1), SegmentReplayed(round=2, reason="gone")]
    commit = RoundCommitted(round=3, bytes=9, seconds=0.1)
    html = page_of(opening, STARTED, *many, *faults, commit)._repr_html_()
    assert html.count("<tr>") == SHOWN_ROUNDS + 1
    assert "30 of 30" in html
    assert "1.000e-07" in html
    assert "<a href='http://h:1/status'" in html
    assert "replica 1 is not finite" in html
    done = RunFinished(reason="target", rounds=30, params_sha256="", val_loss=None, run="runs/a")
    assert repr(page_of(done)) == "runs/a: complete\ndone (target): 30 rounds"
    limited = replace(done, limited_by=Limit(stages=("decode",), shares={"decode": 1.0}, cure="Store less."))
    assert repr(page_of(limited)).endswith("30 rounds, limited by decode (100% of the time). Store less.")


def test_the_table_shows_evaluated_rounds_and_the_last_one() -> None:
    started = replace(STARTED, rounds=40, eval_every=3)
    results = [
        result_of(n, metrics={"val_loss": n / 8} if n % 3 == 0 else {}, samples=n, seconds=1.0) for n in range(1, 39)
    ]
    page = page_of(started, *map(RoundFinished, results))
    assert [row["round"] for row in page.view.listed] == [*range(12, 37, 3), 38]
    lines = repr(page).splitlines()[1:11]
    assert [line.split("  ")[0] for line in lines] == [f"{n} of 40" for n in (*range(12, 37, 3), 38)]
    assert [line.partition("val_loss ")[2] for line in lines] == [f"{n / 8:.4f}" for n in range(12, 37, 3)] + [""]
    assert "36 samples/s" in repr(page)  # of the last rounds: (33 + ... + 38) / 6 = 35.5
    first = page_of(started, RoundFinished(results[0]), RoundFinished(results[1]))
    assert repr(first).splitlines()[1] == "2 of 40  train_loss 0.5000"


def test_the_best_round_is_marked_by_the_metric_of_the_run() -> None:
    values = {1: 0.5, 2: 0.9, 3: 0.7}
    results = [RoundFinished(result_of(n, metrics={"val_loss": 1.0, "val_accuracy": v})) for n, v in values.items()]
    started = replace(STARTED, metric="val_accuracy", higher=True)
    assert page_of(started, *results).view.table.best_round == 2
    assert page_of(replace(started, higher=False), *results).view.table.best_round == 1
    html = page_of(started, *results)._repr_html_()
    assert html.count(">best<") == 1
    assert html.index(">0.9000<") < html.index(">best<") < html.index(">0.7000<")


def test_a_continued_run_shows_the_rounds_before() -> None:
    rows = tuple(row_of(result_of(n, train_loss=1 / n)) for n in range(1, 8))
    page = page_of(replace(STARTED, round=7, rows=rows))
    assert "continuing after round 7 of 30" in repr(page)
    assert [x for x, _ in page.view.curves["train"].points] == list(range(1, 8))
    assert "round 8 of 30" in page._repr_html_()


def test_reports_of_an_earlier_pass_or_round_are_not_shown() -> None:
    def steps(*rounds: int) -> list[tuple[int, int]]:
        events = [StepsTaken(round=r, replica=k, step=1, steps=2, samples=1, seconds=1.0) for k, r in enumerate(rounds)]
        return [(event.replica, event.round) for event in page_of(*events).view.steps]

    assert steps(-1, -1, 0) == [(2, 0)]
    assert steps(0, 1) == [(1, 1)]
    assert steps(4, 5, 3) == [(0, 4), (1, 5)]  # of a ring, some replicas are a round ahead


def test_replicas_and_what_limits_are_shown_while_it_trains() -> None:
    steps = [
        StepsTaken(round=4, replica=k, step=5, steps=10, samples=50, seconds=0.5, worker=f"tcp://h:{k}")
        for k in range(2)
    ]
    rounds = [RoundFinished(result_of(n, retried=0)) for n in (1, 2, 3)]
    html = page_of(STARTED, *rounds, *steps)._repr_html_()
    assert "replica 1" in html
    assert "tcp://h:1" in html
    assert "5 of 10 steps, 100 samples/s" in html
    assert "limited by reduce" in html
    many = [replace(steps[0], replica=k) for k in range(50)]
    assert "50 replicas at 50% to 50%" in page_of(replace(STARTED, replicas=50), *many)._repr_html_()


def test_a_run_without_a_step_for_long_says_what_it_waits_for() -> None:
    step = StepsTaken(round=1, replica=0, step=5, steps=10, samples=50, seconds=0.5, worker="tcp://h:1")
    assert page_of(STARTED, step, at=29.0).waiting == ""
    text = "no step for 1:30; waiting for replica 0 (5 of 10 on tcp://h:1)"
    assert page_of(STARTED, step, at=90.0).waiting == text
    assert text in page_of(STARTED, step, at=90.0)._repr_html_()
    assert text in repr(page_of(STARTED, step, at=90.0))
    done = replace(step, step=10)
    assert "the average and the evaluation of round 1" in page_of(STARTED, done, at=90.0).waiting
    assert "the first step of round 1" in page_of(STARTED, at=90.0).waiting


def test_nothing_is_sent_while_nothing_is_shown_and_a_stall_is() -> None:
    clock = [0.0]
    sent: list[RunPage] = []
    reporter = notebook._Notebook(RunPage(), sent.append, lambda: clock[0])
    reporter.tick()
    assert sent == []
    reporter(STARTED)
    clock[0] = 100.0
    reporter.tick()
    assert "no step for 1:40" in repr(sent[-1])
    reporter.tick()
    assert len(sent) == 2  # not before TICK_SECONDS


def test_text_is_never_taken_for_html() -> None:
    bad = "<script>'\"&"
    started = RunStarted(run=bad, round=0, rounds=1, replicas=1, samples=1, workers=1, dashboard=bad)
    html = page_of(started, SegmentReplayed(round=1, reason=bad), RoundFinished(result_of(1, metrics={bad: 1.0})))
    assert "<script>" not in html._repr_html_()
    assert "'\"" not in html._repr_html_()


# Interrupts -------------------------------------------------------------------------------------------------------


def interrupt_after(round: int) -> Callable[[Event], None]:
    def report(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.result.round == round:
            raise KeyboardInterrupt

    return report


def test_an_interrupt_says_in_two_lines_how_to_go_on(samples: dtrain.Samples, outputs: list[list[Any]]) -> None:
    config = {"commit_every": 2}
    with pytest.raises(KeyboardInterrupt) as caught:
        train(samples, config=config, report=interrupt_after(5))
    assert isinstance(caught.value, Interrupted)
    assert caught.value._render_traceback_() == [
        "Interrupted: runs/run-1 keeps round 4 of 6.",
        "Go on: dtrain.train(..., run='run-1'). Look at it: dtrain.last_run()",
    ]
    assert "stopped" in repr(outputs[0][-1])
    assert dtrain.last_run().model is not None
    continued = train(samples, config=config, run="run-1", progress=False)
    whole = train(samples, config=config, progress=False)
    assert continued.rows[-1]["params_sha256"] == whole.rows[-1]["params_sha256"]


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"run_dir": "elsewhere"}, "dtrain.train(..., run='run-1', run_dir='elsewhere')"),
        ({"run": "mine"}, "dtrain.train(..., run='mine')"),
        ({"run_dir": RunConfig().dir}, "dtrain.train(..., run='run-1')"),
    ],
)
def test_how_to_go_on_names_the_place(samples: dtrain.Samples, options: dict[str, Any], again: str) -> None:
    with pytest.raises(Interrupted) as caught:
        train(samples, config={"commit_every": 1}, report=interrupt_after(2), progress=False, **options)
    assert f"Go on: {again}." in caught.value.hint
    assert "keeps round 1 of 6" in caught.value.message


def test_an_interrupt_before_a_commit(samples: dtrain.Samples) -> None:
    with pytest.raises(Interrupted, match="before a round was committed") as caught:
        train(samples, config={"commit_every": 5}, report=interrupt_after(1), progress=False)
    assert caught.value.hint == "Start again: dtrain.train(..., run='run-1')"
