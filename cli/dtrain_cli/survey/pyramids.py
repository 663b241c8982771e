"""OME-Zarr: which image of a store is read, and the label images beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dtrain.data.dataset import NamedArray, open_named
from dtrain.data.layouts import ome
from dtrain.errors import LengthsDiffer, UnknownVariable, UnsuitableVariable, UsageError, listed
from dtrain_cli.survey.contents import Place, contents_of, groups_below, layout_of
from dtrain_cli.survey.roles import Contents

MOST_SERIES = 100
"""Images of a file with several that are listed."""


def image_at_root(place: Place) -> Contents | None:
    """Return the first image of a store that is OME-Zarr, and its label images; None if it is none."""
    if layout_of(place, "") != ome.NAME:
        return None
    groups = list(_images_of(place, ""))
    if not groups:
        below = [name for name, _ in groups_below(place.root)]
        raise UsageError(
            f"{place.path} is OME-Zarr whose attributes name no image; its groups: {listed(below) or 'none'}.",
            "Name the group of an image with --data, or write its arrays in [data] by their path: "
            'inputs = ["0"], targets = ["labels/NAME/0"].',
        )
    return _contents(place, groups)


def image_below(place: Place) -> Contents | None:
    """Return the same of the first image in the groups of a store; None if there is none."""
    groups = [name for name, _ in groups_below(place.root) if layout_of(place, name) == ome.NAME]
    images = [name for name in groups if _levels(place, name) and ome.LABELS not in name.split("/")]
    return _contents(place, images) if images else None


def _images_of(place: Place, group: str) -> Iterator[str]:
    """Yield the groups of the images of a group: its own, those of a well or of a plate's first well, or of a file."""
    prefix = f"{group}/" if group else ""
    if _levels(place, group):
        yield group
    elif wells := _paths(_described(place, group, "plate").get("wells")):
        yield from _images_of(place, f"{prefix}{wells[0]}")
        yield from (f"{prefix}{well}" for well in wells[1:])
    elif fields := _paths(_described(place, group, "well").get("images")):
        yield from (f"{prefix}{field}" for field in fields)
    else:
        numbers = (f"{prefix}{number}" for number in range(MOST_SERIES))
        for name in numbers:  # as bioformats2raw writes them
            if not _levels(place, name):
                break
            yield name


def _described(place: Place, group: str, key: str) -> Mapping[str, Any]:
    attributes = place.hierarchy.attributes(group)
    for table in (attributes.get("ome"), attributes):
        if isinstance(table, Mapping) and isinstance(table.get(key), Mapping):
            return dict(table[key])
    return {}


def _paths(given: Any) -> list[str]:
    entries = given if isinstance(given, list) else []
    return [str(entry["path"]).strip("/") for entry in entries if isinstance(entry, Mapping) and "path" in entry]


def _levels(place: Place, group: str) -> list[str]:
    """Return the names of the arrays of an image's pyramid, the largest first; none if a group is no image."""
    images = list(ome.images(place.hierarchy.attributes(group)))
    return ome.levels(images[0]) if images else []


def _contents(place: Place, groups: list[str]) -> Contents:
    """Return the first of some images, with its label images."""
    group, *others = groups
    prefix = f"{group}/" if group else ""
    levels = _levels(place, group)
    strange: dict[str, str] = {}
    arrays: dict[str, NamedArray] = dict(open_named(place.store, group, (levels[0],)))
    for name in _label_names(place, prefix):
        label = f"{ome.LABELS}/{name}"
        pyramid = _levels(place, f"{prefix}{label}")
        try:
            arrays |= open_named(place.store, group, (levels[0], f"{label}/{pyramid[0]}" if pyramid else label))
        except LengthsDiffer:
            strange[label] = "another resolution than the image"
        except (UnknownVariable, UnsuitableVariable):
            strange[label] = "cannot be opened"
    found = contents_of(place, group, arrays, strange, ome.NAME)
    return replace(found, others=tuple(others))


def _label_names(place: Place, prefix: str) -> list[str]:
    attributes = place.hierarchy.attributes(f"{prefix}{ome.LABELS}")
    for table in (attributes.get("ome"), attributes):
        if isinstance(table, Mapping) and isinstance(table.get(ome.LABELS), list):
            return [name for name in table[ome.LABELS] if isinstance(name, str)]
    return []
