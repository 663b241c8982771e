"""dtrain train: the run directory, continuing, and what a run refuses."""

import hashlib
import json
import re
import shutil

import pytest
import tomli_w
import yaml
from safetensors import safe_open

from tests.cli.helpers import MODEL, TABLES, blobs, history, kept, last, objects, tree
from tests.training import bits, rewrite

ROW = [
    "event",
    "round",
    "train_loss",
    "val_loss",
    "val_accuracy",
    "samples",
    "steps",
    "seconds",
    "bytes_reduced",
    "rejected",
    "retried",
    "params_sha256",
    "replica_loss",
    "update_norm",
    "update_cosine",
    "seconds_steps",
    "seconds_waiting",
    "seconds_fetch",
    "seconds_decode",
    "seconds_gather",
    "seconds_model",
    "seconds_reduce",
    "seconds_evaluate",
]
DONE = {"event", "reason", "rounds", "params_sha256", "val_loss", "run", "limited_by"}


def sha256_of(path):
    digest = hashlib.sha256()
    with safe_open(path, "np") as file:
        for name in sorted(file.keys()):
            array = file.get_tensor(name)
            digest.update(f"{name}\0{array.dtype}\0{','.join(map(str, array.shape))}\0".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes(order="C"))
    return digest.hexdigest()


# The run directory ---------------------------------------------------------------------------------------


def test_the_run_directory_is_as_specified(cli, project):
    job = project()
    outcome = cli("--json", "train", job.config)
    assert outcome.code == 0, outcome.err
    assert {p.name for p in job.run.iterdir()} == {
        "config.toml",
        "plan.json",
        "env.json",
        "history.jsonl",
        "events.jsonl",
        "rounds",
    }
    rows = history(job.run)
    assert [list(row) for row in rows] == [ROW, ROW]
    assert [(row["event"], row["round"]) for row in rows] == [("round", 1), ("round", 2)]
    for row in rows:
        assert (row["samples"], row["steps"], row["rejected"], row["retried"]) == (48, 6, 0, 0)
        assert len(row["replica_loss"]) == 2
        assert row["train_loss"] == pytest.approx(sum(row["replica_loss"]) / 2)
        assert 0 <= row["val_accuracy"] <= 1
        committed = job.run / "rounds" / f"round-{row['round']:06d}"
        assert {"params.safetensors", "manifest.json"} < {p.name for p in committed.iterdir()}
        assert sha256_of(committed / "params.safetensors") == row["params_sha256"]

    printed = objects(outcome.out)
    assert printed[:-1] == rows
    assert printed[-1] == {
        "event": "done",
        "reason": "rounds",
        "rounds": 2,
        "params_sha256": rows[-1]["params_sha256"],
        "val_loss": rows[-1]["val_loss"],
        "run": "job/runs/job",
        "limited_by": printed[-1]["limited_by"],
    }
    assert sum(printed[-1]["limited_by"]["shares"].values()) == pytest.approx(1.0)
    assert set(printed[-1]) == DONE
    assert outcome.err.splitlines()[-1] == "next: dtrain eval job/runs/job"


def test_the_committed_parameters_are_the_models_state_dict(cli, project):
    job = project()
    assert cli("-q", "train", job.config).code == 0
    with safe_open(job.run / "rounds/round-000002/params.safetensors", "np") as file:
        assert {name: file.get_tensor(name).shape for name in file.keys()} == {  # noqa: SIM118
            "layers.0.weight": (5, 3),
            "layers.0.bias": (5,),
            "layers.2.weight": (4, 5),
            "layers.2.bias": (4,),
        }


def test_events_name_every_commit(cli, project):
    job = project()
    assert cli("-q", "train", job.config).code == 0
    events = objects((job.run / "events.jsonl").read_text())
    assert [(e["event"], e["round"]) for e in events] == [("RoundCommitted", 1), ("RoundCommitted", 2)]


