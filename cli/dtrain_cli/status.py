"""dtrain status: where a run stands, from its files alone."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from dtrain_cli.output import Options, result, shown, table


def status(
    ctx: typer.Context,
    run: Annotated[
        str, typer.Argument(help="A run's directory, or its name. [default: the newest]", show_default=False)
    ] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it until the run ends.")] = False,
) -> None:
    """Show where a run stands, while it trains or after a crash."""
    from dtrain.run import find_run, load_run

    options: Options = ctx.obj
    opened = load_run(find_run(run))
    before: Any = None
    while True:
        record, text = _status(opened)
        if (record["round"], record["state"]) != before:
            result(options, text, record)
            before = record["round"], record["state"]
        if not watch or record["state"] != "running":
            return
        time.sleep(1.0)


def _status(opened: Any) -> tuple[dict[str, Any], str]:
    from dtrain.algorithm.stop import metric_of, stop_reason
    from dtrain.checkpoint import committed_rounds
    from dtrain.lock import holder

    rows, committed = opened.rows, committed_rounds(opened.directory)
    last: dict[str, Any] = rows[-1] if rows else {}
    finished, total = last.get("round", 0), opened.config.train.rounds
    ended = finished >= total or stop_reason([metric_of(row, opened.config) for row in rows], opened.config)
    lock = holder(opened.directory)
    state = "running" if lock else "done" if ended and finished in committed else "stopped"
    best = opened.best_round
    record = {
        "event": "status",
        "run": shown(opened.directory),
        "state": state,
        "round": finished,
        "rounds": total,
        "committed": committed,
        "best_round": best,
        "last": last or None,
        "holder": lock,
    }
    by = f" (process {lock['pid']} on {lock['host']})" if lock else ""
    lines = [
        ("run", f"{shown(opened.directory)}: {state}{by}"),
        ("rounds", f"{finished} of {total}, committed {', '.join(map(str, committed)) or 'none'}"),
    ]
    for label, row in (("last", last), ("best", next((r for r in rows if r["round"] == best), {}))):
        if row:
            losses = [f"{k} {v:.4f}" for k, v in row.items() if k.endswith("_loss") and isinstance(v, float)]
            losses += [
                f"{k} {v:.4f}" for k, v in row.items() if k.startswith("val_") and k != "val_loss" and v is not None
            ]
            lines.append((label, f"round {row['round']}: {', '.join(losses)}"))
    return record, table(lines)
