"""Progress on stderr, without a terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from dtrain.events import (
    ClusterOpening,
    Event,
    ParametersLoaded,
    ReplicaRejected,
    RoundCommitted,
    RoundFinished,
    RoundsMeasured,
    RunFinished,
    RunStarted,
    SegmentReplayed,
    StepsTaken,
)
from dtrain.report.progress import MAX_LINES, _Terminal, terminal_progress
from dtrain.stages import Limit
from tests.report.helpers import result_of


@pytest.fixture
def started() -> RunStarted:
    return RunStarted(run="runs/a", round=0, rounds=3, replicas=2, samples=1234, workers=2, dashboard="")


def finished(number: int) -> RoundFinished:
    return RoundFinished(result_of(number, metrics={"val_loss": 0.25}, samples=100, seconds=0.5))


def printed(capsys: pytest.CaptureFixture[str], *events: Event, verbose: bool = False) -> list[str]:
    with terminal_progress(color=False, verbose=verbose) as report:
        for event in events:
            report(event)
    return capsys.readouterr().err.splitlines()


def test_a_run_prints_its_size_and_a_line_a_round(capsys: pytest.CaptureFixture[str], started: RunStarted) -> None:
    assert printed(capsys, started, finished(1), finished(2)) == [
        "runs/a: 1,234 training samples, 2 replicas on 2 workers",
        "round 1  train_loss 0.5000  val_loss 0.2500  200 samples/s",
        "round 2  train_loss 0.5000  val_loss 0.2500  200 samples/s",
    ]


def test_one_is_no_plural(capsys: pytest.CaptureFixture[str], started: RunStarted) -> None:
    assert printed(capsys, replace(started, replicas=1, workers=1))[0].endswith("samples, 1 replica on 1 worker")


def test_a_continued_run_says_where(capsys: pytest.CaptureFixture[str], started: RunStarted) -> None:
    assert printed(capsys, replace(started, round=2))[1:] == ["continuing after round 2 of 3"]


def test_the_end_names_the_stage_that_limits(capsys: pytest.CaptureFixture[str], started: RunStarted) -> None:
    done = RunFinished(reason="rounds", rounds=3, params_sha256="", val_loss=None, run="runs/a")
    limit = Limit(stages=("decode",), shares={"decode": 0.61, "model": 0.39}, cure="Store less.")
    assert printed(capsys, started, done)[1:] == []
    assert printed(capsys, started, replace(done, limited_by=limit))[1:] == [
        "limited by decode (61% of the time); then model 39%. Store less."
    ]


def test_rounds_that_are_measured_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    events = [RoundsMeasured(rounds=n, local_steps=h, seconds=t) for n, h, t in ((20, 1, 0.0123), (3, 4000, 1.04))]
    assert printed(capsys, *events) == [
        "measured 20 rounds of local_steps = 1: 12 ms each",
        "measured 3 rounds of local_steps = 4000: 1.0 s each",
    ]


@pytest.mark.parametrize(
    ("new", "cast", "text"),
    [
        ((), (), "starting from 1,400 tensors of a.safetensors"),
        (("head",), ("bfloat16",), "starting from 1,400 tensors of a.safetensors (bfloat16 as float32); 1 new: head"),
        (tuple("abcdefgh"), (), "starting from 1,400 tensors of a.safetensors; 8 new: a, b, c and 5 more"),
    ],
)
def test_a_run_says_once_what_it_starts_from(
    capsys: pytest.CaptureFixture[str], started: RunStarted, new: tuple[str, ...], cast: tuple[str, ...], text: str
) -> None:
    loaded = ParametersLoaded(path="a.safetensors", tensors=1400, new=new, cast=cast)
    assert " ".join(printed(capsys, started, loaded)[1:]).replace("   ", " ") == text


def test_a_long_run_prints_some_of_its_rounds(capsys: pytest.CaptureFixture[str], started: RunStarted) -> None:
    rounds = 40 * MAX_LINES + 1
    lines = printed(capsys, replace(started, rounds=rounds), *(finished(n) for n in range(1, rounds + 1)))[1:]
    assert MAX_LINES / 2 <= len(lines) <= MAX_LINES + 2
    assert lines[0].startswith("round    1 ")
    assert lines[-1].startswith(f"round {rounds} ")


def test_of_a_long_run_evaluated_rounds_are_printed(capsys: pytest.CaptureFixture[str], started: RunStarted) -> None:
    rounds = 10 * MAX_LINES
    for eval_every, expected in (
        (1, [1, *range(10, 501, 10)]),
        (4, [1, *range(12, 501, 12), 500]),  # every tenth round or more, and evaluated
        (150, [1, 150, 300, 450, 500]),
    ):
        events = [
            finished(n) if n % eval_every == 0 or n == rounds else RoundFinished(result_of(n, metrics={}))
            for n in range(1, rounds + 1)
        ]
        lines = printed(capsys, replace(started, rounds=rounds, eval_every=eval_every), *events)[1:]
        assert [int(line.split()[1]) for line in lines] == expected
        assert ["val_loss" in line for line in lines] == [eval_every == 1, *[True] * (len(expected) - 1)]
    assert lines[0] == "round   1  train_loss 0.5000  16 samples/s"


def test_between_evaluations_a_line_comes_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, started: RunStarted
) -> None:
    clock = [0.0]
    monkeypatch.setattr("dtrain.report.progress.time", SimpleNamespace(monotonic=lambda: clock[0]))
    with terminal_progress(color=False) as show:
        show(replace(started, rounds=100, eval_every=50))
        for n in range(1, 50):
            clock[0] += 9.0  # seconds a round
            show(RoundFinished(result_of(n, metrics={})))
    lines = capsys.readouterr().err.splitlines()[1:]
    assert [int(line.split()[1]) for line in lines] == [1, *range(4, 50, 3)]  # PLAIN_SECONDS = 20


class Clock:
    """A clock of the module that is tested."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("dtrain.report.progress.time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> tuple[_Terminal, io.StringIO]:
    """A reporter that believes in a terminal of so many columns."""
    monkeypatch.setenv("COLUMNS", str(width))
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, highlight=False, no_color=True)
    return _Terminal(console, live=True, verbose=False), text


