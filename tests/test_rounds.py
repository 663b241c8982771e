"""The loop against a runner that is written down: what is submitted when, where segments end, what a loss repeats."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain import rounds as module
from dtrain.algorithm.evaluate import Sums
from dtrain.algorithm.metrics.named import metric_named
from dtrain.algorithm.pattern import first_outer
from dtrain.algorithm.plan import first_position
from dtrain.algorithm.replica import fresh_replica
from dtrain.config.schema import TrainConfig
from dtrain.errors import ClusterLost, Diverged, OutOfMemory, UserCodeFailed
from dtrain.events import SegmentReplayed
from dtrain.rounds import MAX_COMMIT_EVERY, commit_cadence, first_cadence, initial_state, next_commit, rounds
from dtrain.runtime.runner import Outcome, SegmentLost
from dtrain.types import Broadcast, Contribution, Layout, Parameters, Position, RoundPlan, RoundSummary, TrainState
from tests.algorithm.helpers import means

SIZES = (40, 24)


def params(value: float = 0.0) -> Parameters:
    return Parameters(Layout((), 1, 1, 0), np.array([value], np.float32), np.zeros(0, np.uint8))


def state_after(position: Position) -> TrainState:
    model = params(position.round)
    return TrainState(
        position=position,
        model=model,
        broadcast=(Broadcast(model),) * 2,
        replicas=(fresh_replica(),) * 2,
        outer=((), ()),
    )


START = state_after(first_position(2))


@dataclass
class Script:
    """A runner that trains nothing: round r has the loss 1 / r. Handles are numbers of rounds."""

    lose: tuple[int, ...] = ()
    """Rounds that are lost when they are collected, each once."""
    lost: Mapping[str, Any] = field(default_factory=dict)
    rejected: tuple[int, ...] = ()
    finite: bool = True
    validated: bool = True
    eval_every: int = 1
    workers_lost: bool = False
    lose_evaluations: int = 0
    """Evaluations outside of the cadence that are lost."""
    lose_early: tuple[str, ...] = ()
    """Steps, such as "submit 3" or "place 2", that lose their segment at once, each once."""
    repeat: tuple[int, ...] = ()
    """Rounds during which workers do an earlier round again, each once."""

    def __post_init__(self) -> None:
        self.log: list[str] = []
        self.again: list[int] = []
        self.left = list(self.lose)
        self.early = list(self.lose_early)
        self.repeating = list(self.repeat)
        self.finished: dict[int, int | None] = {}
        self.evaluates: dict[int, bool] = {}
        self.spec = SimpleNamespace(plan=SimpleNamespace(sizes=SIZES, replicas=2), eval_every=self.eval_every)

    def place(self, state: TrainState, again: int = 0) -> int:
        self.again.append(again)
        self._do(f"place {state.round}")
        return state.round

    def _do(self, step: str) -> None:
        self.log.append(step)
        if step in self.early:
            self.early.remove(step)
            raise SegmentLost("worker gone")

    @property
    def has_lost_workers(self) -> bool:
        return self.workers_lost

    def submit(self, held: int, plan: RoundPlan) -> int:
        assert plan.round == held + 1
        self.evaluates[plan.round] = plan.evaluates
        self._do(f"submit {plan.round}")
        return plan.round

    def collect(self, held: int, finished: int | None = None) -> Outcome:
        self.finished[held] = finished
        if held in self.repeating and finished is not None:
            self.repeating.remove(held)
            raise SegmentLost("round again", gone=True, left=True)
        if held in self.left:
            self.left.remove(held)
            raise SegmentLost("worker gone", **self.lost)
        self.log.append(f"collect {held}")
        each = tuple(
            Contribution(
                replica=k,
                samples=size,
                steps=3,
                loss_sum=math.nan if k in self.rejected else size / held,
                loss_count=size,
                finite=k not in self.rejected,
            )
            for k, size in enumerate(SIZES)
        )
        summary = RoundSummary(contributions=each, params_sha256=f"sha{held}", finite=self.finite, bytes_reduced=8)
        return Outcome(summary, self._sums(held) if self.evaluates[held] else None)

    def _sums(self, held: int) -> Sums | None:
        return means(10, (10 / held, 10), accuracy=(held, 10)) if self.validated else None

    metrics = MappingProxyType({"accuracy": metric_named("accuracy")})

    def evaluate(self, params: Parameters, split: str) -> Sums | None:
        assert split == "val"
        self.log.append(f"evaluate {params.flat[0]:.0f}")
        if self.lose_evaluations:
            self.lose_evaluations -= 1
            raise SegmentLost("worker gone")
        return self._sums(int(params.flat[0]))

    def gather(self, held: int, position: Position, directory: object = None) -> TrainState:
        assert position.round == held
        self.log.append(f"gather {held}")
        return state_after(position)


def config(**tables: Any) -> TrainConfig:
    train = {"loss": "mse", "rounds": 6, "local_steps": 3, "batch_size": 8, "metrics": ["accuracy"]}
    return TrainConfig(**{**tables, "train": {**train, **tables.get("train", {})}})


def go(runner: Script, given: TrainConfig, state: TrainState = START, **more: Any) -> tuple[list[Any], list[Any]]:
    events: list[Any] = []
    return list(rounds(runner, state, given, events.append, **more)), events  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ahead", "order"),
    [
        (0, "submit 1 collect 1 submit 2 collect 2 submit 3 collect 3"),
        (1, "submit 1 submit 2 collect 1 submit 3 collect 2 collect 3"),
        (2, "submit 1 submit 2 submit 3 collect 1 collect 2 collect 3"),
    ],
)
def test_rounds_are_submitted_ahead_within_a_segment(ahead: int, order: str) -> None:
    runner = Script()
    given = config(train={"rounds": 3}, run={"commit_every": 9})
    results, _ = go(runner, given, look_ahead=ahead)
    assert " ".join(runner.log) == f"place 0 {order} gather 3"
    assert [result.stop for result in results] == [None, None, "rounds"]


def test_a_segment_ends_with_a_state_and_the_next_one_starts_from_it() -> None:
    runner = Script()
    results, events = go(runner, config(run={"commit_every": 2}))
    assert [line for line in runner.log if line.startswith(("place", "gather"))] == [
        *("place 0", "gather 2", "place 2", "gather 4", "place 4", "gather 6")
    ]
    assert [result.round for result in results if result.state is not None] == [2, 4, 6]
    assert results[-1].state is not None
    assert results[-1].state.position.steps == (18, 18)
    assert events == []


def test_a_result_holds_the_means_of_its_round() -> None:
    (first, second), _ = go(Script(rejected=(1,)), config(train={"rounds": 2}, average={"max_rejected": 0.5}))
    assert (first.round, first.samples, first.steps, first.rejected, first.params_sha256) == (1, 64, 6, 1, "sha1")
    assert second.train_loss == 0.5
    assert second.replica_loss[0] == 0.5
    assert math.isnan(second.replica_loss[1])  # and train_loss is the mean of the replicas that were averaged
    assert second.metrics == {"val_loss": 0.5, "val_accuracy": 0.2}
    assert second.stop_metric == 0.5
    assert second.bytes_reduced == 8


def test_a_stop_rule_makes_its_round_the_last() -> None:
    runner = Script()
    results, _ = go(runner, config(stop={"target": 0.4}, run={"commit_every": 9}), look_ahead=2)
    assert [result.round for result in results] == [1, 2, 3]
    assert (results[-1].stop, results[-1].state is not None) == ("target", True)
    assert "submit 5" in runner.log  # submitted ahead, and never collected
    assert "collect 4" not in runner.log


@pytest.mark.parametrize(
    ("ahead", "over_from", "order"),
    [
        (0, 0, "submit 1 collect 1 gather 1"),
        (2, 0, "submit 1 collect 1 gather 1"),
        (0, 2, "submit 1 collect 1 submit 2 collect 2 gather 2"),
        (2, 2, "submit 1 submit 2 submit 3 collect 1 submit 4 collect 2 gather 2"),
    ],
)
def test_when_the_time_is_over_the_round_being_trained_ends_the_segment(ahead: int, over_from: int, order: str) -> None:
    runner = Script()

    def is_over() -> bool:
        return f"collect {over_from}" in runner.log or not over_from

    found = rounds(runner, START, config(run={"commit_every": 50}), print, look_ahead=ahead, is_over=is_over)  # type: ignore[arg-type]
    for result in found:
        if result.state is not None:
            break
    assert " ".join(runner.log) == f"place 0 {order}"
    assert (result.round, result.stop) == (over_from or 1, None)
    assert [one.round for one in found] == list(range(result.round + 1, 7))  # whoever goes on loses nothing


def test_a_round_that_is_replayed_after_the_time_ends_nothing() -> None:
    runner = Script(lose=(3,))
    events: list[Any] = []

    def is_over() -> bool:
        return bool(events)  # from the loss of the segment on

    found = rounds(runner, START, config(run={"commit_every": 5}), events.append, is_over=is_over)  # type: ignore[arg-type]
    assert [(result.round, result.state is not None) for result in found] == [
        *((1, False), (2, False), (3, True), (4, True), (5, True), (6, True))
    ]
    assert len(events) == 1


def test_the_history_before_counts_for_patience() -> None:
    given = config(stop={"metric": "val_accuracy", "mode": "min", "patience": 3})
    state = state_after(replace(first_position(2), round=2))
    results, _ = go(Script(), given, state, history=(0.1, 0.15))
    assert [result.round for result in results] == [3, 4]  # the best value is that of round 1
    assert results[-1].stop == "patience"


def test_a_lost_segment_is_replayed_and_its_rounds_are_yielded_once() -> None:
    runner = Script(lose=(3, 3))
    results, events = go(runner, config(run={"commit_every": 4}))
    assert [result.round for result in results] == [1, 2, 3, 4, 5, 6]
    assert [result.retried for result in results] == [0, 0, 2, 2, 0, 0]
    assert events == [SegmentReplayed(round=committed, reason="worker gone") for committed in (0, 1)]
    assert runner.log.count("submit 1") == 2
    assert runner.log.count("submit 4") == 3
    assert runner.log.count("submit 5") == 1


@pytest.mark.parametrize(
    ("step", "retried"),
    [("place 0", [1, 0, 0]), ("place 2", [0, 0, 1]), ("submit 1", [1, 0, 0]), ("submit 3", [0, 0, 1])],
)
def test_a_round_that_is_lost_before_it_is_trained_was_begun_again(step: str, retried: list[int]) -> None:
    results, events = go(Script(lose_early=(step,)), config(train={"rounds": 3}, run={"commit_every": 2}), look_ahead=0)
    assert [result.retried for result in results] == retried
    assert len(events) == 1


@pytest.mark.parametrize(
    ("lost", "error", "match"),
    [
        ({}, ClusterLost, "Round 3 was lost 4 times in a row: worker gone"),
        ({"full": True}, OutOfMemory, "Round 3 was lost 4 times, for want of memory: worker gone"),
        (
            {"killed": "dtrain-train-r3"},
            UserCodeFailed,
            "Round 3 was lost 4 times: the task dtrain-train-r3",
        ),
        ({"gone": True, "killed": "k"}, UserCodeFailed, "4 times"),
        ({"gone": True, "full": True}, OutOfMemory, "4 times"),
    ],
)
def test_a_segment_that_is_always_lost_ends_the_run(
    lost: dict[str, Any], error: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    runner = Script(lose=(3,) * 9, lost=lost)
    with pytest.raises(error, match=match):
        go(runner, config(run={"commit_every": 2}))
    assert runner.again == [0, 0, 1, 2, 3]


def test_as_long_as_workers_go_and_come_a_segment_is_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """76 seconds of workers that end and are restarted were too long."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    runner = Script(lose=(3,) * 20, lost={"gone": True})
    results = go(runner, config(run={"commit_every": 2}))[0]
    assert [result.round for result in results] == [1, 2, 3, 4, 5, 6]
    assert results[2].retried == 20
    with pytest.raises(ClusterLost, match="Round 3 was lost 28 times in a row"):
        go(Script(lose=(3,) * 99, lost={"gone": True}), config(run={"commit_every": 2}))


