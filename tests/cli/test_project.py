"""The code of a run that is evaluated: the dtrain.toml of the project names it, and it has not changed."""

import json
import os
import shutil
import textwrap
from pathlib import Path

import pytest

import dtrain
from tests.cli.helpers import MODEL, last
from tests.runtime import models
from tests.training import rewrite, rewrite_env

LOSSES = (
    MODEL
    + """

def loss(outputs, targets):
    return 2 * nn.functional.cross_entropy(outputs, targets)


def rmse(outputs, targets):
    return outputs.square().mean()
"""
)


@pytest.fixture
def own(cli, project):
    """A project with a loss and a metric of its own, trained."""
    job = project({"train": {"loss": "model:loss", "metrics": ["accuracy", "model:rmse"]}}, model=LOSSES)
    assert cli("-q", "train", job.config).code == 0
    return job


def test_the_functions_of_the_project_are_used(cli, own, monkeypatch):
    found = last(cli("--json", "eval", own.run, "--split", "val"))
    row = json.loads((own.run / "history.jsonl").read_text().splitlines()[-1])
    assert (found["loss"], found["rmse"]) == (row["val_loss"], row["val_rmse"])
    monkeypatch.chdir(own.run)
    assert last(cli("--json", "eval", ".", "--split", "val"))["loss"] == found["loss"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("old", "new", "key"),
    [("hidden=5", "hidden=6", "model"), ("return 2 *", "return 3 *", "train.loss"), ("square", "abs", "train.metrics")],
)
def test_changed_code_is_a_conflict(cli, own, old, new, key):
    (own.dir / "model.py").write_text(LOSSES.replace(old, new))
    outcome = cli("--json", "eval", own.run)
    assert outcome.code == 4
    assert f"other code of {key}" in last(outcome)["message"] or key in last(outcome)["message"]
    assert "--trust-code" in last(outcome)["hint"]
    if key != "model":
        for flags in ((), ("-q",)):
            trusted = cli(*flags, "--json", "eval", own.run, "--trust-code")
            assert trusted.code == 0, trusted.err
    assert cli("status", own.run).code == 0  # it runs no code


def test_trusted_code_is_used_and_said(cli, own, script):
    before = last(cli("--json", "eval", own.run))
    (own.dir / "model.py").write_text(LOSSES.replace("return 2 *", "return 4 *"))
    outcome = script("-q", "--json", "eval", own.run, "--trust-code")
    assert outcome.code == 0
    assert last(outcome)["loss"] == pytest.approx(2 * before["loss"])
    assert "is trusted and used" in outcome.err


