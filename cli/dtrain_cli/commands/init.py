"""dtrain init: write a config file, a model, and the data of a template."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from dtrain_cli.arguments import epilog
from dtrain_cli.output import Options, result, say, shown

if TYPE_CHECKING:
    import xarray as xr

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


def _forecast_stores() -> Stores:
    from dtrain_cli import datasets

    return {"weather.zarr": (datasets.weather(), 30)}


def _image_stores() -> Stores:
    from dtrain_cli import datasets

    return {"cells.zarr": (datasets.cells(), 4)}


def _text_stores() -> Stores:
    from dtrain_cli import datasets

    return {"text.zarr": (datasets.some_python_sources(), datasets.TOKENS_A_CHUNK)}


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
    "forecast": Template(
        {"dtrain.toml": "forecast.toml", "model.py": "grid_model.py"}, ("weather.zarr",), _forecast_stores
    ),
    "image": Template({"dtrain.toml": "image.toml", "model.py": "image_model.py"}, ("cells.zarr",), _image_stores),
    "text": Template({"dtrain.toml": "text.toml", "model.py": "text_model.py"}, ("text.zarr",), _text_stores),
}

EPILOG = epilog(
    ("dtrain init digits --template digits", "handwritten digits, with a model"),
    ("dtrain init cells --template image", "pictures with masks"),
    ("dtrain init my --data archive.zarr", "a config file for a store of yours"),
    ("dtrain init my --data s3://bucket/era5.zarr --template forecast", ""),
)


def _templates(incomplete: str) -> list[str]:
    """Complete a template."""
    return [name for name in TEMPLATES if name.startswith(incomplete)]


@app.command("init", epilog=EPILOG)
def init(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to write; made if absent.")] = Path("."),
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            help="demo (default), digits, tabular, forecast, image or text; with --data one of the last four "
            "(default: what fits)",
            metavar="NAME",
            show_default=False,
            autocompletion=_templates,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Path or URL of a Zarr store of yours: the config file is filled in for it.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write dtrain.toml, model.py and a template's data. Overwrites nothing.

    With --data, the config file is filled in for your store. Names, shapes and
    a few chunks decide what is learned: the next step of a field over time,
    masks or labels of images (also of OME-Zarr), a column of a table, the type
    of a cell (AnnData), the next token of a text.
    The file says what was guessed, and how to change it.
    """
    options: Options = ctx.obj
    if data is None:
        _from_template(options, directory, template or "demo")
    else:
        _from_store(options, directory, data, template)


def _from_template(options: Options, directory: Path, name: str) -> None:
    chosen = _template(name)
    names = [*chosen.files, *chosen.stores]
    _refuse_existing(directory, names)
    _write(directory, {file: _read(source) for file, source in chosen.files.items()}, chosen.make_stores())
    written = [shown(directory / file) for file in names]
    result(options, "\n".join(f"wrote {file}" for file in written), {"event": "init", "written": written})
    _say_next(options, directory)


def _from_store(options: Options, directory: Path, data: str, template: str | None) -> None:
    from dtrain.urls import has_secret
    from dtrain_cli.inspect_store import BY_TEMPLATE, choose
    from dtrain_cli.survey.document import document

    if template is not None:
        _check_template_for_data(template, BY_TEMPLATE)
    names = ["dtrain.toml", "model.py"]
    _refuse_existing(directory, names)
    settings = choose(data, template)
    text = document(settings, _relative(data, directory))
    _write(directory, {"dtrain.toml": text, "model.py": _read(settings.model)}, {})
    written = [shown(directory / file) for file in names]
    draft = settings.draft
    record = {"event": "init", "written": written, "template": draft.template, "not_used": list(draft.others)}
    result(options, "\n".join(f"wrote {file}" for file in written), record)
    say(options, _wrapped(draft.title))
    if settings.left_out:
        say(options, _wrapped(f"left out: {settings.left_out}"))
    if settings.filled:
        say(options, _wrapped(f"note: {settings.filled}"))
    if settings.lost:
        say(options, _wrapped(f"warning: {settings.lost}: dtrain refuses that; {written[0]} has the cure"))
    if has_secret(data):
        say(
            options,
            _wrapped(f"warning: {written[0]} holds the whole URL, with what may be a secret: keep it to yourself"),
        )
    say(options, _wrapped(f"what was guessed, and how to change it, stands in {written[0]}"))
    _say_next(options, directory)


def _say_next(options: Options, directory: Path) -> None:
    config = shown(directory / "dtrain.toml")
    say(options, f"next: dtrain plan {config}, then dtrain train {config}")


def _wrapped(text: str) -> str:
    from dtrain.display import wrapped
    from dtrain_cli.survey.document import plain

    return wrapped(plain(text))


def _template(name: str) -> Template:
    from dtrain.errors import UsageError, did_you_mean

    if name not in TEMPLATES:
        raise UsageError(f"--template {name}: allowed are {', '.join(TEMPLATES)}{did_you_mean(name, TEMPLATES)}")
    return TEMPLATES[name]


def _check_template_for_data(name: str, allowed: Iterable[str]) -> None:
    from dtrain.errors import UsageError, did_you_mean

    allowed = list(allowed)
    if name not in allowed:
        why = "brings its own data" if name in TEMPLATES else "is not known"
        raise UsageError(
            f"--template {name} {why}; with --data, allowed are {', '.join(allowed)}{did_you_mean(name, allowed)}",
            "Leave --template out to take the one that fits.",
        )


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


def _relative(data: str, directory: Path) -> str:
    return data if "://" in data else os.path.relpath(Path(data).expanduser().absolute(), directory.absolute())


def _read(name: str) -> str:
    return files("dtrain_cli").joinpath("templates", name).read_text(encoding="utf-8")
