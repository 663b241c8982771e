"""dtrain init: a config file, a model, and the data of a template."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from dtrain_cli.output import Options, result, say, shown

if TYPE_CHECKING:
    import xarray as xr

    Stores: TypeAlias = dict[str, tuple[xr.Dataset, int]]

TEMPLATES = ("demo", "digits", "tabular")
LATER = ("forecast", "image")
FILES = {
    "demo": ("dtrain.toml", "model.py", "generate.py"),
    "digits": ("dtrain.toml", "model.py"),
    "tabular": ("dtrain.toml", "model.py"),
}
STORES = {"demo": ("train.zarr", "val.zarr"), "digits": ("digits.zarr",), "tabular": ("tabular.zarr",)}
TARGET_NAMES = ("label", "labels", "target", "targets", "class", "classes", "y")


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
    from dtrain.errors import DiskFull, NotSupportedYet, OutputExists, UsageError, did_you_mean
    from dtrain_cli.datasets import write_store

    options: Options = ctx.obj
    template = template or ("demo" if data is None else "tabular")
    if template in LATER:
        raise NotSupportedYet(f"--template {template}: this version has {', '.join(TEMPLATES)}.")
    if template not in TEMPLATES:
        raise UsageError(
            f"--template {template}: allowed are {', '.join(TEMPLATES)}{did_you_mean(template, TEMPLATES)}"
        )
    if data is not None and template != "tabular":
        raise UsageError(f"--data fills the template tabular, not {template}.")
    names = [*FILES[template], *([] if data is not None else STORES[template])]
    for name in names:
        if (directory / name).exists():
            raise OutputExists(f"{shown(directory / name)} is already there; nothing was written.", "Name another DIR.")
    if directory.exists() and not directory.is_dir():
        raise OutputExists(f"{shown(directory)} is a file; nothing was written.", "Name another DIR.")
    texts, stores = _contents(template, directory, data)
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
    written = [shown(directory / name) for name in names]
    config = shown(directory / "dtrain.toml")
    result(options, "\n".join(f"wrote {name}" for name in written), {"event": "init", "written": written})
    say(options, f"next: dtrain plan {config}, then dtrain train {config}")


def _contents(template: str, directory: Path, data: str | None) -> tuple[dict[str, str], Stores]:
    """Return the texts of a template's files, and its data sets with the rows of a chunk, by name."""
    from dtrain_cli import datasets

    if template == "demo":
        names = {"dtrain.toml": "demo.toml", "model.py": "demo_model.py", "generate.py": "demo_generate.py"}
        train, val = datasets.python_sources()
        rows = datasets.TOKENS_A_CHUNK
        return {name: _read(source) for name, source in names.items()}, {
            "train.zarr": (train, rows),
            "val.zarr": (val, rows),
        }
    if template == "digits":
        names = {"dtrain.toml": "digits.toml", "model.py": "digits_model.py"}
        return {name: _read(source) for name, source in names.items()}, {"digits.zarr": (datasets.digits(), 100)}
    return _tabular(directory, data), {} if data is not None else {"tabular.zarr": (datasets.tabular(), 100)}


def _tabular(directory: Path, data: str | None) -> dict[str, str]:
    if data is None:
        shapes = {"features": 16, "outputs": [], "inputs": ["features"], "targets": ["target"], "loss": "mse"}
        filled = {**shapes, "path": "tabular.zarr", "group": ""}
    else:
        path = json.dumps(_relative(data, directory), ensure_ascii=False)[1:-1]  # it may hold quotes
        filled = {**_inspected(data), "path": path, "group": ""}
    classes = filled["loss"] == "cross_entropy"
    filled = {**filled, "metric": "accuracy" if classes else "mae", "what": "classes" if classes else "a number"}
    words = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in filled.items()
    }
    return {"dtrain.toml": Template(_read("tabular.toml")).substitute(words), "model.py": _read("tabular_model.py")}


def _inspected(path: str) -> dict[str, Any]:
    """Guess inputs, target and loss of a store from names, shapes and dtypes."""
    import numpy as np

    from dtrain.data.source import list_variables, open_samples
    from dtrain.errors import TooFewSamples, UsageError

    known = {name: dims for name, dims in sorted(list_variables(path).items()) if dims}
    if len(known) < 2:
        raise UsageError(f"{path}: needs two variables, an input and a target; it has {', '.join(known) or 'none'}.")
    target = next((name for name in TARGET_NAMES if name in known), list(known)[-1])
    inputs = [name for name, dims in known.items() if name != target and dims[0] == known[target][0]]
    if not inputs:
        raise UsageError(f"{path}: no variable shares the first dimension of {target}, {known[target][0]}.")
    samples = open_samples(path, inputs=inputs, targets=[target])
    if not samples.num_samples:
        raise TooFewSamples(f"{path} holds no samples along {samples.sample_dim}.")
    described = samples.variable(target)
    features = sum(math.prod(samples.variable(name).row_shape) for name in inputs)
    classes = _count_classes(path, target) if np.dtype(described.dtype).kind in "iub" else 0
    outputs = [classes, *described.row_shape] if classes else list(described.row_shape)
    loss = "cross_entropy" if classes else "mse"
    return {"features": features, "outputs": outputs, "inputs": inputs, "targets": [target], "loss": loss}


def _count_classes(path: str, target: str) -> int:
    """Return the largest class + 1, reading the target chunk by chunk; 0 if a number is negative: no class."""
    from dtrain.data.read.open import open_group
    from dtrain.errors import ChunkUndecodable, one_line

    array: Any = open_group(str(path), "")[target]
    rows, most = array.chunks[0], 0
    for start in range(0, array.shape[0], rows):
        try:
            values = array[start : start + rows]
        except Exception as error:
            said = one_line(error)
            raise ChunkUndecodable(
                f"{path}: {target}[{start}:{start + rows}] cannot be decoded: {said}",
                "Restore it from a copy of the store.",
            ) from error
        if int(values.min()) < 0:
            return 0
        most = max(most, int(values.max()))
    return most + 1


def _relative(data: str, directory: Path) -> str:
    import os

    return data if "://" in data else os.path.relpath(Path(data).absolute(), directory.absolute())


def _read(name: str) -> str:
    return files("dtrain_cli").joinpath("templates", name).read_text(encoding="utf-8")
