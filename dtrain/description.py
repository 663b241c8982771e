"""Read what describes a run (config.toml, plan.json, env.json), and refuse modified files."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain.climatefile import read_climate
from dtrain.committed import check_plan
from dtrain.config.compare import may_change
from dtrain.config.schema import TrainConfig
from dtrain.config.values import flat_values
from dtrain.errors import RunDamaged, RunNotFound, one_line
from dtrain.resolved import VERSION, Resolved, from_json
from dtrain.runfiles import (
    CONFIG,
    ENV,
    PLAN,
    RESTORE,
    SEAL,
    check_seal,
    other_version,
    parse_json,
    read_file,
    read_if_there,
    sha256,
)


def read_tables_of(run: Path) -> dict[str, Any]:
    """Return the tables of a run's config.toml.

    Raises
    ------
    RunNotFound, RunDamaged
        There is no run, or the file cannot be read.
    """
    data = read_if_there(run / CONFIG)
    if data is None:
        raise RunNotFound(f"{run} is not a run: it has no {CONFIG}.", "A run's directory is runs/NAME.")
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise RunDamaged(f"{run / CONFIG} cannot be read: {one_line(error)}", RESTORE) from error


def read_config_of(run: Path) -> TrainConfig:
    """Return a run's configuration, once plan.json is known to be that of its rounds.

    Raises
    ------
    RunNotFound, RunDamaged
        There is no run, or its configuration cannot be read or has been modified.
    RunConflict
        Another version of dtrain has trained it.
    """
    tables = read_tables_of(run)
    check_plan(run)
    try:
        config = TrainConfig(**tables)
    except (ValueError, TypeError, RecursionError) as error:
        raise RunDamaged(f"{run / CONFIG} cannot be read: {one_line(error)}", RESTORE) from error
    stored = _read_plan_file(run)
    started = {} if stored is None else stored.get("config")
    if not isinstance(started, dict):
        raise RunDamaged(f"{run / PLAN} does not hold what a run writes: config is {started!r:.40}.", RESTORE)
    now = dict(flat_values(config))
    for key in started.keys() & now.keys():
        if now[key] != started[key] and not may_change(key, config):
            raise RunDamaged(
                f"{run / CONFIG} has been modified: {key} was {shown_value(started[key])} when the run was started, "
                f"and is {shown_value(now[key])}.",
                RESTORE,
            )
    return config


def read_env(run: Path) -> dict[str, str]:
    """Return the content of a run's env.json.

    Raises
    ------
    RunDamaged
        It cannot be read, or has been modified.
    """
    content = parse_json(run / ENV, read_file(run / ENV))
    check_seal(run / ENV, content)
    if not isinstance(content.get("base"), str) or not all(isinstance(one, str) for one in content.values()):
        raise RunDamaged(f"{run / ENV} does not hold what a run writes.", RESTORE)
    return content


def read_resolved(run: Path) -> Resolved:
    """Return what a run has resolved: its plan.json.

    Raises
    ------
    RunDamaged
        It cannot be read, or has been modified.
    RunConflict
        Another version of dtrain has written it.
    """
    stored = _read_plan_file(run)
    if stored is None:
        raise RunDamaged(f"{run / PLAN} is missing.", RESTORE)
    try:
        resolved = from_json(stored)
    except Exception as error:  # its digest fits, and it holds what no version of dtrain writes
        raise RunDamaged(f"{run / PLAN} cannot be read: {type(error).__name__}: {one_line(error)}", RESTORE) from error
    if digest := resolved.climatology_sha256:
        resolved = replace(resolved, climatology=read_climate(run, resolved.plan.fingerprint, digest))
    return resolved


def _read_plan_file(run: Path) -> dict[str, Any] | None:
    """Return the content of plan.json, which is as it was written; None if there is none."""
    data = read_if_there(run / PLAN)
    if data is None:
        return None
    stored = parse_json(run / PLAN, data)
    version = stored.get("version")
    if SEAL in stored or version not in (1, 2):  # plans of versions 1 and 2 have no digest
        check_seal(run / PLAN, stored)
    if version != VERSION:
        raise other_version(run, f"its plan has version {version}, this one reads {VERSION}")
    return stored


def plan_sha256(run: Path) -> str:
    """Return the SHA-256 of a run's plan.json, which the manifest of each round has.

    Raises
    ------
    RunDamaged
        It cannot be read.
    """
    return sha256(read_file(run / PLAN))


def shown_value(value: Any) -> str:
    """Return a value of a configuration as an error names it."""
    return "not given" if value is None else json.dumps(value)
