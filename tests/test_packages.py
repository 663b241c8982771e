"""Packages are looked for without being imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dtrain.packages import is_installed


def test_a_folder_of_that_name_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wandering").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("wandering")
    (tmp_path / "wandering/__init__.py").write_text("raise ValueError")
    assert is_installed("wandering")
    assert "wandering" not in sys.modules
    assert not is_installed("no.such.package")
