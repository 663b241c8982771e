"""dtrain verify: all of a run, a round or a store, with each fault in a line and exit code 5."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dtrain import committed, runfiles
from dtrain.files import remove_directory
from dtrain.lock import locked
from dtrain.runfiles import sealed
from dtrain_cli import completion
from dtrain_cli.commands.verify import MOST_LINES
from tests.cli.helpers import SCRIPT, history, last, objects, tree
from tests.cli.test_run_files import FILES, ROUND, SPOILS

CHUNK = "train.zarr/x/c/1/0"


def faults(outcome):
    return [found for found in objects(outcome.out) if found["event"] == "fault"]


def names_all(outcome, *names):
    """Whether each of the names is in a line of its own about a fault."""
    lines = [line for line in outcome.out.splitlines() if line.startswith(("damaged: ", "unlisted: "))]
    return len(lines) == len(names) and all(any(name in line for line in lines) for name in names)


# Runs ---------------------------------------------------------------------------------------------------------------


def test_an_intact_run_by_its_directory_and_by_its_name(cli, job):
    before = tree(job.dir)
    for path in (job.run, job.run.name, f"{job.run}/", job.run.absolute()):
        outcome = cli("verify", path)
        assert outcome.code == 0, outcome
        assert outcome.err == ""
        assert "job/runs/job: intact" in outcome.out
        assert "rounds  1, 2, 3, 4" in outcome.out
    found = last(cli("verify", "job", "--json"))
    assert (found["event"], found["kind"], found["code"], found["faults"]) == ("verify", "run", 0, {})
    assert (found["rounds"], found["notes"]) == ([1, 2, 3, 4], [])
    sizes = [path.stat().st_size for path in job.run.rglob("*") if path.is_file()]
    manifests = [path.stat().st_size for path in job.run.rglob("manifest.json")]
    assert (found["files"], found["bytes"]) == (len(sizes), sum(sizes) - sum(manifests))
    assert tree(job.dir) == before


def test_a_round_by_its_directory(cli, job, monkeypatch):
    for path in (job.run / "rounds/round-000003", (job.run / "rounds/round-000003").absolute()):
        outcome = cli("verify", path)
        assert outcome.code == 0, outcome
        assert outcome.out.startswith("round  job/runs/job/rounds/round-000003: intact")
    (job.run / "rounds/round-000004/state.json").unlink()
    assert cli("verify", job.run / "rounds/round-000003").code == 0
    assert cli("verify", job.run / "rounds/round-000004").code == 5
    monkeypatch.chdir(job.run / "rounds")
    assert cli("verify", "round-000003").code == 0
    assert cli("verify", "round-000004").code == 5
    assert cli("verify", "round-000009").code == 2
    assert cli("verify", "../rounds/round-000009").code == 5


def test_all_faults_of_a_run_are_listed(cli, job):
    run = job.run
    (run / "rounds/round-000001/params.safetensors").write_bytes(b"x")
    (run / "rounds/round-000002/inner-0000.safetensors").unlink()
    (run / "rounds/round-000002/state.json").write_text("{}")
    (run / "rounds/round-000003/notes.txt").write_text("mine")
    (run / "env.json").write_text("{}")
    outcome = cli("verify", run)
    assert outcome.code == 5
    named = ("round-000001/params", "round-000002/inner-0000", "round-000002/state", "round-000003/notes", "env.json")
    assert names_all(outcome, *named), outcome.out
    assert "not intact, 5 faults: 4 damaged, 1 unlisted" in " ".join(outcome.out.split())
    outcome = cli("verify", run, "--json")
    assert (outcome.code, len(faults(outcome))) == (5, 5)
    assert (last(outcome)["event"], last(outcome)["faults"]) == ("verify", {"damaged": 4, "unlisted": 1})


def test_a_changed_history_is_a_fault_of_each_round(cli, job):
    content = (job.run / "history.jsonl").read_text()
    (job.run / "history.jsonl").write_text(content.replace("1", "2", 1))
    outcome = cli("verify", job.run)
    assert outcome.code == 5
    assert outcome.out.count("history.jsonl") >= 4


def test_a_changed_plan_is_one_fault(cli, job):
    path = job.run / "plan.json"
    content = path.read_text()
    path.write_text(content.replace("1", "2", 1))
    outcome = cli("verify", job.run)
    assert (outcome.code, len(faults(cli("verify", job.run, "--json")))) == (5, 1)
    assert f"{path.name} has been modified" in outcome.out
    plan = {key: value for key, value in json.loads(content).items() if key != "sha256"}
    path.write_text(json.dumps(sealed({**plan, "seed": 12})))
    outcome = cli("verify", job.run)
    assert (outcome.code, len(faults(cli("verify", job.run, "--json")))) == (5, 1)
    assert "is not the one that rounds 1, 2, 3, 4 were trained with" in outcome.out
    outcome = cli("verify", job.run / "rounds/round-000003")
    assert "is not the one that round 3 was trained with" in outcome.out
    path.unlink()
    assert "plan.json is missing" in cli("verify", job.run / "rounds/round-000003").out


def test_a_flipped_bit_in_any_file_of_a_round_is_found(cli, job):
    directory = job.run / "rounds/round-000002"
    for path in sorted(directory.iterdir()):
        intact = bytearray(path.read_bytes())
        spoilt = bytearray(intact)
        spoilt[len(spoilt) // 2] ^= 1
        path.write_bytes(spoilt)
        outcome = cli("verify", directory)
        assert (outcome.code, path.name in outcome.out) == (5, True), path
        path.write_bytes(intact)
    assert cli("verify", directory).code == 0


@pytest.mark.sampled(16)
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name", FILES)
def test_any_content_of_a_file_of_a_run(cli, job, name, spoil):
    SPOILS[spoil](job.run / name)
    before = {path: os.lstat(path).st_mtime_ns for path in job.run.rglob("*")}
    outcome = cli("verify", job.run)
    assert outcome.code in ((0, 5) if name in ("events.jsonl", "LOCK") else (2, 4, 5)), outcome
    assert outcome.code == 0 or name in outcome.out + outcome.err
    assert "\x1b" not in outcome.out + outcome.err
    assert {path: os.lstat(path).st_mtime_ns for path in job.run.rglob("*")} == before


@pytest.mark.sampled(10)
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name", ROUND)
def test_any_content_of_a_file_of_a_round(cli, job, name, spoil):
    path = job.run / "rounds/round-000002" / name
    SPOILS[spoil](path)
    for place in (job.run, path.parent):
        outcome = cli("verify", place)
        assert outcome.code == 5, outcome
        assert name in outcome.out


def test_a_sealed_manifest_of_a_round_with_odd_content(cli, job):
    path = job.run / "rounds/round-000002/manifest.json"
    content = json.loads(path.read_text())
    state = content["files"]["state.json"]
    for files in (3, {"state.json": 1}, {"state.json": {**state, "bytes": 4 * 10**12}}, {"../../plan.json": state}, {}):
        path.write_text(json.dumps(sealed({**{k: v for k, v in content.items() if k != "sha256"}, "files": files})))
        outcome = cli("verify", path.parent)
        assert outcome.code == 5, (files, outcome)


def test_a_lost_config_leaves_a_run_that_is_damaged(cli, job):
    (job.run / "config.toml").unlink()
    outcome = cli("verify", job.run)
    assert outcome.code == 5
    assert names_all(outcome, "config.toml"), outcome


def test_a_round_of_another_version_is_a_conflict(cli, job):
    path = job.run / "rounds/round-000002/manifest.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    path.write_text(json.dumps(sealed({**content, "format": 99})))
    for place in (job.run, path.parent):
        outcome = cli("verify", place)
        assert outcome.code == 4
        assert "another version" in outcome.err


def test_the_climatology_of_a_run_is_verified(cli, job):
    from dtrain.climatefile import write_climate
    from dtrain.data.climatology import Climatology
    from dtrain.description import read_resolved

    climatology = Climatology({"x": np.zeros((2, 3))}, {}, "of all rows")
    write_climate(job.run, climatology, read_resolved(job.run).plan.fingerprint)
    assert cli("verify", job.run).code == 0
    path = job.run / "climatology.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    outcome = cli("verify", job.run)
    assert outcome.code == 5
    assert names_all(outcome, "climatology.safetensors")


def test_leftovers_do_no_harm(cli, job):
    run = job.run
    shutil.copytree(run / "rounds/round-000001", run / "rounds/.round-000005-0123abcd")
    (run / ".plan.json-0123abcd").write_text("{")
    (run / "notes.md").write_text("mine")
    with (run / "history.jsonl").open("a") as file:
        file.write('{"event": "round", "rou')
    with (run / "events.jsonl").open("a") as file:
        file.write("{\n")
    outcome = cli("verify", run)
    assert outcome.code == 0, outcome
    said = " ".join(outcome.err.split())
    assert said.count("killed while it wrote") == 2
    assert "notes.md is no file of dtrain" in said
    assert "history.jsonl ends in the middle of a line" in said
    assert "events.jsonl: line" in said
    assert len(last(cli("verify", run, "--json"))["notes"]) == 5


def test_a_run_that_is_being_trained(cli, job, monkeypatch):
    """Its lock is held, and a round is pruned while it is read."""
    run, check = job.run, runfiles.check_known

    def prune(path, *facts):
        if path.parent.name == "round-000002" and path.parent.exists():
            remove_directory(path.parent)
        return check(path, *facts)

    monkeypatch.setattr("dtrain.verify.rounds.check_known", prune)
    (run / "rounds" / ".round-000005-0123abcd").mkdir()
    with locked(run):
        outcome = cli("verify", run, "--json")
    assert outcome.code == 0, outcome
    assert last(outcome)["rounds"] == [1, 3, 4]
    (note,) = last(outcome)["notes"]  # none about the round that is being written
    assert "is being trained by process" in note


def test_a_round_that_was_pruned_after_it_was_listed_is_no_fault(job, monkeypatch):
    monkeypatch.setattr(committed, "committed_rounds", lambda run: [1, 2, 3, 4, 5])
    committed.check_plan(job.run)
    committed.check_history(job.run)


@pytest.mark.alone
def test_verify_beside_training(script, cli, project):
    job = project({"train": {"rounds": 40}, "run": {"keep": 2}})
    env = {**os.environ, "NAP": "0.01"}
    training = subprocess.Popen([SCRIPT, "-q", "train", job.config], env=env)
    try:
        while not (job.run / "rounds").exists():
            time.sleep(0.05)
            assert training.poll() is None
        codes = set()
        while training.poll() is None:
            codes.add(cli("verify", job.run).code)
    finally:
        training.wait(60)
    assert codes == {0}
    assert cli("verify", job.run).code == 0
    assert len(history(job.run)) == 40


def test_a_run_without_a_committed_round(cli, job):
    shutil.rmtree(job.run / "rounds")
    (job.run / "history.jsonl").unlink()
    (job.run / "events.jsonl").unlink(missing_ok=True)
    outcome = cli("verify", job.run)
    assert outcome.code == 0, outcome
    assert "none is committed" in outcome.out


# Stores -------------------------------------------------------------------------------------------------------------


def test_a_store_and_its_manifest(cli, job):
    store = job.dir / "train.zarr"
    outcome = cli("verify", store)
    assert (outcome.code, outcome.err) == (0, "")
    assert "job/train.zarr: intact" in outcome.out
    assert "2 arrays, 6 chunks in 6 objects" in outcome.out
    assert "no checksum" in outcome.out
    for state in ("written", "the same"):
        outcome = cli("verify", store, "--manifest", "m.json")
        assert outcome.code == 0
        assert f"m.json: {state}" in outcome.out
    (job.dir / CHUNK).write_bytes(b"short")
    (job.dir / "train.zarr/label/c/0").unlink()
    outcome = cli("verify", store, "--manifest", "m.json")
    assert outcome.code == 5
    lines = outcome.out.splitlines()
    assert lines[0] == "missing: label/c/0: the manifest lists it, and it is not there" or "x/c/1/0" in lines[0]
    assert {line.partition(":")[0] for line in lines[:3]} == {"missing", "damaged", "modified"}
    assert "not intact, 3 faults: 1 damaged, 1 missing, 1 modified" in " ".join(outcome.out.split())
    outcome = cli("verify", store, "--manifest", "m.json", "--json")
    found = last(outcome)
    assert (found["event"], found["kind"], found["code"]) == ("verify", "store", 5)
    assert found["manifest"] == {"file": "m.json", "state": "differs"}
    assert found["without_checksum"] == ["label", "x"]
    assert [(f["what"], f["array"], f["key"]) for f in faults(outcome)] == [
        ("damaged", "x", "x/c/1/0"),
        ("modified", "x", "x/c/1/0"),
        ("missing", "label", "label/c/0"),
    ]


def test_a_missing_chunk_and_what_the_user_says_of_it(cli, job):
    (job.dir / CHUNK).unlink()
    (job.dir / "train.zarr/label/c/0").unlink()
    outcome = cli("verify", job.dir / "train.zarr")
    assert outcome.code == 5
    assert outcome.out.startswith("missing: x/c/1/0: it is not stored; Zarr reads it as 0\n")
    assert "label: 1 of 3 chunks; Zarr reads them as 0" in outcome.out
    assert "--set data.missing=fill" in outcome.err
    assert cli("verify", job.dir / "train.zarr", "--set", "data.missing=fill").code == 0
    assert cli("verify", job.dir / "train.zarr", "--set", "data.missing=error").out.count("missing: ") == 2


def test_of_very_many_faults_some_are_printed(cli, write_store, tmp_path):
    count = MOST_LINES + 20
    values = np.arange(1.0, count + 1)
    store = write_store(tmp_path / "a.zarr", {"v": {"dims": ("n",), "values": values, "chunks": (1,)}})
    shutil.rmtree(store / "v/c")
    outcome = cli("verify", "a.zarr")
    assert outcome.code == 5
    assert outcome.out.count("missing: ") == MOST_LINES
    assert f"{count} faults" in outcome.out
    assert len(faults(cli("verify", "a.zarr", "--json"))) == count


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.zarr"], 5, ["nowhere.zarr", "no such file"]),
        (["jab"], 2, ["jab", "no such run", "job", "Zarr store"]),
        (["job"], 5, ["job/train.zarr"]),
        (["job/model.py"], 5, ["model.py is a file"]),
        (["job/runs"], 5, ["job/runs is not a Zarr group"]),
        (["job/runs/job", "--manifest", "m.json"], 2, ["--manifest m.json", "no Zarr store"]),
        (["job/runs/job", "--set", "data.missing=fill"], 2, ["--set data.missing=fill"]),
        (["job/train.zarr", "--set", "data.path=x"], 2, ["data.storage_options and data.missing"]),
        (["job/train.zarr", "--set", "data.missing=maybe"], 3, ["data.missing"]),
        (["job/train.zarr", "--manifest", "no/m.json"], 2, ["there is no directory no"]),
        (["job/train.zarr", "--manifest", "job/dtrain.toml"], 5, ["dtrain.toml"]),
        (["http://me:secret@127.0.0.1:1/a.zarr"], 3, ["password"]),
    ],
)
def test_what_is_refused(cli, job, arguments, code, words):
    if arguments == ["job"]:
        shutil.rmtree(job.run)
    outcome = cli("verify", *arguments)
    assert outcome.code == code, outcome
    said = " ".join((outcome.err + outcome.out).split())
    assert all(word in said for word in words), outcome
    assert len(outcome.err.splitlines()) <= 4
    assert "secret" not in said
    assert not Path("m.json").exists()


def test_ctrl_c_is_clean_and_writes_nothing(cli, job, monkeypatch):
    from dtrain.data.read.whole import ObjectReader

    look = ObjectReader.look

    def slow(self, place):
        time.sleep(0.2)
        return look(self, place)

    monkeypatch.setattr(ObjectReader, "look", slow)
    threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT) or os.kill(os.getpid(), signal.SIGINT)).start()
    outcome = cli("verify", job.dir / "train.zarr", "--manifest", "m.json")
    assert outcome.code == 130
    assert "Stopped by Ctrl-C" in outcome.err
    assert "Nothing was written" in outcome.err
    assert not Path("m.json").exists()


def test_a_store_is_verified_without_torch(job):
    code = f"import sys; from dtrain_cli.main import run; code = run(['verify', '{job.dir / 'train.zarr'}'])"
    code += "; sys.exit(code or int('torch' in sys.modules or 'distributed' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_shell_completes_runs_and_stores(job):
    assert completion.runs_or_stores("") == ["job", "job/train.zarr"]
    assert completion.runs_or_stores("job/t") == ["job/train.zarr"]
