"""Stored chunks -> rows in memory, by numcodecs: in the thread that reads, without a copy where a chunk is whole rows.

zarr's own way from a selection to its values leads through an event loop, other threads and temporary arrays. That
costs as much again as decoding a chunk does. (Its fused pipeline does not, and needs Python 3.12: once that is the
oldest Python, this file, `dtrain.data.read.files` and the stages of `dtrain.data.read.codecs` may go.)
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dtrain.data.encoding import Array
from dtrain.data.plan.grid import Chunk
from dtrain.data.read.codecs import INTO, STAGES, Undecodable, check_size, chunk_format, encoded_most, plain_name
from dtrain.data.read.local import Scratch
from dtrain.data.read.shards import ArrayLike
from dtrain.errors import one_line


class Decoder:
    """Decodes the chunks of one array. Threads may share it.

    Parameters
    ----------
    array : zarr.Array
        An array without an obstacle (`dtrain.data.plan.readers.numcodecs_obstacle`).
    """

    def __init__(self, array: ArrayLike) -> None:
        self.dtype = np.dtype(array.dtype)
        self.chunks: tuple[int, ...] = array.chunks
        self.nbytes = math.prod(self.chunks) * self.dtype.itemsize
        self.fill = np.zeros((), self.dtype) if array.fill_value is None else np.asarray(array.fill_value, self.dtype)
        codecs = [name for name in map(plain_name, chunk_format(array).codecs) if name != "bytes"]
        self._into = INTO.get(codecs[0]) if codecs else None
        most = [
            self.nbytes,
            *[encoded_most(self.nbytes)] * len(codecs),
        ]  # the first codec encodes the values themselves
        stages = [(STAGES[name], size) for name, size in zip(codecs, most, strict=False)]
        self._stages = stages[:0:-1] if self._into else stages[::-1]
        """What undoes the codecs, one after the other, and the most bytes that each may give."""

    def decode(self, stored: memoryview, chunk: Chunk, out: Array, scratch: Scratch) -> None:
        """Write the selected part of a stored chunk into ``out[chunk.target]``.

        Parameters
        ----------
        stored : memoryview
        chunk : Chunk
        out : array
            Axes as stored, any strides, of a dtype that values are cast to.
        scratch : callable
            Gives a scratch buffer of so many bytes to decode into.

        Raises
        ------
        Undecodable
        """
        target = out[chunk.where]
        if chunk.whole and target.flags.c_contiguous and target.dtype == self.dtype:
            self._decode(stored, target.reshape(-1).view(np.uint8))
            return
        decoded = np.frombuffer(scratch(self.nbytes), np.uint8, self.nbytes)
        self._decode(stored, decoded)
        with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32 becomes infinite: checked later
            target[...] = decoded.view(self.dtype).reshape(self.chunks)[chunk.source]

    def check(self, stored: memoryview, scratch: Scratch) -> None:
        """Decode a stored chunk into a scratch buffer.

        Raises
        ------
        Undecodable
        """
        self._decode(stored, np.frombuffer(scratch(self.nbytes), np.uint8, self.nbytes))

    def fill_in(self, chunk: Chunk, out: Array) -> None:
        """Write the fill value into ``out[chunk.target]``."""
        with np.errstate(over="ignore", invalid="ignore"):
            out[chunk.where] = self.fill

    def _decode(self, stored: memoryview, out: npt.NDArray[np.uint8]) -> None:
        try:
            for stage, most in self._stages:
                stored = stage(stored, most)
            if self._into is not None:
                self._into(stored, out)
            else:
                check_size(len(stored), len(out))
                out[:] = np.frombuffer(stored, np.uint8)
        except (Undecodable, MemoryError):
            raise
        except Exception as error:
            raise Undecodable(one_line(error)) from error
