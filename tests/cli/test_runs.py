"""dtrain status and dtrain eval: what is known of a run afterwards, or while it trains."""

import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.cli.helpers import blobs, history, kept, last, objects, tree
from tests.training import rewrite

PACE = {"samples_per_second", "seconds_left", "seconds_since_round", "retried", "rejected"}
LIVE = {
    *("event", "run", "state", "round", "rounds", "committed", "best_round", "best_seen_round", "last", "evaluated"),
    *("holder", *PACE),
}


@pytest.fixture
def run(job):
    return job.run


def best(run):
    return min(history(run), key=lambda row: row["val_loss"])["round"]


# status --------------------------------------------------------------------------------------------------------


def test_the_status_of_a_run_that_is_done(cli, run):
    outcome = cli("--json", "status", run)
    assert outcome.code == 0
    assert outcome.err == ""
    (found,) = objects(outcome.out)
    pace = {name: found.pop(name) for name in PACE}
    assert pace.pop("samples_per_second") > 0
    assert pace.pop("seconds_since_round") >= 0
    assert pace == {"seconds_left": None, "retried": 0, "rejected": 0}
    assert found == {
        "event": "status",
        "run": "job/runs/job",
        "state": "done",
        "round": 4,
        "rounds": 4,
        "committed": [1, 2, 3, 4],
        "best_round": best(run),
        "best_seen_round": best(run),
        "last": history(run)[-1],
        "evaluated": history(run)[-1],
        "holder": None,
    }


def test_the_status_in_words(cli, run):
    outcome = cli("status", run)
    lines = outcome.out.splitlines()
    assert lines[0] == "run     job/runs/job: done"
    assert lines[1] == "rounds  4 of 4, committed 1, 2, 3, 4"
    row = history(run)[-1]
    assert lines[2] == (
        f"last    round 4: train_loss {row['train_loss']:.4f}, val_loss {row['val_loss']:.4f}, "
        f"val_accuracy {row['val_accuracy']:.4f}"
    )
    assert lines[3].startswith(f"best    round {best(run)}: ")
    assert outcome.err == "next: dtrain eval job/runs/job\n"


def test_the_next_step_after_a_stop(cli, run):
    shutil.rmtree(run / "rounds/round-000004")
    assert cli("status", run).err == "next: dtrain train job/dtrain.toml continues\n"


def test_the_status_names_the_last_evaluated_round_beside_the_last(cli, project):
    job = project({"train": {"eval_every": 3, "rounds": 6}})
    assert cli("-q", "train", job.config).code == 0
    rows = history(job.run)[:5]
    shutil.rmtree(job.run / "rounds/round-000006")
    rewrite(job.run, rows)  # as while it trains
    found = last(cli("--json", "status", job.run))
    assert (found["last"], found["evaluated"], found["best_round"]) == (rows[4], rows[2], 3)
    lines = cli("status", job.run).out.splitlines()
    assert lines[2] == f"last       round 5: train_loss {rows[4]['train_loss']:.4f}"
    assert lines[3].startswith(f"evaluated  round 3: train_loss {rows[2]['train_loss']:.4f}, val_loss ")
    assert lines[4].startswith("best       round 3: ")


def test_a_metric_of_zero_is_shown(cli, run):
    rows = [{**row, "val_accuracy": 0.0} for row in history(run)]
    rewrite(run, rows)
    assert "val_accuracy 0.0000" in cli("status", run).out


def test_the_status_of_a_run_that_was_stopped(cli, project):
    job = project()
    assert cli("-q", "train", job.config, "--max-time", "0s").code == 75
    found = last(cli("--json", "status", job.run))
    assert (found["state"], found["round"], found["rounds"], found["committed"]) == ("stopped", 1, 2, [1])
    assert "job/runs/job: stopped" in cli("status", job.run).out


def test_a_run_that_met_its_target_is_done(cli, project):
    job = project({"train": {"rounds": 9}, "stop": {"target": 100.0}})
    outcome = cli("-q", "--json", "train", job.config)
    assert outcome.code == 0, outcome.err
    assert (last(outcome)["reason"], last(outcome)["rounds"]) == ("target", 1)
    found = last(cli("--json", "status", job.run))
    assert (found["state"], found["round"], found["rounds"]) == ("done", 1, 9)
    assert objects(cli("-q", "--json", "train", job.config).out) == [last(outcome)]


