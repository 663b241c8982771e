"""dtrain predict: predictions of a run, back into Zarr."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dtrain_cli import completion
from dtrain_cli.arguments import (
    PROJECT,
    RUN,
    SCHEDULER,
    SET,
    TRUST_CODE,
    absolute_scheduler,
    epilog,
    start_workers_early,
)
from dtrain_cli.output import Options, result, say, shown, table, waiting

ORDER = 55
EPILOG = epilog(
    ("dtrain predict storms --data 2024.zarr --out predicted.zarr", ""),
    ("dtrain predict storms --data 2024.zarr --out predicted.zarr --continue", ""),
    ("dtrain predict cells --out types.icechunk --round best --values classes", ""),
    ("dtrain predict nuclei --data s3://bucket/image.zarr --out masks.zarr", ""),
)
app = typer.Typer()


@app.command("predict", epilog=EPILOG)
def predict(
    ctx: typer.Context,
    run: RUN = "",
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Path or URL of a store with the run's inputs; the targets need not be there. Several are read as "
            "one, in this order. Default: the run's own data.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            help="Where predictions are written: a directory (Zarr v3), a URL, or an icechunk repository "
            "(NAME.icechunk). Nothing that is there is overwritten.",
            show_default=False,
        ),
    ] = "",
    goes_on: Annotated[
        bool,
        typer.Option("--continue", help="Go on with predictions that were interrupted; only what lacks is written."),
    ] = False,
    round: Annotated[
        str,
        typer.Option("--round", metavar="ROUND", help="last, best or a number.", autocompletion=completion.rounds),
    ] = "last",
    values: Annotated[
        str,
        typer.Option(
            "--values",
            help="auto: in the targets' units, of classes the class and its probability; classes; probabilities: those "
            "of all classes; raw: what the model returns.",
        ),
    ] = "auto",
    overlap: Annotated[
        float,
        typer.Option("--overlap", help="Share of a patch that the next one covers too; both are blended. 0 for none."),
    ] = 0.25,
    scheduler: SCHEDULER = None,
    settings: SET = None,
    project: PROJECT = None,
    trust_code: TRUST_CODE = False,
) -> None:
    """Predict a store with a run, on the cluster, and write the predictions to Zarr.

    Every anchor whose input window is complete is predicted, in the targets' units, with the coordinates of the inputs.
    """
    options: Options = ctx.obj
    start_workers_early(Path(run) / "config.toml", settings, scheduler, trains=False)
    with waiting(options, "loading PyTorch"):
        from dtrain.directory import find_run
        from dtrain.errors import UsageError
        from dtrain.report.predicting import prediction_progress
        from dtrain.runs import is_view, open_run

    if not out:
        raise UsageError("--out is needed: where predictions are written.", "For example --out predictions.zarr.")
    view = tuple(setting for setting in settings or () if is_view(setting))
    own = tuple(setting for setting in settings or () if setting not in view)
    opened = open_run(find_run(run), project=project, trusted=trust_code, settings=own, imported=False)
    cluster = absolute_scheduler(scheduler) if scheduler is not None else opened.config.cluster.scheduler
    with prediction_progress(quiet=options.quiet, color=options.color) as tell:
        written = opened.predict_to(
            out,
            opened.other_data(tuple(data) if data else None, view) if data or view else None,
            round=round,
            values=values,
            overlap=overlap,
            cluster=cluster,
            resume=goes_on,
            report=tell,
        )
    record = {"event": "done", "run": shown(opened.directory), **asdict(written)}
    rows = [
        ("predictions", shown(written.out)),
        ("run", f"{shown(opened.directory)} round {written.round}"),
        *((name, " x ".join(f"{n:,}" for n in shape) or "1") for name, shape in written.shapes.items()),
        ("samples", _counts(written.samples, written.new, written.left_out)),
    ]
    result(options, table(rows), {**record, "out": shown(written.out)})
    say(options, f"next: python -c \"import xarray; print(xarray.open_zarr('{shown(written.out)}'))\"")


def _counts(samples: int, new: int, left_out: int) -> str:
    text = f"{samples:,}"
    if new < samples:
        text += f", {samples - new:,} of them written before" if new else ", all written before: nothing was left to do"
    if left_out:
        text += f"; {left_out:,} without a prediction, for too many non-finite values (data.non_finite)"
    return text
