"""The README's code runs, and its tree is the tree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.config.presets import PRESETS
from dtrain_cli.main import run

pytestmark = pytest.mark.alone
ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands() -> list[str]:
    return [line[2:].partition("#")[0].strip() for line in TEXT.splitlines() if line.startswith("$ dtrain")]


def test_the_commands_and_the_python_block(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(commands()) == 7
    for command in commands():
        words = command.split()[1:]
        if words[0] in ("plan", "train", "eval", "predict"):
            words += ["--scheduler", "serial"]
        assert run(words) == 0, capsys.readouterr().err
    assert "accuracy" in capsys.readouterr().out
    train, functions, predict, loop = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    said_by = {train: "'loss'", functions: "val_accuracy", predict: "0.", "import dtrain\n" + loop: ""}
    for block, said in said_by.items():
        (digits / "block.py").write_text(block)
        done = subprocess.run([sys.executable, "-W", "error", "block.py"], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


def test_the_tree_names_every_folder_and_nothing_else() -> None:
    tree = TEXT.split("## The tree")[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    assert named == {path.parent.name for path in (ROOT / "dtrain").rglob("__init__.py")} - {"dtrain"}
    for path in (ROOT / "dtrain").rglob("*.py"):  # what a file is for stands in its first line
        assert path.read_text(encoding="utf-8").startswith(('"""', 'r"""')), path


def test_the_table_of_presets_names_each_once() -> None:
    table = TEXT.split("| where | presets |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(PRESETS)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|\$ )make ([a-z-]+)", TEXT):
        assert f"\n{target}:" in makefile, target