def test_in_words(cli, project):
    job = project()
    outcome = cli("train", job.config)
    assert outcome.code == 0
    sha = history(job.run)[-1]["params_sha256"]
    assert re.fullmatch(
        rf"done \(rounds\): 2 rounds, val_loss \d\.\d{{4}}\nrun job/runs/job\nparams_sha256 {sha}\n", outcome.out
    )
    told = outcome.err.splitlines()
    assert told[0] == "job/runs/job: 48 training samples, 2 replicas on 2 workers"
    assert [line.split("  ")[0] for line in told[1:3]] == ["round 1", "round 2"]
    assert re.match(r"limited by (fetch|decode|gather|model|reduce|evaluate) \(\d+% of the time\)", told[3])


def test_without_validation_there_is_no_val_loss(cli, project):
    job = project({"data": {"split": {"val": 0.0, "test": 0.0}}})
    outcome = cli("--json", "train", job.config)
    assert outcome.code == 0
    assert not [key for row in history(job.run) for key in row if key.startswith("val_")]
    assert set(last(outcome)) == DONE
    assert last(outcome)["val_loss"] is None


@pytest.mark.slow  # a run on a local cluster that is stopped by Ctrl-C says the same
def test_rounds_without_an_evaluation_have_no_val_keys(cli, project):
    job = project({"train": {"eval_every": 2, "rounds": 3}})
    outcome = cli("--json", "train", job.config)
    *rows, done = objects(outcome.out)
    assert rows == history(job.run)
    assert [list(row) for row in rows] == [[key for key in ROW if not key.startswith("val")], ROW, ROW]
    assert done["val_loss"] == rows[-1]["val_loss"]
    stopped = project({"train": {"eval_every": 9, "rounds": 3}}, name="stopped")
    outcome = cli("--json", "train", stopped.config, "--max-time", "0s")
    row, done = objects(outcome.out)[:2]
    assert (outcome.code, done["reason"], list(row)) == (75, "max_time", ROW)
    assert done["val_loss"] == row["val_loss"]


def test_the_same_run_on_a_local_cluster_gives_the_same_bits(cli, project, trained):
    job = project()
    outcome = cli("--json", "train", job.config, "--scheduler", "local", "--set", "cluster.workers=2")
    assert outcome.code == 0, outcome.err
    assert bits(history(job.run)) == bits(trained(2))


# Names, settings, formats ------------------------------------------------------------------------------------


def test_a_run_has_the_name_that_it_is_given(cli, project):
    job = project()
    outcome = cli("--json", "train", job.config, "--run", "lr-0.1_a")
    assert last(outcome)["run"] == "job/runs/lr-0.1_a"
    assert [p.name for p in (job.dir / "runs").iterdir()] == ["lr-0.1_a"]


def test_the_default_name_is_that_of_the_directory_in_letters_that_all_systems_know(cli, project):
    job = project(name="My job, ünnamed")
    outcome = cli("--json", "train", job.config)
    assert outcome.code == 0, outcome.err
    assert last(outcome)["run"] == "My job, ünnamed/runs/My-job-nnamed"


def test_the_config_may_lie_in_the_working_directory(cli, project, monkeypatch):
    job = project()
    monkeypatch.chdir(job.dir)
    assert last(cli("--json", "train", "dtrain.toml"))["run"] == "runs/job"


def test_a_run_elsewhere_is_named_by_its_whole_path(cli, project, monkeypatch, tmp_path):
    job = project()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    outcome = cli("--json", "train", job.dir / "dtrain.toml")
    assert last(outcome)["run"] == str(job.dir / "runs" / "job")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".", "..", "a b", "ä", "x" * 65, ".hidden"])
def test_names_that_no_run_may_have(cli, project, name, tmp_path):
    job = project()
    before = tree(tmp_path)
    outcome = cli("--json", "train", job.config, "--run", name)
    assert outcome.code == last(outcome)["code"] == 2
    assert f'run "{name}"' in last(outcome)["message"]
    assert tree(tmp_path) == before


