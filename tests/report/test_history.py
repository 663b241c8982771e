from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from dtrain.events import ReplicaRejected, RoundCommitted, RoundFinished, RunFinished, RunStarted
from dtrain.files import append_line
from dtrain.report.dataset import dataset_of
from dtrain.report.history import best_round, limit_of_rows, read_lines, read_rows, read_rows_of, row_of
from dtrain.report.journal import cut_history, journal
from tests.report.helpers import result_of


def write_rows(run, *numbers, tail=""):
    lines = [json.dumps(row_of(result_of(number))) for number in numbers]
    (run / "history.jsonl").write_text("".join(line + "\n" for line in lines) + tail)
    return lines


# Rows -----------------------------------------------------------------------------------------------------------


def test_a_row_has_the_keys_of_the_contract():
    assert row_of(result_of()) == {
        "event": "round",
        "round": 1,
        "train_loss": 0.5,
        "val_loss": 0.75,
        "val_accuracy": 0.875,
        "samples": 20,
        "steps": 4,
        "seconds": 1.2346,
        "bytes_reduced": 800,
        "rejected": 0,
        "retried": 1,
        "params_sha256": "ab" * 32,
        "replica_loss": [0.25, 0.75],
        "update_norm": [1.5, 2.5],
        "update_cosine": 0.5,
        "seconds_steps": 0.15,  # of the slowest replica
        "seconds_waiting": 0.05,
        "seconds_fetch": 0.03,  # of the busiest process
        "seconds_decode": 0.02,
        "seconds_gather": 0.01,
        "seconds_model": 0.14,
        "seconds_reduce": 0.01,
        "seconds_evaluate": 0.125,  # of 0.25 on two processes
    }
    # SPEC section 5, in its order
    assert list(row_of(result_of())) == [
        *("event", "round", "train_loss", "val_loss", "val_accuracy", "samples", "steps", "seconds", "bytes_reduced"),
        *("rejected", "retried", "params_sha256", "replica_loss"),
        *("update_norm", "update_cosine", "seconds_steps", "seconds_waiting"),
        *("seconds_fetch", "seconds_decode", "seconds_gather", "seconds_model", "seconds_reduce", "seconds_evaluate"),
    ]


def test_replicas_of_one_process_take_turns():
    two = result_of().contributions
    row = row_of(result_of(contributions=tuple(replace(c, process="host:1") for c in two)))
    # 0.1 s and 0.2 s one after the other, of which 0.06 s of data
    assert [row[f"seconds_{name}"] for name in ("fetch", "decode", "gather", "model")] == [0.03, 0.02, 0.01, 0.24]
    assert (row["seconds_steps"], row["seconds_evaluate"]) == (0.15, 0.25)


# What limits ----------------------------------------------------------------------------------------------------


def rows_of(*seconds, **changes):
    """Rows of rounds that take so long; their busiest process takes 0.2 s, the evaluation 0.125 s."""
    return [row_of(result_of(n, seconds=s, **{"retried": 0, **changes})) for n, s in enumerate(seconds, start=1)]


def test_the_time_beside_steps_and_evaluation_is_that_of_averaging():
    limit = limit_of_rows(rows_of(50.0, 1.0, 1.0))  # without the first round
    assert limit.stages == ("reduce",)
    assert limit.shares == pytest.approx(
        {"fetch": 0.03, "decode": 0.02, "gather": 0.01, "model": 0.14, "reduce": 0.675, "evaluate": 0.125}
    )


def test_rounds_that_overlap_are_averaged_in_the_time_of_the_reducer():
    limit = limit_of_rows(rows_of(0.3, 0.3, 0.3))  # less than 0.2 s + 0.125 s: evaluated beside the next round
    assert limit.stages == ("model",)
    assert limit.shares["reduce"] == pytest.approx(0.01 / 0.335)


def test_a_single_round_says_what_it_can():
    assert limit_of_rows(rows_of(1.0)).shares["reduce"] == pytest.approx(0.675)


def test_rounds_that_were_begun_again_do_not_count():
    assert limit_of_rows(rows_of(1.0, 1.0, retried=1)) is None


def test_a_history_of_an_earlier_version_says_nothing_of_its_limit():
    old = [{k: v for k, v in row.items() if k != "seconds_model"} for row in rows_of(1.0, 1.0)]
    assert limit_of_rows(old) is None
    assert limit_of_rows([]) is None
    assert limit_of_rows(old + rows_of(1.0, 1.0, 1.0)[2:]).shares["reduce"] == pytest.approx(0.675)


def test_without_validation_there_is_no_val_loss():
    assert not [key for key in row_of(result_of(metrics={})) if key.startswith("val")]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(bad):
    row = row_of(result_of(train_loss=bad, metrics={"val_loss": bad, "val_mae": 1.0}, replica_loss=(bad, 2.0)))
    assert (row["train_loss"], row["val_loss"], row["val_mae"], row["replica_loss"]) == (None, None, 1.0, [None, 2.0])
    assert "null" in json.dumps(row, allow_nan=False)


