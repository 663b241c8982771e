"""dtrain status: the state of a run, read from its files alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrain_cli.output import Options, result, shown, table

if TYPE_CHECKING:
    from dtrain.report.history import Row
    from dtrain.run import Run

ORDER = 40
app = typer.Typer()


@app.command("status")
def status(
    ctx: typer.Context,
    run: Annotated[
        str, typer.Argument(help="A run's directory, or its name. [default: the newest]", show_default=False)
    ] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Print every change until the run ends.")] = False,
) -> None:
    """Show the state of a run, while it trains or after a crash."""
    from dtrain.directory import find_run
    from dtrain.runs import load_run

    options: Options = ctx.obj
    opened = load_run(find_run(run))
    before: tuple[int, str] | None = None
    while True:
        rows = opened.rows
        record = _record(opened, rows)
        now = record["round"], record["state"]
        if now != before:
            result(options, table(_lines(record, rows)), record)
            before = now
        if not watch or record["state"] != "running":
            return
        time.sleep(1.0)


def _record(run: Run, rows: list[Row]) -> dict[str, Any]:
    from dtrain.algorithm.stop import end_reason
    from dtrain.checkpoint import committed_rounds
    from dtrain.lock import holder

    committed = committed_rounds(run.directory)
    finished = rows[-1]["round"] if rows else 0
    ended = end_reason(run.stop_history(rows), run.config)
    process = holder(run.directory)
    return {
        "event": "status",
        "run": shown(run.directory),
        "state": "running" if process else "done" if ended and finished in committed else "stopped",
        "round": finished,
        "rounds": run.config.train.rounds,
        "committed": committed,
        "best_round": run.best_round,
        "last": rows[-1] if rows else None,
        "evaluated": next((row for row in reversed(rows) if "val_loss" in row), None),
        "holder": process,
    }


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
    return lines + [(label, _losses(row)) for label, row in shown_rows.items() if row]


def _listed(committed: list[int]) -> str:
    return ", ".join(map(str, committed)) or "none"


def _losses(row: Row) -> str:
    from dtrain.display import number

    losses = [(k, v) for k, v in row.items() if k.endswith("_loss") and isinstance(v, float)]
    metrics = [(k, v) for k, v in row.items() if k.startswith("val_") and k != "val_loss" and v is not None]
    return f"round {row['round']}: {', '.join(f'{key} {number(value)}' for key, value in losses + metrics)}"
