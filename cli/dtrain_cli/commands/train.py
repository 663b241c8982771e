"""dtrain train: train a run, or continue it."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain_cli.arguments import CONFIG, SCHEDULER, SET, epilog, load_job, start_workers_early
from dtrain_cli.output import Options, emit, progress, result, say, shown, waiting

if TYPE_CHECKING:
    from dtrain.events import Event, RunFinished

ORDER = 30
app = typer.Typer()


EPILOG = epilog(
    ("dtrain train my/dtrain.toml", "trains, or continues"),
    ("dtrain train my/dtrain.toml --run second --set train.seed=1", ""),
    ("dtrain train my/dtrain.toml --scheduler cluster.json", "on a Dask cluster"),
    ("dtrain train my/dtrain.toml --max-time 2h", "exit code 75 if not done by then"),
    ("dtrain train my/dtrain.toml --json", "a line a round"),
)


@app.command("train", epilog=EPILOG)
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
        str | None,
        typer.Option("--max-time", metavar="TIME", help="Stop after the round in which this time ends: 2h, 90m."),
    ] = None,
) -> None:
    """Train a run, or continue it where its newest committed round ended.

    The same command continues after any interruption. A complete run prints its result again.
    """
    options: Options = ctx.obj
    start_workers_early(config, settings, scheduler)
    with waiting(options, "loading PyTorch and opening the data"):
        from dtrain.directory import run_directory
        from dtrain.events import RoundFinished, RunFinished
        from dtrain.report.history import row_of
        from dtrain.trainer import train_job

        seconds = parse_duration(max_time) if max_time is not None else None
        job = load_job(config, settings, scheduler)
    directory = Path(shown(run_directory(job, run)))

    def report(event: Event) -> None:
        show(event)
        if isinstance(event, RoundFinished) and options.json:
            emit(options, row_of(event.result))
        if isinstance(event, RunFinished):
            result(options, _done(event), {"event": "done", **asdict(event)})

    with progress(options) as show:
        train_job(job, directory, report=report, max_seconds=seconds)
    for tracker in job.trackers:
        if tracker.look:
            say(options, f"{tracker.name}: {tracker.look.format(runs=shown(directory.parent))}")
    say(options, f"next: dtrain eval {shown(directory)}")


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as ``90``, ``90s``, ``30m``, ``2h`` or ``1d``."""
    from dtrain.errors import UsageError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if not match:
        raise UsageError(f'--max-time "{text}": write it like 90s, 30m, 2h or 1d.')
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _done(event: RunFinished) -> str:
    from dtrain.display import number

    loss = f", val_loss {number(event.val_loss)}" if event.val_loss is not None else ""
    return f"done ({event.reason}): {event.rounds} rounds{loss}\nrun {event.run}\nparams_sha256 {event.params_sha256}"
