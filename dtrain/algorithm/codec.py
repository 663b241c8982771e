r"""Codecs: lossy compression of updates, with error feedback.

    u = (theta - theta_k) + e_k ;  c_k = Enc(u) ;  e_k' = u - Dec(c_k)

    codec   a value becomes                                            bits a parameter
    bf16    the nearest bfloat16                                       16
    int8    the nearest of 255 multiples of the block's scale          8.25
    int4    the nearest of 15 multiples of the block's scale           4.25

A block is 128 values, its scale their largest magnitude over 127 or 7. Rounding is to nearest, ties to even: the same
bits everywhere. Only parameters are compressed; buffers are sent as they are.

References
----------
Error feedback: Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019, arXiv:1901.09847. Quantised outer updates:
Douillard et al. 2025, arXiv:2501.18512 (4 bits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from dtrain.config.average import CodecConfig
from dtrain.types import Bytes, Flat, Parameters

Ints: TypeAlias = npt.NDArray[np.int8]

BLOCK = 128
"""Values that share a scale; slices begin at multiples of it."""
AT_ONCE = 1 << 20
"""Elements subtracted at a time: bounds the float64 copy to 8 MB."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An update as a codec writes it."""

    data: Bytes
    """uint8[n * bits / 8]"""
    scales: Flat
    """float32[n / BLOCK]; empty if the codec needs none."""

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.data.nbytes + self.scales.nbytes


class Codec(Protocol):
    """Writes an update in fewer bytes."""

    bits: int
    """Of a value in `Encoded.data`; they divide 8 or are a multiple of it."""

    def encode(self, update: Flat) -> Encoded:
        """Compress float32[n]."""
        ...

    def decode(self, encoded: Encoded, size: int) -> Flat:
        """Return float32[size]."""
        ...


class BFloat16:
    """The upper half of a float32, rounded."""

    bits = 16

    def encode(self, update: Flat) -> Encoded:
        """Compress float32[n]."""
        rounded = torch.from_numpy(np.ascontiguousarray(update)).bfloat16()
        return Encoded(rounded.view(torch.uint8).numpy(), np.zeros(0, np.float32))

    def decode(self, encoded: Encoded, size: int) -> Flat:
        """Return float32[size]."""
        wide = np.zeros(size, np.uint32)
        wide.view(np.uint16)[1::2] = encoded.data.view(np.uint16)  # little-endian, as all bytes of a run
        return wide.view(np.float32)


class Integers:
    """Multiples of a scale for each block, up to `most` times in both directions."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.most = 2 ** (bits - 1) - 1
        largest = np.finfo(np.float32).max / np.float32(self.most)
        self.largest_scale = np.nextafter(largest, np.float32(0))  # so that `most` times it is a float32

    def encode(self, update: Flat) -> Encoded:
        """Compress float32[n]."""
        blocks = np.zeros((-(-len(update) // BLOCK), BLOCK), np.float32)
        blocks.reshape(-1)[: len(update)] = update
        largest = np.abs(np.maximum(blocks.max(axis=1), -blocks.min(axis=1)))  # of magnitude: without a copy
        scales = largest / np.float32(self.most)
        scales[np.isfinite(scales) & (scales > self.largest_scale)] = self.largest_scale
        divisors = np.where(scales > 0, scales, np.float32(1))
        blocks /= divisors[:, None]
        np.clip(np.rint(blocks, out=blocks), -self.most, self.most, out=blocks)  # tiny scales are not exact
        return Encoded(self._packed(blocks.astype(np.int8).reshape(-1)[: len(update)]), scales)

    def decode(self, encoded: Encoded, size: int) -> Flat:
        """Return float32[size]."""
        values = np.zeros(len(encoded.scales) * BLOCK, np.float32)
        values[:size] = self._unpacked(encoded.data)[:size]
        blocks = values.reshape(-1, BLOCK)
        blocks *= encoded.scales[:, None]
        return values[:size]

    def _packed(self, values: Ints) -> Bytes:
        if self.bits == 8:
            return values.view(np.uint8)
        nibbles = np.zeros(len(values) + len(values) % 2, np.uint8)
        nibbles[: len(values)] = values.view(np.uint8) & 0xF
        return nibbles[::2] | np.left_shift(nibbles[1::2], np.uint8(4))

    def _unpacked(self, data: Bytes) -> Ints:
        if self.bits == 8:
            return data.view(np.int8)
        values = np.empty(2 * len(data), np.int8)
        values[::2] = np.left_shift(data, np.uint8(4)).view(np.int8) >> 4  # the sign is that of the nibble
        values[1::2] = data.view(np.int8) >> 4
        return values


CODECS: dict[str, Codec] = {"bf16": BFloat16(), "int8": Integers(8), "int4": Integers(4)}
"""By ``average.codec.name``."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """A replica's parameters as an encoded update, and its buffers."""

    update: Encoded
    size: int
    """Values of the update."""
    buffers: Flat
    """float32[num_flat - num_params]"""
    extra: Bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.update.nbytes + self.buffers.nbytes + self.extra.nbytes


