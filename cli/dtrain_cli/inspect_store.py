"""Inspect a store and choose what to train on: the drafts in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dtrain.data.paths import locate
from dtrain.data.read.open import open_group
from dtrain.errors import UsageError, listed
from dtrain_cli.survey.contents import read_contents
from dtrain_cli.survey.draft import Draft
from dtrain_cli.survey.forecast import forecast, maps, series
from dtrain_cli.survey.roles import Contents
from dtrain_cli.survey.settings import Settings, settle
from dtrain_cli.survey.supervised import alone, image, supervised, tabular
from dtrain_cli.survey.text import text
from dtrain_cli.survey.values import Look, Sampler

BY_TEMPLATE: Mapping[str, Callable[[Contents, Look], Draft | None]] = {
    "tabular": tabular,
    "forecast": forecast,
    "image": image,
    "text": text,
}


def choose(path: str, template: str | None = None) -> Settings:
    """Return a configuration for a store.

    Parameters
    ----------
    path : str
        Path or URL of a Zarr group.
    template : str, optional
        One of `BY_TEMPLATE`: the kind of task. The one that fits if not given.

    Raises
    ------
    UsageError
        No variables fit together, or none fit the template.
    DtrainError
        The store cannot be read, or not trained on.
    """
    contents = read_contents(path)
    look = Sampler(contents, open_group(locate(path, Path.cwd()).path, contents.group))
    draft = draft_of(contents, look) if template is None else BY_TEMPLATE[template](contents, look)
    if draft is None:
        raise _nothing_fits(contents, template)
    return settle(draft, contents, look)


def draft_of(contents: Contents, look: Look) -> Draft | None:
    """Return the first draft that fits: what names and attributes say comes before guesses."""
    return (
        text(contents, look)
        or maps(contents, look)
        or supervised(contents, look, guess=False)
        or maps(contents, look, any_places=True)
        or series(contents, look)
        or supervised(contents, look, guess=True)
        or alone(contents, look, images=False)
    )


NEEDS = {
    "forecast": "numbers along a dimension of time",
    "image": "images: arrays of samples, height and width",
    "text": "an array of integers that number tokens",
}


def _nothing_fits(contents: Contents, template: str | None) -> UsageError:
    arrays = [f"{a.name}({', '.join(a.dims)})" for a in contents.arrays.values() if not a.is_coordinate]
    unsuitable = [f"{name} ({reason})" for name, reason in contents.left_out.items()]
    has = listed(arrays) or "no array of numbers"
    also = f"; not used: {listed(unsuitable)}" if unsuitable else ""
    if template in NEEDS:
        return UsageError(
            f"{contents.path}: --template {template} needs {NEEDS[template]}; it has {has}{also}.",
            "Leave --template out: dtrain init takes the one that fits.",
        )
    return UsageError(
        f"{contents.path}: needs two variables of numbers that share a dimension, an input and a target; it has "
        f"{has}{also}.",
        "Write both along one dimension, for example with xarray: "
        'xr.Dataset({"x": (("n", "k"), x), "y": (("n",), y)}).to_zarr("new.zarr").',
    )
