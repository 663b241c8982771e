"""dtrain plan."""

import tomllib

import numpy as np
import pytest

from tests.cli.helpers import last, objects, tree

KEYS = {
    "event",
    "units",
    "unit_rows",
    "cells",
    "cell_rows",
    "window_units",
    "partition_samples",
    "val_samples",
    "test_samples",
    "decodes_per_unit",
    "read_amplification",
    "decoded_bytes",
    "patches",
    "absent_rows",
    "partition_units",
    "readers",
    "replicas",
    "fingerprint",
    "num_params",
    "first_loss",
    "steps",
    "samples_a_round",
    "rounds",
    "workers",
    "resident_bytes",
    "reduced_bytes",
    "received_bytes",
    "commit_bytes",
    "commit_by",
    "round_seconds",
    "worker_bytes",
    "checksums",
    "probe",
    "cadence",
    "resolved",
}


def test_the_numbers_as_an_object(cli, project):
    outcome = cli("--json", "plan", project().config)
    assert outcome.code == 0, outcome.err
    (found,) = objects(outcome.out)
    assert set(found) >= KEYS
    params = (3 * 5 + 5) + (5 * 4 + 4)
    assert {
        key: found[key] for key in KEYS - {"fingerprint", "first_loss", "round_seconds", "worker_bytes", "resolved"}
    } == {
        "event": "plan",
        "units": 3,
        "unit_rows": 20,
        "cells": 60,
        "cell_rows": 1,
        "window_units": 64,
        "partition_samples": [24, 24],
        "val_samples": 6,
        "test_samples": 6,
        "decodes_per_unit": 2.0,
        "read_amplification": 2.0,
        "decoded_bytes": 2 * 60 * 20,
        "patches": 1,
        "absent_rows": 0,
        "partition_units": 3,
        "readers": {"x": "numcodecs", "label": "numcodecs"},
        "replicas": 2,
        "num_params": params,
        "steps": [3, 3],
        "samples_a_round": 48,
        "rounds": 2,
        "workers": 2,
        "resident_bytes": found["memory"]["total"],
        "reduced_bytes": params * 4 * 2,
        "received_bytes": params * 4,
        "commit_bytes": params * 4 + 2 * (params * 4 + 8),  # two replicas keep a momentum, of which one array is padded
        "commit_by": "driver",
        "checksums": {"x": False, "label": False},
        "probe": None,
        "cadence": None,
    }
    memory = found["memory"]
    assert (memory["unit"], memory["open_units"], memory["loaders"], memory["cached_units"]) == (
        20 * (3 * 4 + 8),
        3,
        2,
        3,
    )
    assert found["first_loss"] == pytest.approx(1.4, abs=0.4)
    assert found["round_seconds"] >= 0
    assert found["worker_bytes"] > found["resident_bytes"] + found["commit_bytes"]
    assert all(set(value) == {"value", "why"} for value in found["resolved"].values())
    assert found["resolved"]["average.replicas"]["value"] == 2
    assert found["resolved"]["data.sample_dim"]["value"] == "sample"


def test_the_numbers_in_words(cli, project):
    job = project()
    outcome = cli("plan", job.config)
    assert outcome.code == 0
    for words in [
        "60 along sample",
        "float32[sample, k] (60, 3), chunks 20x3",
        "int64[sample] (60,), chunks 20",
        "train 48, val 6, test 6 samples",
        "2 of 24 samples, stratified",
        "no checksums in x, label",
        "44 parameters; x float32[8, 3] -> float32[8, 4]",
        "cross_entropy of one real batch: 1.",
        "3 local steps a replica, batch 8: 48 samples, 2 rounds",
        "352 B sent a round by 2 replicas, 176 B back to each",
        "auto average.replicas  2 (the smaller of 2 workers and the units of the store)",
    ]:
        assert words in outcome.out
    assert outcome.err == f"nothing was written; next: dtrain train {job.config}\n"


@pytest.mark.parametrize(
    ("setting", "said", "means"),
    [
        ('data.normalize=["x"]', "x: one mean of all values", {"x": {"dims": [], "means": 1}}),
        (
            'data.normalize.x=["k"]',
            "x: one mean for each of the 3 places of k",
            {"x": {"dims": ["k"], "means": 3}},
        ),
    ],
)
def test_the_means_of_a_variable_are_printed(cli, project, setting, said, means):
    job = project()
    assert said in cli("plan", job.config, "--set", setting).out
    assert last(cli("--json", "plan", job.config, "--set", setting))["normalize"] == means


def test_a_dimension_without_means_is_refused(cli, project):
    outcome = cli("plan", project().config, "--set", 'data.normalize.x=["sample"]')
    assert outcome.code == 3
    assert 'data.normalize.x names "sample": that is the dimension of the samples' in outcome.err