def test_a_loss_keeps_all_its_digits():
    row = json.loads(json.dumps(row_of(result_of(train_loss=1 / 3, replica_loss=(0.1, 2 / 3)))))
    assert row["train_loss"] == 1 / 3
    assert row["replica_loss"] == [0.1, 2 / 3]


# As a data set --------------------------------------------------------------------------------------------------


def test_the_history_as_a_dataset():
    rows = [
        row_of(result_of(1)),
        row_of(result_of(2, train_loss=math.nan, metrics={"val_loss": math.inf, "val_accuracy": 1.0})),
        row_of(result_of(4, replica_loss=(math.nan, 3.0))),
    ]
    history = dataset_of(rows)
    assert history.sizes == {"round": 3, "replica": 2}
    assert history["round"].values.tolist() == [1, 2, 4]
    assert set(history.data_vars) == set(rows[0]) - {"event", "round"}
    np.testing.assert_array_equal(history.train_loss, [0.5, math.nan, 0.5])
    np.testing.assert_array_equal(history.val_loss, [0.75, math.nan, 0.75])
    np.testing.assert_array_equal(history.val_accuracy, [0.875, 1.0, 0.875])
    np.testing.assert_array_equal(history.replica_loss, [[0.25, 0.75], [0.25, 0.75], [math.nan, 3.0]])
    assert history.params_sha256.values.tolist() == ["ab" * 32] * 3
    assert (history.samples.dtype, history.train_loss.dtype) == (np.int64, np.float64)
    assert history.train_loss.sel(round=4).item() == 0.5


def test_columns_that_the_first_round_lacks_stand_in_their_place():
    rows = [row_of(result_of(1, metrics={})), row_of(result_of(2)), row_of(result_of(3, metrics={}))]
    assert not [key for row in (rows[0], rows[2]) for key in row if key.startswith("val")]
    history = dataset_of(rows)
    assert list(history.data_vars) == [key for key in rows[1] if key not in ("event", "round")]
    assert list(history.data_vars)[:4] == ["train_loss", "val_loss", "val_accuracy", "samples"]
    np.testing.assert_array_equal(history.val_accuracy, [math.nan, 0.875, math.nan])


def test_counts_that_some_rounds_lack_are_nan_there():
    rows = [row_of(result_of(1)), {**row_of(result_of(2)), "late": 7}]  # a later version has a column more
    history = dataset_of(rows)
    np.testing.assert_array_equal(history.late, [math.nan, 7.0])
    assert (history.late.dtype, history.samples.dtype) == (np.float64, np.int64)
    assert list(history.data_vars)[-1] == "late"


def test_the_history_of_no_rounds_is_empty():
    assert dict(dataset_of([]).sizes) == {"round": 0}


# The best round -------------------------------------------------------------------------------------------------


def rows_with(name, *values):
    return [{"round": number, "train_loss": -float(number), name: value} for number, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("values", "higher", "best"),
    [
        ((3.0, 1.0, 2.0), False, 2),
        ((3.0, 1.0, 2.0), True, 1),
        ((2.0, 1.0, 1.0), False, 2),  # the first of equals
        ((1.0, 2.0, 2.0), True, 2),
        ((None, 2.0, 3.0), False, 2),
        ((None, 2.0, 3.0), True, 3),
        ((0.0, 1.0), False, 1),
    ],
)
def test_the_best_round_by_a_metric(values, higher, best):
    assert best_round(rows_with("val_loss", *values), "val_loss", higher) == best


def test_without_validation_the_training_loss_decides_and_lower_is_better():
    rows = [{"round": 1, "train_loss": 2.0}, {"round": 2, "train_loss": 1.0}, {"round": 3, "train_loss": 3.0}]
    assert best_round(rows) == 2
    assert best_round(rows, "val_accuracy", higher=True) == 2
    assert best_round(rows_with("val_loss", None, None)) == 2


def test_a_round_without_an_evaluation_is_not_the_best():
    rows = [{"round": 1, "train_loss": 0.1}, {"round": 2, "train_loss": 0.3, "val_loss": 4.0}]
    assert best_round([*rows, {"round": 3, "train_loss": 0.2, "val_loss": 3.0}, {"round": 4, "train_loss": 0.0}]) == 3
    assert best_round(rows, "val_loss", higher=True) == 2


def test_without_any_number_no_round_is_best():
    assert best_round([]) is None
    assert best_round([{"round": 1, "train_loss": None}]) is None


# Files ----------------------------------------------------------------------------------------------------------


def test_a_row_is_read_back_as_it_was_written(tmp_path):
    journal(tmp_path, RoundFinished(result_of(1)))
    journal(tmp_path, RoundFinished(result_of(2, train_loss=math.nan)))
    assert read_rows(tmp_path) == [row_of(result_of(1)), row_of(result_of(2, train_loss=math.nan))]


def test_a_missing_history_is_empty(tmp_path):
    assert read_rows(tmp_path) == []


@pytest.mark.parametrize("tail", ['{"event": "round", "rou', "\0\0\0\0", '{"a": "\\ud8', "garbage"])
def test_a_line_that_a_killed_process_left_half_written_ends_the_history(tmp_path, tail):
    write_rows(tmp_path, 1, 2, tail=tail)
    assert [row["round"] for row in read_rows(tmp_path)] == [1, 2]