def live_text(report: _Terminal) -> list[str]:
    return [str(line) for line in report.live_lines().renderables]


@pytest.mark.parametrize("width", [80, 160])
def test_a_terminal_shows_a_table_that_fits(width: int, monkeypatch: pytest.MonkeyPatch, started: RunStarted) -> None:
    report, text = terminal(width, monkeypatch)
    names = {"val_accuracy": 0.5, "val_mean_absolute_error": 2.5e-7, "val_auroc": 0.75}
    report(replace(started, rounds=4, eval_every=2))
    for n, loss in ((1, None), (2, 0.25), (3, None), (4, 0.5)):
        metrics = {} if loss is None else {"val_loss": loss, **names}
        report(RoundFinished(result_of(n, metrics=metrics, samples=10**6 * n, seconds=40.0, retried=int(n == 3))))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    table = lines[lines.index("Ctrl-C stops; committed rounds are kept") + 1 :]
    assert table[0].split() == ["round", "train", "samples/s", "time"]
    assert table[1].split() == ["1", "0.5000", "25,000", "0:40"]
    if width == 80:
        assert table[2] == "also in history.jsonl: mean_absolute…"
        del table[2]
    head = ["round", "train", "val", "accuracy", *(["mean_absolute…"] if width > 80 else []), "auroc"]
    assert table[2].split() == [*head, "samples/s", "time"]
    assert table[3].split()[:3] == ["2", "0.5000", "0.2500*"]
    assert table[4].endswith("2:00  1 retried")
    assert "0.5000*" not in table[5]
    ends = {line.index("samples/s") + 9 for line in (table[2],)} | {
        line.index(",", 30) + 4 for line in table[3:]
    }  # one under the other
    assert len(ends) == 1


def test_the_live_lines_show_progress_and_pace(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, started: RunStarted
) -> None:
    report, _ = terminal(80, monkeypatch)
    assert live_text(report) == []
    report(ClusterOpening(run="runs/a", scheduler="local"))
    clock.now = 5.0
    assert live_text(report) == ["runs/a: starting local workers  0:05"]
    report(StepsTaken(round=0, replica=0, step=5, steps=10, samples=5, seconds=0.5))
    assert live_text(report)[0].startswith("preparing  " + "━" * 24)
    report(started)
    assert live_text(report) == ["round 1 of 3  " + "━" * 24 + "  0:05"]
    report(finished(1))
    report(StepsTaken(round=2, replica=1, step=1, steps=2, samples=100, seconds=0.5))
    assert live_text(report) == [
        "round 2 of 3  " + "━" * 24 + "  200 samples/s, 0:01 left",
        "round 2: replica 1 1/2, 200 samples/s",
    ]
    clock.now = 100.0
    assert live_text(report)[1] == "no step for 1:35; waiting for replica 1 (1 of 2)"
    report(RunFinished(reason="rounds", rounds=3, params_sha256="", val_loss=None, run="runs/a"))
    assert live_text(report) == []


