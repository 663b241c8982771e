"""dtrain init: a config file, a model, and the data of a template."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrain_cli.output import Options, result, say, shown

if TYPE_CHECKING:
    import xarray as xr

TEMPLATES = ("digits", "tabular")
LATER = ("demo", "forecast", "image")
TARGET_NAMES = ("label", "labels", "target", "targets", "class", "classes", "y")


def init(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to write; made if absent.")] = Path("."),
    template: Annotated[
        str | None, typer.Option("--template", help="digits or tabular. [default: digits; with --data: tabular]")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="A Zarr store to fill the config file for.", show_default=False)
    ] = None,
) -> None:
    """Write dtrain.toml, model.py and a template's data. Overwrites nothing."""
    from dtrain.errors import NotSupportedYet, OutputExists, UsageError, did_you_mean

    options: Options = ctx.obj
    template = template or ("digits" if data is None else "tabular")
    if template in LATER:
        raise NotSupportedYet(f"--template {template}: this version has {' and '.join(TEMPLATES)}.")
    if template not in TEMPLATES:
        raise UsageError(
            f"--template {template}: allowed are {', '.join(TEMPLATES)}{did_you_mean(template, TEMPLATES)}"
        )
    if data is not None and template != "tabular":
        raise UsageError(f"--data fills the template tabular, not {template}.")
    names = ["dtrain.toml", "model.py", *([] if data is not None else [f"{template}.zarr"])]
    for name in names:
        if (directory / name).exists():
            raise OutputExists(f"{shown(directory / name)} is already there; nothing was written.", "Name another DIR.")
    texts = _digits() if template == "digits" else _tabular(directory, data)
    made = _dataset(template) if data is None else None
    directory.mkdir(parents=True, exist_ok=True)
    if made is not None:
        write_store(made, directory / f"{template}.zarr")
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    written = [shown(directory / name) for name in names]
    config = shown(directory / "dtrain.toml")
    result(options, "\n".join(f"wrote {name}" for name in written), {"event": "init", "written": written})
    say(options, f"next: dtrain plan {config}, then dtrain train {config}")


def write_store(dataset: xr.Dataset, path: Path, rows: int = 100) -> None:
    """Write a dataset as Zarr v3 in chunks of `rows` samples, every chunk stored, with checksums."""
    import zarr
    from zarr.codecs import ZstdCodec

    encoding = {
        str(name): {
            "chunks": (rows, *variable.shape[1:]),
            "compressors": (ZstdCodec(level=3, checksum=True),),
        }
        for name, variable in dataset.data_vars.items()
    }
    with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk of zeros is data, not a missing chunk
        dataset.to_zarr(path, zarr_format=3, encoding=encoding, consolidated=False)


def _digits() -> dict[str, str]:
    return {"dtrain.toml": _read("digits.toml"), "model.py": _read("digits_model.py")}


def _dataset(template: str) -> xr.Dataset:
    return _digits_dataset() if template == "digits" else _tabular_dataset()


def _digits_dataset() -> xr.Dataset:
    import xarray as xr

    from dtrain.errors import UsageError

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "--template digits takes its data from scikit-learn, which is not installed.",
            'Run pip install "dtrain[demo]", or use --template tabular.',
        ) from None
    digits = load_digits()
    return xr.Dataset(
        {
            "image": (("sample", "y", "x"), (digits.images / 16).astype("float32")),
            "label": (("sample",), digits.target.astype("int64")),
        },
        attrs={"title": "Handwritten digits of the UCI repository, as scikit-learn ships them"},
    )


def _tabular_dataset(rows: int = 20_000, features: int = 16) -> xr.Dataset:
    """Make a regression that a line cannot fit: Friedman's first benchmark (1991) with noise columns."""
    import numpy as np
    import xarray as xr

    rng = np.random.default_rng(0)
    x = rng.random((rows, features))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    noisy = y + rng.normal(size=rows)
    return xr.Dataset(
        {
            "features": (("sample", "feature"), x.astype("float32")),
            "target": (("sample",), ((noisy - noisy.mean()) / noisy.std()).astype("float32")),
        }
    )


def _tabular(directory: Path, data: Path | None) -> dict[str, str]:
    if data is None:
        shapes = {"features": 16, "outputs": [], "inputs": ["features"], "targets": ["target"], "loss": "mse"}
        filled = {**shapes, "path": "tabular.zarr", "group": ""}
    else:
        filled = {**_inspected(data), "path": _relative(data, directory), "group": ""}
    classes = filled["loss"] == "cross_entropy"
    filled = {**filled, "metric": "accuracy" if classes else "mae", "what": "classes" if classes else "a number"}
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in filled.items()}
    return {"dtrain.toml": Template(_read("tabular.toml")).substitute(words), "model.py": _read("tabular_model.py")}


def _inspected(path: Path) -> dict[str, Any]:
    """Guess inputs, target and loss of a store from names, shapes and dtypes."""
    import numpy as np

    from dtrain.data.source import list_variables, open_samples
    from dtrain.errors import UsageError

    known = {name: dims for name, dims in list_variables(path).items() if dims}
    if len(known) < 2:
        raise UsageError(f"{path}: needs two variables, an input and a target; it has {', '.join(known) or 'none'}.")
    target = next((name for name in TARGET_NAMES if name in known), list(known)[-1])
    inputs = [name for name, dims in known.items() if name != target and dims[0] == known[target][0]]
    if not inputs:
        raise UsageError(f"{path}: no variable shares the first dimension of {target}, {known[target][0]}.")
    samples = open_samples(path, inputs=inputs, targets=[target])
    described = samples.variable(target)
    features = sum(math.prod(samples.variable(name).sample_shape) for name in inputs)
    classes = np.dtype(described.dtype).kind in "iub"
    outputs = list(described.sample_shape)
    if classes:
        outputs = [_count_classes(path, target), *outputs]
    loss = "cross_entropy" if classes else "mse"
    return {"features": features, "outputs": outputs, "inputs": inputs, "targets": [target], "loss": loss}


def _count_classes(path: Path, target: str) -> int:
    """Return the largest class + 1, reading the target chunk by chunk."""
    from dtrain.data.source import open_group

    array: Any = open_group(str(path), "")[target]
    rows = array.chunks[0]
    return 1 + max(int(array[start : start + rows].max()) for start in range(0, array.shape[0], rows))


def _relative(data: Path, directory: Path) -> str:
    import os

    return os.path.relpath(data.absolute(), directory.absolute())


def _read(name: str) -> str:
    return files("dtrain_cli").joinpath("templates", name).read_text(encoding="utf-8")
