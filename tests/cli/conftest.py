"""Small projects (a store, a config file, a model) and the command line, run in this process or as users do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from dtrain_cli import main, output
from tests.cli.helpers import MODEL, SCRIPT, TABLES, Outcome, Project, blobs, history, merge
from tests.training import rewrite_env


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "TERM"):  # the command line sets them; they are put back
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("NO_COLOR")
    for name in ("FORCE_COLOR", "NAP", "PY_COLORS", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(output, "WAITING_SECONDS", 600.0)  # a busy machine is slow
    loaded = dict(sys.modules)
    yield
    for name in [n for n in sys.modules if n not in loaded and n.partition(".")[0] in ("model", "other")]:
        del sys.modules[name]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """A function that runs the command line in this process: cli("train", path) -> (code, out, err)."""

    def call(*arguments: Any) -> Outcome:
        capsys.readouterr()
        code = main.run([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def script() -> Callable[..., Outcome]:
    """A function that runs the installed console script in a process of its own."""

    def call(*arguments: Any, env: Mapping[str, str] | None = None, timeout: float = 60) -> Outcome:
        command = [str(SCRIPT), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})}, check=False
        )
        lines = [line for line in done.stderr.splitlines(keepends=True) if not line.endswith(" ...\n")]
        return Outcome(done.returncode, done.stdout, "".join(lines))  # without what is waited for

    return call


@pytest.fixture(scope="session")
def usual_store(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> Path:
    """The store of all projects that ask for no other."""
    return write_store(tmp_path_factory.mktemp("usual") / "train.zarr", blobs())


@pytest.fixture
def project(tmp_path: Path, write_store: Callable[..., Path], usual_store: Path) -> Callable[..., Project]:
    """A function that writes a project: project(tables={"train": {"rounds": 3}}, model=..., arrays=...)."""

    def make(
        tables: Mapping[str, Any] | None = None,
        *,
        name: str = "job",
        model: str | None = MODEL,
        arrays: Mapping[str, Any] | None = None,
        without: tuple[str, ...] = (),
    ) -> Project:
        directory = tmp_path / name
        directory.mkdir()
        if arrays is None:
            shutil.copytree(usual_store, directory / "train.zarr")
        else:
            write_store(directory / "train.zarr", {**blobs(), **arrays})
        if model is not None:
            (directory / "model.py").write_text(model)
        merged = merge(deepcopy(TABLES), tables or {})
        for key in without:
            *parents, last = key.split(".")
            table = merged
            for parent in parents:
                table = table[parent]
            del table[last]
        (directory / "dtrain.toml").write_text(tomli_w.dumps(merged))
        return Project(directory, Path(name) / "dtrain.toml", Path(name) / "runs" / name)

    return make


@pytest.fixture(scope="session")
def _histories() -> dict[str, list[dict[str, Any]]]:
    return {}


@pytest.fixture
def trained(
    cli: Callable[..., Outcome], project: Callable[..., Project], _histories: dict[str, list[dict[str, Any]]]
) -> Callable[..., list[dict[str, Any]]]:
    """A function that trains the usual project without a break and returns the rows of its history."""

    def make(rounds: int, tables: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        key = json.dumps([rounds, tables])
        if key not in _histories:
            job = project(tables, name="undisturbed")
            outcome = cli("-q", "train", job.config, "--set", f"train.rounds={rounds}")
            assert outcome.code == 0, outcome.err
            _histories[key] = history(job.run)
        return _histories[key]

    return make


@pytest.fixture(scope="session")
def _complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("complete") / "job"


@pytest.fixture
def job(tmp_path: Path, cli: Callable[..., Outcome], project: Callable[..., Project], _complete: Path) -> Project:
    """A project with a run of four rounds that is complete and keeps them all."""
    made = Project(tmp_path / "job", Path("job/dtrain.toml"), Path("job/runs/job"))
    if _complete.exists():
        shutil.copytree(_complete, made.dir)
        rewrite_env(made.run, base=str(made.dir))
        return made
    project({"train": {"rounds": 4}, "run": {"keep": 9}})
    outcome = cli("-q", "train", made.config)
    assert outcome.code == 0, outcome.err
    shutil.copytree(made.dir, _complete)
    return made
