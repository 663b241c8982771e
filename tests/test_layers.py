"""Imports go downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BASE = {"types", "stages", "config", "urls", "errors", "events", "display", "packages"}
WORK = {"runtime", "data", "algorithm", *BASE}
CORE = {"data/samples", "data/members", "data/tiles", "data/variable", "data/encoding", "data/sparse"}
BELOW: dict[str, set[str]] = {
    "urls": set(),
    "errors": {"urls"},
    "types": set(),
    "stages": set(),
    "packages": set(),
    "config": {"errors", "urls"},
    "events": {"types", "stages"},
    "runfiles": {"errors"},
    "files": {"runfiles", "errors"},
    "display": {"urls"},
    "data/encoding": {"errors"},
    "data/variable": {"data/encoding"},
    "data/tiles": {"data/variable"},
    "data/sparse": {"data/encoding"},
    "data/members": {"data/variable", "errors"},
    "data/sampletext": {"data/variable", "data/encoding", "config", "errors", "display"},
    "data/samples": {
        "data/sampletext",
        "data/members",
        "data/tiles",
        "data/variable",
        "data/encoding",
        "config",
        "errors",
        "display",
    },
    "data/selection": {*CORE, "config", "errors"},
    "data/plan": {*CORE, "config", "errors"},
    "data/read": {"data/plan", *CORE, "config", "errors", "urls"},
    "data/load": {"data/read", "data/plan", *CORE, "types", "config", "errors", "urls"},
    "data/cf": {"data/encoding", "errors"},
    "data/paths": {"data/read", *CORE, "errors", "urls"},
    "data/layouts": {"data/read", *CORE, "errors"},
    "data/dimensions": {"data/layouts", "data/read", "errors"},
    "data/names": {"data/layouts", "data/read", "errors"},
    "data/categories": {*CORE, "errors"},
    "data/matrix": {"data/layouts", *CORE, "config", "errors"},
    "data/dataset": {"data/dimensions", "data/layouts", "data/names", "data/paths", "data/read", *CORE, "errors"},
    "data/genes": {"data/dataset", "data/layouts", "data/read", *CORE, "errors"},
    "data/column": {"data/cf", "data/dataset", "data/read", *CORE, "errors"},
    "data/coordinate": {"data/cf", "data/column", "data/plan", "data/read", *CORE, "errors"},
    "data/places": {"data/cf", "data/column", *CORE, "config", "errors"},
    "data/choose": {
        *("data/column", "data/dataset", "data/places", "data/read", "data/selection"),
        *CORE,
        "config",
        "errors",
    },
    "data/groups": {"data/column", "data/plan", "data/read", *CORE, "errors"},
    "data/balance": {"data/column", "data/plan", *CORE, "errors"},
    "data/given": {
        *("data/column", "data/dataset", "data/groups", "data/paths", "data/places", "data/plan", "data/read"),
        *CORE,
        "errors",
        "urls",
    },
    "data/joined": {
        *("data/column", "data/dataset", "data/layouts", "data/matrix", "data/read", "data/selection"),
        *CORE,
        "config",
        "errors",
    },
    "data/write": {"data/read", "data/plan", *CORE, "files", "lock", "errors"},
    "data/outcoords": {
        *("data/cf", "data/column", "data/dataset", "data/layouts", "data/plan", "data/read"),
        *CORE,
        "errors",
    },
    "data/lead": {"data/cf", "data/outcoords", "data/plan", *CORE},
    "data/weight": {"data/column", "data/dataset", "data/read", *CORE, "config", "errors"},
    "data/climatology": {
        *("data/by", "data/cf", "data/column", "data/distinct", "data/load", "data/paths", "data/plan", "data/read"),
        *CORE,
        "errors",
    },
    "data/distinct": {
        "data/cf",
        "data/column",
        "data/dataset",
        "data/paths",
        "data/plan",
        "data/read",
        *CORE,
        "errors",
    },
    "data/by": {*("data/cf", "data/column", "data/distinct", "data/paths", "data/plan", "data/read"), *CORE, "errors"},
    "data/source": {
        "data/cf",
        "data/choose",
        "data/coordinate",
        "data/dataset",
        "data/given",
        "data/joined",
        "data/layouts",
        "data/matrix",
        "data/paths",
        "data/read",
        "data/selection",
        "data/weight",
        *CORE,
        "config",
        "errors",
    },
    "data/located": {"data/cf", "data/column", "data/plan", "data/read", *CORE, "urls"},
    "data/__init__": set(),
    "lock": {"runfiles", "errors"},
    "certs": {"packages", "errors"},
    "algorithm": {"types", "config", "errors"},
    "statefiles": {"algorithm", "files", "runfiles", "types", "errors"},
    "checkpoint": {"statefiles", "files", "runfiles", "types", "errors"},
    "initfile": {"committed", "checkpoint", "runfiles", "statefiles", "resolved", "job", *WORK},
    "report": {"report/trackers", "files", "runfiles", *BASE},
    "report/trackers": {"report", "files", "runfiles", *BASE},
    "runtime": {"statefiles", "data", "algorithm", *BASE},
    "batching": WORK,
    "job": {"report", *WORK},
    "resolved": {"job", *WORK},
    "resolve": {"resolved", "job", *WORK},
    "counting": {"resolve", "resolved", "job", *WORK},
    "asking": {"job", "resolved", *WORK},
    "climatefile": {"files", "runfiles", "data", "errors"},
    "prepare": {"asking", "counting", "resolve", "resolved", "job", *WORK},
    "probe": {"rounds", "prepare", "job", *WORK},
    "planning": {"probe", "prepare", "resolved", "initfile", "job", *WORK},
    "checkup": WORK,
    "planrecord": {"probe", "planning", *WORK},
    "probetext": {"probe", "planning", "job", *WORK},
    "plantext": {"probetext", "planning", "prepare", "job", "report", *WORK},
    "plans": {"calls", "plantext", "probetext", "planrecord", "probe", "planning", "job", *WORK},
    "calls": {"job", *WORK},
    "rounds": {"statefiles", *WORK},
    "committed": {"checkpoint", "files", "runfiles", "types", "errors"},
    "description": {"committed", "climatefile", "resolved", "runfiles", "config", "errors"},
    "directory": {"description", "committed", "climatefile", "resolve", "resolved", "job", "files", "runfiles", *WORK},
    "project": {"resolved", "job", *WORK},
    "unitlosses": {"report", *WORK},
    "exporting": {"prepare", "resolved", "job", *WORK},
    "predict": {"resolve", "resolved", "job", *WORK},
    "rundata": {"description", "job", "resolve", "resolved", *WORK},
    "evaluation": {"asking", "job", "prepare", "runclimate", "rundata", "scores", "unitlosses", "report", *WORK},
    "run": {
        *(
            "asking",
            "checkpoint",
            "committed",
            "description",
            "evaluation",
            "exporting",
            "predict",
            "project",
            "report",
        ),
        *("resolved", "rundata", "runfiles", "scores"),
        *WORK,
    },
    "runclimate": {"asking", "climatefile", "prepare", "resolved", "job", *WORK},
    "scores": WORK,
    "runs": {"run", "project", "directory", "description", "committed", *WORK},
    "verify": {
        *("checkpoint", "committed", "climatefile", "description", "files", "lock", "runfiles", "statefiles"),
        *WORK,
    },
    "trainer": {
        *("asking", "calls", "runs", "run", "directory", "rounds", "prepare", "resolve", "resolved", "initfile", "job"),
        *("lock", "checkpoint", "committed", "description", "climatefile", "runfiles", "statefiles", "report", *WORK),
    },
    "__init__": {"trainer", "plans", "runs", "run", "batching", "data", *BASE},
}
"""By layer: the layers it may import. The folders and files of data/ are layers; ``data`` is all of them."""

FENCED = {
    "torch": {
        "algorithm",
        "statefiles",
        "runtime",
        "job",
        "resolved",
        "exporting",
        "run",
        "trainer",
        "report/trackers",
    },
    "zarr": {"data/read", "data/write", "data/layouts", "data/dimensions", "data/dataset"},
    "dask": {"runtime", "checkup"},
    "distributed": {"runtime", "checkup", "predict", "prepare", "probe", "planning", "batching", "trainer"},
    "xarray": {"data/cf", "data/places", "report", "predict", "run", "scores"},
    "rich": {"report"},
    "typer": set(),
    "cryptography": {"certs"},
}
"""By third-party package: the layers that may import it."""


def layer(path: Path) -> str:
    return layer_of(path.relative_to(ROOT / "dtrain").with_suffix("").parts)


def layer_of(given: Sequence[str]) -> str:
    """Return the layer of a module below dtrain, for example ``data/plan`` of data.plan.units."""
    parts = tuple(given)
    if parts[:2] == ("report", "trackers"):
        return "report/trackers"
    return "/".join(parts[:2]) if parts[0] == "data" and len(parts) > 1 else parts[0]


def may_import(own: str, used: str) -> bool:
    return used == own or used in BELOW[own] or (used.startswith("data/") and "data" in BELOW[own])


def imports(tree: ast.AST, top: bool = False) -> Iterator[str]:
    """Every imported module, except those under `if TYPE_CHECKING`; `top`: only where it runs on import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            inner = {alias.name for alias in node.names} if module == "dtrain" else set()
            yield from (f"dtrain.{name}" for name in inner) if inner else (module,)
        if not (top and isinstance(node, ast.FunctionDef)):
            yield from imports(node, top)


