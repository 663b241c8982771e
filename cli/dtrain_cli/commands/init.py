"""dtrain init: write a config file, a model, and the data of a template."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template as Text
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from dtrain_cli.output import Options, result, say, shown

if TYPE_CHECKING:
    import xarray as xr

    from dtrain_cli.inspect_store import Choice

Stores: TypeAlias = "dict[str, tuple[xr.Dataset, int]]"
"""By name: a data set, and the rows of a chunk."""

ORDER = 10
app = typer.Typer()


@dataclass(frozen=True, slots=True)
class Template:
    """The files and the stores that a template writes."""

    files: dict[str, str]
    """By name in the new directory: the file in ``templates/``."""
    stores: tuple[str, ...]
    make_stores: Callable[[], Stores]


def _demo_stores() -> Stores:
    from dtrain_cli import datasets

    train, val = datasets.python_sources()
    return {"train.zarr": (train, datasets.TOKENS_A_CHUNK), "val.zarr": (val, datasets.TOKENS_A_CHUNK)}


def _digits_stores() -> Stores:
    from dtrain_cli import datasets

    return {"digits.zarr": (datasets.digits(), 100)}


def _tabular_stores() -> Stores:
    from dtrain_cli import datasets

    return {"tabular.zarr": (datasets.tabular(), 100)}


TEMPLATES = {
    "demo": Template(
        {"dtrain.toml": "demo.toml", "model.py": "demo_model.py", "generate.py": "demo_generate.py"},
        ("train.zarr", "val.zarr"),
        _demo_stores,
    ),
    "digits": Template({"dtrain.toml": "digits.toml", "model.py": "digits_model.py"}, ("digits.zarr",), _digits_stores),
    "tabular": Template(
        {"dtrain.toml": "tabular.toml", "model.py": "tabular_model.py"}, ("tabular.zarr",), _tabular_stores
    ),
}
LATER = ("forecast", "image")


@app.command("init")
def init(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to write; made if absent.")] = Path("."),
    template: Annotated[
        str | None, typer.Option("--template", help="demo, digits or tabular. [default: demo; with --data: tabular]")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Path or URL of a Zarr store to fill the config file for.", show_default=False),
    ] = None,
) -> None:
    """Write dtrain.toml, model.py and a template's data. Overwrites nothing."""
    from dtrain_cli.inspect_store import TABULAR, choose

    options: Options = ctx.obj
    name = template or ("demo" if data is None else "tabular")
    chosen = _template(name, data)
    names = [*chosen.files, *(chosen.stores if data is None else ())]
    _refuse_existing(directory, names)
    texts = {file: _read(source) for file, source in chosen.files.items()}
    if name == "tabular":
        path, choice = ("tabular.zarr", TABULAR) if data is None else (_relative(data, directory), choose(data))
        texts["dtrain.toml"] = _filled(texts["dtrain.toml"], path, choice)
    _write(directory, texts, chosen.make_stores() if data is None else {})
    written = [shown(directory / file) for file in names]
    config = shown(directory / "dtrain.toml")
    result(options, "\n".join(f"wrote {file}" for file in written), {"event": "init", "written": written})
    say(options, f"next: dtrain plan {config}, then dtrain train {config}")


def _template(name: str, data: str | None) -> Template:
    from dtrain.errors import NotSupportedYet, UsageError, did_you_mean

    if name in LATER:
        raise NotSupportedYet(f"--template {name}: this version has {', '.join(TEMPLATES)}.")
    if name not in TEMPLATES:
        raise UsageError(f"--template {name}: allowed are {', '.join(TEMPLATES)}{did_you_mean(name, TEMPLATES)}")
    if data is not None and name != "tabular":
        raise UsageError(f"--data fills the template tabular, not {name}.")
    return TEMPLATES[name]


def _refuse_existing(directory: Path, names: list[str]) -> None:
    from dtrain.errors import OutputExists

    for name in names:
        if (directory / name).exists():
            raise OutputExists(f"{shown(directory / name)} is already there; nothing was written.", "Name another DIR.")
    if directory.exists() and not directory.is_dir():
        raise OutputExists(f"{shown(directory)} is a file; nothing was written.", "Name another DIR.")


def _write(directory: Path, texts: dict[str, str], stores: Stores) -> None:
    from dtrain.errors import DiskFull
    from dtrain_cli.datasets import write_store

    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, (dataset, rows) in stores.items():
            write_store(dataset, directory / name, rows)
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiskFull(
            f"{shown(directory)} cannot be written: {error.strerror or error}.", "Name another DIR."
        ) from error


def _filled(text: str, path: str, choice: Choice) -> str:
    """Fill in the config file of the tabular template."""
    classes = choice.loss == "cross_entropy"
    return Text(text).substitute(
        path=json.dumps(path, ensure_ascii=False)[1:-1],  # it may hold quotes
        inputs=json.dumps(choice.inputs, ensure_ascii=False),
        targets=json.dumps([choice.target], ensure_ascii=False),
        features=choice.features,
        outputs=json.dumps(choice.outputs),
        loss=choice.loss,
        metric="accuracy" if classes else "mae",
        kind="classes" if classes else "a number",
    )


def _relative(data: str, directory: Path) -> str:
    return data if "://" in data else os.path.relpath(Path(data).absolute(), directory.absolute())


def _read(name: str) -> str:
    return files("dtrain_cli").joinpath("templates", name).read_text(encoding="utf-8")