def test_nothing_is_read_behind_a_broken_line(tmp_path):
    lines = write_rows(tmp_path, 1, 2, 3)
    (tmp_path / "history.jsonl").write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
    assert [row["round"] for row in read_rows(tmp_path)] == [1]


@pytest.mark.parametrize("name", ["replica_loss", "update_norm"])
def test_a_row_of_another_number_of_replicas_ends_the_history(tmp_path, name):
    lines = write_rows(tmp_path, 1, 2)
    other = {**json.loads(lines[1]), "round": 3, name: [0.5]}
    append_line(tmp_path / "history.jsonl", json.dumps(other))
    assert [row["round"] for row in read_rows(tmp_path)] == [1, 2]
    assert dataset_of(read_rows(tmp_path)).sizes["round"] == 2


@pytest.mark.parametrize("name", ["samples", "seconds", "val_loss", "train_loss", "seconds_steps"])
def test_a_number_that_nothing_can_hold_ends_the_history(tmp_path, name):
    lines = write_rows(tmp_path, 1, 2)
    append_line(tmp_path / "history.jsonl", json.dumps({**json.loads(lines[1]), "round": 3, name: 10**400}))
    assert [row["round"] for row in read_rows(tmp_path)] == [1, 2]


def test_bytes_that_are_no_text_end_the_history(tmp_path):
    write_rows(tmp_path, 1)
    with (tmp_path / "history.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\x00")
    assert [row["round"] for row in read_rows(tmp_path)] == [1]
    cut_history(tmp_path, 1)
    assert (tmp_path / "history.jsonl").read_text() == json.dumps(row_of(result_of(1))) + "\n"


@pytest.mark.parametrize("last", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("tail", ["", '{"event": "ro'])
def test_the_history_is_cut_back_to_the_newest_commit(tmp_path, last, tail):
    lines = write_rows(tmp_path, 1, 2, 3, tail=tail)
    cut_history(tmp_path, last)
    assert (tmp_path / "history.jsonl").read_text() == "".join(line + "\n" for line in lines[:last])
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]


def test_after_a_cut_lines_can_be_appended(tmp_path):
    lines = write_rows(tmp_path, 1, 2, tail='{"event": "ro')
    cut_history(tmp_path, 1)
    append_line(tmp_path / "history.jsonl", lines[1])
    assert (tmp_path / "history.jsonl").read_text() == f"{lines[0]}\n{lines[1]}\n"


def test_a_history_that_needs_no_cut_is_left_alone(tmp_path):
    write_rows(tmp_path, 1, 2)
    before = (tmp_path / "history.jsonl").stat()
    cut_history(tmp_path, 2)
    assert (tmp_path / "history.jsonl").stat() == before


def test_a_run_without_history_needs_no_cut(tmp_path):
    cut_history(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_rounds_go_to_the_history_and_faults_and_commits_to_the_events(tmp_path):
    journal(tmp_path, RoundFinished(result_of(1)))
    journal(tmp_path, ReplicaRejected(round=1, replica=3))
    journal(tmp_path, RoundCommitted(round=1, bytes=10, seconds=0.5))
    started = {"run": "r", "round": 0, "rounds": 1, "replicas": 2, "samples": 20, "workers": 2, "dashboard": ""}
    journal(tmp_path, RunStarted(**started))
    journal(tmp_path, RunFinished(reason="rounds", rounds=1, params_sha256="ab", val_loss=None, run="r"))
    assert [row["event"] for row in read_rows(tmp_path)] == ["round"]
    rejected, committed = list(read_lines(tmp_path / "events.jsonl"))
    assert (rejected.pop("time")[:2], rejected) == ("20", {"event": "ReplicaRejected", "round": 1, "replica": 3})
    assert committed["event"] == "RoundCommitted"
    assert (committed["round"], committed["bytes"], committed["seconds"]) == (1, 10, 0.5)


# pandas -----------------------------------------------------------------------------------------------------------


def test_pandas_has_a_row_a_round_and_scalars_only():
    history = dataset_of([row_of(result_of(1)), row_of(result_of(2, metrics={}))])
    frame = history.to_pandas()
    assert list(frame.index) == [1, 2]
    assert frame.index.name == "round"
    assert list(frame.columns) == [
        name for name in row_of(result_of()) if name not in ("event", "round", "replica_loss", "update_norm")
    ]
    assert frame.val_loss.isna().tolist() == [False, True]  # a round without an evaluation
    assert history.replica_loss.to_pandas().shape == (2, 2)
    assert isinstance(history, xr.Dataset)
    assert history.isel(round=[0]).to_pandas().shape == (1, len(frame.columns))


def test_pandas_of_no_round():
    assert dataset_of([]).to_pandas().empty


def test_rows_of_some_rounds(tmp_path):
    write_rows(tmp_path, 1, 2, 3, 4, tail='{"event": "ro')
    assert read_rows_of(tmp_path, [2, 4, 5, 9]) == [read_rows(tmp_path)[1], read_rows(tmp_path)[3]]
    assert read_rows_of(tmp_path / "nowhere", [1]) == []
