"""The memory of batches: taken for a bundle, lent to the consumer, used again once nobody refers to it.

A bundle of batches has one piece of memory for each field. When it is handed out, each piece is wrapped in a fresh
base array. Every view, tensor or buffer made of a batch keeps that base alive, and when the last one is gone a
finalizer reports that the memory is free. Memory is never written to while a consumer can see it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.encoding import Array, DType

Allocate: TypeAlias = Callable[[tuple[int, ...], DType], Array]
"""Makes an array of a shape and a dtype; in pinned memory, for example."""
Memory: TypeAlias = tuple[npt.NDArray[np.uint8], ...]
"""By field: bytes, from an aligned address on."""

PIECE_BYTES = 512 << 10
"""Rows that are written twice, because they are cast, unpacked or made dense, are written in pieces of this size: they
stay in the processor's cache."""
ALIGNMENT = 64
"""Bytes, as torch aligns. The last bits of a vectorised sum depend on where in memory its operands lie."""


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One field of a sample, as it lies in memory."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, memory: npt.NDArray[np.uint8], offset: int, size: int) -> Array:
        """Return `size` samples that begin at an offset in bytes."""
        return np.ndarray((size, *self.shape), self.dtype, memory, offset)


@dataclass(frozen=True, slots=True)
class FieldLayout:
    """Where the batches of a bundle lie in the memory of one field: in order, each at an aligned address."""

    spec: FieldSpec
    offsets: tuple[int, ...]
    """By batch: bytes from the beginning of the memory."""
    nbytes: int
    """Of all batches."""
    is_gapless: bool
    """Whether the samples of all batches follow each other without padding."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the batches of a bundle lie."""

    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    """By batch: its first sample in the bundle."""
    fields: tuple[FieldLayout, ...]

    def batch(self, memory: Memory, index: int) -> tuple[Array, ...]:
        """Return the fields of a batch."""
        size = self.sizes[index]
        pairs = zip(self.fields, memory, strict=True)
        return tuple([field.spec.view(array, field.offsets[index], size) for field, array in pairs])

    def pieces(self, memory: Memory, start: int, stop: int) -> Iterator[Piece]:
        """Yield samples ``start:stop`` of the bundle, field by field, in as few pieces as are contiguous."""
        for number, (field, array) in enumerate(zip(self.fields, memory, strict=True)):
            if field.is_gapless:
                yield Piece(number, start, stop, field.spec.view(array, start * field.spec.nbytes, stop - start))
                continue
            for first, size, offset in zip(self.starts, self.sizes, field.offsets, strict=True):
                low, high = max(start, first), min(stop, first + size)
                if low < high:
                    out = field.spec.view(array, offset + (low - first) * field.spec.nbytes, high - low)
                    yield Piece(number, low, high, out)


class Piece(NamedTuple):
    """Samples ``start:stop`` of a field of a bundle."""

    field: int
    start: int
    stop: int
    out: Array


def layout_of(specs: tuple[FieldSpec, ...], sizes: tuple[int, ...]) -> Layout:
    """Return the layout of batches of these sizes."""
    return Layout(sizes, (0, *accumulate(sizes[:-1])), tuple(_field_layout(spec, sizes) for spec in specs))


