"""dtrain eval: loss and metrics of a committed round."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain_cli.arguments import SCHEDULER, SET, absolute_scheduler
from dtrain_cli.output import Options, result, shown, table

if TYPE_CHECKING:
    from dtrain.config.schema import DataConfig
    from dtrain.data.plan.splits import SplitName
    from dtrain.data.samples import Samples

ORDER = 50
app = typer.Typer()


@app.command("eval")
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
    from dtrain.directory import find_run
    from dtrain.errors import UsageError
    from dtrain.run import load_run

    options: Options = ctx.obj
    names: dict[str, SplitName] = {"val": "val", "test": "test", "all": "all"}
    chosen = names.get(split or ("all" if data is not None else "test"))
    if chosen is None:
        raise UsageError(f'--split "{split}": allowed are val, test and all.')
    opened = load_run(find_run(run), settings=tuple(settings or ()))
    samples = None if data is None else _described(opened.config.data, data)
    cluster = absolute_scheduler(scheduler) if scheduler is not None else opened.config.cluster.scheduler
    means, number, count = opened.evaluation(samples, split=chosen, round=round, cluster=cluster)
    record = {"event": "eval", "run": shown(opened.directory), "round": number, "split": chosen, "samples": count}
    rows = [("run", f"{shown(opened.directory)} round {number}"), ("split", f"{chosen}, {count:,} samples")]
    rows += [(name, f"{value:.6g}") for name, value in means.items()]
    result(options, table(rows), {**record, **{k: v if math.isfinite(v) else None for k, v in means.items()}})


def _described(config: DataConfig, data: str) -> Samples:
    """Describe the samples of another store with a run's ``[data]`` table."""
    from dtrain.data.source import describe

    path = data if "://" in data else str(Path(data).absolute())
    return describe(config.model_copy(update={"path": path}), Path.cwd())
