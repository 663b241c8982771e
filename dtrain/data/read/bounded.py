"""Arrays that zarr reads without decoding more than a chunk can hold, whatever a stored object claims to hold.

zarr's codecs decode all that a frame holds, and look at the size afterwards: some kilobytes become gigabytes. Here each
compressor that is known is undone by dtrain's own stages, which limit the bytes that come out. What other
codecs make of a chunk is up to them.
"""

from __future__ import annotations

import asyncio
import lzma
import math
from bz2 import BZ2Decompressor
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numcodecs
import numpy as np
import zarr
from numcodecs.compat import ensure_contiguous_ndarray
from zarr.abc.codec import BytesBytesCodec, Codec
from zarr.codecs import ShardingCodec
from zarr.core.buffer import Buffer
from zarr.core.metadata import ArrayV3Metadata

from dtrain.data.encoding import DType
from dtrain.data.read.codecs import (
    CHECKSUM_CODECS,
    SPARE,
    STAGES,
    TRUNCATED,
    Stage,
    Undecodable,
    check_most,
    chunk_format,
    described_codec,
    encoded_most,
    plain_name,
    unpacked,
)
from dtrain.data.read.shards import ArrayLike, view_of

Decode: TypeAlias = Callable[[memoryview], memoryview]
"""Undoes one codec of one array."""

KEEPS_SIZE = frozenset({"bytes", "transpose"})
"""Codecs that give as many bytes as they are given."""
WIDENING = 16
"""By how much other filters may widen values: at most, each byte becomes a complex number."""
TEXT_BYTES, LEAST_TEXT = 4096, 64 << 20
"""Texts have no fixed size: so many bytes for each, and so many in any case, are the most for a chunk of them."""
IN_SHARD = 256
"""The most bytes that a chunk adds to a shard, besides twice its decoded size: entry, and headers of its codecs."""
LZMA_MEMORY = 256 << 20
"""The most bytes that a frame of lzma may ask for, besides what it holds: 65 MB with the highest preset."""


def bounded(array: ArrayLike) -> ArrayLike:
    """Return an array of which the known compressors cannot decode to more than its chunks can hold."""
    metadata: Any = array.metadata
    if isinstance(metadata, ArrayV3Metadata):
        codecs = _bounded(metadata.codecs, array.chunks, np.dtype(array.dtype))
        if codecs == metadata.codecs:
            return array
        changed: Any = replace(metadata, codecs=codecs)
    else:
        filters, compressor = metadata.filters or (), metadata.compressor
        if not filters and compressor is None:
            return array
        given = [*filters, *([] if compressor is None else [compressor])]
        own = [
            codec if decode is None else OldBounded(codec, decode)
            for codec, decode in zip(given, _decodes(given, array.chunks, np.dtype(array.dtype)), strict=True)
        ]
        changed = replace(
            metadata,
            filters=tuple(own[: len(filters)]) or None,
            compressor=None if compressor is None else own[-1],
        )
    return zarr.Array(zarr.AsyncArray(metadata=changed, store_path=array.store_path))


def _bounded(given: tuple[Codec, ...], shape: tuple[int, ...], dtype: DType) -> tuple[Codec, ...]:
    """Return codecs of Zarr v3 with the known compressors bounded, also of the chunks in shards."""
    own: list[Codec] = []
    for codec, decode in zip(given, _decodes(given, shape, dtype), strict=True):
        if isinstance(codec, ShardingCodec):
            inner: Any = codec
            own.append(replace(inner, codecs=_bounded(inner.codecs, inner.chunk_shape, dtype)))
        elif decode is not None and isinstance(codec, BytesBytesCodec):
            own.append(Bounded(codec, decode))
        else:
            own.append(codec)
    return tuple(own)


def _decodes(codecs: Sequence[Any], shape: tuple[int, ...], dtype: DType) -> list[Decode | None]:
    """Return what undoes each codec of a chunk; None for a codec that is not bounded."""
    described = [(plain_name(name), options) for name, options in map(described_codec, codecs)]
    stages = [partial(_from_lzma, said) if name == LZMA else COMPRESSORS.get(name) for name, said in described]
    most = most_bytes([name for name, _ in described], shape, dtype)
    return [stage and partial(_undone, stage, size) for stage, size in zip(stages, most, strict=False)]