def test_settings_of_several_kinds(cli, project):
    job = project()
    settings = [
        "train.rounds=3",
        "train.optimizer=adam",
        "train.optimizer_args={ lr = 0.01, betas = [0.8, 0.9], amsgrad = true }",
        "data.split.val = 0.2",
        "data.shuffle=false",
        'train.metrics=["accuracy", "perplexity"]',
        "model_args.hidden=7",
        "average.weights=uniform",
        "run.keep=1",
    ]
    outcome = cli("--json", "train", job.config, *[word for text in settings for word in ("--set", text)])
    assert outcome.code == 0, outcome.err
    values = last(cli("--json", "config", "show", job.run))["values"]
    assert {key: values[key]["value"] for key in ("train.rounds", "train.optimizer", "data.shuffle", "model_args")} == {
        "train.rounds": 3,
        "train.optimizer": "adam",
        "data.shuffle": False,
        "model_args": {"hidden": 7},
    }
    assert values["train.optimizer_args"]["value"] == {"lr": 0.01, "betas": [0.8, 0.9], "amsgrad": True}
    assert history(job.run)[-1]["val_perplexity"] > 1
    assert len(kept(job.run)) <= 2
    assert cli("-q", "train", job.config, *[w for text in settings for w in ("--set", text)]).code == 0


def test_the_last_setting_of_a_key_counts(cli, project):
    outcome = cli("--json", "train", project().config, "--set", "train.rounds=5", "--set", "train.rounds=1")
    assert last(outcome)["rounds"] == 1


@pytest.mark.parametrize(
    ("setting", "code", "words"),
    [
        ("train.rounds", 2, ["--set train.rounds", "key=value"]),
        ("=5", 2, ["--set =5"]),
        ("train.rounds=many", 3, ["train.rounds", "many"]),
        ("train.rounds=2.5", 3, ["train.rounds", "2.5"]),
        ("train.rounds=", 3, ["train.rounds"]),
        ("train.rouns=2", 3, ["train.rouns", 'did you mean "rounds"']),
        ("rounds=2", 3, ["rounds", 'did you mean "train.rounds"']),
        ("model.name=a", 3, ["model", "not a table"]),
        ("train.rounds.more=2", 3, ["rounds", "not a table"]),
        ("data.split.val=1.5", 3, ["data.split.val"]),
    ],
)
def test_settings_that_mean_nothing(cli, project, setting, code, words):
    outcome = cli("--json", "train", project().config, "--set", setting)
    assert outcome.code == code
    for word in words:
        assert word in last(outcome)["message"]


def test_paths_in_settings_are_relative_to_the_working_directory(cli, project, tmp_path):
    job = project()
    shutil.move(job.dir / "train.zarr", tmp_path / "moved.zarr")
    outcome = cli("--json", "train", job.config, "--set", "data.path=moved.zarr", "--set", "run.dir=elsewhere")
    assert outcome.code == 0, outcome.err
    assert last(outcome)["run"] == "elsewhere/job"


@pytest.mark.parametrize(
    ("name", "dump"),
    [("job.yaml", yaml.safe_dump), ("job.yml", yaml.safe_dump), ("job.json", json.dumps), ("job", tomli_w.dumps)],
)
def test_other_formats_of_the_config_file(cli, project, trained, name, dump):
    job = project()
    (job.dir / name).write_text(dump(TABLES))
    outcome = cli("--json", "train", job.dir / name)
    assert outcome.code == 0, outcome.err
    assert last(outcome)["params_sha256"] == trained(2)[-1]["params_sha256"]


# Continuing --------------------------------------------------------------------------------------------------


def test_the_same_command_again_says_the_same_and_touches_no_cluster(cli, project):
    job = project()
    first = cli("--json", "train", job.config)
    before = tree(job.run)
    for scheduler in ("serial", "tcp://127.0.0.1:1"):  # nothing listens there
        again = cli("--json", "train", job.config, "--scheduler", scheduler)
        assert again.code == 0, again.err
        assert objects(again.out) == [last(first)]
        assert {k: v for k, v in tree(job.run).items() if "/" in k or k == "history.jsonl"} == {
            k: v for k, v in before.items() if "/" in k or k == "history.jsonl"
        }


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tables", [{}, {"train": {"local_steps": 4}}, {"train": {"batch_size": "full"}}])
def test_more_rounds_continue_as_if_there_had_been_no_break(cli, project, trained, tables):
    job = project(tables)
    assert cli("-q", "train", job.config, "--set", "train.rounds=2").code == 0
    outcome = cli("--json", "train", job.config, "--set", "train.rounds=4")
    assert outcome.code == 0, outcome.err
    assert "continuing after round 2 of 4" in outcome.err
    assert [row["round"] for row in objects(outcome.out)[:-1]] == [3, 4]
    assert bits(history(job.run)) == bits(trained(4, tables=tables))


