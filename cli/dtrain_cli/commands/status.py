"""dtrain status: the state of a run, read from its files alone."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrain_cli.arguments import RUN, epilog
from dtrain_cli.output import Options, result, say, shown, table

if TYPE_CHECKING:
    from dtrain.report.history import Row
    from dtrain.run import Run

ORDER = 40
POLL_SECONDS = 1.0
app = typer.Typer()


EPILOG = epilog(
    ("dtrain status", "of the newest run"),
    ("dtrain status my", "of the run of that name"),
    ("dtrain status my/runs/my --watch", "follows a run from its files"),
    ("dtrain status --json", ""),
)


@app.command("status", epilog=EPILOG)
def status(
    ctx: typer.Context,
    run: RUN = "",
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Follow the run: print each round until the run ends, or until Ctrl-C."),
    ] = False,
) -> None:
    """Show the state of a run, while it trains or after a crash: only its files are read."""
    from dtrain.directory import find_run
    from dtrain.runs import load_run

    options: Options = ctx.obj
    opened = load_run(find_run(run))
    with suppress(*([KeyboardInterrupt] if watch else [])):  # to stop watching is no fault, and stops no run
        if watch and not options.json:
            _follow(options, opened)
        elif watch:
            _follow_as_json(options, opened)
        else:
            rows = opened.rows
            record = _record(opened, rows)
            result(options, table(_lines(record, rows)), record)
            if not options.json:
                say(options, _next(opened, record["state"]))


def _next(run: Run, state: str) -> str:
    """Return what one does next with a run in a state."""
    if state == "running":
        return f"next: dtrain status {shown(run.directory)} --watch"
    if state == "done":
        return f"next: dtrain eval {shown(run.directory)}"
    config = run.directory.parent.parent / "dtrain.toml"
    return f"next: dtrain train {shown(config)} continues" if config.is_file() else "next: train it again to continue"


def _follow_as_json(options: Options, run: Run) -> None:
    """Print the state of a run after each round, until it ends."""
    before: tuple[int, str] | None = None
    while True:
        record = _record(run, run.rows)
        now = record["round"], record["state"]
        if now != before:
            result(options, "", record)
            before = now
        if record["state"] != "running":
            return
        time.sleep(POLL_SECONDS)


def _follow(options: Options, run: Run) -> None:
    """Print the rounds of a run as they come, until it ends, and then its state."""
    from dtrain.algorithm.stop import higher_is_better
    from dtrain.display import WIDTH, columns_of
    from dtrain.report.journal import read_events
    from dtrain.report.table import RoundTable
    from dtrain.report.watch import Look, Watch, follow

    def look() -> Look:
        state = _state(run, run.rows)
        return Look(run.rows, read_events(run.directory), state == "running", _silent(run))

    print(f"{shown(run.directory)}: {_state(run, run.rows)}", flush=True)
    rounds = RoundTable(
        rounds=run.config.train.rounds,
        width=columns_of(sys.stdout) or WIDTH,
        metric=run.config.stop.metric,
        higher=higher_is_better(run.config),
    )
    follow(Watch(rounds), look, color=options.color)
    rows = run.rows
    print(table(_lines(_record(run, rows), rows)), flush=True)


def _record(run: Run, rows: list[Row]) -> dict[str, Any]:
    from dtrain.algorithm.stop import higher_is_better
    from dtrain.committed import committed_rounds
    from dtrain.lock import holder
    from dtrain.report.history import best_round
    from dtrain.report.pace import seconds_left, speed

    state = _state(run, rows)
    is_running = state == "running"
    return {
        "event": "status",
        "run": shown(run.directory),
        "state": state,
        "round": rows[-1]["round"] if rows else 0,
        "rounds": run.config.train.rounds,
        "committed": committed_rounds(run.directory),
        "best_round": run.best_round,
        "best_seen_round": best_round(rows, run.config.stop.metric, higher_is_better(run.config)),
        "last": rows[-1] if rows else None,
        "evaluated": next((row for row in reversed(rows) if "val_loss" in row), None),
        "holder": holder(run.directory),
        "samples_per_second": round(speed(rows), 1) if rows else None,
        "seconds_left": seconds_left(rows, run.config.train.rounds) if is_running else None,
        "seconds_since_round": round(_silent(run), 1),
        "retried": sum(row["retried"] for row in rows),
        "rejected": sum(row["rejected"] for row in rows),
    }


def _state(run: Run, rows: list[Row]) -> str:
    """Return "running", "done" or "stopped"."""
    from dtrain.algorithm.stop import end_reason
    from dtrain.committed import committed_rounds
    from dtrain.lock import holder

    if holder(run.directory):
        return "running"
    ended = end_reason(run.stop_history(rows), run.config)
    return "done" if ended and rows[-1]["round"] in committed_rounds(run.directory) else "stopped"


def _silent(run: Run) -> float:
    """Return the seconds since the run has written a round or an event, or was started."""
    from dtrain.runfiles import ENV, EVENTS, HISTORY

    files = [run.directory / name for name in (ENV, HISTORY, EVENTS)]
    times = [file.stat().st_mtime for file in files if file.exists()]
    return max(0.0, time.time() - max(times, default=time.time()))


def _lines(record: dict[str, Any], rows: list[Row]) -> list[tuple[str, str]]:
    process = record["holder"]
    by = f" (process {process['pid']} on {process['host']})" if process else ""
    lines = [
        ("run", f"{record['run']}: {record['state']}{by}"),
        ("rounds", f"{record['round']} of {record['rounds']}, committed {_listed(record['committed'])}"),
    ]
    best = next((row for row in rows if row["round"] == record["best_round"]), None)
    last, evaluated = record["last"], record["evaluated"]
    shown_rows = {"last": last, "evaluated": evaluated if evaluated is not last else None, "best": best}
    lines += [(label, _losses(row)) for label, row in shown_rows.items() if row]
    if best is not None and (seen := record["best_seen_round"]) != best["round"]:
        lines.append(("", f"of the rounds that are kept; round {seen} was better"))
    if rows:
        lines.append(("pace", _pace(record)))
    if record["retried"] or record["rejected"]:
        lines.append(("faults", f"{record['retried']} retried, {record['rejected']} rejected (events.jsonl)"))
    return lines


def _pace(record: dict[str, Any]) -> str:
    """Return how fast the run is and, while it trains, how long it takes and when the last round ended."""
    from dtrain.display import clock

    pace = f"{record['samples_per_second']:,.0f} samples/s"
    if record["seconds_left"] is None:
        return pace
    return (
        f"{pace}, {clock(record['seconds_left'])} left; the last round ended {clock(record['seconds_since_round'])} ago"
    )


def _listed(committed: list[int]) -> str:
    return ", ".join(map(str, committed)) or "none"


def _losses(row: Row) -> str:
    from dtrain.display import number

    losses = [(k, v) for k, v in row.items() if k.endswith("_loss") and isinstance(v, float)]
    metrics = [(k, v) for k, v in row.items() if k.startswith("val_") and k != "val_loss" and v is not None]
    return f"round {row['round']}: {', '.join(f'{key} {number(value)}' for key, value in losses + metrics)}"
