"""Every example runs, and shows what it says."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dtrain_cli.main import run

pytestmark = pytest.mark.alone
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def load(name: str) -> Any:
    (path,) = [path for path in EXAMPLES if path.stem == name]
    return load_from(path)


def load_from(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_says_how_to_run_it_in_its_first_line(path: Path) -> None:
    assert f"Run: python examples/{path.name}" in path.read_text().splitlines()[0]


def test_digits_reaches_95_percent_on_held_out_images(tmp_path: Path) -> None:
    example = load("digits")
    run, samples = example.main(tmp_path, cluster="serial")
    accuracy = run.evaluate(split="test")["accuracy"]
    images, labels = example.read(samples, "test")  # the run's own split
    with torch.inference_mode():
        said = run.model(torch.from_numpy(images)).argmax(1).numpy()
    assert (said == labels).mean() == pytest.approx(accuracy)
    assert accuracy >= 0.95
    assert example.logistic_regression(samples) >= 0.93


def test_the_original_example_learns(tmp_path: Path) -> None:
    found = load("original_example").main(tmp_path, cluster="serial")
    assert found["accuracy"] > 0.75
    assert found["loss"] < 0.06


@pytest.mark.slow
def test_the_original_example_runs_as_a_script_on_a_local_cluster() -> None:
    (path,) = [path for path in EXAMPLES if path.stem == "original_example"]
    done = subprocess.run([sys.executable, "-W", "error", str(path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"test loss 0\.0\d+, accuracy 0\.\d+", done.stdout)


def test_the_language_model_learns_and_writes(tmp_path: Path) -> None:
    example = load("language_model")
    run, samples = example.main(tmp_path, cluster="serial", rounds=4, num_bytes=200_000)
    bits = run.history.val_bits_per_byte.values
    assert bits[-1] < bits[0] < 8.0
    text = example.generate(run.model, "def ", length=10)
    assert text.startswith("def ")
    assert len(text.encode()) >= 14
    counting = example.bits_of_counting(samples, most=2)
    frequent = np.bincount(example.text_of(samples, "train")[:, 1:].ravel(), minlength=256)
    found = example.text_of(samples, "val")[:, 1:].ravel()
    n, t = frequent.sum(), (frequent > 0).sum()
    by_hand = -np.log2((frequent[found] + t / 256) / (n + t)).mean()
    assert counting[0] == pytest.approx(by_hand)
    assert counting[2] < counting[1] < counting[0] < 8
    assert 0 < example.bits_of_xz(samples) < 8


def test_by_hand_runs_as_a_script() -> None:
    (path,) = [path for path in EXAMPLES if path.stem == "local_sgd_by_hand"]
    done = subprocess.run([sys.executable, "-W", "error", str(path)], capture_output=True, text=True, check=True)
    assert "test accuracy 0.9" in done.stdout
    assert "dtrain" not in {line.split()[1] for line in path.read_text().splitlines() if line.startswith("import ")}


@pytest.fixture
def lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the example with little data, as working directory; its README."""
    shutil.copytree(EXAMPLES[0].parent / "lora", tmp_path / "lora", ignore=shutil.ignore_patterns("*.zarr", "runs"))
    monkeypatch.chdir(tmp_path / "lora")
    monkeypatch.syspath_prepend(tmp_path / "lora")
    load_from(tmp_path / "lora" / "data.py").main(".", num_bytes=200_000)
    return Path("README.md").read_text()


@pytest.mark.slow
def test_fine_tuning_with_adapters_sends_a_tenth(lora: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [line.split("#")[0].split() for line in lora.splitlines() if line.startswith("$ dtrain")]
    assert len(commands) == 4
    small = "--scheduler serial --set train.rounds=2 --set train.local_steps=2"
    for command in commands:
        assert run([*command[2:], *small.split()]) == 0, capsys.readouterr().err
    full, adapters = load_from(Path("compare.py")).main(".")
    assert (full[2], adapters[2]) == (2_085_888, 196_608)  # as the table says
    assert adapters[3] < full[3] / 3

    base = load_file("runs/base/rounds/round-000002/params.safetensors")
    save_file({f"model.{n}": t for n, t in base.items()} | {"model.head.bias": torch.ones(3)}, "downloaded.safetensors")
    exec("".join(re.findall(r"```python\n(.*?)```", lora, re.DOTALL)), {})
    for name in ("start", "whole"):
        assert all(torch.equal(base[n], tensor) for n, tensor in load_file(f"{name}.safetensors").items())
    start = ["plan", "lora.toml", "--scheduler", "serial", "--set", "train.init=start.safetensors"]
    assert run(start) == 0, capsys.readouterr().err