def offences(source: str, own: str) -> list[str]:
    found = []
    for name in imports(ast.parse(source)):
        top, *rest = name.split(".")
        if top == "dtrain" and not may_import(own, layer_of(rest or ["__init__"])):
            found.append(f"{own} must not import {name}")
        if top in FENCED and own not in FENCED[top]:
            found.append(f"{own} must not import {top}")
        if top == "dtrain_cli":
            found.append(f"{own} must not import {name}")
    return found


MODULES = sorted((ROOT / "dtrain").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below(path: Path) -> None:
    assert offences(path.read_text(encoding="utf-8"), layer(path)) == []


def test_no_import_cycle() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    below: dict[str, set[str]] = {}
    for name, path in names.items():
        used = set(imports(ast.parse(path.read_text(encoding="utf-8")), top=True))
        below[name] = {other for other in names if other in used and other != name}
    assert max(len(used) for used in below.values()) > 5  # it sees imports at all
    while free := [name for name, used in below.items() if not used]:
        below = {name: used.difference(free) for name, used in below.items() if name not in free}
    assert below == {}, "these modules import each other"


def test_only_one_module_turns_numpy_into_torch_in_the_runtime() -> None:
    users = {p.name for p in (ROOT / "dtrain" / "runtime").glob("*.py") if "from_numpy" in p.read_text()}
    assert users == {"tensors.py"}


def test_data_never_reaches_torch_or_dask() -> None:
    modules = "sys, dtrain.data.read.units, dtrain.data.plan.partition, dtrain.data.load.loader"
    code = f"import {modules}; print([m for m in ('torch', 'dask') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['dask']")  # xarray imports dask where it is installed
    code = f"import sys; sys.modules['torch'] = sys.modules['distributed'] = None; {code}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_planning_needs_neither_zarr_nor_xarray() -> None:
    modules = [path.stem for path in (ROOT / "dtrain" / "data" / "plan").glob("*.py") if path.stem != "__init__"]
    imported = ", ".join(f"dtrain.data.plan.{name}" for name in modules)
    code = f"import sys, {imported}; print([m for m in ('zarr', 'xarray', 'numcodecs', 'zarrs') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert len(modules) > 5


def test_the_check_itself_can_fail() -> None:
    assert offences("import torch", "data/read") == ["data/read must not import torch"]
    assert offences("import zarr", "data/plan") == ["data/plan must not import zarr"]
    assert offences("from dtrain.data.read.store import ReadStore", "data/plan") == [
        "data/plan must not import dtrain.data.read.store"
    ]
    assert offences("from dtrain.data.source import describe", "data/read") == [
        "data/read must not import dtrain.data.source"
    ]
    assert offences("from dtrain.data.load.loader import Loader", "runtime") == []
    assert offences("from dtrain.runtime.tasks import x", "algorithm") == [
        "algorithm must not import dtrain.runtime.tasks"
    ]
    assert offences("def f():\n    from dtrain import trainer", "data/load") == [
        "data/load must not import dtrain.trainer"
    ]