def test_a_run_whose_last_round_is_not_committed_is_not_done(cli, job):
    shutil.rmtree(job.run / "rounds/round-000004")
    found = last(cli("--json", "status", job.run))
    assert (found["state"], found["round"], found["committed"]) == ("stopped", 4, [1, 2, 3])


def test_the_status_of_a_run_that_trains(cli, project):
    from dtrain.lock import locked

    job = project()
    assert cli("-q", "train", job.config, "--max-time", "0s").code == 75
    with locked(job.run):
        before = tree(job.run)
        found = last(cli("--json", "status", job.run))
        assert set(found) == LIVE
        assert found["state"] == "running"
        assert found["holder"]["pid"] == os.getpid()
        assert f"job/runs/job: running (process {os.getpid()} on " in cli("status", job.run).out
        assert tree(job.run) == before


def test_the_status_of_a_run_without_a_round(cli, project):
    job = project(model="import torch\n\ndef build():\n    return torch.nn.Linear(3, 4)\n")
    assert cli("-q", "train", job.config).code == 0
    shutil.rmtree(job.run / "rounds")
    (job.run / "history.jsonl").unlink()
    found = last(cli("--json", "status", job.run))
    assert (found["state"], found["round"], found["committed"], found["last"]) == ("stopped", 0, [], None)
    assert "0 of 2, committed none" in cli("status", job.run).out


def test_a_half_written_line_of_history_is_no_obstacle(cli, run):
    path = run / "history.jsonl"
    shutil.rmtree(run / "rounds/round-000004")
    path.write_text(path.read_text()[:-30])
    found = last(cli("--json", "status", run))
    assert (found["round"], found["committed"]) == (3, [1, 2, 3])


def test_without_a_name_the_newest_run(cli, project):
    for name in ("new", "old"):
        assert cli("-q", "train", project(name=name).config).code == 0
    for path in (p for p in Path("old/runs/old").rglob("*") if p.is_file()):
        os.utime(path, (1, 1))
    assert last(cli("--json", "status"))["run"] == "new/runs/new"
    assert last(cli("--json", "status", "old"))["run"] == "old/runs/old"


def test_watching_a_run_that_is_done_ends_at_once(cli, run):
    outcome = cli("--json", "status", run, "--watch")
    assert outcome.code == 0
    assert [row["state"] for row in objects(outcome.out)] == ["done"]


def test_watching_a_run_until_it_ends(cli, run):
    from dtrain.lock import locked

    ready = threading.Event()

    def train():
        with locked(run):
            ready.set()
            time.sleep(1.5)

    driver = threading.Thread(target=train)
    driver.start()
    ready.wait()
    outcome = cli("--json", "status", run, "--watch")
    driver.join()
    states = [row["state"] for row in objects(outcome.out)]
    assert states == ["running", "done"]
    assert all(row["samples_per_second"] > 0 for row in objects(outcome.out))
    assert [row["seconds_left"] is None for row in objects(outcome.out)] == [False, True]


def test_watching_prints_the_rounds_and_the_end(cli, run):
    outcome = cli("status", run, "--watch")
    lines = outcome.out.splitlines()
    assert (outcome.code, outcome.err, lines[0]) == (0, "", "job/runs/job: done")
    assert lines[1].split()[:3] == ["round", "train", "val"]
    assert [line.split()[0] for line in lines[2:6]] == ["1", "2", "3", "4"]
    assert sum("*" in line for line in lines[2:6]) >= 1
    assert lines[6].split()[:2] == ["run", "job/runs/job:"]
    assert "samples/s" in lines[-1]


def test_ctrl_c_stops_watching_and_is_no_fault(cli, run, monkeypatch):
    from dtrain.lock import locked
    from dtrain.report import watch

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=interrupt))
    with locked(run):
        outcome = cli("status", run, "--watch")
    assert outcome.code == 0
    assert "Stopped" not in outcome.err


