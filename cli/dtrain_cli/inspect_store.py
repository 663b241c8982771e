"""Inspect a store and choose what to train on: the drafts in the order in which they are tried."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from dtrain.data.layouts import anndata, ome
from dtrain.data.paths import locate
from dtrain.data.read.open import open_group
from dtrain.errors import UsageError, listed
from dtrain_cli.survey.cells import cells, cells_at_root, cells_below
from dtrain_cli.survey.contents import named_at_root, named_below, open_place
from dtrain_cli.survey.draft import Draft
from dtrain_cli.survey.forecast import forecast, maps, series
from dtrain_cli.survey.microscopy import microscopy
from dtrain_cli.survey.pyramids import image_at_root, image_below
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
BY_LAYOUT: Mapping[str, Mapping[str, Callable[[Contents, Look], Draft | None]]] = {
    anndata.NAME: {"tabular": cells},
    ome.NAME: {"image": microscopy, "forecast": forecast},
}
"""By layout: the templates that it can have, the usual one first."""


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
    by_template = BY_LAYOUT.get(contents.layout, BY_TEMPLATE)
    choose_any = next(iter(by_template.values())) if contents.layout else draft_of
    chosen = choose_any if template is None else by_template.get(template, _nothing)
    draft = chosen(contents, look)
    if draft is None:
        raise _nothing_fits(contents, template)
    return settle(draft, contents, look)


def read_contents(path: str) -> Contents:
    """Return what the store at a path or URL holds that can be trained on.

    Raises
    ------
    DataNotFound, NotZarr
        There is nothing, or no Zarr group.
    UsageError
        No array has dimension names, or several groups have arrays.
    TooFewSamples
        All arrays are empty.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a store without consolidated metadata is as good
        place = open_place(path)
        return (
            cells_at_root(place)
            or image_at_root(place)
            or named_at_root(place)
            or cells_below(place)
            or image_below(place)
            or named_below(place)
        )


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


def _nothing(contents: Contents, look: Look) -> None:
    """Return no draft: the template does not fit the layout of a store."""


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