def test_nothing_is_written_and_nothing_trained(cli, project, tmp_path):
    job = project()
    before = tree(tmp_path)
    first = last(cli("--json", "plan", job.config))
    assert tree(tmp_path) == before
    again = last(cli("--json", "plan", job.config))
    assert first["first_loss"] == again["first_loss"]
    assert not (job.dir / "runs").exists()


def test_a_plan_leaves_a_run_alone(cli, project):
    job = project()
    assert cli("-q", "train", job.config).code == 0
    before = tree(job.dir)
    assert cli("-q", "plan", job.config, "--set", "train.rounds=9", "--set", "average.replicas=3").code == 0
    assert tree(job.dir) == before


def test_a_plan_is_what_training_then_does(cli, project):
    job = project()
    planned = last(cli("--json", "plan", job.config))
    outcome = cli("--json", "train", job.config)
    row = objects(outcome.out)[0]
    assert row["samples"] == planned["samples_a_round"]
    assert row["steps"] == sum(planned["steps"])
    assert row["bytes_reduced"] == planned["reduced_bytes"]
    assert planned["fingerprint"] in (job.run / "plan.json").read_text()


@pytest.fixture
def short(monkeypatch):
    """Probes that take a moment, and say little of the machine."""
    for name, value in {"ROUND_SECONDS": 0.02, "MOST": 3, "PROBE_SECONDS": 0.5}.items():
        monkeypatch.setattr(f"dtrain.probe.{name}", value)


@pytest.mark.usefixtures("short")
def test_a_probe_measures_and_says_how_many_steps_to_take(cli, project, tmp_path):
    job = project()
    before = tree(tmp_path)
    outcome = cli("plan", job.config, "--probe", "--bandwidth", "200Mbit")
    assert outcome.code == 0, outcome.err
    assert tree(tmp_path) == before
    assert max(map(len, outcome.out.splitlines())) <= 80
    rows = outcome.out.splitlines()
    assert "local_steps  in steps  MB/s a worker  x synchronous" in rows
    assert sum(row.endswith("<- as configured") for row in rows) == 1
    assert rows[-2] == "[train]"
    assert rows[-1].startswith("local_steps = ")
    assert tomllib.loads("\n".join(rows[-2:]))["train"]["local_steps"] >= 1
    said = outcome.err.splitlines()
    assert said[0] == "measuring rounds; nothing of them is kept"
    assert said[1].startswith("measured 3 rounds of local_steps = 1: ")
    assert said[-1] == f"nothing was written; next: dtrain train {job.config}"


@pytest.mark.usefixtures("short")
def test_a_probe_as_an_object(cli, project):
    job = project({"train": {"local_steps": 4}})
    outcome = cli("--json", "-q", "plan", job.config, "--probe")
    assert (outcome.code, outcome.err) == (0, "")
    (record,) = objects(outcome.out)
    probe, cadence = record["probe"], record["cadence"]
    assert probe["step_seconds"] > 0
    limit = probe["limited_by"]
    assert sum(limit["shares"].values()) == pytest.approx(1.0)
    assert max(limit["shares"], key=limit["shares"].get) == limit["stages"][0]
    assert (cadence["measured"], cadence["bandwidth"], cadence["local_steps"]) == (True, None, 4)
    assert (cadence["pays_from"], cadence["all_reduce_seconds"]) == (None, None)
    by_steps = {row["local_steps"]: row for row in cadence["table"]}
    assert {1, 4, 1000, cadence["recommended"]} <= by_steps.keys()
    assert by_steps[cadence["recommended"]]["share"] >= 0.9 - 1e-9
    in_turn = 2  # replicas, in this process
    assert by_steps[4]["share"] == pytest.approx(4 * in_turn * probe["step_seconds"] / by_steps[4]["seconds"])


def test_a_bandwidth_without_a_probe_is_an_estimate(cli, project):
    job = project()
    outcome = cli("--json", "plan", job.config, "--bandwidth", "8kbit")
    (record,) = objects(outcome.out)
    assert record["probe"] is None
    cadence = record["cadence"]
    # 176 bytes of parameters and 184 of momentum there, 176 bytes back, at 1,000 bytes a second
    assert (cadence["wire_bytes"], cadence["wire_seconds"]) == (536, 0.536)
    assert cadence["all_reduce_seconds"] == 0.176
    assert cadence["pays_from"] == 4
    assert "estimate " in cli("plan", job.config, "--bandwidth", "8kbit").out