# eval ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1", "3", "last", "best"])
def test_the_values_of_validation_are_those_of_the_history(cli, run, number):
    outcome = cli("--json", "eval", run, "--split", "val", "--round", number)
    assert outcome.code == 0, outcome.err
    (found,) = objects(outcome.out)
    wanted = {"last": 4, "best": best(run)}.get(number) or int(number)
    row = history(run)[wanted - 1]
    assert found == {
        "event": "eval",
        "run": "job/runs/job",
        "round": wanted,
        "split": "val",
        "samples": 6,
        "loss": row["val_loss"],
        "accuracy": row["val_accuracy"],
    }


def test_the_default_is_the_last_round_on_the_test_split(cli, run):
    found = last(cli("--json", "eval", run))
    assert (found["round"], found["split"], found["samples"]) == (4, "test", 6)
    assert found == last(cli("--json", "eval", run, "--round", "last", "--split", "test"))


def test_another_round_that_is_the_best_is_mentioned(cli, run):
    rows = [{**row, "val_loss": abs(row["round"] - 2.0)} for row in history(run)]
    rewrite(run, rows)
    note = "job: this is round 4, the last one; round 2 has the best val_loss. --round best evaluates it.\n"
    for output in ((), ("--json",)):
        outcome = cli(*output, "eval", run)
        assert (outcome.code, outcome.err) == (0, note)
    for arguments in (("--round", "last"), ("--round", "best"), ("--round", "4")):
        assert cli("eval", run, *arguments).err == "next: dtrain predict job/runs/job --out job-predicted.zarr\n"
    assert cli("-q", "eval", run).err == ""
    assert last(cli("--json", "eval", run, "--round", "best"))["round"] == 2


def test_the_whole_store(cli, run):
    found = last(cli("--json", "eval", run, "--split", "all"))
    assert found["samples"] == 60
    assert found["loss"] > 0


def test_the_values_in_words(cli, run):
    found = last(cli("--json", "eval", run))
    outcome = cli("eval", "job")
    assert outcome.out.splitlines() == [
        f"run       job/runs/job round {found['round']}",
        "split     test, 6 samples",
        f"loss      {found['loss']:.6g}",
        f"accuracy  {found['accuracy']:.6g}",
    ]


def test_other_data(cli, run, write_store, tmp_path):
    whole = last(cli("--json", "eval", run, "--split", "all"))
    shutil.copytree("job/train.zarr", "copy.zarr")
    outcome = cli("--json", "eval", run, "--data", "copy.zarr")
    assert outcome.code == 0, outcome.err
    assert last(outcome)["split"] == "all"
    assert last(outcome)["samples"] == 60
    assert last(outcome)["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert last(cli("--json", "eval", run, "--data", "copy.zarr", "--split", "test"))["samples"] == 6

    write_store(tmp_path / "few.zarr", blobs(10, chunk=3))
    outcome = cli("--json", "eval", run, "--data", "few.zarr")
    assert outcome.code == 0, outcome.err
    assert last(outcome)["samples"] == 10


def test_a_single_sample_of_other_data(cli, run, write_store, tmp_path):
    write_store(tmp_path / "one.zarr", blobs(1, chunk=1))
    outcome = cli("--json", "eval", run, "--data", "one.zarr")
    assert outcome.code == 0, outcome.err
    assert last(outcome)["samples"] == 1


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("path", 5, ["nothing.zarr"]),
        ("variable", 3, ['"label"']),
        ("shape", 3, ["8x4 and 3x5"]),
        ("nan", 5, ["x[3, 0]"]),
    ],
)
def test_other_data_that_do_not_fit(cli, run, write_store, tmp_path, change, code, words):
    arrays = blobs(20)
    if change == "variable":
        arrays["lable"] = arrays.pop("label")
    elif change == "shape":
        arrays["x"] = {**arrays["x"], "values": np.zeros((20, 4), "float32"), "chunks": (20, 4)}
    elif change == "nan":
        arrays["x"]["values"][3, 0] = np.nan
    if change != "path":
        write_store(tmp_path / "other.zarr", arrays)
    outcome = cli("--json", "eval", run, "--data", "nothing.zarr" if change == "path" else "other.zarr")
    assert outcome.code == code, outcome.err
    for word in words:
        assert word in last(outcome)["message"]


def test_evaluation_writes_nothing(cli, run):
    before = tree(run)
    assert cli("-q", "eval", run).code == 0
    assert tree(run) == before


