"""Damaged files of a run: an error that names them, or the same as before; never anything else."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dtrain
from dtrain.committed import newest_round
from dtrain.data.samples import Samples
from dtrain.errors import DtrainError
from dtrain.lock import holder
from dtrain.report.journal import read_events
from dtrain.runfiles import sealed
from dtrain.runs import load_run
from tests.faults.mutate import damaged_bytes, damaged_json
from tests.runtime import models
from tests.sampling import IS_THOROUGH
from tests.training import rewrite, trained

COUNT = 2000 if IS_THOROUGH else 60
CODES = {2, 4, 5}
SECONDS = 5.0
"""Of the processor."""


@pytest.fixture(scope="module")
def whole(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = {"loss": "cross_entropy", "rounds": 3, "batch_size": 32, "metrics": ["accuracy"]}
    average = {"codec": {"name": "int8"}, "outer": {"optimizer": "sgd"}}
    where = tmp_path_factory.mktemp("whole")
    run = trained(models.small, samples, where, table, average=average, run="r")
    (run.directory / "LOCK").write_text('{"host": "elsewhere", "pid": 7, "since": "2026-01-01"}\n')
    return run.directory


def opened(run: Path) -> dict[str, Any]:
    """Return what the files of a run say, as the commands read them."""
    own = load_run(run, model=models.small)
    state, fingerprint, _ = newest_round(run)
    read_events(run)
    holder(run)
    return {
        "resolved": own.resolved,
        "config": own.config.train,
        "rows": own.rows,
        "best": own.best_round,
        "params": None if state is None else own.model.state_dict(),
        "fingerprint": fingerprint,
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    params = [own["params"] for own in (one, other)]
    equal = all(one[key] == other[key] for key in ("resolved", "config", "rows", "best", "fingerprint"))
    return equal and all((params[0][name] == params[1][name]).all() for name in params[0])


def files_of(run: Path) -> list[Path]:
    return sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())


def tried(run: Path, look: Callable[[Path], dict[str, Any]]) -> dict[str, Any] | None:
    """Return what a run says, or None for an error that is one of dtrain's; all else is raised."""
    began, found, fault = time.process_time(), None, None
    try:
        found = look(run)
    except DtrainError as error:
        fault = error
    assert time.process_time() - began < SECONDS
    assert fault is None or fault.code in CODES, fault
    assert fault is None or len(str(fault).splitlines()) <= 4
    return found


def test_damaged_files_are_named_or_change_nothing(whole: Path, tmp_path: Path) -> None:
    before, refused = opened(whole), 0
    run = tmp_path / "r"
    shutil.copytree(whole, run)
    names = files_of(whole)
    for seed in range(COUNT):
        rng = np.random.default_rng(seed)
        name = names[int(rng.integers(len(names)))]
        data = (whole / name).read_bytes()
        is_json = name.suffix == ".json" and rng.random() < 0.5
        (run / name).write_bytes(damaged_json(data, rng, dict) if is_json else damaged_bytes(data, rng))
        found = tried(run, opened)
        refused += found is None
        if found is not None:
            assert same(found, before) or name.name in ("history.jsonl", "LOCK", "events.jsonl"), (seed, name)
        (run / name).write_bytes(data)
    assert refused > COUNT / 3
    assert same(opened(run), before)


def test_damaged_files_with_digests_that_fit_are_named_or_read(whole: Path, tmp_path: Path) -> None:
    """As somebody would write them on purpose: no error but dtrain's own."""
    run = tmp_path / "r"
    shutil.copytree(whole, run)
    names = [path for path in files_of(whole) if path.name in ("plan.json", "env.json", "manifest.json", "state.json")]
    for seed in range(COUNT // 2):
        rng = np.random.default_rng(10_000 + seed)
        name = names[int(rng.integers(len(names)))]
        (run / name).write_bytes(damaged_json((whole / name).read_bytes(), rng, sealed))
        if name.name == "plan.json":
            rewrite(run)
        if name.name == "state.json":
            reseal(run / name.parent)
        tried(run, opened)
        shutil.rmtree(run)
        shutil.copytree(whole, run)


def reseal(directory: Path) -> None:
    """Make the manifest of a round fit its files."""
    from dtrain.runfiles import sha256

    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    for name in manifest["files"]:
        data = (directory / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": sha256(data)}
    path.write_text(json.dumps(sealed(manifest)))


def test_rows_of_any_kind_end_the_history(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "rounds")  # no digest stands for them
    lines = (whole / "history.jsonl").read_bytes().splitlines()
    for seed in range(COUNT // 4):
        rng = np.random.default_rng(seed)
        (run / "history.jsonl").write_bytes(b"\n".join([*lines[:2], damaged_json(lines[2], rng, dict), b""]))
        (run / "events.jsonl").write_bytes(damaged_json(lines[2], rng, dict))
        own = dtrain.load_run(run, model=models.small)
        assert len(own.rows) in (2, 3)
        assert own.history.sizes["round"] == len(own.rows)
        read_events(run)