@pytest.mark.parametrize("where", ["project", "run", "base"])
def test_what_the_files_of_a_run_name_is_never_imported(cli, own, where, tmp_path):
    marker = tmp_path / "imported"
    place = {"project": own.dir, "run": own.run, "base": tmp_path / "elsewhere"}[where]
    place.mkdir(exist_ok=True)
    (place / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nfrom model import *\n")
    (place / "model.py").write_text(f"{LOSSES}\nopen({str(marker)!r}, 'w')\n") if where != "project" else None
    config = own.run / "config.toml"
    if where == "base":
        rewrite_env(own.run, base=str(place))
        shutil.copytree(own.dir / "train.zarr", place / "train.zarr")
        assert cli("--json", "eval", own.run).code == 0
    else:
        text = config.read_text()
        config.write_text(text.replace("model:build", "evil:build"))
        outcome = cli("--json", "eval", own.run)
        assert outcome.code == 5
        assert 'config.toml has been modified: model was "model:build"' in last(outcome)["message"]
        plan = json.loads((own.run / "plan.json").read_text())
        for name in ("evil:build", "os:system"):
            config.write_text(text.replace("model:build", name))
            rewrite(own.run, plan={**plan, "config": {**plan["config"], "model": name}})
            outcome = cli("--json", "eval", own.run)
            assert outcome.code == 4
            assert f'model was "{name}", and there it is "model:build"' in last(outcome)["message"]
    assert not marker.exists()


def test_a_metric_that_the_project_does_not_name(cli, own):
    text = (own.dir / "dtrain.toml").read_text()
    (own.dir / "dtrain.toml").write_text(text.replace("model:rmse", "mae"))
    outcome = cli("--json", "eval", own.run)
    assert outcome.code == 4
    assert 'train.metrics had "model:rmse", which is not there' in last(outcome)["message"]
    assert cli("--json", "eval", own.run, "--trust-code").code == 4  # a name of the run's files is never used
    (own.dir / "dtrain.toml").write_text(text.replace('loss = "model:loss"', 'loss = "mse"'))
    assert cli("--json", "eval", own.run, "--trust-code").code == 4
    (own.dir / "dtrain.toml").write_text(text.replace("model:rmse", 'model:rmse", "model:loss'))
    assert cli("--json", "eval", own.run).code == 0


@pytest.mark.parametrize("given", ["elsewhere", "elsewhere/dtrain.toml"])
def test_the_project_may_lie_elsewhere(cli, own, given, tmp_path):
    expected = last(cli("--json", "eval", own.run))
    (tmp_path / "elsewhere").mkdir()
    for name in ("dtrain.toml", "model.py"):
        (own.dir / name).rename(tmp_path / "elsewhere" / name)
    outcome = cli("--json", "eval", own.run)
    assert outcome.code == 3
    assert "job has no dtrain.toml" in last(outcome)["message"]
    assert "--project DIR" in last(outcome)["hint"]
    assert last(cli("--json", "eval", own.run, "--project", given)) == expected


def test_a_project_in_yaml(cli, own):
    import tomllib

    import yaml

    tables = tomllib.loads((own.dir / "dtrain.toml").read_text())
    (own.dir / "dtrain.toml").unlink()
    (own.dir / "dtrain.yaml").write_text(yaml.safe_dump(tables))
    assert cli("--json", "eval", own.run).code == 0


def test_the_newest_run_is_evaluated(cli, own, project):
    other = project(name="later")
    assert cli("-q", "train", other.config).code == 0
    for path in own.run.rglob("*"):
        os.utime(path, (1, 1))
    assert last(cli("--json", "eval"))["run"] == "later/runs/later"
    assert last(cli("--json", "eval", "job"))["run"] == "job/runs/job"


def test_a_run_of_a_program_is_evaluated_there(cli, tmp_path, samples):
    def build():
        return models.small()

    run = dtrain.train(
        build, samples, train={"loss": lambda o, t: (o**2).mean(), "rounds": 1}, cluster="serial", progress=False
    )
    outcome = cli("--json", "eval")
    assert outcome.code == 3
    assert "was given in Python" in last(outcome)["message"] or "has no dtrain.toml" in last(outcome)["message"]
    assert 'dtrain.load_run("runs/run-1", loss=loss).evaluate()' in last(outcome)["hint"]
    assert run.directory == tmp_path / "runs/run-1"


TYPED = """
    import sys, dtrain
    from torch import nn

    def build():
        return nn.Linear(6, 3)

    def my_loss(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def my_metric(outputs, targets):
        return 0.5

    samples = dtrain.open_samples(sys.argv[1], inputs=["x"], targets=["y"])
    table = dict(loss=my_loss, metrics=["accuracy", my_metric], rounds=1)
    dtrain.train(build, samples, train=table, cluster="serial", progress=False)
"""


def test_a_run_of_a_script_says_in_one_sentence_what_to_do(cli, tmp_path, blobs):
    import subprocess
    import sys

    Path("script.py").write_text(textwrap.dedent(TYPED))
    subprocess.run([sys.executable, "script.py", blobs], check=True)
    outcome = cli("--json", "eval")
    assert outcome.code == 3
    assert last(outcome)["message"] == (
        'model = "__main__:build", train.loss = "__main__:my_loss", train.metrics = "__main__:my_metric" were defined '
        "in a notebook or script: they are not found by name."
    )
    assert last(outcome)["hint"] == (
        'Give them again in Python: dtrain.load_run("runs/run-1", model=build, loss=my_loss, '
        "metrics=[my_metric]).evaluate()."
    )
    assert len(outcome.err.splitlines()) == 2