def _field_layout(spec: FieldSpec, sizes: tuple[int, ...]) -> FieldLayout:
    lengths = [size * spec.nbytes for size in sizes]
    ends = list(accumulate(-(-length // ALIGNMENT) * ALIGNMENT for length in lengths))
    is_gapless = all(length % ALIGNMENT == 0 for length in lengths[:-1])
    return FieldLayout(spec, (0, *ends[:-1]), ends[-1], is_gapless)


@dataclass(frozen=True, slots=True)
class Bundle:
    """Filled batches that are lent to the consumer."""

    number: int
    layout: Layout
    bases: Memory
    """Base arrays of this loan alone: all that the consumer gets are views of them."""

    def fields(self, index: int) -> tuple[Array, ...]:
        """Return the fields of a batch."""
        return self.layout.batch(self.bases, index)


class Buffers:
    """The memory of the bundles of one loader.

    Parameters
    ----------
    specs : tuple of FieldSpec
        The fields that have memory in each batch.
    allocate : callable
        Makes memory.
    on_free : callable
        Called with the number of a bundle when nobody refers to its memory any more: in any thread, even within
        garbage collection, so it must not wait for a lock.
    usual : callable, optional
        Given the size of the first batch, the sizes of a usual bundle. The first bundles are smaller, and have the
        memory of a usual one, which later bundles use again.
    """

    def __init__(
        self,
        specs: tuple[FieldSpec, ...],
        allocate: Allocate,
        on_free: Callable[[int], None],
        usual: Callable[[int], tuple[int, ...]] | None = None,
    ) -> None:
        self._allocate = allocate
        self._on_free = on_free
        self._specs = specs
        self._usual = usual
        self._least = [0] * len(specs)
        """By field: bytes that its memory has at least."""
        self._layout = Layout((), (), ())
        """Of the open bundle."""
        self._free: list[Memory] = []
        self._used: dict[int, Memory] = {}
        """By number of the bundle; the open one and those that are lent."""
        self._open = -1

    def open(self, bundle: int, sizes: tuple[int, ...]) -> None:
        """Take memory for batches of these sizes."""
        if self._usual is not None:
            self._least = [field.nbytes for field in layout_of(self._specs, self._usual(sizes[0])).fields]
            self._usual = None
        if sizes != self._layout.sizes:
            self._layout = layout_of(self._specs, sizes)
        self._open = bundle
        self._used[bundle] = self._memory([field.nbytes for field in self._layout.fields])

    def _memory(self, nbytes: list[int]) -> Memory:
        while self._free:
            memory = self._free.pop()
            if all(len(array) >= size for array, size in zip(memory, nbytes, strict=True)):
                return memory
        made = [max(sizes) for sizes in zip(nbytes, self._least, strict=True)]
        return tuple(_aligned(self._allocate((ALIGNMENT + size,), np.dtype(np.uint8))) for size in made)

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield samples ``start:stop`` of the open bundle, field by field, in as few pieces as are contiguous."""
        return self._layout.pieces(self._used[self._open], start, stop)

    def lend(self) -> Bundle:
        """Return the open bundle as the consumer gets it."""
        bases = tuple(np.frombuffer(array.data, np.uint8) for array in self._used[self._open])
        _call_when_gone(bases, partial(self._on_free, self._open))
        return Bundle(self._open, self._layout, bases)

    def recycle(self, bundle: int) -> None:
        """Keep the memory of a bundle for another one."""
        self._free.append(self._used.pop(bundle))

    def abandon(self, bundle: int) -> None:
        """Forget the memory of a bundle; whoever refers to it keeps it alive."""
        del self._used[bundle]

    def clear(self) -> None:
        """Forget all memory."""
        self._free.clear()
        self._used.clear()


def _call_when_gone(bases: Memory, call: Callable[[], None]) -> None:
    """Call a function once, after all of some arrays are gone. It is not called at the interpreter's exit."""
    others = [None] * (len(bases) - 1)

    def gone() -> None:
        try:
            others.pop()  # atomic: arrays may go in several threads at once
        except IndexError:
            call()

    for base in bases:
        weakref.finalize(base, gone).atexit = False


def _aligned(memory: Array) -> npt.NDArray[np.uint8]:
    """Return some bytes of memory from its first aligned address on."""
    start = -int(memory.__array_interface__["data"][0]) % ALIGNMENT
    return memory.view(np.uint8)[start:]


def aligned_copy(values: Array) -> Array:
    """Return a copy at an aligned address."""
    memory = _aligned(np.empty(values.nbytes + ALIGNMENT, np.uint8))
    copy: Array = np.ndarray(values.shape, values.dtype, memory)
    copy[...] = values
    return copy
