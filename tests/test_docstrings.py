"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "dtrain").rglob("*.py"), *(ROOT / "cli" / "dtrain_cli").rglob("*.py")]
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removeprefix("cli.")
    for file in FILES
    if "templates" not in file.parts and ">>> " in file.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name))
    assert not outcome.failed
