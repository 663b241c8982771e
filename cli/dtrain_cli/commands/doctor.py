"""dtrain doctor: whether this machine, a cluster and data are fit to train."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain_cli.arguments import SCHEDULER, SET, absolute_scheduler, epilog, start_workers_early
from dtrain_cli.output import Options, result, say, waiting

if TYPE_CHECKING:
    from distributed import Client

    from dtrain.checkup.check import Check
    from dtrain.config.schema import ClusterConfig
    from dtrain.config.values import Tables

ORDER = 15
COLUMNS = 9, 13
"""Widths of status and name."""
app = typer.Typer()


EPILOG = epilog(
    ("dtrain doctor", "this machine, and a local cluster"),
    ("dtrain doctor --scheduler tcp://10.0.0.1:8786", "a Dask cluster"),
    ("dtrain doctor --data s3://bucket/era5.zarr", "reads one chunk"),
    ("dtrain doctor --scheduler serial --json", ""),
)


@app.command("doctor", epilog=EPILOG)
def doctor(
    ctx: typer.Context,
    scheduler: SCHEDULER = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PATH", help="A store to read one chunk of: path or URL.", show_default=False),
    ] = None,
    settings: SET = None,
) -> None:
    """Check versions, CPU, memory, a cluster, one local step and, with --data, the reading of a store.

    Without --scheduler a local cluster is started. Nothing is written, and each
    check ends within its time limit. --set takes the keys of [cluster], such as
    cluster.tls.ca of a tls:// scheduler.
    """
    options: Options = ctx.obj
    config = _cluster(scheduler, settings or [])
    place = config.scheduler
    if place == "local":
        start_workers_early(Path(), [], place)
    checks: list[Check] = []
    with waiting(options, "loading PyTorch"):
        from dtrain.checkup.check import exit_code
        from dtrain.checkup.data import check_data
        from dtrain.checkup.here import check_machine
        from dtrain.checkup.place import check_place

    _each(options, "looking at this machine", check_machine(), checks)
    with _closing(options) as stack:
        client = _each(options, f"looking at {place}", check_place(config, stack), checks)
        if data is not None:
            _each(options, f"reading {data}", check_data(data, _largest, client), checks)
    code = exit_code(checks)
    errors = [check.name for check in checks if check.status == "error"]
    warnings = [check.name for check in checks if check.status == "warning"]
    words = {"error": errors, "warning": warnings}
    counts = [f"{len(named)} {word}{'s'[: len(named) != 1]}" for word, named in words.items() if named]
    summary = ", ".join(counts) or "all is well"
    result(options, summary, {"event": "doctor", "code": code, "errors": errors, "warnings": warnings})
    if not errors:
        say(options, "next: dtrain init my --data PATH" if data is None else f"next: dtrain init my --data {data}")
    raise typer.Exit(code)


def _cluster(scheduler: str | None, settings: list[str]) -> ClusterConfig:
    """Return the table ``[cluster]`` that the options mean."""
    from dtrain.config.files import with_setting
    from dtrain.config.schema import TrainConfig
    from dtrain.errors import UsageError

    tables: Tables = {}
    for setting in settings:
        if not setting.startswith("cluster."):
            raise UsageError(
                f"--set {setting}: doctor takes keys of cluster alone.", "For example cluster.tls.ca=ca.pem."
            )
        tables = with_setting(tables, setting)
    config = TrainConfig(**tables).cluster
    return config if scheduler is None else config.model_copy(update={"scheduler": absolute_scheduler(scheduler)})


@contextmanager
def _closing(options: Options) -> Iterator[ExitStack]:
    """Give a stack, and say that it is being closed if that takes long."""
    with ExitStack() as stack:
        yield stack
        with waiting(options, "closing the cluster"):
            stack.close()


def _each(options: Options, doing: str, found: Iterator[Check | Client], checks: list[Check]) -> Client | None:
    """Print each check as it ends; return the client that comes among them, if one does."""
    from dtrain.checkup.check import Check

    client = None
    while True:
        with waiting(options, doing):
            item = next(found, None)
        if item is None:
            return client
        if not isinstance(item, Check):
            client = item
            continue
        checks.append(item)
        result(options, _text(item), {"event": "check", **asdict(item)})


def _text(check: Check) -> str:
    from dtrain.display import width_of, wrapped

    indent = " " * (COLUMNS[0] + COLUMNS[1])
    head = f"{check.status:<{COLUMNS[0]}}{check.name:<{COLUMNS[1]}}{check.text}"
    lines = [head, *([f"{indent}{check.cure}"] if check.cure else [])]
    return "\n".join(wrapped(line, width_of(sys.stdout), indent) for line in lines)


def _largest(path: str) -> tuple[str, str]:
    """Return the group of a store, and the name of its largest array of numbers."""
    from dtrain_cli.inspect_store import read_contents

    contents = read_contents(path)
    largest = max(contents.arrays.values(), key=lambda array: math.prod(array.shape) * array.itemsize)
    return contents.group, largest.name
