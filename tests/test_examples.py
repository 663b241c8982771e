"""Every example runs, and shows what it says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.alone
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def load(name: str) -> Any:
    (path,) = [path for path in EXAMPLES if path.stem == name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_says_how_to_run_it_in_its_first_line(path: Path) -> None:
    assert f"Run: python examples/{path.name}" in path.read_text().splitlines()[0]


def test_digits_reaches_95_percent_on_held_out_images(tmp_path: Path) -> None:
    assert load("digits").main(tmp_path, cluster="serial") >= 0.95


def test_the_original_example_learns(tmp_path: Path) -> None:
    found = load("original_example").main(tmp_path, cluster="serial")
    assert found["accuracy"] > 0.75
    assert found["loss"] < 0.06


def test_the_original_example_runs_as_a_script_on_a_local_cluster() -> None:
    (path,) = [path for path in EXAMPLES if path.stem == "original_example"]
    done = subprocess.run([sys.executable, "-W", "error", str(path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"test loss 0\.0\d+, accuracy 0\.\d+", done.stdout)


def test_the_language_model_learns_and_writes(tmp_path: Path) -> None:
    example = load("language_model")
    run = example.main(tmp_path, cluster="serial", rounds=4, num_bytes=200_000)
    bits = run.history.val_bits_per_byte.values
    assert bits[-1] < bits[0] < 8.0
    text = example.generate(run.model, "def ", length=10)
    assert text.startswith("def ")
    assert len(text.encode()) >= 14


def test_by_hand_runs_as_a_script() -> None:
    (path,) = [path for path in EXAMPLES if path.stem == "local_sgd_by_hand"]
    done = subprocess.run([sys.executable, "-W", "error", str(path)], capture_output=True, text=True, check=True)
    assert "test accuracy 0.9" in done.stdout
    assert "dtrain" not in {line.split()[1] for line in path.read_text().splitlines() if line.startswith("import ")}
