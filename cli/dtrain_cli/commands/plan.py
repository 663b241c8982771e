"""dtrain plan: the numbers of a run before it starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from dtrain_cli.arguments import CONFIG, SCHEDULER, SET, epilog, load_job, start_workers_early
from dtrain_cli.output import Options, progress, result, say, table, waiting

ORDER = 20
app = typer.Typer()


EPILOG = epilog(
    ("dtrain plan my/dtrain.toml", "the numbers, before anything is trained"),
    ("dtrain plan my/dtrain.toml --probe", "measures how many local steps pay"),
    ("dtrain plan my/dtrain.toml --probe --bandwidth 200Mbit", "for slow links"),
    ("dtrain plan my/dtrain.toml --set average.replicas=8 --json", ""),
)


@app.command("plan", epilog=EPILOG)
def plan(
    ctx: typer.Context,
    config: CONFIG,
    settings: SET = None,
    scheduler: SCHEDULER = None,
    full: Annotated[bool, typer.Option("--full", help="Look for missing chunks in every shard.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure some rounds, and show how many local steps a round pay.")
    ] = False,
    bandwidth: Annotated[
        str | None,
        typer.Option("--bandwidth", metavar="200Mbit", help="Predict rounds where a worker's link is that fast."),
    ] = None,
) -> None:
    """Show what training would do: partitions, steps, memory, traffic, and the loss of one real batch.

    Keeps nothing, writes nothing, and refuses with the arithmetic what cannot work.
    """
    options: Options = ctx.obj
    start_workers_early(config, settings, scheduler)
    with waiting(options, "loading PyTorch and opening the data"):
        from dtrain.config.values import parse_bandwidth
        from dtrain.planning import plan_job
        from dtrain.planrecord import plan_record
        from dtrain.plantext import plan_rows
        from dtrain.probe import probe_job
        from dtrain.probetext import cadence_text

        speed = None if bandwidth is None else parse_bandwidth(bandwidth)
        job = load_job(config, settings, scheduler)
    with waiting(options, "looking for workers, checking the data, trying the model on one batch"):
        planned = replace(plan_job(job, full=full), bandwidth=speed)
    if probe:
        say(options, "measuring rounds; nothing of them is kept")
        with progress(options) as show:
            planned = replace(planned, probe=probe_job(job, planned.initial.params, report=show))
    text = "\n\n".join(filter(None, [table(plan_rows(job, planned)), cadence_text(planned)]))
    result(options, text, plan_record(planned))
    say(options, f"nothing was written; next: dtrain train {config}")
