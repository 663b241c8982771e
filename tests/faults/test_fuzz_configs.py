"""Damaged configurations: accepted, or refused in at most four lines; never anything else."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import yaml

from dtrain.config.files import load_config, to_toml
from dtrain.errors import DtrainError
from tests.config.helpers import RICH, SMALLEST
from tests.faults.mutate import damaged_bytes, damaged_value
from tests.sampling import IS_THOROUGH

COUNT = 10_000 if IS_THOROUGH else 300
SECONDS = 5.0
"""Of the processor."""
SETTINGS = ("train.rounds=3", "train.optimizer_args.lr=1e-3", "data.isel={ level = 3 }", "cluster.workers=2")


def tried(path: Path, settings: tuple[str, ...]) -> bool:
    """Whether a file is accepted; it is refused with one of dtrain's errors, or the test fails."""
    began, fault = time.process_time(), None
    try:
        config = load_config(path, settings)
        again = to_toml(config)
    except DtrainError as error:
        fault = error
    assert time.process_time() - began < SECONDS
    if fault is None:
        path.with_name("again.toml").write_text(again, encoding="utf-8")
        assert to_toml(load_config(path.with_name("again.toml"))) == again
        return True
    assert fault.code in (2, 3), fault
    assert len(str(fault).splitlines()) <= 4, fault
    return False


@pytest.mark.parametrize("tables", [SMALLEST, RICH], ids=["smallest", "rich"])
def test_damaged_configurations(tmp_path: Path, tables: dict[str, Any]) -> None:
    accepted = 0
    for seed in range(COUNT // 2):
        rng = np.random.default_rng(seed)
        kind = int(rng.integers(4))
        path = tmp_path / ("c.toml" if kind < 3 else "c.yaml")
        if kind == 0:
            path.write_bytes(damaged_bytes(tomli_w.dumps(tables).encode(), rng))
        else:
            other = damaged_value(copy.deepcopy(tables), rng)
            path.write_text(written(other, path.suffix), encoding="utf-8")
        given = SETTINGS[int(rng.integers(len(SETTINGS)))]
        settings = (damaged_bytes(given.encode(), rng).decode(errors="replace"),) if kind == 2 else ()
        accepted += tried(path, settings)
    assert 0 < accepted < COUNT // 2


def written(value: Any, suffix: str) -> str:
    if suffix == ".yaml":
        return yaml.safe_dump(value, allow_unicode=True)
    try:
        return tomli_w.dumps(value)
    except (TypeError, ValueError, AttributeError):  # TOML has no null, and wants tables
        return yaml.safe_dump(value)