def test_without_a_terminal_a_stall_is_told_of_and_again_after_twice_the_time(
    clock: Clock, capsys: pytest.CaptureFixture[str], started: RunStarted
) -> None:
    report = _Terminal(Console(stderr=True), live=False, verbose=False)
    report(started)
    for clock.now in map(float, range(0, 200)):
        report.tick()
    clock.now = 200.0
    report(StepsTaken(round=1, replica=0, step=1, steps=2, samples=1, seconds=0.5))
    for clock.now in map(float, range(201, 900)):  # silences of 200 s are usual now
        report.tick()
    told = [line.split(";")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("no step")]
    assert told == ["no step for 0:31", "no step for 1:02", "no step for 2:04", "no step for 10:01"]


def test_faults_are_always_printed_and_commits_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    events = (
        ReplicaRejected(round=3, replica=1),
        SegmentReplayed(round=2, reason="worker tcp://a is gone"),
        RoundCommitted(round=3, bytes=9, seconds=0.1),
    )
    faults = [
        "round 3: replica 1 is not finite and was left out of the average",
        "lost work with a worker; going on from round 2 (worker tcp://a is gone)",
    ]
    assert printed(capsys, *events) == faults
    assert printed(capsys, *events, verbose=True)[2].startswith("RoundCommitted(round=3")


def test_the_pass_for_normalisation_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.report.progress.PLAIN_SECONDS", 0.0)
    with terminal_progress(color=False) as show:
        show(StepsTaken(round=0, replica=1, step=3, steps=10, samples=600, seconds=0.5))
    assert capsys.readouterr().err.splitlines() == [
        "mean and standard deviation, units: replica 1 3/10, 1,200 samples/s"
    ]


def test_without_a_terminal_a_long_round_says_so_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.report.progress.PLAIN_SECONDS", 0.0)
    with terminal_progress(color=False) as show:
        for replica, step in ((0, 3), (1, 2)):
            show(StepsTaken(round=7, replica=replica, step=step, steps=10, samples=step * 50, seconds=0.5))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["round 7: replica 0 3/10, 300 samples/s", "round 7: replica 0 3/10, replica 1 2/10, 500 samples/s"]


# Columns ----------------------------------------------------------------------------------------------------------


def test_lines_fit_eighty_columns(capsys: pytest.CaptureFixture[str], started: RunStarted) -> None:
    values = {"val_loss": 0.25, "val_accuracy": 0.5, "val_mean_absolute_error": 1e-7, "val_top_5": 2.5e6}
    long = replace(started, run="runs/" + "a" * 40, dashboard="http://127.0.0.1:12345/status", round=1)
    many = RoundFinished(result_of(2, metrics=values, samples=10**9, train_loss=3e-5))
    lost = SegmentReplayed(round=2, reason="worker tcp://127.0.0.1:40000 is gone " * 3)
    lines = printed(capsys, long, many, lost, RoundCommitted(round=3, bytes=9**9, seconds=0.123456789), verbose=True)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "train_loss 3.000e-05 val_loss 0.2500 val_accuracy 0.5000 val_mean_absolute_error 1.000e-07" in text
    assert "val_top_5 2.500e+06" in text
    assert "  val_mean_absolute_error 1.000e-07" in "\n".join(lines)  # names and values stay together


def test_a_wider_terminal_is_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, started: RunStarted
) -> None:
    values = {"val_loss": 0.25, "val_accuracy": 0.5, "val_auc": 0.75}
    for columns, count in ((40, 4), (100, 1)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = printed(capsys, RoundFinished(result_of(2, metrics=values)))
        assert len(lines) == count
        assert max(map(len, lines)) <= columns


def test_the_usual_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"val_loss": 0.25, "val_accuracy": 0.5}
    events = [RoundFinished(result_of(10, metrics=values, samples=n)) for n in (10, 10**6)]
    assert printed(capsys, *events) == [
        "round 10  train_loss 0.5000  val_loss 0.2500  val_accuracy 0.5000  8/s",
        "round 10  train_loss 0.5000  val_loss 0.2500  val_accuracy 0.5000  404,994/s",
    ]
