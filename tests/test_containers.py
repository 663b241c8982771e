"""The files of examples/containers: what they promise, their commands run as processes, what the image would hold."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONTAINERS = ROOT / "examples" / "containers"


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load((CONTAINERS / "compose.yaml").read_text())["services"]


@pytest.fixture
def steps() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile: (name, rest)."""
    text = (CONTAINERS / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def test_one_image_without_root_and_no_port_beyond_this_machine(
    compose: dict[str, Any], steps: list[tuple[str, str]]
) -> None:
    assert set(compose) == {"scheduler", "worker", "client"}
    assert {service["image"] for service in compose.values()} == {"dtrain"}
    assert {service["user"] for service in compose.values()} == {"1000:1000"}
    assert [rest for name, rest in steps if name == "USER"] == ["dtrain"]
    published = [port for service in compose.values() for port in service.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_what_is_copied_is_there_and_not_ignored(steps: list[tuple[str, str]]) -> None:
    ignored = (CONTAINERS / "Dockerfile.dockerignore").read_text().split()
    for copied in [rest.split()[:-1] for name, rest in steps if name == "COPY"]:
        assert all((ROOT / path).exists() and f"!{path}" in ignored for path in copied)


def command(text: str, port: int) -> list[str]:
    """Return a command of the compose file as one that runs here."""
    here = {"scheduler:8786": f"127.0.0.1:{port}", "0.0.0.0:8787": "127.0.0.1:0", "0.0.0.0": "127.0.0.1"}
    for there, name in here.items():
        text = text.replace(there, name)
    return shlex.split(text.replace("8786", str(port)))


@contextmanager
def process(arguments: list[str], directory: Path) -> Iterator[None]:
    script = Path(sys.executable).parent / arguments[0]
    with subprocess.Popen([str(script), *arguments[1:]], cwd=directory, stderr=subprocess.DEVNULL) as running:
        try:
            yield
        finally:
            running.terminate()


@pytest.mark.slow
def test_the_commands_train(compose: dict[str, Any], tmp_path: Path) -> None:
    dtrain = Path(sys.executable).parent / "dtrain"
    subprocess.run(
        [dtrain, "init", "digits", "--template", "digits"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run = {name: command(service["command"], port) for name, service in compose.items()}
    with process(run["scheduler"], tmp_path), process(run["worker"], tmp_path), process(run["worker"], tmp_path):
        script = Path(sys.executable).parent / run["client"][0]
        done = subprocess.run(
            [str(script), *run["client"][1:], "--set", "train.rounds=3"],
            cwd=tmp_path / "digits",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "done (rounds): 3 rounds" in done.stdout
    assert "2 replicas" in done.stderr


@pytest.mark.slow
def test_what_the_image_installs_is_dtrain(steps: list[tuple[str, str]], tmp_path: Path) -> None:
    arguments = dict(re.match(r'(\w+)="(.*)"', rest).groups() for name, rest in steps if name == "ARG")  # type: ignore[union-attr]
    for copied in [rest.split() for name, rest in steps if name == "COPY"]:
        target = tmp_path / copied[-1].strip("/")
        for path in copied[:-1]:
            is_folder = (ROOT / path).is_dir()
            shutil.copytree(ROOT / path, target) if is_folder else _copy(ROOT / path, target)
    (install,) = [rest for name, rest in steps if name == "RUN" and rest.startswith("pip install")]
    for key, value in arguments.items():
        install = install.replace(f"${{{key}}}", value)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    words = shlex.split(install.replace("/src", str(tmp_path / "src")))
    subprocess.run([tmp_path / "venv/bin/pip", *words[1:], "-q"], check=True)
    said = subprocess.run([tmp_path / "venv/bin/dtrain", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("dtrain ")


def _copy(path: Path, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    shutil.copy(path, directory)
