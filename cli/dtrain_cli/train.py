"""dtrain train: train a run, or continue it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dtrain_cli.output import Options, result, say, shown

CONFIG = Annotated[Path, typer.Argument(help="The config file (TOML, YAML or JSON).", show_default=False)]
SET = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key, for example train.rounds=50.", show_default=False),
]
SCHEDULER = Annotated[
    str | None,
    typer.Option("--scheduler", help="local, serial, tcp://host:port or a scheduler file.", show_default=False),
]


def train(
    ctx: typer.Context,
    config: CONFIG,
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="NAME", help="Name of the run; default: the config's directory name."),
    ] = None,
    settings: SET = None,
    scheduler: SCHEDULER = None,
    max_time: Annotated[
        str | None, typer.Option("--max-time", help="Stop after a round when this is over, for example 2h or 90m.")
    ] = None,
) -> None:
    """Train a run, or continue it where its newest committed round ended.

    The same command continues after whatever stopped it; a run that is complete says so.
    """
    from dtrain.events import Event, RoundFinished, RunFinished
    from dtrain.report.history import row_of
    from dtrain.run import run_directory
    from dtrain.trainer import train_job

    options: Options = ctx.obj
    seconds = parse_duration(max_time) if max_time is not None else None
    job = load_job(config, settings, scheduler)
    directory = Path(shown(run_directory(job, run)))

    def tell(event: Event) -> None:
        show(event)
        if isinstance(event, RoundFinished) and options.json:
            print(json.dumps(row_of(event.result)), flush=True)
        if isinstance(event, RunFinished):
            result(options, _done(event), {"event": "done", **asdict(event)})

    with _terminable(), _progress(options) as show:
        train_job(job, directory, report=tell, max_seconds=seconds)
    say(options, f"next: dtrain eval {shown(directory)}")


def load_job(config: Path, settings: list[str] | None, scheduler: str | None) -> Any:
    """Read a config file and resolve what it names."""
    from dtrain.config import load_config
    from dtrain.job import job_from_config

    own = [f'cluster.scheduler="{_scheduler(scheduler)}"'] if scheduler is not None else []
    return job_from_config(load_config(config, (*(settings or ()), *own)), config.absolute().parent)


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as ``90``, ``90s``, ``30m``, ``2h`` or ``1d``."""
    from dtrain.errors import UsageError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if not match:
        raise UsageError(f'--max-time "{text}": write it like 90s, 30m, 2h or 1d.')
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _scheduler(text: str) -> str:
    """Return an address as it is, a scheduler file as an absolute path."""
    return text if text in ("local", "serial") or "://" in text else str(Path(text).absolute())


def _progress(options: Options) -> Any:
    if options.quiet:
        return nullcontext(lambda event: None)
    from dtrain.report.progress import terminal_progress

    return terminal_progress(color=options.color, verbose=options.verbose)


def _done(event: Any) -> str:
    loss = f", val_loss {event.val_loss:.4f}" if event.val_loss is not None else ""
    return f"done ({event.reason}): {event.rounds} rounds{loss}\nrun {event.run}\nparams_sha256 {event.params_sha256}"


class _Terminated(BaseException):
    """SIGTERM has come. Like KeyboardInterrupt no Exception: nothing on the way out takes it for a fault."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does: the cluster is closed, committed rounds are kept."""
    from dtrain.errors import Stopped

    def stop(number: int, frame: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        raise Stopped("Stopped by SIGTERM.", "Committed rounds are kept; the same command continues.") from None
    finally:
        signal.signal(signal.SIGTERM, before)