def test_how_an_evaluation_reads_can_be_set(cli, run):
    plain = last(cli("--json", "eval", run))
    assert last(cli("--json", "eval", run, "--set", "data.memory=1GB", "--set", "data.reader=zarr")) == plain
    outcome = cli("--json", "eval", run, "--set", "train.loss=mse")
    assert outcome.code == 3
    assert "train.loss" in last(outcome)["message"]
    assert "data.storage_options" in last(outcome)["hint"]


@pytest.mark.parametrize("command", ["eval", "init"])
def test_data_may_be_a_url(cli, run, command):
    where = ["eval", run] if command == "eval" else ["init", "elsewhere"]
    outcome = cli("--json", *where, "--data", "memory://none.zarr")
    assert outcome.code == 5
    assert last(outcome)["message"].startswith("memory://none.zarr: no Zarr group there")


def test_values_that_are_not_finite_are_null(cli, project):
    far = {**blobs()["x"], "values": blobs()["x"]["values"] * 1e6}
    linear = "import torch\n\ndef build():\n    return torch.nn.Linear(3, 4)\n"
    tables = {"train": {"metrics": ["perplexity"], "optimizer_args": {"lr": 1e-12}}}
    job = project(tables, model=linear, arrays={"x": far})
    assert cli("-q", "train", job.config).code == 0
    assert history(job.run)[-1]["val_perplexity"] is None
    outcome = cli("--json", "eval", job.run, "--split", "val", "--round", "last")
    assert outcome.code == 0, outcome.err
    assert '"perplexity": null' in outcome.out
    assert "perplexity  inf" in cli("eval", job.run, "--split", "val", "--round", "last").out


def test_data_that_have_changed_since_training(cli, run, write_store):
    shutil.rmtree("job/train.zarr")
    write_store(run.parents[1].absolute() / "train.zarr", blobs(40))
    outcome = cli("--json", "eval", run)
    assert outcome.code == 5
    assert "train.zarr" in last(outcome)["message"]
    assert "--data" in last(outcome)["hint"]


def test_a_round_that_is_damaged(cli, run):
    (run / "rounds/round-000004/params.safetensors").write_bytes(b"torn")
    outcome = cli("--json", "eval", run, "--round", "4")
    assert outcome.code == 5
    assert "round-000004/params.safetensors" in last(outcome)["message"]
    assert cli("-q", "eval", run, "--round", "3").code == 0


def test_status_says_that_a_round_that_is_not_kept_was_better(cli, run):
    rows = history(run)
    shutil.rmtree(run / f"rounds/round-{best(run):06d}")
    found = last(cli("--json", "status", run))
    of_kept = min((row for row in rows if row["round"] in kept(run)), key=lambda row: row["val_loss"])["round"]
    assert (found["best_round"], found["best_seen_round"]) == (of_kept, best(run))
    assert f"of the rounds that are kept; round {best(run)} was better" in cli("status", run).out


def test_a_best_round_that_is_not_kept_gives_way_to_the_last(cli, run):
    shutil.rmtree(run / f"rounds/round-{best(run):06d}")
    assert last(cli("--json", "eval", run, "--round", "best"))["round"] == kept(run)[-1]


@pytest.mark.parametrize("split", ["tset", "train", "Test", ""])
def test_a_split_that_is_not_there(cli, run, split):
    outcome = cli("--json", "eval", run, f"--split={split}")
    assert outcome.code == 2
    assert "allowed are val, test and all" in last(outcome)["message"]


def test_the_runs_own_store_named_as_data_has_the_runs_own_splits(cli, run, monkeypatch):
    for split in ("val", "test"):
        own = last(cli("--json", "eval", run, "--split", split))
        Path("link").symlink_to("job/train.zarr")
        shutil.copytree("job/train.zarr", "copy.zarr")
        for data in ("job/train.zarr", "job/../job/train.zarr/", f"file://{Path.cwd()}/job/train.zarr", "link"):
            assert last(cli("--json", "eval", run, "--data", data, "--split", split)) == own
        assert last(cli("--json", "eval", run, "--data", "copy.zarr", "--split", split)) == own
        shutil.rmtree("copy.zarr")
        Path("link").unlink()
    outcome = cli("--json", "eval", run, "--data", "job/train.zarr", "--round", "last")
    assert (last(outcome)["split"], last(outcome)["samples"]) == ("all", 60)
    assert outcome.err == (
        "job/train.zarr is the run's own data: all of it includes rows that the run was trained on.\n"
    )