def test_while_other_workers_are_left_the_first_replays_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for left, expected in ((False, [0, 1, 2, 3, 4]), (True, [0, 0, 0, 3, 4])):
        slept.clear()
        go(Script(lose=(3,) * 5, lost={"gone": True, "left": left}), config(run={"commit_every": 2}))
        assert slept == expected


def test_with_auto_a_segment_ends_once_workers_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Dask computes again is what was lost since the last commit."""
    monkeypatch.setattr(module, "commit_cadence", lambda *given: 100)
    for is_lost, gathered in ((True, [1, 2, 3, 4, 5, 6]), (False, [1, 6])):
        runner = Script(workers_lost=is_lost)
        go(runner, config(run={"commit_every": "auto"}))
        assert [entry for entry in runner.log if entry.startswith("gather")] == [f"gather {n}" for n in gathered]
    runner = Script(workers_lost=True, eval_every=2)  # commits fall on evaluated rounds
    go(runner, config(run={"commit_every": "auto"}))
    assert [entry for entry in runner.log if entry.startswith("gather")] == ["gather 2", "gather 4", "gather 6"]
    runner = Script(workers_lost=True)
    go(runner, config(run={"commit_every": 3}))
    assert [entry for entry in runner.log if entry.startswith("gather")] == ["gather 3", "gather 6"]


def test_a_round_that_was_yielded_without_its_state_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment that is replayed may end with a round that the lost one passed over."""
    monkeypatch.setattr(module, "commit_cadence", lambda *given: 100)
    committed: list[int] = []
    keeping = module.Keeping(lambda number: Path(), lambda result: committed.append(result.round), lambda state: state)
    runner = Script(lose=(4,))
    results = go(runner, config(run={"commit_every": "auto"}), keeping=keeping)[0]
    assert [result.round for result in results] == [1, 2, 3, 4, 5, 6]
    assert [result.round for result in results if result.state is not None] == [1, 6]
    assert committed == [2]