def test_fewer_rounds_than_there_are(cli, project):
    job = project()
    first = cli("--json", "train", job.config)
    outcome = cli("--json", "train", job.config, "--set", "train.rounds=1")
    assert outcome.code == 0
    assert objects(outcome.out) == [last(first)]


def test_time_over_is_temporary(cli, project, trained):
    job, limit = project({"train": {"rounds": 4}}), "0s"
    outcome = cli("--json", "train", job.config, "--max-time", limit)
    assert outcome.code == 75
    row, done, fault = objects(outcome.out)
    assert row == history(job.run)[0]
    assert set(done) == DONE
    assert (done["event"], done["reason"], done["rounds"]) == ("done", "max_time", 1)
    assert done["params_sha256"] == row["params_sha256"]
    assert (fault["event"], fault["code"]) == ("error", 75)
    assert kept(job.run) == [1]

    assert cli("-q", "train", job.config, "--max-time", limit).code == 75
    outcome = cli("--json", "train", job.config, "--max-time", "1h")
    assert outcome.code == 0
    assert last(outcome)["reason"] == "rounds"
    assert bits(history(job.run)) == bits(trained(4))
    assert cli("-q", "train", job.config, "--max-time", limit).code == 0


def test_time_that_is_over_in_the_last_round_is_no_reason_to_stop(cli, project):
    assert cli("-q", "train", project().config, "--set", "train.rounds=1", "--max-time", "0s").code == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.batch_size=4"], "train.batch_size was 8, is 4"),
        (["train.optimizer_args.lr=0.2"], 'train.optimizer_args was {"lr": 0.1, "momentum": 0.9}, is {"lr": 0.2'),
        (["train.seed=1"], "train.seed was 0, is 1"),
        (["train.local_steps=3"], "train.local_steps was not given, is 3"),
        (["data.split.val=0.2"], "data.split.val was 0.1, is 0.2"),
        (["data.shuffle=false"], "data.shuffle was true, is false"),
        (["average.replicas=3"], 'average.replicas was "auto", is 3'),
        (["average.weights=uniform"], 'average.weights was "samples", is "uniform"'),
        (["cluster.threads=2"], "cluster.threads was 1, is 2"),
        (["model_args.hidden=6"], 'model_args was {}, is {"hidden": 6}'),
        (["train.loss=mse"], 'train.loss was "cross_entropy", is "mse"'),
        (["train.metrics=[]"], 'train.metrics was ["accuracy"], is []'),
        (["train.seed=1", "train.batch_size=4"], "train.batch_size was 8, is 4; train.seed was 0, is 1"),
    ],
)
def test_a_run_refuses_another_configuration(cli, job, settings, said):
    before = tree(job.run)
    more = [word for text in settings for word in ("--set", text)]
    outcome = cli("--json", "train", job.config, "--set", "train.rounds=5", *more)
    assert outcome.code == last(outcome)["code"] == 4
    assert f"job/runs/job was started with another configuration: {said}" in last(outcome)["message"]
    assert "--run" in last(outcome)["hint"]
    assert tree(job.run) == before


def test_a_schedule_over_the_whole_run_fixes_its_rounds(cli, project):
    job = project({"train": {"schedule": "cosine"}})
    assert cli("-q", "train", job.config).code == 0
    outcome = cli("train", job.config, "--set", "train.rounds=3")
    assert outcome.code == 4
    assert "train.rounds was 2, is 3" in outcome.err
    assert cli("-q", "train", job.config).code == 0


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "setting",
    [
        "cluster.workers=3",
        "cluster.memory=4GB",
        "cluster.allow_plain=true",
        "run.keep=1",
        "run.commit_every=2",
        "data.memory=1GB",
        "data.reader=zarr",
    ],
)
def test_what_a_run_may_change(cli, job, trained, setting):
    outcome = cli("--json", "train", job.config, "--set", "train.rounds=5", "--set", setting)
    assert outcome.code == 0, outcome.err
    assert last(outcome)["params_sha256"] == trained(5)[-1]["params_sha256"]


