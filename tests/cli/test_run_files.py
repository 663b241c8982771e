"""Any content of any file of a run: exit code 5 or 2, and nothing is written through a link."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.runfiles import sealed
from tests.cli.helpers import Outcome, Project, history, last, tree
from tests.training import bits

FILES = ("config.toml", "plan.json", "env.json", "history.jsonl", "events.jsonl", "LOCK")
ROUND = ("manifest.json", "state.json", "params.safetensors", "inner-0001.safetensors")
DEEP = b"[" * 10_000
CONTENTS = {
    "a number": b"3",
    "an object": b"{}",
    "null": b"null",
    "a list": b"[]",
    "a text": b'"text"',
    "true": b"true",
    "nothing": b"",
    "nesting": DEEP + b"]" * 10_000,
    "nested objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "open nesting": DEEP,
    "no text": bytes(range(256)),
    "many zeros": b"\0" * 4096,
    "infinity": b'{"host": "x", "pid": 1e999, "since": "x", "version": Infinity, "format": NaN, "event": "round"}',
    "long digits": b'{"version": ' + b"9" * 5000 + b"}",
    "nested table": b"a = " + DEEP + b"]" * 10_000,
    "escapes": b'{"host": "\\u001b[31mred", "pid": 1, "since": "\\n"}',
}


def put(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(content)

    return write


def link(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def moved(path: Path) -> None:
    """The file itself, behind a link."""
    other = path.with_name("elsewhere")
    if path.exists():
        path.rename(other)
    else:
        other.write_bytes(b"")
    path.symlink_to(other.name)


def large(path: Path) -> None:
    """A file of 4 TB that takes no room."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(4 * 10**12)


ODD = {
    "a link to a device": link("/dev/zero"),
    "a link to nothing": link("nowhere"),
    "a link to another file": link("../../../dtrain.toml"),
    "a link to itself": moved,
    "a pipe": pipe,
    "a directory": folder,
    "a huge file": large,
}
SPOILS = {**{name: put(content) for name, content in CONTENTS.items()}, **ODD}


def commands(job: Project) -> dict[str, tuple[object, ...]]:
    return {
        "status": ("status", job.run),
        "eval": ("eval", job.run),
        "train": ("train", job.config, "--set", "train.rounds=5"),
    }


def outcomes(cli: Callable[..., Outcome], job: Project) -> dict[str, Outcome]:
    found = {name: cli("-q", "--json", *arguments) for name, arguments in commands(job).items()}
    for name, outcome in found.items():
        assert outcome.code in (0, 2, 5), (name, outcome)
        assert "Traceback" not in outcome.err
        assert "\x1b" not in outcome.out + outcome.err
    return found


@pytest.mark.sampled(24)
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name", FILES)
def test_any_content_of_a_file_of_a_run(cli, job, name, spoil):
    outside = (job.dir / "dtrain.toml").read_bytes()
    SPOILS[spoil](job.run / name)
    rounds = tree(job.run / "rounds")
    codes = {command: outcome.code for command, outcome in outcomes(cli, job).items()}
    assert (job.dir / "dtrain.toml").read_bytes() == outside
    if name in ("events.jsonl", "LOCK"):
        assert codes["eval"] == 0  # it does not look at them
        is_file = spoil in CONTENTS or (name, spoil) == ("events.jsonl", "a huge file")
        assert codes["train"] == (0 if is_file or spoil == "a huge file" else 5)
    else:
        assert set(codes.values()) <= {2, 5}
        assert tree(job.run / "rounds") == rounds


