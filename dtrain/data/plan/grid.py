"""Which chunks and shards of an array a selection touches, and which part of each: the one place for chunk geometry."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType

from dtrain.data.variable import Select, Variable


@dataclass(frozen=True, slots=True)
class Chunk:
    """The selected part of a chunk, and its place in the output."""

    place: tuple[int, ...]
    """Place in the grid of the array's chunks."""
    source: tuple[slice, ...]
    """The selected part, counted within the chunk."""
    target: tuple[slice, ...]
    """Where the part goes, counted within the selection."""
    whole: bool
    """True if all of the chunk is selected, each value once."""

    @property
    def where(self) -> tuple[slice | EllipsisType, ...]:
        """`target` as an index that gives a view, also of an array without dimensions."""
        return (*self.target, ...)


@dataclass(frozen=True, slots=True)
class ShardPart:
    """The selected part of a shard, in whole chunks."""

    place: tuple[int, ...]
    """Place in the grid of the array's shards."""
    origin: tuple[int, ...]
    """Place of its first chunk in the grid of the array's chunks."""
    inside: tuple[list[int], ...]
    """The touched chunks along each dimension, counted within the shard."""
    is_whole: bool
    """True if the shard has no other chunks of the array."""

    def chunks(self) -> Iterator[tuple[int, ...]]:
        """Yield the places of its touched chunks in the grid of the array's chunks, in C order."""
        return itertools.product(
            *([first + i for i in along] for first, along in zip(self.origin, self.inside, strict=True))
        )


def chunks_of(sizes: tuple[int, ...], select: Select) -> Iterator[Chunk]:
    """Yield the chunks that hold selected values, in C order.

    Parameters
    ----------
    sizes : tuple of int
        The shape of a chunk.
    select : Select
    """
    if not sizes:
        yield Chunk((), (), (), True)
        return
    along = [list(_parts_along(size, *part)) for size, part in zip(sizes, select, strict=True)]
    for parts in itertools.product(*along):
        place, source, target, whole = zip(*parts, strict=True)
        yield Chunk(place, source, target, all(whole))


def shards_of(variable: Variable, select: Select) -> Iterator[ShardPart]:
    """Yield the selected part of each shard that a selection touches, in C order."""
    chunks = touched(variable.chunks, select)
    counts = [shard // size for shard, size in zip(variable.objects, variable.chunks, strict=True)]
    total = [-(-n // size) for n, size in zip(variable.shape, variable.chunks, strict=True)]
    for place in itertools.product(*touched(variable.objects, select)):
        origin = tuple(p * count for p, count in zip(place, counts, strict=True))
        inside = tuple(
            [c - first for c in along if first <= c < first + count]
            for along, first, count in zip(chunks, origin, counts, strict=True)
        )
        there = [min(count, n - first) for count, n, first in zip(counts, total, origin, strict=True)]
        yield ShardPart(place, origin, inside, [len(along) for along in inside] == there)


def chunks_touched(variable: Variable, select: Select, place: tuple[int, ...]) -> int:
    """Return how many chunks of one stored object a selection touches.

    Parameters
    ----------
    variable : Variable
    select : Select
    place : tuple of int
        Of the object, in the grid of the array's objects.
    """
    count = 1
    for size, chunk, number, along in zip(
        variable.objects, variable.chunks, place, touched(variable.chunks, select), strict=True
    ):
        inside = range(number * (size // chunk), (number + 1) * (size // chunk))
        count *= bisect_left(along, inside.stop) - bisect_left(along, inside.start)
    return count


def touched(sizes: tuple[int, ...], select: Select) -> list[Sequence[int]]:
    """Return the numbers of the chunks (or shards) that a selection touches, along each dimension.

    Parameters
    ----------
    sizes : tuple of int
        The shape of a chunk.
    select : Select
    """
    return [_numbers_along(size, *part) for size, part in zip(sizes, select, strict=True)]


def _numbers_along(size: int, start: int, stop: int, step: int) -> Sequence[int]:
    """Return the numbers of the touched chunks along one dimension.

    A step that is no longer than a chunk touches every chunk of ``start:stop``, also the last one if the step leads
    over it: digests of stored objects that runs have kept (`content_digest`) count it.
    """
    if step <= size:
        return range(start // size, -(-stop // size))
    return sorted({place // size for place in range(start, stop, step)})


def _parts_along(size: int, start: int, stop: int, step: int) -> Iterator[tuple[int, slice, slice, bool]]:
    """Yield number, selected part, its target, and True if it is all of the chunk, along one dimension."""
    done = 0
    for number in _numbers_along(size, start, stop, step):
        first = start + done * step - number * size
        end = min(stop - number * size, size)
        count = -(-(end - first) // step)
        if count > 0:
            yield number, slice(first, end, step), slice(done, done + count), count == size
            done += count
