"""OME-Zarr: the axes of an image stand in the ``multiscales`` of its group, which lists the arrays of its pyramid.

References
----------
OME-NGFF 0.4, "multiscales" and "labels" metadata (https://ngff.openmicroscopy.org/0.4/): attributes of a Zarr v2
group. 0.5: the same under the attribute ``ome`` of a Zarr v3 group. Up to 0.2 the axes were always those of
`ALL_AXES`; 0.3 has their names alone.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

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
    for group in hierarchy.enclosing(path):
        for image in images(group.attributes):
            if group.inside in levels(image):
                return image
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
