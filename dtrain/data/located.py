"""Where boxes of samples lie in their store: the values of their coordinate, and the stored objects that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.data.cf import texts_of
from dtrain.data.column import ColumnReader, describe_column, find_coordinate
from dtrain.data.encoding import Array
from dtrain.data.plan.grid import touched
from dtrain.data.plan.units import Box, box_selection
from dtrain.data.read.open import open_arrays
from dtrain.data.read.store import key_of
from dtrain.data.samples import Samples
from dtrain.urls import redacted_url

MOST_ROWS = 10_000_000
"""Of a store whose coordinate is longer the values are left out: it would have to be read."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a box lies."""

    store: str
    first: int
    """Its first row, counted in the store."""
    last: int
    start: str = ""
    """The value of the sample dimension's coordinate there; empty without a coordinate."""
    stop: str = ""
    object: str = ""
    """The first stored object of the first input; empty for a sparse one."""


def locate(samples: Samples, boxes: Sequence[Box]) -> list[Location]:
    """Return where each of some boxes lies.

    Parameters
    ----------
    samples : Samples
    boxes : sequence of Box
        None lies in several stores.

    Raises
    ------
    DtrainError
        The store cannot be read.
    """
    begins = np.array(samples.begins or (0,))
    owners = np.searchsorted(begins, [box.start for box in boxes], side="right") - 1
    found: dict[int, Location] = {}
    for number, store in enumerate(samples.stores):
        own = [index for index, owner in enumerate(owners) if owner == number]
        begin = int(begins[number])
        local = [Box(boxes[i].start - begin, boxes[i].stop - begin, boxes[i].block) for i in own]
        found |= zip(own, _locate(store, local), strict=True)
    return [found[index] for index in range(len(boxes))]


def _locate(samples: Samples, boxes: Sequence[Box]) -> list[Location]:
    if not boxes:
        return []
    names = _values_at(samples, [row for box in boxes for row in (box.start, box.stop - 1)])
    pairs = zip(names[::2], names[1::2], strict=True) if names else [("", "")] * len(boxes)
    return [
        Location(redacted_url(samples.path), box.start, box.stop - 1, *ends, key)
        for box, ends, key in zip(boxes, pairs, _objects(samples, boxes), strict=True)
    ]


def _objects(samples: Samples, boxes: Sequence[Box]) -> list[str]:
    """Return the key of the first stored object of each box, of the first input that has the sample dimension."""
    _, arrays = open_arrays(samples)
    variable = next((v for v in samples.moving if v.name in samples.config.inputs and v.sparse is None), None)
    if variable is None:
        return [""] * len(boxes)
    places = ([own[0] for own in touched(variable.objects, box_selection(samples, variable, box))] for box in boxes)
    return [key_of(arrays[variable.name], tuple(place)) for place in places]


def _values_at(samples: Samples, rows: Sequence[int]) -> list[str]:
    """Return the coordinate of the sample dimension at some rows, in its own words; nothing where it has none."""
    store, _ = open_arrays(samples)
    length = samples.moving[0].shape[samples.moving[0].sample_axis]
    names = [variable.name for variable in samples.moving]
    found = find_coordinate(store, samples.config.group, names, samples.sample_dim, length)
    if isinstance(found, str) or length > MOST_ROWS:
        return []
    described = describe_column(samples.path, *found)
    if isinstance(described, str):
        return []
    reader = ColumnReader(samples, described, samples.first_row, samples.num_samples, fills=True)
    values: Array = reader.values(samples.first_row, samples.num_samples)
    return texts_of(described.variable.name, values[np.array(rows) - samples.first_row], described.attributes)