def most_bytes(names: Sequence[str], shape: tuple[int, ...], dtype: DType) -> list[int]:
    """Return the most bytes that a chunk has before each of its codecs encodes it, and after the last one.

    Parameters
    ----------
    names : sequence of str
        Of the codecs in the order in which they encode.
    shape : tuple of int
        Of a chunk.
    dtype : dtype

    Examples
    --------
    >>> most_bytes(["bytes", "zstd"], (10,), np.dtype("float32"))
    [40, 40, 1048656]
    """
    count, known = math.prod(shape), {*COMPRESSORS, LZMA, *CHECKSUM_CODECS, *KEEPS_SIZE}
    is_text = dtype.kind in "OT"
    size = LEAST_TEXT + TEXT_BYTES * count if is_text else count * dtype.itemsize
    encoded = encoded_most(size if is_text or known.issuperset(names) else WIDENING * size)
    first = next((i for i, name in enumerate(names) if name not in KEEPS_SIZE), len(names))
    return [*(size if i <= first else encoded for i in range(len(names))), encoded]


def object_most(array: ArrayLike) -> int:
    """Return the most bytes that a stored object of an array has: a chunk, or a shard with its index."""
    names = [plain_name(name) for name in chunk_format(array).codecs]
    most = most_bytes(names, array.chunks, np.dtype(array.dtype))[-1]
    if array.shards is None:
        return most
    count = math.prod(shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True))
    return count * (most - SPARE + IN_SHARD) + SPARE


# The codecs that are bounded ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bounded(BytesBytesCodec):
    """A codec of Zarr v3 that is undone by something else than itself."""

    inner: BytesBytesCodec
    undo: Decode
    is_fixed_size = False

    def to_dict(self) -> dict[str, Any]:
        """Return what the metadata say of the codec."""
        return self.inner.to_dict()

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        """Return the size of an encoded chunk, or raise if it is not known."""
        return self.inner.compute_encoded_size(input_byte_length, chunk_spec)

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: Any) -> Buffer:
        decoded = self.undo(view_of(chunk_bytes))
        value: Buffer = chunk_spec.prototype.buffer.from_bytes(decoded)
        return value

    def _encode_sync(self, chunk_bytes: Buffer, chunk_spec: Any) -> Buffer | None:
        """Refuse: stores are read only. A newer zarr decodes in one thread what could encode so too."""
        raise NotImplementedError

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: Any) -> Buffer:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)


class OldBounded(numcodecs.abc.Codec):  # type: ignore[misc]
    """A codec of Zarr v2 that is undone by something else than itself.

    Parameters
    ----------
    inner : numcodecs.abc.Codec
    undo : callable
    """

    codec_id = "bounded"

    def __init__(self, inner: Any, undo: Decode) -> None:
        self.codec_id, self._inner, self._undo = inner.codec_id, inner, undo

    def encode(self, buf: Any) -> Any:
        """Encode a chunk as the codec does."""
        return self._inner.encode(buf)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Return a decoded chunk; zarr does not ask for it in memory of its own."""
        return self._undo(memoryview(ensure_contiguous_ndarray(buf)).cast("B"))

    def get_config(self) -> Any:
        """Return what the metadata say of the codec."""
        return self._inner.get_config()


def _undone(stage: Stage, most: int, stored: memoryview) -> memoryview:
    return stage(stored, most)


def _from_bz2(stored: memoryview, most: int) -> memoryview:
    return unpacked(BZ2Decompressor, stored, most, lambda rest: rest.startswith(b"BZh"))


def _from_lzma(options: Mapping[str, Any], stored: memoryview, most: int) -> memoryview:
    form, filters = options.get("format", lzma.FORMAT_XZ), options.get("filters")
    limit = None if form == lzma.FORMAT_RAW else LZMA_MEMORY + most
    new = partial(lzma.LZMADecompressor, format=form, memlimit=limit, filters=filters)
    return unpacked(new, stored, most, lambda rest: rest.startswith(b"\xfd7zXZ\0"))


def _from_lz4(stored: memoryview, most: int) -> memoryview:
    if len(stored) < 4:
        raise Undecodable(TRUNCATED)
    check_most(int.from_bytes(stored[:4], "little"), most)
    return memoryview(numcodecs.LZ4().decode(stored)).cast("B")


LZMA = "lzma"
"""Alone has options that its frames do not repeat."""
COMPRESSORS: Mapping[str, Stage] = {
    **{name: stage for name, stage in STAGES.items() if name != "crc32c"},  # it checks, and gives less than it is given
    "bz2": _from_bz2,
    "lz4": _from_lz4,
}
"""How the other codecs are undone that give more than they are given, by their plain name."""
