"""Check this machine: versions, CPU, memory, disk, extras."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dask.utils import format_bytes

from dtrain.checkup.check import CLUSTER_FAILED, Check
from dtrain.runtime import machine

SMALL_MEMORY = 2 * 10**9
SMALL_DISK = 10**9


def check_machine() -> Iterator[Check]:
    """Check the versions and the machine of this process."""
    here = facts_here()
    versions = here["versions"]
    missing = [name for name, version in versions.items() if not version]
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    yield Check(
        name="versions",
        status="error" if missing or here["torch_error"] else "ok",
        text=f"{text}; {here['torch_error']}" if here["torch_error"] else text,
        cure="" if not missing and not here["torch_error"] else "pip install dtrain in this environment",
        code=CLUSTER_FAILED,
    )
    small = here["memory"] < SMALL_MEMORY or 0 <= here["free"] < SMALL_DISK
    yield Check(
        name="machine",
        status="warning" if small else "ok",
        text=f"{machine_text(here)}, {format_bytes(here['free'])} free in this directory",
        cure="Runs and workers need memory and disk: free some, or set run.dir to another disk." if small else "",
    )
    yield Check(name="extras", status="ok", text=extras_text())


def facts_here() -> dict[str, Any]:
    """Return the facts of this process."""
    return machine.machine_facts()


def machine_text(facts: Mapping[str, Any]) -> str:
    """Return what a machine has, in words."""
    gpus = ", ".join(facts["gpus"]) or "no GPU"
    cpu = facts["capability"] or "unknown CPU"
    return f"{facts['platform']}, {facts['cores']} cores ({cpu}), {format_bytes(facts['memory'])} of memory, {gpus}"


def extras_text() -> str:
    """Return which extras of dtrain are installed, and which are not."""
    have: list[str] = []
    lack: list[str] = []
    for extra, packages in extras().items():
        (have if all(is_distribution(name) for name in packages) else lack).append(extra)
    return f"installed: {', '.join(have) or 'none'}; not installed: {', '.join(lack) or 'none'}"


def extras() -> dict[str, list[str]]:
    """Return the packages of each extra of dtrain, for developers' one left out."""
    found: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("dtrain") or ():
        match = re.match(r"([A-Za-z0-9._-]+).*extra\s*==\s*['\"](\w+)['\"]", line)
        if match and match[2] != "dev":
            found.setdefault(match[2], []).append(match[1])
    return dict(sorted(found.items()))


def is_distribution(name: str) -> bool:
    """Whether a distribution of that name is installed."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
