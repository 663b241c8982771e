"""Images with masks or labels, tables, and inputs without a target: drafts for what is no forecast and no text."""

from __future__ import annotations

import math
from dataclasses import replace

from dtrain.errors import listed
from dtrain_cli.survey.draft import Draft, patches, unused
from dtrain_cli.survey.roles import ArrayFacts, Contents, space_of
from dtrain_cli.survey.target import Target, find_target, is_one_image, is_row_number, sample_dim
from dtrain_cli.survey.values import Look

NEIGHBOURS = 4
"""Rows of a single image that its model sees on both sides of the row it predicts."""


def image(contents: Contents, look: Look) -> Draft | None:
    """Return a draft for images with masks, labels or numbers, else for images alone; None if there are none."""
    target = find_target(contents, look)
    draft = None if target is None else _pictured(contents, target)
    return draft or alone(contents, look, images=True)


def tabular(contents: Contents, look: Look) -> Draft | None:
    """Return a draft for rows of numbers with a target, else for rows alone; None if there are none."""
    target = find_target(contents, look)
    draft = None if target is None else _tabled(contents, target)
    return draft or alone(contents, look, images=False)


def supervised(contents: Contents, look: Look, *, guess: bool) -> Draft | None:
    """Return a draft for images or a table with a target; None if there is no target, or only a guess."""
    target = find_target(contents, look, guess=guess)
    return None if target is None else _pictured(contents, target) or _tabled(contents, target)


def _others(contents: Contents, target: Target) -> list[ArrayFacts]:
    return [a for a in contents.arrays.values() if a is not target.array and not a.is_coordinate]


def _pictured(contents: Contents, target: Target) -> Draft | None:
    """Return a draft that sees images; None if no input is one."""
    others = _others(contents, target)
    space = space_of(target.array, contents)
    pictures = [other for other in others if _has_places(other, space, contents)]
    along = sample_dim(target.array, pictures or others, contents)
    if not pictures:
        return None
    if not along:
        return _rows_of_one_image(contents, target, pictures) if is_one_image(target.array, others, contents) else None
    pictures = [picture for picture in pictures if along in picture.dims]
    if not pictures:
        return None
    space = space or max((space_of(picture, contents) for picture in pictures), key=len)
    space = tuple(dim for dim in space if dim in target.array.dims) or space  # a target may have one of two axes
    inputs = [picture for picture in pictures if set(space) <= set(picture.without(along))]
    if not inputs:
        return None
    sizes = inputs[0].sizes
    patch = patches(inputs[0], space) if space_of(target.array, contents) else {}
    draft = _draft(contents, target, inputs, along, template="image")
    size = " x ".join(f"{sizes[dim]:,}" for dim in space)
    return replace(
        draft,
        space=space,
        patch=patch,
        notes={**draft.notes, "data.patch": f"images of {size} pixels are cut into patches"},
    )


def _has_places(other: ArrayFacts, space: tuple[str, ...], contents: Contents) -> bool:
    """Return True if an array is an image, of these places if some are given."""
    return set(space) <= set(other.dims) if space else bool(space_of(other, contents))


def _rows_of_one_image(contents: Contents, target: Target, pictures: list[ArrayFacts]) -> Draft:
    """Return a draft for a single large image: its rows are the samples, seen with their neighbours."""
    along, *space = space_of(target.array, contents)
    draft = _draft(contents, target, [p for p in pictures if set(p.dims) >= {along, *space}], along, template="image")
    near = min(NEIGHBOURS, target.array.sizes[along] // (5 * NEIGHBOURS))
    why = f"a sample is a row of {along}; the model sees {near} more rows on both sides of it"
    return replace(
        draft,
        space=tuple(space),
        input_offsets={"start": -near, "stop": near + 1} if near else 0,
        notes={
            **draft.notes,
            "data.input_offsets": why,
            "data.sample_dim": "there is one image: its rows are samples",
        },
    )


def _tabled(contents: Contents, target: Target) -> Draft | None:
    """Return a draft that sees all values of a row at once; None if nothing shares a dimension with the target."""
    others = [other for other in _others(contents, target) if not is_row_number(other)]
    along = sample_dim(target.array, others, contents)
    if not along:
        return None
    inputs = [other for other in others if along in other.dims]
    if target.classes and any(len(other.dims) > 1 for other in inputs):
        inputs = [other for other in inputs if len(other.dims) > 1]  # columns beside a matrix describe its rows
    return _draft(contents, target, inputs, along, template="tabular") if inputs else None


def _draft(contents: Contents, target: Target, inputs: list[ArrayFacts], along: str, *, template: str) -> Draft:
    names = tuple(array.name for array in inputs)
    kind = "Classes of" if target.classes else "A number:"
    others = unused(contents, *names, target.array.name)
    return Draft(
        template=template,
        title=f"{kind} {target.array.name}, from {listed(names, 4)}.",
        inputs=names,
        target=target.array.name,
        sample_dim=along,
        classes=target.classes,
        why_classes=target.why_classes,
        transform=target.transform,
        others=others,
        notes={
            "data.targets": target.why,
            "data.transform": target.why_transform,
            "model_args.outputs": target.why_classes,
            "model_args.classes": target.why_classes,
        },
    )


def alone(contents: Contents, look: Look, *, images: bool) -> Draft | None:
    """Return a draft that learns to reproduce the largest array through few numbers; None if none has rows."""
    arrays = [a for a in contents.arrays.values() if not a.is_coordinate and len(a.dims) > 1]
    arrays = [a for a in arrays if bool(space_of(a, contents)) or not images]
    arrays = [a for a in arrays if sample_dim(a, [a], contents)]
    if not arrays:
        return None
    largest = max(arrays, key=lambda a: a.itemsize * math.prod(a.shape))
    along = sample_dim(largest, [largest], contents)
    space = space_of(largest, contents)
    texts = listed(sorted(contents.strings))
    strings = f"; strings ({texts}) can be one as integer codes" if texts else ""
    return Draft(
        template="tabular",
        title=f"No target was found: the model learns to reproduce {largest.name}.",
        inputs=(largest.name,),
        target=largest.name,
        sample_dim=along,
        patch=patches(largest, space) if space else {},
        others=unused(contents, largest.name),
        notes={
            "data.targets": f"no target was found: name yours here, and change the loss and outputs{strings}",
            "data.patch": "large images are cut into patches",
        },
    )