def test_several_stores_are_evaluated_as_one(cli, run):
    for name in ("a.zarr", "b.zarr"):
        shutil.copytree("job/train.zarr", name)
    outcome = last(cli("--json", "eval", run, "--data", "a.zarr", "--data", "b.zarr"))
    alone = last(cli("--json", "eval", run, "--data", "a.zarr"))
    assert (outcome["split"], outcome["samples"]) == ("all", 120)
    assert outcome["loss"] == pytest.approx(alone["loss"])
    shutil.rmtree("a.zarr")
    shutil.rmtree("b.zarr")


def test_the_selection_of_the_run_is_mentioned_and_can_be_changed(cli, project, write_store, tmp_path):
    job = project({"data": {"isel": {"sample": {"start": 0, "stop": 40}}}})
    assert cli("-q", "train", job.config).code == 0
    write_store(tmp_path / "later.zarr", blobs(90))
    outcome = cli("--json", "eval", job.run, "--data", "later.zarr")
    assert last(outcome)["samples"] == 40
    assert last(outcome)["isel"] == {"sample": {"start": 0, "stop": 40, "step": 1}}
    assert "data.isel = {" in outcome.err
    assert "of the run selects from later.zarr too; --set data.isel={} takes all" in outcome.err
    for setting, count in (("data.isel={}", 90), ("data.isel={sample={start=40,stop=90}}", 50)):
        outcome = cli("--json", "eval", job.run, "--data", "later.zarr", "--set", setting)
        assert (outcome.code, last(outcome)["samples"]) == (0, count)
        assert "of the run selects" not in outcome.err
    outcome = cli("--json", "eval", job.run, "--set", "data.isel.sample.stop=50", "--split", "all")
    assert (outcome.code, last(outcome)["samples"]) == (0, 50)
    outcome = cli("--json", "eval", job.run, "--set", "data.isel.sample.stop=50")
    assert outcome.code == 3
    assert "may hold rows that were trained on" in last(outcome)["message"]


def test_a_run_is_evaluated_by_its_own_splits(cli, job):
    for setting in ("data.split.test=0.5", "data.split={ test = { sample = { start = 5 } } }"):
        outcome = cli("--json", "eval", job.run, "--set", setting)
        assert outcome.code == 3
        assert "--set data.split" in last(outcome)["message"]
        assert "of a run that is evaluated it cannot be set" in last(outcome)["message"]


def test_what_is_chosen_by_coordinate_can_be_changed(cli, project, write_store, tmp_path):
    numbers = {"dims": ("sample",), "chunks": (20,)}
    job = project(
        {"data": {"sel": {"sample": {"stop": 139}}}}, arrays={"sample": {**numbers, "values": np.arange(100, 160)}}
    )
    assert cli("-q", "train", job.config).code == 0
    write_store(tmp_path / "later.zarr", {**blobs(90), "sample": {**numbers, "values": np.arange(100, 190)}})
    outcome = cli("--json", "eval", job.run, "--data", "later.zarr")
    assert (last(outcome)["samples"], last(outcome)["sel"]["sample"]["stop"]) == (40, 139)
    assert "of the run selects from later.zarr too; --set data.sel={} takes all" in outcome.err
    for setting, count in (("data.sel={}", 90), ("data.sel={sample={start=140,stop=189}}", 50)):
        outcome = cli("--json", "eval", job.run, "--data", "later.zarr", "--set", setting)
        assert (outcome.code, last(outcome)["samples"]) == (0, count)
        assert "of the run selects" not in outcome.err


@pytest.mark.slow
def test_evaluation_on_a_local_cluster_gives_the_same_values(cli, run):
    arguments = ("--json", "eval", run, "--split", "val")
    outcome = cli(*arguments, "--scheduler", "local")
    assert outcome.code == 0, outcome.err
    assert last(outcome) == last(cli(*arguments))


def test_a_run_is_found_from_its_projects_directory(cli, run, monkeypatch):
    monkeypatch.chdir("job")
    assert last(cli("--json", "eval", "job"))["run"] == "runs/job"
    assert last(cli("--json", "status"))["run"] == "runs/job"