def test_a_change_and_back_again(cli, project):
    job = project()
    assert cli("-q", "train", job.config, "--set", "train.local_steps=2").code == 0
    assert cli("-q", "train", job.config).code == 4
    assert cli("-q", "train", job.config, "--set", "train.local_steps=2", "--set", "train.rounds=3").code == 0


@pytest.mark.parametrize("rounds", [2, 3])
def test_a_run_refuses_another_model(cli, project, rounds):
    job = project()
    assert cli("-q", "train", job.config).code == 0
    (job.dir / "model.py").write_text(MODEL.replace("Tanh", "ReLU"))
    outcome = cli("train", job.config, "--set", f"train.rounds={rounds}")
    assert outcome.code == 4
    assert "other code of model" in outcome.err
    (job.dir / "model.py").write_text(MODEL)
    assert cli("-q", "train", job.config, "--set", f"train.rounds={rounds}").code == 0


def test_a_run_refuses_another_module_that_its_model_uses(cli, project):
    job = project(model="import torch\nimport other\n\ndef build():\n    return torch.nn.Linear(3, other.CLASSES)\n")
    (job.dir / "other.py").write_text("CLASSES = 4\n")
    assert cli("-q", "train", job.config).code == 0
    (job.dir / "other.py").write_text("CLASSES = 4  # as before\n")
    outcome = cli("train", job.config)
    assert outcome.code == 4
    assert "other code of model" in outcome.err


def test_a_run_refuses_data_of_another_shape(cli, project, write_store):
    job = project()
    assert cli("-q", "train", job.config).code == 0
    shutil.rmtree(job.dir / "train.zarr")
    write_store(job.dir / "train.zarr", blobs(70))
    outcome = cli("--json", "train", job.config, "--set", "train.rounds=3")
    assert outcome.code == last(outcome)["code"] == 5
    assert "train.zarr" in last(outcome)["message"]


def test_a_copy_of_a_project_continues(cli, project, trained, tmp_path):
    job = project()
    assert cli("-q", "train", job.config, "--run", "a").code == 0
    shutil.move(job.dir, tmp_path / "moved")
    outcome = cli("--json", "train", "moved/dtrain.toml", "--run", "a", "--set", "train.rounds=3")
    assert outcome.code == 0, outcome.err
    assert last(outcome)["params_sha256"] == trained(3)[-1]["params_sha256"]


# After a crash --------------------------------------------------------------------------------------------------


def test_history_beyond_the_newest_commit_is_cut_back(cli, project, trained):
    job = project()
    assert cli("-q", "train", job.config).code == 0
    path = job.run / "history.jsonl"
    rows = path.read_text().splitlines()
    lost = json.dumps({**json.loads(rows[-1]), "round": 3, "params_sha256": "f" * 64})
    path.write_text("\n".join([*rows, lost, '{"event": "round", "rou']))
    outcome = cli("--json", "train", job.config, "--set", "train.rounds=4")
    assert outcome.code == 0, outcome.err
    assert bits(history(job.run)) == bits(trained(4))


def test_a_torn_newest_round_is_replaced(cli, project, trained):
    job = project()
    assert cli("-q", "train", job.config).code == 0
    torn = job.run / "rounds/round-000002/params.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    outcome = cli("--json", "train", job.config)
    assert outcome.code == 0, outcome.err
    assert "round 2 is damaged and was skipped" in outcome.err
    assert [row.get("round") for row in objects(outcome.out)] == [2, None]
    assert bits(history(job.run)) == bits(trained(2))
    assert sha256_of(torn) == last(outcome)["params_sha256"]
    assert "RoundDamaged" in (job.run / "events.jsonl").read_text()