@pytest.mark.parametrize("text", ["fast", "200", "25Mb", "0Mbit"])
def test_what_is_no_bandwidth_is_refused(cli, project, text):
    outcome = cli("plan", project().config, "--bandwidth", text)
    assert outcome.code == 2
    assert f"bandwidth '{text}': allowed are a number and a unit, such as 200Mbit, 5Gbit/s or 25MB/s" in outcome.err


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (["average.replicas=3"], {"replicas": 3, "partition_samples": [16, 16, 16]}),
        (["train.local_steps=5"], {"steps": [5, 5], "samples_a_round": 80}),
        (["train.batch_size=full"], {"steps": [1, 1], "samples_a_round": 48}),
        (["train.local_epochs=2"], {"steps": [6, 6], "samples_a_round": 96}),
        (["data.split={ val = 0.0, test = 0.0 }"], {"val_samples": 0, "test_samples": 0, "samples_a_round": 60}),
        (["data.shuffle=false"], {"window_units": 64}),
        (["train.rounds=1000"], {"rounds": 1000}),
    ],
)
def test_settings_change_the_plan(cli, project, settings, found):
    outcome = cli("--json", "plan", project().config, *[w for text in settings for w in ("--set", text)])
    assert outcome.code == 0, outcome.err
    assert {key: last(outcome)[key] for key in found} == found


DATED = {
    "x": {"dims": ("time", "k"), "values": np.zeros((1000, 3), "float32"), "chunks": (100, 3)},
    "label": {"dims": ("time",), "values": np.arange(1000) % 4, "chunks": (100,)},
    "donor": {"dims": ("time",), "values": np.arange(1000) // 10, "chunks": (100,)},
    "time": {
        "dims": ("time",),
        "values": np.arange(1000),
        "chunks": (1000,),
        "attributes": {"units": "days since 2017-04-06"},
    },
}


def said(outcome):
    """The output as one line: long rows are wrapped."""
    return " ".join(outcome.out.split())


def test_splits_are_printed_in_the_words_of_the_coordinate(cli, project):
    split = {"val": {"time": "2017-12"}, "test": {"time": {"start": "2018-01-03"}}, "gap": 2}
    job = project({"data": {"split": split}}, arrays=DATED)
    outcome = cli("plan", job.config)
    assert outcome.code == 0, outcome.err
    assert (
        "splits by time: train 2017-04-06 to 2017-11-28, 237 samples; val 2017-12-01 to 2017-12-31, 31 samples; "
        "test 2018-01-03 to 2019-12-31, 728 samples; dropped: 4 beside a split that is given" in said(outcome)
    )
    assert "leakage" not in outcome.out
    assert "data.split_order" not in outcome.out
    record = last(cli("--json", "plan", job.config))
    assert record["splits"]["test"] == {
        "by": "time",
        "places": 728,
        "ranges": [["2018-01-03", "2019-12-31"]],
        "num_ranges": 1,
        "groups": None,
        "samples": 728,
    }
    assert record["dropped"] == {"split": 0, "gaps": 0, "missing": 0, "left_out": 4}


def test_groups_and_what_is_chosen_are_printed(cli, project):
    data = {"split": {"by": "donor", "val": 0.1, "test": 0.2}, "sel": {"time": {"start": "2018"}, "k": 1}}
    job = project({"data": data}, arrays={**DATED, "k": {"dims": ("k",), "values": [0, 1, 2], "chunks": (3,)}})
    (job.dir / "model.py").write_text("from torch import nn\ndef build():\n    return nn.Sequential(")
    with (job.dir / "model.py").open("a") as file:
        file.write("nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4))\n")
    outcome = cli("plan", job.config)
    assert outcome.code == 0, outcome.err
    text = said(outcome)
    assert "chosen time 2018-01-01 to 2019-12-31, 730 of 1,000 places" in text
    assert "chosen k 1" in text
    assert (
        "splits by donor: train 51 groups, 510 samples; val 7 groups, 70 samples; test 15 groups, 150 samples" in text
    )
    record = last(cli("--json", "plan", job.config))
    assert [record["splits"][name]["groups"] for name in ("train", "val", "test")] == [51, 7, 15]
    assert record["chosen"]["time"]["first"] == "2018-01-01"


def test_shares_of_rows_along_time_get_a_sentence_about_leakage(cli, project):
    job = project(arrays=DATED)
    text = said(cli("plan", job.config))
    assert "leakage rows of time that follow each other may be alike, and are drawn at random" in text
    assert last(cli("--json", "plan", job.config))["leakage"].startswith("rows of time that follow")
    for setting in ("data.split_order=sequential", "data.target_offsets=[0]", "data.split={ by = 'donor' }"):
        assert "leakage" not in said(cli("plan", job.config, "--set", setting))
