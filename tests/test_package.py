"""What is installed, and that the files that say so agree."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"dask": "dask-core", "torch": "pytorch"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_wheel_holds_exactly_the_two_packages(tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(copy)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dtrain", "dtrain_cli"}
    for needed in (
        "dtrain/py.typed",
        "dtrain/data/read/units.py",
        "dtrain_cli/templates/digits.toml",
        "dtrain_cli/commands/train.py",
    ):
        assert needed in names


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path: Path) -> None:
    (tmp_path / "dtrain").mkdir()  # the folder that holds the clone: the clone has no __init__.py
    command = [sys.executable, "-c", "import dtrain; print(callable(dtrain.train))"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_environment_has_the_same_lower_bounds(project: dict[str, Any]) -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    stated = dict(_bound(text) for text in environment["dependencies"] if isinstance(text, str))
    for text in [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["demo"]]:
        name, bound = _bound(text)
        assert stated[CONDA_NAMES.get(name, name)] == bound, name
    assert stated["python"] == project["project"]["requires-python"]
    assert environment["channels"][0] == "conda-forge"


def test_constraints_pin_every_dependency_within_its_bound(project: dict[str, Any]) -> None:
    from packaging.specifiers import SpecifierSet

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert pinned["torch"] == "2.13.0"
    extras = project["project"]["optional-dependencies"]
    for text in [*project["project"]["dependencies"], *extras["demo"], *extras["dev"]]:
        name, bound = _bound(text)
        if name.startswith("dtrain"):
            continue
        assert pinned[name.lower()] in SpecifierSet(bound), name


def test_the_version_stands_in_one_more_place_only(project: dict[str, Any]) -> None:
    import dtrain

    assert dtrain.__version__ == project["project"]["version"]


def test_every_public_name_is_there() -> None:
    import dtrain

    for name in dtrain.__all__:
        assert getattr(dtrain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        dtrain.trian  # noqa: B018


def _bound(text: str) -> tuple[str, str]:
    match = re.match(r"([A-Za-z0-9_-]+)(?:\[[^]]*\])?(.*)", text)
    assert match is not None
    return match[1], match[2]
