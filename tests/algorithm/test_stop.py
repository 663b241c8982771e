"""Stop rules as functions of the history."""

from __future__ import annotations

import pytest

from dtrain.algorithm.stop import check_metric, end_reason, stop_history, stop_reason
from dtrain.config.schema import TrainConfig
from dtrain.errors import InvalidConfig

NAN = float("nan")


def config(**stop):
    return TrainConfig(train={"metrics": ["accuracy"]}, stop=stop)


def test_without_a_rule_nothing_stops():
    assert stop_reason([1.0] * 1000, config()) is None
    assert stop_reason([], config(target=1.0, patience=1)) is None


@pytest.mark.parametrize(
    ("values", "reason"), [([0.5], None), ([0.1], "target"), ([0.05], "target"), ([0.05, 0.2], None), ([None], None)]
)
def test_target_looks_at_the_last_value(values, reason):
    assert stop_reason(values, config(target=0.1)) == reason


def test_target_of_an_accuracy_is_reached_from_below():
    stop = config(metric="val_accuracy", target=0.9)
    assert stop_reason([0.95], stop) == "target"
    assert stop_reason([0.85], stop) is None
    assert stop_reason([0.85], config(metric="val_accuracy", target=0.9, mode="min")) == "target"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([3, 2, 1], None),
        ([1, 2], None),
        ([1, 2, 2], "patience"),
        ([3, 2, 2.5, 1.9, 2], None),
        ([3, 2, 2, 2], "patience"),
        ([1, NAN, NAN], "patience"),
        ([NAN, NAN], "patience"),
        ([1, None, 2, None, None, 3], "patience"),
        ([1, None, None, 2, None, None], None),
        ([None, None, None], None),
    ],
)
def test_patience_counts_rounds_since_the_best(values, reason):
    assert stop_reason(values, config(patience=2)) == reason


def test_an_improvement_of_less_than_min_delta_is_none():
    values = [1.0, 0.95, 0.91, 0.89]
    assert stop_reason(values[:3], config(patience=2, min_delta=0.1)) == "patience"
    assert stop_reason(values, config(patience=3, min_delta=0.1)) is None  # 0.89 is better by more than 0.1
    assert stop_reason(values, config(patience=2)) is None


def test_patience_of_an_accuracy():
    assert stop_reason([0.5, 0.6, 0.6, 0.55], config(metric="val_accuracy", patience=2)) == "patience"
    assert stop_reason([0.5, 0.6, 0.7], config(metric="val_accuracy", patience=1)) is None


# The history of a run -------------------------------------------------------------------------------------------


def rows(*values, metric="val_loss"):
    """Rows of rounds 1, 2, ...: one without a value has no key of the metric."""
    return [
        {"round": number, "train_loss": float(number)} | ({} if value is None else {metric: value})
        for number, value in enumerate(values, 1)
    ]


def with_rounds(rounds, **stop):
    return TrainConfig(train={"rounds": rounds, "metrics": ["accuracy"]}, stop=stop)


def test_a_history_has_a_value_for_each_evaluation():
    assert stop_history(rows(None, 2.0, None, 4.0, 5.0), with_rounds(5), 2) == (None, 2.0, None, 4.0, 5.0)
    assert stop_history(rows(1.0, 2.0), with_rounds(5), 1) == (1.0, 2.0)
    assert stop_history([], with_rounds(5), 2) == ()


def test_what_is_null_in_a_row_is_a_value_that_is_not_finite():
    given = [{"round": 1}, {"round": 2, "val_loss": None}]
    absent, bad = stop_history(given, with_rounds(5), 2)
    assert absent is None
    assert bad is not None
    assert bad != bad


def test_evaluations_outside_of_the_cadence_do_not_count():
    ended_by_time = rows(9.0, 2.0, 9.0)
    assert stop_history(ended_by_time, with_rounds(5), 2) == (None, 2.0, None)
    extended = rows(None, 2.0, 9.0, 4.0)  # round 3 was the last one before train.rounds was raised
    assert stop_history(extended[:3], with_rounds(3), 2) == (None, 2.0, 9.0)
    assert stop_history(extended, with_rounds(5), 2) == (None, 2.0, None, 4.0)
    assert end_reason(stop_history(extended[:3], with_rounds(3, target=9.0), 4), with_rounds(3, target=9.0)) == "target"
    assert end_reason(stop_history(extended[:3], with_rounds(5, target=9.0), 4), with_rounds(5, target=9.0)) is None


def test_every_round_counts_for_train_loss():
    given = with_rounds(9, metric="train_loss", patience=2)
    assert stop_history(rows(None, 2.0, None), given, 2) == (1.0, 2.0, 3.0)
    assert end_reason((1.0, 2.0, 3.0), given) == "patience"


def test_a_metric_that_no_round_has_is_refused():
    with pytest.raises(
        InvalidConfig, match=r'stop.metric = "val_acuracy" is not computed; did you mean "val_accuracy"'
    ):
        check_metric(config(metric="val_acuracy", target=0.9), has_validation=True)
    with pytest.raises(InvalidConfig, match="Computed are train_loss"):
        check_metric(config(target=0.9), has_validation=False)
    check_metric(config(metric="val_nothing"), has_validation=True)  # no rule is set
    check_metric(config(metric="val_accuracy", patience=1), has_validation=True)