def test_no_round_that_can_be_read(cli, project):
    job = project()
    assert cli("-q", "train", job.config).code == 0
    for path in (job.run / "rounds").glob("*/manifest.json"):
        path.write_text("{")
    outcome = cli("--json", "train", job.config, "--set", "train.rounds=3")
    assert outcome.code == 5
    assert "none of its 2 committed rounds" in last(outcome)["message"]


def test_what_a_killed_process_left_is_swept_up(cli, project):
    job = project()
    assert cli("-q", "train", job.config).code == 0
    left = job.run / "rounds/.round-000003-0a1b2c3d"
    left.mkdir()
    (left / "params.safetensors").write_bytes(b"half")
    files = [job.run / f".{name}-0a1b2c3d" for name in ("config.toml", "plan.json", "env.json", "history.jsonl")]
    mine = [job.run / name for name in (".nfs-0a1b2c3d", ".config.toml-mine", "config.toml-0a1b2c3d")]
    for file in (*files, *mine):
        file.write_bytes(b"half")
    (job.run / "LOCK").write_text('{"host": "', "utf-8")
    assert cli("-q", "train", job.config, "--set", "train.rounds=3").code == 0
    assert not left.exists()
    assert not any(file.exists() for file in files)
    assert all(file.exists() for file in mine)
    assert not (job.run / "LOCK").exists()


def test_the_newest_rounds_are_kept_and_the_best(cli, project):
    job = project({"train": {"optimizer_args": {"lr": 0.05}}, "run": {"keep": 2}})
    assert cli("-q", "train", job.config, "--set", "train.rounds=9").code == 0
    best = min(history(job.run), key=lambda row: row["val_loss"])["round"]
    assert kept(job.run) == sorted({8, 9, best})
    worse = project({"train": {"optimizer_args": {"lr": 0.05}, "rounds": 1}}, name="worse")
    assert cli("-q", "train", worse.config).code == 0
    rows = history(worse.run)
    rewrite(worse.run, [{**rows[0], "val_loss": -1.0}])
    assert cli("-q", "train", worse.config, "--set", "train.rounds=6", "--set", "run.keep=1").code == 0
    assert kept(worse.run) == [1, 6]


def test_the_first_and_the_last_round_are_committed_in_any_case(cli, project):
    job = project({"run": {"commit_every": "auto", "keep": 9}})
    assert cli("-q", "train", job.config, "--set", "train.rounds=7").code == 0
    assert {1, 7} <= set(kept(job.run))


def test_rounds_are_committed_as_often_as_the_config_says(cli, project, trained):
    job = project({"run": {"commit_every": 3, "keep": 9}})
    assert cli("-q", "train", job.config, "--set", "train.rounds=7").code == 0
    assert kept(job.run) == [3, 6, 7]
    assert bits(history(job.run)) == bits(trained(7))


# The lock ----------------------------------------------------------------------------------------------------


def test_a_run_has_one_driver(cli, project):
    from dtrain.lock import holder, locked

    job = project()
    assert cli("-q", "train", job.config).code == 0
    before = {k: v for k, v in tree(job.run).items() if k != "LOCK"}
    with locked(job.run):
        pid = holder(job.run)["pid"]
        outcome = cli("--json", "train", job.config, "--set", "train.rounds=3")
        assert outcome.code == last(outcome)["code"] == 4
        assert f"process {pid}" in last(outcome)["message"]
        assert {k: v for k, v in tree(job.run).items() if k != "LOCK"} == before
        assert cli("-q", "train", job.config, "--run", "another").code == 0
    assert cli("-q", "train", job.config, "--set", "train.rounds=3").code == 0


def test_a_driver_on_another_machine_counts_as_long_as_it_beats(cli, project):
    import os
    import time

    job = project()
    assert cli("-q", "train", job.config).code == 0
    lock = job.run / "LOCK"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "2026-01-01T00:00:00+0000"}))
    outcome = cli("--json", "train", job.config, "--set", "train.rounds=3")
    assert outcome.code == 4
    assert "process 7 on elsewhere" in last(outcome)["message"]
    long_ago = time.time() - 3600
    os.utime(lock, (long_ago, long_ago))
    assert cli("-q", "train", job.config, "--set", "train.rounds=3").code == 0