@pytest.mark.sampled(12)
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name", ROUND)
def test_a_round_with_such_a_file_falls_back_to_the_one_before(cli, job, trained, name, spoil):
    SPOILS[spoil](job.run / "rounds/round-000004" / name)
    codes = {command: outcome.code for command, outcome in outcomes(cli, job).items()}
    assert codes == {"status": 0, "eval": 5, "train": 0}
    assert bits(history(job.run)) == bits(trained(5, {"run": {"keep": 9}}))
    events = [json.loads(line) for line in (job.run / "events.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events if event["event"] == "RoundDamaged"] == [4]


@pytest.mark.parametrize("kind", ["a link", "a file", "a pipe", "a link to nothing"])
def test_rounds_that_lie_elsewhere(cli, job, kind, tmp_path):
    rounds, other = job.run / "rounds", tmp_path / "other"
    rounds.rename(other)
    if kind.startswith("a link"):
        rounds.symlink_to(other if kind == "a link" else tmp_path / "nothing")
    else:
        (put(b"") if kind == "a file" else pipe)(rounds)
    before = tree(other)
    assert {outcome.code for outcome in outcomes(cli, job).values()} == {5}
    assert tree(other) == before


def test_a_round_that_is_a_link_is_damaged(cli, job, tmp_path):
    newest, other = job.run / "rounds/round-000004", tmp_path / "other"
    newest.rename(other)
    newest.symlink_to(other)
    before = tree(other)
    assert {name: o.code for name, o in outcomes(cli, job).items()} == {"status": 0, "eval": 5, "train": 0}
    assert tree(other) == before
    assert not newest.is_symlink()
    assert not [path for path in (job.run / "rounds").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "name", ["round-7", "round-٣", "round-²", "round-" + "9" * 30, "round-1e3", "round-0000001", "x"]
)
def test_other_names_are_no_rounds(cli, job, name):
    (job.run / "rounds" / name).mkdir()
    assert last(cli("--json", "status", job.run))["committed"] == [1, 2, 3, 4]
    assert cli("-q", "train", job.config).code == 0


@pytest.mark.parametrize("wanted", ["²", "9" * 5000, "1\n", "-1", " 1"])
def test_rounds_that_are_asked_for(cli, job, wanted):
    outcome = cli("--json", "eval", job.run, "--round", wanted)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) <= 4


def test_a_run_behind_a_link_is_a_run(cli, job, tmp_path):
    job.run.rename(tmp_path / "other")
    job.run.symlink_to(tmp_path / "other")
    assert {outcome.code for outcome in outcomes(cli, job).values()} == {0}


# What belongs together --------------------------------------------------------------------------------------------


def test_a_plan_that_is_missing_beside_rounds(cli, job):
    (job.run / "plan.json").unlink()
    (job.dir / "model.py").write_text((job.dir / "model.py").read_text().replace("Tanh", "ReLU"))
    before = tree(job.run)
    for name, arguments in commands(job).items():
        outcome = cli("--json", *arguments, *(["--set", "train.batch_size=4"] if name == "train" else []))
        assert outcome.code == 5
        assert last(outcome)["message"] == "job/runs/job/plan.json is missing."
    assert tree(job.run) == before


@pytest.mark.parametrize("values", [None, "sealed", "sealed and without rounds"])
def test_a_plan_that_is_modified(cli, job, values):
    plan = json.loads((job.run / "plan.json").read_text())
    changed = {**plan, "eval_every": 2}
    if values:
        del changed["sha256"]
        changed = sealed(changed)
    (job.run / "plan.json").write_text(json.dumps(changed))
    if values == "sealed and without rounds":
        shutil.rmtree(job.run / "rounds")
        assert {name: o.code for name, o in outcomes(cli, job).items()} == {"status": 0, "eval": 2, "train": 0}
        return
    for outcome in outcomes(cli, job).values():
        assert outcome.code == 5
        assert last(outcome)["message"] == "job/runs/job/plan.json is not the one that round 4 was trained with."


def test_a_plan_is_modified_before_the_first_round(cli, job):
    shutil.rmtree(job.run / "rounds")
    plan = json.loads((job.run / "plan.json").read_text())
    (job.run / "plan.json").write_text(json.dumps({**plan, "eval_every": 2}))
    for outcome in outcomes(cli, job).values():
        assert (outcome.code, "plan.json has been modified" in last(outcome)["message"]) == (5, True)


def test_one_manifest_that_names_another_plan_is_damaged(cli, job, trained):
    path = job.run / "rounds/round-000004/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(sealed({**manifest, "plan": "0" * 64})))
    assert {name: o.code for name, o in outcomes(cli, job).items()} == {"status": 0, "eval": 5, "train": 0}
    assert bits(history(job.run)) == bits(trained(5, {"run": {"keep": 9}}))


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_line_of_the_history_that_is_modified(cli, job, trained, number):
    rows = history(job.run)
    rows[number - 1]["train_loss"] += 1
    (job.run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = outcomes(cli, job)
    assert {name: o.code for name, o in found.items()} == {"status": 5, "eval": 5, "train": 5 if number == 1 else 0}
    if number > 1:  # the rounds after it are trained again
        assert bits(history(job.run)) == bits(trained(5, {"run": {"keep": 9}}))


def test_a_config_that_is_modified(cli, job):
    path = job.run / "config.toml"
    text = path.read_text()
    for old, new, code in (
        ("batch_size = 8", "batch_size = 4", 5),
        ('loss = "cross_entropy"', 'loss = "mse"', 5),
        ("seed = 0", "seed = 1", 5),
        ("keep = 9", "keep = 4", 0),
        ('scheduler = "serial"', 'scheduler = "local"', 0),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        outcome = cli("--json", "eval", job.run)
        assert outcome.code == code, outcome.err
        if code:
            key = old.partition(" ")[0]
            assert f"config.toml has been modified: train.{key} was" in last(outcome)["message"]


def test_an_env_that_is_modified(cli, job):
    path = job.run / "env.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": "/"}))
    assert {name: o.code for name, o in outcomes(cli, job).items()} == {"status": 5, "eval": 5, "train": 5}


def test_a_start_that_was_killed_between_its_first_files(cli, job, trained):
    for name in ("config.toml", "env.json", "plan.json"):
        if name == "config.toml":
            shutil.rmtree(job.run / "rounds")
            (job.run / "history.jsonl").unlink()
        (job.run / name).unlink()
        assert cli("status", job.run).code == 2  # it is no run yet
    (job.run / "plan.json").write_text("{")
    assert cli("-q", "train", job.config, "--set", "train.rounds=5").code == 0
    assert bits(history(job.run)) == bits(trained(5, {"run": {"keep": 9}}))


def test_runs_of_earlier_versions(cli, job):
    plan = json.loads((job.run / "plan.json").read_text())
    (job.run / "plan.json").write_text(json.dumps({k: v for k, v in plan.items() if k != "sha256"} | {"version": 2}))
    for path in (job.run / "rounds").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({"format": 1, "round": manifest["round"], "files": manifest["files"]}))
    before = tree(job.run)
    for arguments in (
        *commands(job).values(),
        ("predict", job.run, "--out", "o.zarr"),
        ("export", job.run, "--to", "pt2", "--out", "o"),
    ):
        outcome = cli("--json", *arguments)
        assert outcome.code == 4
        assert last(outcome)["message"].startswith("job/runs/job was trained by another version of dtrain: ")
    assert tree(job.run) == before
