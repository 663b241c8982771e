"""Arguments and options that several commands share."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain_cli import completion

if TYPE_CHECKING:
    from dtrain.job import Job


def epilog(*pairs: tuple[str, str]) -> str:
    """Return commands and what they do as the end of a command's help; each fits a line of 78 columns."""
    lines = (f"{command}   {about}" if about else command for command, about in pairs)
    return "\n\n".join(["For example:", *(line.replace("[", "\\[") for line in lines)])  # rich takes [ for markup


GLANCE_BYTES = 2**20
CONFIG = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="The config file (TOML, YAML or JSON).",
        show_default=False,
        autocompletion=completion.config_files,
    ),
]
RUN = Annotated[
    str,
    typer.Argument(
        help="A run's directory, or its name; default: the newest.",
        show_default=False,
        autocompletion=completion.runs,
    ),
]
SET = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a key, for example train.rounds=50.",
        show_default=False,
        autocompletion=completion.keys,
    ),
]
SCHEDULER = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="WHERE",
        help="local, serial, tcp://host:port, tls://host:port or a scheduler file.",
        show_default=False,
        autocompletion=completion.places,
    ),
]
PROJECT = Annotated[
    Path | None,
    typer.Option(
        "--project",
        metavar="DIR",
        help="Directory of the dtrain.toml that names the run's functions; default: the one that holds runs/.",
        show_default=False,
    ),
]
TRUST_CODE = Annotated[
    bool, typer.Option("--trust-code", help="Use code that has changed since the run was trained, with a warning.")
]


def load_job(config: Path, settings: list[str] | None, scheduler: str | None) -> Job:
    """Read a config file with the command line's settings, and open what it names."""
    from dtrain.config.files import load_config
    from dtrain.job import job_from_config

    own = [f'cluster.scheduler="{absolute_scheduler(scheduler)}"'] if scheduler is not None else []
    return job_from_config(load_config(config, (*(settings or ()), *own)), config.absolute().parent)


def start_workers_early(
    config: Path, settings: list[str] | None, scheduler: str | None, *, trains: bool = True
) -> None:
    """Let what local workers are forked from import torch while this process does; call it before heavy imports."""
    if (scheduler or _scheduler_of(config, settings or [])) == "local":
        from dtrain.runtime.forkserver import start

        start(trains=trains)


def _scheduler_of(config: Path, settings: list[str]) -> str:
    """Return ``cluster.scheduler`` of a TOML file at a glance; empty if it cannot be read."""
    for setting in reversed(settings):
        key, _, value = setting.partition("=")
        if key.strip() == "cluster.scheduler":
            return value.strip().strip("\"'")
    if not config.is_file():  # a pipe can be read once, or never ends
        return ""
    try:
        with config.open("rb") as file:
            cluster = tomllib.loads(file.read(GLANCE_BYTES).decode()).get("cluster", {})
    except (OSError, ValueError, RecursionError):
        return ""
    return str(cluster.get("scheduler", "local")) if isinstance(cluster, dict) else ""


def absolute_scheduler(text: str) -> str:
    """Return an address with its protocol, and the path of a scheduler file as an absolute path."""
    from dtrain.runtime.where import with_protocol

    address = with_protocol(text)
    return address if address in ("local", "serial") or "://" in address else str(Path(text).absolute())
