"""OME-Zarr: the label image that is learned from an image at full resolution, and how both are cut."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from dtrain.data.layouts import ome
from dtrain.errors import listed
from dtrain_cli.survey.draft import Draft, unused
from dtrain_cli.survey.forecast import FEWEST, maps
from dtrain_cli.survey.roles import ArrayFacts, Contents, has_word, is_channel, is_time
from dtrain_cli.survey.values import Look

CLASSES = {"semantic", "class", "classes", "tissue", "tissues", "type", "types", "region", "regions", "zone", "zones"}
"""Words of label images whose values are classes; the values of all others number objects, as the format says."""
MOST_CLASSES = 100
PATCH = {2: 64, 3: 32}
"""Places along a side of a patch, by number of dimensions."""
SMALLEST_PATCH = 16
THICK = 8
"""Planes of a chunk and of an image from which on patches are volumes."""
FEW_ROWS = 20
"""Of fewer time points, and always of planes, places are held out."""
FEWEST_SAMPLES = 64
"""Patches get smaller until there are so many samples."""
LARGEST_ROW = 4 << 30


def microscopy(contents: Contents, look: Look) -> Draft | None:
    """Return a draft that learns a label image; without one, the next time point, or to remove noise.

    None if the array of the image cannot be used.
    """
    pictures = [array for array in contents.arrays.values() if not _is_label(array)]
    if not pictures:
        return None
    image = pictures[0]
    labels = [array for array in contents.arrays.values() if _is_label(array) and array.is_integer]
    along = _sample_dim(image, labels[0] if labels else image, contents)
    steps = maps(contents, look, any_places=True) if not labels else None
    if steps is not None and image.sizes[steps.sample_dim] >= FEWEST:
        draft = replace(steps, largest_row=LARGEST_ROW, title=f"No label image was found. {steps.title}")
    elif not along:
        return None
    else:
        draft = _segmentation(image, labels, look) if labels else _denoising(image)
        draft = _cut(draft, image, along)
    if contents.others:
        first = f"the first of several images; the others: {listed(list(contents.others), 6)}"
        title = f"{draft.title} Of {len(contents.others) + 1} images, {contents.group} is read."
        draft = replace(draft, title=title, notes={**draft.notes, "data.group": first})
    return replace(draft, others=unused(contents, *draft.inputs, draft.target))


def _is_label(array: ArrayFacts) -> bool:
    return array.name.startswith(f"{ome.LABELS}/")


def _sample_dim(image: ArrayFacts, label: ArrayFacts, contents: Contents) -> str:
    """Return the dimension of samples: time, else planes, else the rows of the only plane."""
    shared = [dim for dim in image.dims if dim in label.dims and not is_channel(dim)]
    times = [dim for dim in shared if is_time(dim, contents)]
    return next(iter((*times, *(dim for dim in ("z", "y") if dim in shared))), "")


def _segmentation(image: ArrayFacts, labels: list[ArrayFacts], look: Look) -> Draft:
    """Return a draft for a label image: foreground and background, or classes if its name says so."""
    label, *others = labels
    values = look(label.name, closely=True)
    top = int(values.maximum) + 1 if values.count else 2
    is_classes = has_word(label.name, CLASSES) and 2 <= top <= MOST_CLASSES
    seen = f"the largest value that was read is {top - 1:,}"
    beside = f"; others: {listed([other.name for other in others])}" if others else ""
    if is_classes:
        why, off = f"its name says that values are classes; {seen}", {}
    else:
        why = "values of a label image number objects, and are no classes: the class is value > 0"
        text = f"if values are classes ({seen}); then leave data.transform out"
        off = {"model_args.classes": (max(2, top), text)} if 2 < top <= MOST_CLASSES else {}
    return Draft(
        template="image",
        title=f"Segmentation: {label.name}, from {image.name}.",
        inputs=(image.name,),
        target=label.name,
        sample_dim="",
        classes=max(2, top) if is_classes else 2,
        transform="" if is_classes else "model:foreground",
        always_normalize=True,
        notes={
            "data.inputs": "full resolution",
            "data.targets": f"the label image{beside}",
            "data.transform": "turns values above 0 into class 1",
            "model_args.classes": why,
        },
        off=off,
    )


def _denoising(image: ArrayFacts) -> Draft:
    """Return a draft that removes noise from an image: what can be learned without a target."""
    return Draft(
        template="image",
        title=f"No label image was found: the model learns to remove noise that is added to {image.name}.",
        inputs=(image.name,),
        target=image.name,
        sample_dim="",
        transform="model:noisy",
        always_normalize=True,
        notes={
            "data.inputs": "full resolution",
            "data.targets": "no label image was found: name yours here, and change loss, transform and model_args",
            "data.transform": "adds noise of half a standard deviation to the inputs",
        },
    )


def _cut(draft: Draft, image: ArrayFacts, along: str) -> Draft:
    """Return a draft with its samples: patches along chunks, held out by place where there are few rows."""
    sizes, chunks = image.sizes, dict(zip(image.dims, image.chunks, strict=True))
    planes = ("z",) if "z" in sizes and along != "z" else ()
    is_thick = bool(planes) and min(sizes["z"], chunks["z"]) >= THICK
    space = tuple(dim for dim in image.dims if dim in ("y", "x") or (dim == "z" and is_thick))
    if along == "y":
        return _rows_of_a_plane(draft, sizes, chunks)
    side = PATCH[len(space)]
    patch = _patch(sizes, chunks, space, side) | ({"z": 1} if planes and not is_thick else {})
    while _count(sizes, patch, along) < FEWEST_SAMPLES and side > SMALLEST_PATCH:
        side //= 2
        patch |= _patch(sizes, chunks, space, side)
    by_place = _count(sizes, patch, "") >= FEWEST_SAMPLES // 4 and (along == "z" or sizes[along] < FEW_ROWS)
    return replace(
        draft,
        sample_dim=along,
        space=space,
        patch={dim: patch[dim] for dim in image.dims if dim in patch},
        split={"patches": True} if by_place else {},
        largest_row=LARGEST_ROW,
        notes={
            **draft.notes,
            "data.patch": f"a patch of each {'plane' if along == 'z' else 'time point'} is a sample",
            "data.split": "whole places are held out: neighbouring planes and time points resemble each other",
        },
    )


def _rows_of_a_plane(draft: Draft, sizes: Mapping[str, int], chunks: Mapping[str, int]) -> Draft:
    """Return a draft for an image of one plane: a sample is a window of rows, and a patch of their places."""
    side = PATCH[2]
    patch = _patch(sizes, chunks, ("y", "x"), side)
    while _count(sizes, patch, "") < FEWEST_SAMPLES and side > SMALLEST_PATCH:
        side //= 2
        patch = _patch(sizes, chunks, ("y", "x"), side)
    offsets = {"start": 0, "stop": patch["y"]}
    why = f"there is one plane: a sample is {patch['y']} rows of {patch['x']} places"
    return replace(
        draft,
        sample_dim="y",
        space=("window", "x"),
        input_offsets=offsets,
        target_offsets=offsets,
        stride=patch["y"],
        patch={"x": patch["x"]},
        largest_row=LARGEST_ROW,
        notes={**draft.notes, "data.input_offsets": why},
    )


def _patch(sizes: Mapping[str, int], chunks: Mapping[str, int], space: tuple[str, ...], side: int) -> dict[str, int]:
    return {dim: _side(sizes[dim], chunks[dim], side) for dim in space}


def _side(size: int, chunk: int, wanted: int) -> int:
    """Return the side of a patch: near the wanted one, and a part of a chunk if one fits.

    >>> _side(1000, 256, 64), _side(1000, 100, 64), _side(275, 275, 64), _side(40, 40, 64)
    (64, 50, 55, 40)
    """
    if size <= wanted:
        return size
    fitting = [side for side in range(wanted, wanted // 2, -1) if chunk % side == 0]
    return fitting[0] if fitting else wanted


def _count(sizes: Mapping[str, int], patch: Mapping[str, int], along: str) -> int:
    """Return the number of samples, or of places if no dimension is given."""
    return math.prod(math.ceil(sizes[dim] / side) for dim, side in patch.items()) * sizes.get(along, 1)