def compress(
    start: Parameters, after: Parameters, residual: Flat | None, config: CodecConfig
) -> tuple[Compressed, Parameters, Flat | None]:
    """Encode the way from `start` to `after`; return it with the parameters that it leads to, and the next residual.

    An update that is too large for float32, or for the codec, leads to parameters that are not finite.
    """
    codec, end = CODECS[config.name], start.num_params
    with np.errstate(over="ignore", invalid="ignore"):
        update = _update(start.flat[:end], after.flat[:end], residual)
        encoded = codec.encode(update)
        decoded = codec.decode(encoded, end)
        lost = update - decoded if config.error_feedback else None
    compressed = Compressed(encoded, end, after.flat[end:], after.extra)
    return compressed, _reached(start, compressed, decoded), lost


def _update(start: Flat, after: Flat, residual: Flat | None) -> Flat:
    """Return ``start - after + residual``: in float64, rounded once to float32; 0 for a mask that stays infinite."""
    update = np.empty_like(start)
    for begin in range(0, len(update), AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        wide = np.subtract(start[part], after[part], dtype=np.float64)
        wide[start[part] == after[part]] = 0.0  # infinity less itself
        update[part] = wide if residual is None else wide + residual[part]
    return update


def encoded_bytes(size: int, config: CodecConfig) -> int:
    """Return the bytes of an encoded update of `size` values, 1 at least."""
    whole, rest = divmod(size - 1, BLOCK)
    block, last = (CODECS[config.name].encode(np.zeros(count, np.float32)).nbytes for count in (BLOCK, rest + 1))
    return whole * block + last


def decompress(start: Parameters, compressed: Compressed, config: CodecConfig) -> Parameters:
    """Return the parameters that a compressed update leads to from `start`, or slices of them from slices."""
    return _reached(start, compressed, CODECS[config.name].decode(compressed.update, compressed.size))


def _reached(start: Parameters, compressed: Compressed, decoded: Flat) -> Parameters:
    flat, end = np.empty_like(start.flat), start.num_params
    with np.errstate(over="ignore"):
        np.subtract(start.flat[:end], decoded, out=flat[:end], dtype=np.float64)
    flat[end:] = compressed.buffers
    return Parameters(start.layout, flat, compressed.extra, start=start.start)


def cut_compressed(compressed: Compressed, start: int, stop: int, is_last: bool, config: CodecConfig) -> Compressed:
    """Return the values `start` to `stop` of a compressed update; `start` is a multiple of `BLOCK`.

    The last slice has the buffers.
    """
    bits = CODECS[config.name].bits
    stop = min(stop, compressed.size)
    data = compressed.update.data[start * bits // 8 : -(-stop * bits // 8)]
    scales = compressed.update.scales[start // BLOCK : -(-stop // BLOCK)]
    rest = (compressed.buffers, compressed.extra) if is_last else (compressed.buffers[:0], compressed.extra[:0])
    return Compressed(Encoded(data, scales), max(0, stop - start), *rest)
