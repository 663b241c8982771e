"""dtrain eval: loss and metrics of a committed round."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, cast

import typer

from dtrain_cli.output import Options, result, shown, table
from dtrain_cli.train import SCHEDULER, SET, _scheduler


def evaluate(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(help="A run's directory, or its name.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option("--data", help="Other data than the run's own: path or URL of a store with the same variables."),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="val, test or all. [default: test; with --data: all]")
    ] = None,
    round: Annotated[str, typer.Option("--round", help="best, last or a number.")] = "best",
    scheduler: SCHEDULER = None,
    settings: SET = None,
) -> None:
    """Compute the loss and the metrics of a run, on the cluster."""
    from dtrain.data.plan.splits import SplitName
    from dtrain.data.source import describe
    from dtrain.errors import UsageError
    from dtrain.run import find_run, load_run

    options: Options = ctx.obj
    wanted = split or ("all" if data is not None else "test")
    if wanted not in ("val", "test", "all"):
        raise UsageError(f'--split "{split}": allowed are val, test and all.')
    chosen = cast(SplitName, wanted)
    opened = load_run(find_run(run), settings=tuple(settings or ()))
    samples = None
    if data is not None:
        path = data if "://" in data else str(Path(data).absolute())
        table_of_data = opened.config.data.model_copy(update={"path": path})
        samples = describe(table_of_data, Path.cwd())
    place = _scheduler(scheduler) if scheduler is not None else opened.config.cluster.scheduler
    found, number, count = opened.evaluation(samples, split=chosen, round=round, cluster=place)
    record = {"event": "eval", "run": shown(opened.directory), "round": number, "split": chosen, "samples": count}
    rows = [("run", f"{shown(opened.directory)} round {number}"), ("split", f"{chosen}, {count:,} samples")]
    rows += [(name, f"{value:.6g}") for name, value in found.items()]
    result(options, table(rows), {**record, **{k: v if math.isfinite(v) else None for k, v in found.items()}})
