"""dtrain eval: loss and metrics of a committed round."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from dtrain_cli.output import Options, columns, result, say, shown, table, waiting

if TYPE_CHECKING:
    from dtrain.data.plan.splits import SplitName
    from dtrain.data.samples import Samples
    from dtrain.events import Event, Reporter
    from dtrain.run import Run
    from dtrain.scores import Scores

ORDER = 50
PASS_SECONDS = 5.0
"""Between two lines about a pass over the training rows."""
app = typer.Typer()


EPILOG = epilog(
    ("dtrain eval", "the newest run on its test split"),
    ("dtrain eval my --split val --round best", ""),
    ("dtrain eval my --data other.zarr", "on another store, all of it"),
    ("dtrain eval my --scheduler tcp://10.0.0.1:8786 --json", ""),
)


@app.command("eval", epilog=EPILOG)
def evaluate(
    ctx: typer.Context,
    run: RUN = "",
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Other data than the run's own: path or URL of a store with the same variables. Several are read as "
            "one, in this order: --data a.zarr --data b.zarr.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="SPLIT",
            help="val, test or all; default: test, with --data all.",
            autocompletion=completion.splits,
        ),
    ] = None,
    round: Annotated[
        str | None,
        typer.Option(
            "--round",
            metavar="ROUND",
            help="last, best or a number; default: last.",
            show_default=False,
            autocompletion=completion.rounds,
        ),
    ] = None,
    scheduler: SCHEDULER = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            metavar="NAME",
            help="Break the figures down: by lead, by target, by a dimension of the target, by a coordinate of one "
            "dimension (also time.month and other parts of dates). Several: --by lead --by lat.",
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="In place of the run's metrics: a built-in one, one of the run, or a class of torchmetrics. Several: "
            "--metric rmse --metric r2.",
        ),
    ] = None,
    no_baselines: Annotated[
        bool, typer.Option("--no-baselines", help="Forecasts without persistence and climatology beside them.")
    ] = False,
    all_times: Annotated[
        bool, typer.Option("--all-times", help="With --by lead: each lead at all of its valid times, shared or not.")
    ] = False,
    settings: SET = None,
    project: PROJECT = None,
    trust_code: TRUST_CODE = False,
) -> None:
    """Compute the loss and the metrics of a run, on the cluster.

    --set data.isel={} and other keys of [data] select other samples than the run's.
    """
    options: Options = ctx.obj
    start_workers_early(Path(run) / "config.toml", settings, scheduler, trains=False)
    with waiting(options, "loading PyTorch"):
        from dtrain.asking import Question
        from dtrain.directory import find_run
        from dtrain.errors import UsageError, did_you_mean
        from dtrain.runs import is_view, open_run

    names: dict[str, SplitName] = {"val": "val", "test": "test", "all": "all"}
    chosen = names.get(split if split is not None else "all" if data else "test")
    if chosen is None:
        guess = did_you_mean(str(split), names)
        raise UsageError(f'--split "{split}": allowed are val, test and all{guess or "."}')
    view = tuple(setting for setting in settings or () if is_view(setting))
    own = tuple(setting for setting in settings or () if setting not in view)
    opened = open_run(find_run(run), project=project, trusted=trust_code, settings=own, imported=False)
    samples = opened.other_samples(tuple(data) if data else None, view) if data or view else None
    cluster = absolute_scheduler(scheduler) if scheduler is not None else opened.config.cluster.scheduler
    with waiting(options, f"evaluating on {chosen}"):
        asked_metrics = tuple(metrics) if metrics else None
        question = Question(
            split=chosen, by=tuple(by or ()), metrics=asked_metrics, baselines=not no_baselines, all_times=all_times
        )
        wanted = "last" if round is None else round
        scores = opened.scores(samples, question, round=wanted, cluster=cluster, report=_passes(options))
    number, count = scores.round, scores.samples
    record = {"event": "eval", "run": shown(opened.directory), "round": number, "split": chosen, "samples": count}
    chosen_by = {} if samples is None else samples.config.model_dump(mode="json", include={"isel", "sel"})
    record |= {key: table for key, table in chosen_by.items() if table}
    rows = [("run", f"{shown(opened.directory)} round {number}"), ("split", f"{chosen}, {count:,} samples")]
    if by:
        _show_groups(options, scores, table(rows), record)
    else:
        finite = {name: value if math.isfinite(value) else None for name, value in scores.values.items()}
        beside = scores.beside()
        shown_alone = ["loss"] if beside is not None else list(finite)
        rows += [(name, f"{scores.values[name]:.6g}") for name in shown_alone]
        text = table(rows) if beside is None else f"{table(rows)}\n\n{columns(*beside)}"
        result(options, text, {**record, **finite})
    for note in scores.asked.notes:
        say(options, f"{note[0].upper()}{note[1:]}.")
    notes = list(_notes(opened, samples, " and ".join(data or ()), chosen, number if round is None else None))
    if not notes and not options.json:
        store = " --data STORE" if opened.config.data.is_federated else ""
        notes = [f"next: dtrain predict {shown(opened.directory)}{store} --out {opened.directory.name}-predicted.zarr"]
    for line in notes:
        say(options, line)


def _passes(options: Options) -> Reporter:
    """Return what says now and then how far a pass over the training rows is."""
    from dtrain.events import StepsTaken
    from dtrain.report.lines import steps_line

    latest: dict[int, StepsTaken] = {}
    said = time.monotonic()

    def tell(event: Event) -> None:
        nonlocal said
        if isinstance(event, StepsTaken):
            latest[event.replica] = event
            if time.monotonic() - said > PASS_SECONDS:
                said = time.monotonic()
                say(options, steps_line([latest[replica] for replica in sorted(latest)]))

    return tell


def _show_groups(options: Options, scores: Scores, head: str, record: dict[str, Any]) -> None:
    """Print a table for people, or an object for each group; sentences about what counts go beside."""
    from dtrain.scores import rows_of, texts_of

    dataset = scores.dataset()
    if options.json:
        for row in rows_of(dataset):
            result(options, "", {**record, **row})
    else:
        result(options, f"{head}\n\n{columns(*texts_of(dataset, scores.asked.baselines))}", {})


def _notes(run: Run, samples: Samples | None, data: str, split: SplitName, last: int | None) -> Iterator[str]:
    """Yield what is said beside the figures: what they are of, where one could take them for something else."""
    from dtrain.job import plain

    if last is not None and (note := run.note_on_best(last)):
        yield f"{note} --round best evaluates it."
    if samples is None or not data:
        return
    store = run.find_store(samples)
    if (isinstance(store, int) or store == "part") and split == "all":
        yield f"{data} is the run's own data: all of it includes rows that the run was trained on."
    for key in ("isel", "sel"):
        selected = getattr(samples.config, key)
        if store is None and selected and selected == getattr(run.config.data, key):
            yield (
                f"data.{key} = {plain(selected)} of the run selects from {data} too; --set data.{key}={{}} takes all "
                "of it, or name another selection."
            )
