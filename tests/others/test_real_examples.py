"""The examples with real data: the commands of each README, in an environment of their own, give its figures."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NUMBER = re.compile(r"\d\.\d{3}")


def commands(readme: str, block: int) -> list[str]:
    """Return the commands of a console block."""
    text = re.findall(r"```console\n(.*?)```", readme, re.DOTALL)[block]
    return [line.removeprefix("$ ").split("   #")[0].strip() for line in text.splitlines()]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment that has what this one has: examples install the rest."""
    folder = tmp_path_factory.mktemp("examples") / "venv"
    venv.create(folder, with_pip=True)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "all.pth").write_text(sysconfig.get_path("purelib"))
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "MPLBACKEND": "agg"}


def ran(command: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def tried(name: str, tmp_path: Path, environment: dict[str, str]) -> tuple[Path, str, str]:
    """Run the first block of an example's README; return its folder, the README and what the last command printed."""
    readme = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    install, *others = commands(readme, 0)
    done = subprocess.run(
        ["bash", "-euc", install], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"the data cannot be installed here: {done.stderr.strip()[-300:]}")
    folder = shutil.copytree(
        EXAMPLES / name, tmp_path / "examples" / name, ignore=shutil.ignore_patterns("*.zarr", "runs", "*.png")
    )
    printed = ""
    assert others[0] == f"cd examples/{name}"
    for command in others[1:]:
        printed = ran(command, folder, environment)
    assert (folder / f"{name}.png").stat().st_size > 1000
    return folder, readme, printed


def row(table: str, start: str) -> list[float]:
    """Return the numbers of the row that begins with a text, without those after ±."""
    lines = [line for line in table.splitlines() if NUMBER.search(line)]
    (line,) = [line for line in lines if line.lstrip("| *").lower().startswith(start.lower())]
    return [float(number) for number in NUMBER.findall(re.sub(r"(±|\+-) \d\.\d+", "", line))]


def test_a_forecast_at_two_sites(tmp_path: Path, environment: dict[str, str]) -> None:
    folder, readme, printed = tried("forecast", tmp_path, environment)
    for label in ("climatology", "persistence", "ridge regression", "federated"):
        assert row(printed, label) == pytest.approx(row(readme, label), rel=0.02), label
    assert row(printed, "mean of 5") == pytest.approx(row(readme, "the mean of the last 5"), rel=0.02)
    assert row(printed, "trend of 30") == pytest.approx(row(readme, "a line through"), rel=0.02)
    model, persistence = row(printed, "federated"), row(printed, "persistence")
    assert all(own < 0.85 * last for own, last in zip(model, persistence, strict=True))
    for command in commands(readme, 1)[:1]:  # of the comparison: one of three
        ran(command, folder, environment)
    pooled = row(ran("python figure.py", folder, environment), "pooled")
    assert pooled == pytest.approx(row(readme, "pooled"), rel=0.02)


def test_types_of_cells(tmp_path: Path, environment: dict[str, str]) -> None:
    _, readme, printed = tried("cells", tmp_path, environment)
    for label, own in (("the most frequent", "most frequent"), ("logistic", "logistic"), ("dtrain", "dtrain")):
        accuracy, f1 = row(readme, label)  # means of five seeds: one of them differs by two standard deviations
        assert row(printed, own) == [pytest.approx(accuracy, abs=0.05), pytest.approx(f1, abs=0.12)], label
    assert row(printed, "dtrain")[0] > row(printed, "most frequent")[0] + 0.4


def test_a_volume(tmp_path: Path, environment: dict[str, str]) -> None:
    _, readme, printed = tried("volume", tmp_path, environment)
    assert row(printed, "thresholds") == pytest.approx(row(readme, "two thresholds"), rel=0.01)
    assert row(printed, "dtrain") == pytest.approx(row(readme, "dtrain"), rel=0.02)
    assert all(own > other for own, other in zip(row(printed, "dtrain"), row(printed, "thresholds"), strict=True))
