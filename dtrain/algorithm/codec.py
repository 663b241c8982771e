"""Codecs: lossy compression of updates, with error feedback.

    u = (theta - theta_k) + e_k ;  c_k = Enc(u) ;  e_k' = u - Dec(c_k)

Only parameters are compressed; buffers are sent as they are.

References
----------
Error feedback: Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019, arXiv:1901.09847.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dtrain.config.schema import CodecConfig
from dtrain.types import Bytes, Flat, Parameters


@dataclass(frozen=True, slots=True)
class Encoded:
    """An update as a codec writes it."""

    data: Bytes
    """uint8[n]"""
    scales: Flat
    """float32[m]: what the codec needs beside the bytes; may be empty."""

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.data.nbytes + self.scales.nbytes


class Codec(Protocol):
    """Writes an update in fewer bytes."""

    def encode(self, update: Flat) -> Encoded:
        """Compress float32[n]."""
        ...

    def decode(self, encoded: Encoded) -> Flat:
        """Return float32[n]."""
        ...


CODECS: dict[str, Codec] = {}
"""By ``average.codec.name``."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """A replica's parameters as an encoded update, and its buffers."""

    update: Encoded
    buffers: Flat
    """float32[num_flat - num_params]"""
    extra: Bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.update.nbytes + self.buffers.nbytes + self.extra.nbytes


def compress(
    start: Parameters, after: Parameters, residual: Flat | None, config: CodecConfig
) -> tuple[Compressed, Flat | None]:
    """Encode the way from `start` to `after`; return it with the residual of the next round."""
    codec, end = CODECS[config.name], start.layout.num_params
    wide = start.flat[:end].astype(np.float64) - after.flat[:end]
    update = (wide if residual is None else wide + residual).astype(np.float32)
    encoded = codec.encode(update)
    lost = update - codec.decode(encoded) if config.error_feedback else None
    return Compressed(encoded, after.flat[end:], after.extra), lost


def decompress(start: Parameters, compressed: Compressed, config: CodecConfig) -> Parameters:
    """Return the parameters that a compressed update leads to from `start`."""
    end = start.layout.num_params
    flat = np.empty_like(start.flat)
    flat[:end] = start.flat[:end].astype(np.float64) - CODECS[config.name].decode(compressed.update)
    flat[end:] = compressed.buffers
    return Parameters(start.layout, flat, compressed.extra)
