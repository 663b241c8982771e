"""OME-Zarr: the axes of an image stand in the ``multiscales`` of its group, which lists the arrays of its pyramid.

References
----------
OME-NGFF 0.4, "multiscales" and "labels" metadata (https://ngff.openmicroscopy.org/0.4/): attributes of a Zarr v2
group. 0.5: the same under the attribute ``ome`` of a Zarr v3 group. Up to 0.2 the axes were always those of
`ALL_AXES`; 0.3 has their names alone.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from dtrain.data.layouts.hierarchy import Attributes, Hierarchy
from dtrain.data.layouts.stored import HasAxes
from dtrain.data.read.shards import ArrayLike

NAME = "OME-Zarr"
ALL_AXES = ("t", "c", "z", "y", "x")
LABELS = "labels"
"""The group beside the arrays of an image that holds its label images."""
CHANNEL = "channel"


def is_root(hierarchy: Hierarchy, path: str) -> bool:
    """Return True if a group is an image."""
    attributes = hierarchy.attributes(path)
    return "multiscales" in attributes or "ome" in attributes


def dims_of(hierarchy: Hierarchy, array: HasAxes) -> list[Any] | None:
    """Return the names of an array's axes, as they are stored; None if no enclosing image names the array."""
    image = _image_of(hierarchy, array.path)
    axes = None if image is None else _axes(image, array.ndim)
    return None if axes is None else [name for name, _ in axes]


def irrelevant_axis(hierarchy: Hierarchy, array: ArrayLike) -> int | None:
    """Return the channel axis of a label image, if its length is 1; None if there is no such axis.

    "Each dimension of the label should be either the same as the corresponding dimension of the image, or 1 if that
    dimension of the label is irrelevant" (0.4): of a channel it always is.
    """
    if LABELS not in array.path.split("/")[:-1]:
        return None
    image = _image_of(hierarchy, array.path)
    axes = None if image is None else _axes(image, array.ndim)
    pairs = enumerate(zip(axes or (), array.shape, strict=False))
    return next((axis for axis, ((_, kind), length) in pairs if kind == CHANNEL and length == 1), None)


def _image_of(hierarchy: Hierarchy, path: str) -> Mapping[str, Any] | None:
    """Return the description of the image that an array is a level of, in the nearest group that names the array."""
    found = _level_of(hierarchy, path)
    return None if found is None else found[0]


def _level_of(hierarchy: Hierarchy, path: str) -> tuple[Mapping[str, Any], str] | None:
    """Return the same with the path of the array from the group of the image."""
    for group in hierarchy.enclosing(path):
        for image in images(group.attributes):
            if group.inside in levels(image):
                return image, group.inside
    return None


def images(attributes: Attributes) -> Iterator[Mapping[str, Any]]:
    """Yield the images that the attributes of a group describe."""
    for table in (attributes.get("ome"), attributes):
        given = table.get("multiscales") if isinstance(table, Mapping) else None
        yield from (image for image in given if isinstance(image, Mapping)) if isinstance(given, list) else ()


def levels(image: Mapping[str, Any]) -> list[str]:
    """Return the paths of the arrays of a pyramid, from its group."""
    given = image.get("datasets")
    paths = [level.get("path") for level in given if isinstance(level, Mapping)] if isinstance(given, list) else []
    return [posixpath.normpath(path).strip("/") for path in paths if isinstance(path, str)]


def _axes(image: Mapping[str, Any], ndim: int) -> list[tuple[Any, str]] | None:
    """Return name and type of each axis; None if the image names none, as allowed once, and has not all of them."""
    axes = image.get("axes")
    if axes is None and ndim == len(ALL_AXES):
        axes = list(ALL_AXES)
    if not isinstance(axes, list):
        return None
    named = [axis if isinstance(axis, Mapping) else {"name": axis} for axis in axes]
    return [(axis.get("name"), str(axis.get("type", CHANNEL if axis.get("name") == "c" else ""))) for axis in named]


# Written ----------------------------------------------------------------------------------------------------

VERSION = "0.5"
"""Of the metadata that are written, which lie in Zarr v3."""
Range: TypeAlias = tuple[int, int]
"""The first selected place of an axis, and the step to the next."""


def written_image(
    hierarchy: Hierarchy, path: str, name: str, dims: Sequence[str], ranges: Mapping[str, Range]
) -> dict[str, Any] | None:
    """Return the attribute ``ome`` of a group that holds one level of an image; None if viewers could not open it.

    Parameters
    ----------
    hierarchy : Hierarchy
    path : str
        An array of an image, whose axes and scales are those of the new one.
    name : str
        The new array.
    dims : sequence of str
        Its dimensions.
    ranges : mapping of str to (int, int)
        By dimension, where its places lie in the image.
    """
    found = _level_of(hierarchy, path)
    image, level = found or ({}, "")
    given = None if found is None else _axes_written(image)
    if given is None or [axis["name"] for axis in given if axis["name"] in dims] != list(dims):
        return None
    places = [number for number, axis in enumerate(given) if axis["name"] in dims]
    scale, translation = _transformed(image, level, len(given))
    first, step = ([ranges.get(dim, (0, 1))[k] for dim in dims] for k in (0, 1))
    own_scale = [scale[k] * by for k, by in zip(places, step, strict=True)]
    begin = [translation[k] + scale[k] * at for k, at in zip(places, first, strict=True)]
    transforms: list[dict[str, Any]] = [{"type": "scale", "scale": own_scale}]
    if any(begin):
        transforms.append({"type": "translation", "translation": begin})
    written = {"path": name, "coordinateTransformations": transforms}
    axes = [given[k] for k in places]
    return {"version": VERSION, "multiscales": [{"name": name, "axes": axes, "datasets": [written]}]}


def _axes_written(image: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the axes of an image as version 0.5 has them."""
    given = image.get("axes", list(ALL_AXES))
    if not isinstance(given, list):
        return None
    named = [dict(axis) if isinstance(axis, Mapping) else {"name": axis} for axis in given]
    types = {"t": "time", "c": CHANNEL, "z": "space", "y": "space", "x": "space"}
    return [{**({"type": types[a["name"]]} if a.get("name") in types else {}), **a} for a in named]


def _transformed(image: Mapping[str, Any], level: str, ndim: int) -> tuple[list[float], list[float]]:
    """Return scale and translation of each axis of a level: its own, then those of all levels."""
    scale, translation = [1.0] * ndim, [0.0] * ndim
    own = [image["datasets"][number] for number, path in enumerate(levels(image)) if path == level]
    for described in (*own[:1], image):
        for transform in described.get("coordinateTransformations") or []:
            by, to = transform.get("scale"), transform.get("translation")
            if isinstance(by, list) and len(by) == ndim:
                scale = [a * b for a, b in zip(scale, by, strict=True)]
                translation = [a * b for a, b in zip(translation, by, strict=True)]
            if isinstance(to, list) and len(to) == ndim:
                translation = [a + b for a, b in zip(translation, to, strict=True)]
    return scale, translation
