"""dtrain export: the model of a run as a file that needs no dtrain."""

from __future__ import annotations

import pkgutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dtrain_cli import completion
from dtrain_cli.arguments import PROJECT, RUN, SET, TRUST_CODE, epilog
from dtrain_cli.output import Options, result, say, shown, table, waiting

ORDER = 56
app = typer.Typer()


def _formats(incomplete: str) -> list[str]:
    """Complete a format: the modules of their folder, whose packages are not imported."""
    from dtrain.exporting import formats

    names = sorted(module.name for module in pkgutil.iter_modules(formats.__path__))
    return [name for name in names if name.startswith(incomplete)]


EPILOG = epilog(
    ("dtrain export my --to pt2 --out my.pt2", "a program of torch.export"),
    ("dtrain export my --to onnx --out my.onnx --round best", "for ONNX Runtime"),
    ("dtrain export my --to safetensors --out my.safetensors", "tensors alone"),
)


@app.command("export", epilog=EPILOG)
def export(
    ctx: typer.Context,
    run: RUN = "",
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="safetensors, pt2 or onnx.",
            show_default=False,
            autocompletion=_formats,
        ),
    ] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="The file to write.", show_default=False)] = ...,  # type: ignore[assignment]
    round: Annotated[
        str,
        typer.Option("--round", metavar="ROUND", help="last, best or a number.", autocompletion=completion.rounds),
    ] = "last",
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average of models (average.ema).")] = False,
    settings: SET = None,
    project: PROJECT = None,
    trust_code: TRUST_CODE = False,
) -> None:
    """Write the model of a run as a file that needs no dtrain, with a model card beside it (PATH.md).

    It takes decoded values and gives outputs in the units of the target:
    normalisation is inside. Outputs on real samples are compared with those of
    the model in the run before the file is kept.
    """
    options: Options = ctx.obj
    with waiting(options, "loading PyTorch"):
        from dtrain.directory import find_run
        from dtrain.runs import open_run

    own = tuple(settings or ())
    opened = open_run(find_run(run), project=project, trusted=trust_code, settings=own, imported=False)
    with waiting(options, f"exporting to {to}, and comparing outputs"):
        file = opened.export(to, out, round=round, ema=ema)
    rows = [
        ("file", f"{shown(file.path)} ({file.nbytes:,} bytes), card {shown(file.card)}"),
        ("run", f"{shown(opened.directory)} round {file.round}"),
        ("checked", f"on {file.samples} samples ({file.split}), relative to the largest output"),
        ("", f"file against module {file.difference:.1e}, module against run.model {file.data_difference:.1e}"),
    ]
    record = {**asdict(file), "path": shown(file.path), "card": shown(file.card), "run": shown(opened.directory)}
    result(options, table(rows), {"event": "export", **record})
    if round == "last" and not ema and (note := opened.note_on_best(file.round)):
        say(options, f"{note} --round best exports it.")
    say(options, f"next: {shown(file.card)} shows how to load and call it")