@pytest.mark.parametrize(
    ("commit_every", "commits", "replayed"),
    [("auto", [1, 2, 3, 6], [1, 2]), (50, [1, 2, 3, 6], [0, 1, 2]), (3, [1, 3, 4, 6], [0, 3])],
)
def test_a_segment_that_repeats_a_finished_round_begins_again_and_commits_it(
    commit_every: int | str, commits: list[int], replayed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills that come sooner than a long segment takes would let it be repeated for ever."""
    monkeypatch.setattr(module, "commit_cadence", lambda *given: 100)
    runner = Script(repeat=(2, 4, 5))
    results, events = go(runner, config(run={"commit_every": commit_every}))
    assert [result.round for result in results] == [1, 2, 3, 4, 5, 6]
    assert [entry for entry in runner.log if entry.startswith("gather")] == [f"gather {n}" for n in commits]
    assert events == [SegmentReplayed(round=round, reason="round again") for round in replayed]


def test_a_segment_begins_again_only_if_that_commits_a_round_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "commit_cadence", lambda *given: 100)
    runner = Script(eval_every=2)
    go(runner, config(run={"commit_every": "auto"}))
    assert runner.finished == {1: None, 2: None, 3: None, 4: None, 5: 4, 6: 5}
    runner = Script()
    go(runner, config(run={"commit_every": 1}))
    assert set(runner.finished.values()) == {None}


def test_commits_come_more_often_where_work_is_lost_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, given = [0.0], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def cadence(overhead: float, seconds: float, every: int, between: float) -> int:
        given.append(between)
        return 1

    class Slow(Script):
        def collect(self, held: int, finished: int | None = None) -> Outcome:
            clock[0] += 10.0
            return super().collect(held, finished)

    monkeypatch.setattr(module, "commit_cadence", cadence)
    go(Slow(lose=(3, 5)), config(run={"commit_every": "auto"}))
    assert given == [math.inf, math.inf, 40.0, 50.0, 35.0]


def test_a_loss_makes_the_next_segment_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "commit_cadence", lambda *given: 100)
    runner = Script(lose=(4,))
    go(runner, config(run={"commit_every": "auto"}))
    assert [entry for entry in runner.log if entry.startswith("gather")] == ["gather 1", "gather 2", "gather 6"]
    runner = Script(lose=(4,))
    go(runner, config(run={"commit_every": 3}))
    assert [entry for entry in runner.log if entry.startswith("gather")] == ["gather 3", "gather 4", "gather 6"]
    runner = Script(lose=(4,))
    go(runner, config(train={"rounds": 40}, run={"commit_every": 20}))
    commits = [1, 5, 20, 40]  # 1, 4, 16 rounds after the loss
    assert [entry for entry in runner.log if entry.startswith("gather")] == [f"gather {n}" for n in commits]


@pytest.mark.parametrize(
    ("runner", "match"),
    [
        (Script(rejected=(0,)), r"Round 1: 1 of 2 replicas .*\(replica 0\); average.max_rejected = 0.25"),
        (Script(rejected=(0, 1)), r"Round 1: 2 of 2 replicas"),
        (Script(finite=False), r"Round 1: the averaged parameters are not finite"),
    ],
)
def test_too_much_that_is_not_finite_stops_the_run(runner: Script, match: str) -> None:
    with pytest.raises(Diverged, match=match):
        go(runner, config())


def test_without_validation_there_are_no_metrics() -> None:
    results, _ = go(Script(validated=False), config(stop={"metric": "train_loss", "target": 0.5}))
    assert [result.metrics for result in results] == [{}, {}]
    assert [result.stop_metric for result in results] == [1.0, 0.5]


def test_a_complete_state_has_no_further_round() -> None:
    runner = Script()
    assert go(runner, config(), state_after(replace(first_position(2), round=6)))[0] == []
    assert runner.log == []


def test_the_state_of_round_0() -> None:
    given = config(average={"outer": {}})
    state = initial_state(params(7), 2, given)
    assert state.position == first_position(2)
    assert state.model.flat.tolist() == [7.0]
    assert all(own.params is state.model for own in state.broadcast)
    assert [piece.slots for piece in state.outer[0]] == [piece.slots for piece in first_outer(given.average)] == [()]
    assert state.outer[0] is state.outer[1]


def test_with_auto_the_first_commit_comes_soon() -> None:
    assert (first_cadence("auto"), first_cadence(7)) == (1, 7)
    assert [next_commit(7, 3, 3, 1), next_commit(6, 3, 3, 1), next_commit(7, 3, "auto", 1)] == [9, 9, 10]
    results, _ = go(Script(), config())
    assert results[0].state is not None


# Evaluations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("commit_every", "eval_every", "commits"),
    [
        (4, 1, [4, 8, 12, 14]),
        (1, 4, [4, 8, 12, 14]),
        (4, 4, [4, 8, 12, 14]),
        (5, 3, [6, 12, 14]),  # 5 rounds or more, to an evaluated round
        (3, 50, [14]),  # the last round is evaluated
    ],
)
def test_commits_fall_on_evaluated_rounds(commit_every: int, eval_every: int, commits: list[int]) -> None:
    runner = Script(eval_every=eval_every)
    given = config(train={"rounds": 14}, run={"commit_every": commit_every})
    results, _ = go(runner, given)
    assert [result.round for result in results if result.state is not None] == commits
    assert all(result.metrics for result in results if result.state is not None)
    later = state_after(replace(first_position(2), round=5))  # where an earlier start was interrupted
    continued, _ = go(Script(eval_every=eval_every), given, later)
    assert [result.round for result in continued if result.state is not None] == [n for n in commits if n > 5]


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_the_next_commit_is_evaluated_and_not_too_soon(finished: int, every: int, eval_every: int, auto: bool) -> None:
    number = next_commit(finished, every, "auto" if auto else every, eval_every)
    assert number > finished
    assert number % eval_every == 0
    assert number - finished < every + eval_every
    if auto:
        assert number - finished >= every


def test_with_auto_the_first_commit_is_the_first_evaluation() -> None:
    results, _ = go(Script(eval_every=4), config())
    assert [result.round for result in results if result.state is not None] == [4, 6]


def test_a_rule_on_train_loss_evaluates_the_round_that_it_ends_on() -> None:
    runner = Script(eval_every=4)
    results, _ = go(runner, config(stop={"metric": "train_loss", "target": 0.34}))
    assert [(result.round, result.stop) for result in results] == [(1, None), (2, None), (3, "target")]
    assert [result.metrics for result in results] == [{}, {}, pytest.approx({"val_loss": 1 / 3, "val_accuracy": 0.3})]
    assert runner.log[-2:] == ["gather 3", "evaluate 3"]
    scheduled = Script(eval_every=3)
    results, _ = go(scheduled, config(stop={"metric": "train_loss", "target": 0.34}))
    assert results[-1].metrics == pytest.approx({"val_loss": 1 / 3, "val_accuracy": 0.3})
    assert "evaluate 3" not in scheduled.log  # it has been evaluated beside the next round


def test_the_round_that_the_time_ends_on_is_evaluated_and_no_rule_counts_it() -> None:
    runner = Script(eval_every=4)
    given = config(stop={"target": 9.0})  # any evaluation of the cadence meets it
    found = rounds(runner, START, given, print, is_over=lambda: True)  # type: ignore[arg-type]
    first = next(found)
    assert (first.round, first.metrics["val_loss"], first.stop, first.stop_metric) == (1, 1.0, None, None)
    assert first.state is not None
    assert [(result.round, result.stop) for result in found] == [(2, None), (3, None), (4, "target")]


def test_an_evaluation_that_is_lost_is_replayed_with_its_segment() -> None:
    runner = Script(eval_every=4, lose_evaluations=2)
    results, events = go(runner, config(stop={"metric": "train_loss", "target": 0.34}))
    assert [result.round for result in results] == [1, 2, 3]
    assert results[-1].metrics["val_loss"] == pytest.approx(1 / 3)
    assert len(events) == 2


def test_without_validation_nothing_is_evaluated_at_the_end() -> None:
    results, _ = go(Script(validated=False, eval_every=4), config(stop={"metric": "train_loss", "target": 0.34}))
    assert [result.metrics for result in results] == [{}, {}, {}]


def test_commits_take_two_percent() -> None:
    assert commit_cadence(0.02, 1.0, 1) == 1
    assert commit_cadence(0.2, 1.0, 10) == 10
    assert commit_cadence(0.2, 1.0, 1) == 4  # grows step by step
    assert commit_cadence(50.0, 0.01, 1000) == MAX_COMMIT_EVERY
    assert module.MAX_REPLAYS == 3
