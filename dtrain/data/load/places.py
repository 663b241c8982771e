"""Where the samples of an evaluation lie: rows and patches, in the order of a pass that is not shuffled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.plan.blocks import Blocks, tile_starts
from dtrain.data.plan.hashing import Ints
from dtrain.data.plan.parts import Partition
from dtrain.data.samples import Samples

Rows: TypeAlias = npt.NDArray[np.bool_]


def sample_places(partition: Partition) -> Iterator[tuple[Ints, Ints]]:
    """Yield, part by part, the anchor and the tile of each sample: int64[sample]."""
    plan, sizes = partition.plan, partition.part_sizes
    for part in range(len(sizes)):
        index = np.arange(int(sizes[part]))
        if partition.samples is not None:  # some of the part's samples come not at all
            index = np.searchsorted(partition.part_ends(part), index, side="right")
        tile = np.zeros(len(index), np.int64)
        if plan.blocks:
            blocks = np.full(len(index), int(partition.part_blocks[part]))
            index, within = np.divmod(index, partition.grid.tiles_in(blocks))
            tile = partition.grid.tile(blocks, within)
        elif plan.patches > 1:
            index, tile = np.divmod(index, plan.patches)
        yield partition.part_anchors(part)[index], tile


def places_of_batches(partition: Partition, sizes: Iterable[int]) -> Iterator[tuple[Ints, Ints]]:
    """Yield the anchors and tiles of batches of some sizes; together they have all samples of a pass."""
    none = np.zeros(0, np.int64)
    parts, anchors, tiles = sample_places(partition), none, none
    for size in sizes:
        while len(anchors) < size:
            more = next(parts)
            anchors, tiles = np.concatenate([anchors, more[0]]), np.concatenate([tiles, more[1]])
        yield anchors[:size], tiles[:size]
        anchors, tiles = anchors[size:], tiles[size:]


def places_of_tiles(samples: Samples, dim: str, tiles: Ints) -> Ints | None:
    """Return the places that tiles cover along a dimension, int64[tile, place]; None if it is not cut into patches.

    A single row stands for all, where they are the same.
    """
    cuts = samples.tiles.cuts
    number = next((number for number, cut in enumerate(cuts) if cut.dim == dim), None)
    if number is None:
        return None
    starts = tile_starts(cuts, Blocks(), tiles)[number]
    if len(np.unique(starts)) == 1:
        starts = starts[:1]
    places: Ints = starts[:, None] + np.arange(cuts[number].size)
    return places


@dataclass(frozen=True, slots=True)
class ValidTimes:
    """The rows that targets show at some leads."""

    shared: Rows
    """bool[row]: at all leads, by as many samples at each."""
    any_lead: Rows
    """bool[row]: at one of them."""


def valid_times(partition: Partition, offsets: Sequence[int]) -> ValidTimes:
    """Return the rows that the targets of a split show.

    A split holds anchors, so that the valid times of a long lead begin and end later than those of a short one: scores
    of leads are comparable at those that all of them share.

    Parameters
    ----------
    partition : Partition
        Of a whole split.
    offsets : sequence of int
        The leads: rows from the anchor.
    """
    count = np.zeros(partition.plan.num_samples, np.int32)
    for anchors, _ in sample_places(partition):
        np.add.at(count, anchors, 1)
    first, *others = (_moved(count, offset) for offset in offsets)
    shared, any_lead = first > 0, first > 0
    for other in others:
        shared &= other == first
        any_lead |= other > 0
    return ValidTimes(shared, any_lead)


def _moved(count: npt.NDArray[np.int32], offset: int) -> npt.NDArray[np.int32]:
    """Return the number of samples that show each row at an offset."""
    moved, size = np.zeros_like(count), len(count) - abs(offset)
    if size > 0:
        moved[max(0, offset) :][:size] = count[max(0, -offset) :][:size]
    return moved
