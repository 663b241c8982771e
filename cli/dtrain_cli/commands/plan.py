"""dtrain plan: the numbers of a run before it starts."""

from __future__ import annotations

from typing import Annotated

import typer

from dtrain_cli.arguments import CONFIG, SCHEDULER, SET, load_job, start_workers_early
from dtrain_cli.output import Options, result, say, table, waiting

ORDER = 20
app = typer.Typer()


@app.command("plan")
def plan(
    ctx: typer.Context,
    config: CONFIG,
    settings: SET = None,
    scheduler: SCHEDULER = None,
    full: Annotated[bool, typer.Option("--full", help="Look for missing chunks in every shard.")] = False,
) -> None:
    """Show what training would do: partitions, steps, memory, traffic, and the loss of one real batch.

    Trains nothing, writes nothing, and refuses with the arithmetic what cannot work.
    """
    options: Options = ctx.obj
    start_workers_early(config, settings, scheduler)
    with waiting(options, "loading PyTorch and opening the data"):
        from dtrain.planning import plan_job, plan_record
        from dtrain.plantext import plan_rows

        job = load_job(config, settings, scheduler)
    with waiting(options, "looking for workers, checking the data, trying the model on one batch"):
        planned = plan_job(job, full=full)
    result(options, table(plan_rows(job, planned)), plan_record(planned))
    say(options, f"nothing was written; next: dtrain train {config}")
