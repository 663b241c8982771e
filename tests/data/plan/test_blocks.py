"""Blocks of patches: every place in one block, every patch whole in one block, and numbers that lead back to both."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.plan.blocks import BlockAxis, Blocks, tile_starts
from dtrain.data.tiles import Cut, Tiles


@st.composite
def grids(draw: st.DrawFn) -> tuple[Tiles, Blocks]:
    cuts, axes = [], []
    for dim in draw(st.sampled_from(["x", "xy", "xyz"])):
        length = draw(st.integers(1, 30))
        size = draw(st.integers(1, length))
        cuts.append(Cut(dim, length, size))
        axes.append(BlockAxis(dim, length, size, draw(st.integers(1, length // size))))
    return Tiles(tuple(cuts)), Blocks(tuple(axes))


def test_tiles_by_hand() -> None:
    tiles = Tiles((Cut("y", 10, 4), Cut("x", 6, 3)))
    assert len(tiles) == 6
    assert [tile.ranges for tile in tiles] == [
        (("y", first, first + 4), ("x", second, second + 3)) for first in (0, 4, 6) for second in (0, 3)
    ]
    assert [len(Tiles()), Tiles()[0].ranges] == [1, ()]


def test_blocks_by_hand() -> None:
    axis = BlockAxis("y", 10, 2, 2)  # patches at 0, 2, 4, 6, 8
    assert [axis.bounds(block) for block in range(axis.num_blocks)] == [(0, 4), (4, 8), (8, 10)]
    assert axis.tiles_in(np.arange(3)).tolist() == [2, 2, 1]
    assert (axis.extent, axis.most_tiles) == (4, 2)
    ragged = BlockAxis("y", 11, 2, 2)  # the last patch begins at 9, and overlaps with the one at 8
    assert [ragged.bounds(block) for block in range(ragged.num_blocks)] == [(0, 4), (4, 8), (8, 11)]
    assert ragged.tiles_in(np.arange(3)).tolist() == [2, 2, 2]
    longer = BlockAxis("y", 9, 2, 2)  # at 7
    assert [longer.bounds(block) for block in range(longer.num_blocks)] == [(0, 4), (4, 9)]
    assert longer.tiles_in(np.arange(2)).tolist() == [2, 3]
    assert (longer.extent, longer.most_tiles) == (5, 3)
    assert len(Blocks()) == 1
    assert Blocks().tiles_in(np.array([0])).tolist() == [1]


@given(grids())
def test_every_place_lies_in_one_block_and_every_tile_whole_in_one(grid: tuple[Tiles, Blocks]) -> None:
    tiles, blocks = grid
    cover = np.zeros([cut.length for cut in tiles.cuts], int)
    number = np.arange(len(blocks))
    counts = blocks.tiles_in(number)
    seen: list[int] = []
    for block in range(len(blocks)):
        bounds = blocks.bounds(block)
        cover[tuple(slice(start, stop) for _, start, stop in bounds)] += 1
        for (_, start, stop), (_, _, extent) in zip(bounds, blocks.extents, strict=True):
            assert stop - start <= extent
        inside = np.arange(counts[block])
        own = blocks.tile(np.full(len(inside), block), inside)
        seen += own.tolist()
        starts = tile_starts(tiles.cuts, blocks, own)
        for at, tile in enumerate(own.tolist()):
            for place, (dim, first, last), (same, start, stop) in zip(starts, tiles[tile].ranges, bounds, strict=True):
                assert dim == same
                assert start <= first < last <= stop
                assert place[at] == first - start
    assert (cover == 1).all()
    assert sorted(seen) == list(range(len(tiles)))
    assert max(counts) <= blocks.most_tiles


@given(grids())
def test_without_blocks_tiles_begin_where_they_begin_in_the_row(grid: tuple[Tiles, Blocks]) -> None:
    tiles, _ = grid
    starts = tile_starts(tiles.cuts, Blocks(), np.arange(len(tiles)))
    assert list(zip(*(along.tolist() for along in starts), strict=True)) == [
        tuple(first for _, first, _ in tile.ranges) for tile in tiles
    ]
