"""Choose who reads a variable, and say why: numcodecs, zarrs or zarr. All three give the same bits.

numcodecs   decodes files of a local store or a zip archive in the thread that reads; the codecs of nearly all stores
zarrs       reads and decodes files of a local store in Rust; the best for shards of many small chunks
zarr        reads every store, and decodes whatever zarr knows
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

import numpy as np

from dtrain.data.samples import WHOLE_OBJECT_BYTES, Samples
from dtrain.data.variable import Variable
from dtrain.errors import InvalidConfig

NUMCODECS_CODECS = frozenset({"bytes", "blosc", "zstd", "gzip", "zlib", "crc32c"})
"""Codecs that `dtrain.data.read.codecs` decodes."""
ZARRS_CODECS = frozenset({"bytes", "blosc", "zstd", "gzip", "crc32c", "transpose"})
"""Codecs that zarrs is tested to decode to the same bits."""
MANY_CHUNKS, SMALL_CHUNK_BYTES = 256, 32 << 10
"""zarrs decodes shards of at least so many chunks, each smaller than this, faster: a call from Python costs 15 us."""
GENERAL = ("numcodecs", "zarrs", "zarr")
"""The more general a reader, the later it stands."""
NOT_A_DIRECTORY = "the store is not a local directory"
MIN_DENSITY = 0.5
"""Inner chunks of a shard are read in one request if they make up this share of the bytes between them."""


def choose_readers(samples: Samples, wanted: str) -> dict[str, tuple[str, str]]:
    """Return the reader of each variable, and the reason for it; of a sparse one, that of each of its arrays.

    Parameters
    ----------
    samples : Samples
    wanted : str
        ``data.reader``: ``auto``, ``numcodecs``, ``zarrs`` or ``zarr``.

    Raises
    ------
    InvalidConfig
        `wanted` cannot read a variable that is read unit by unit.
    """
    if samples.members:
        return _of_all([choose_readers(member, wanted) for member in samples.members])
    chosen: dict[str, tuple[str, str]] = {}
    for v in samples.stored:
        obstacles = {"numcodecs": _numcodecs_obstacle(samples, v), "zarrs": _zarrs_obstacle(samples, v)}
        obstacle = obstacles.get(wanted, "")
        if obstacle and not v.is_static:
            raise InvalidConfig(
                f'data.reader = "{wanted}" does not read {v.name}: {obstacle}.', 'Set data.reader = "auto".'
            )
        if wanted == "auto":
            chosen[v.name] = _best_reader(v, obstacles["numcodecs"], obstacles["zarrs"])
        else:
            chosen[v.name] = ("zarr", obstacle) if obstacle else (wanted, "asked for")
    return chosen


def _of_all(members: Sequence[dict[str, tuple[str, str]]]) -> dict[str, tuple[str, str]]:
    """Return the reader of each variable in the store that is read by the most general one."""
    return {name: max((one[name] for one in members), key=lambda own: GENERAL.index(own[0])) for name in members[0]}


def has_fine_shards(variable: Variable) -> bool:
    """Return True if zarrs is the better reader: shards that are read whole, of many small chunks."""
    chunks = math.prod(variable.objects) // math.prod(variable.chunks)
    whole = variable.chunk_bytes * chunks <= WHOLE_OBJECT_BYTES  # parts of larger shards are read
    return whole and chunks >= MANY_CHUNKS and variable.chunk_bytes < SMALL_CHUNK_BYTES


def numcodecs_obstacle(variable: Variable) -> str:
    """Return why the chunks of a variable are not decoded by numcodecs alone; empty if they are."""
    stored = variable.chunk_format
    if obstacle := _order_obstacle(variable):
        return obstacle
    if stored.endian not in ("", sys.byteorder):
        return f"its byte order is {stored.endian}"
    if not stored.has_plain_index:
        return "the index of its shards is encoded in a rare way"
    return _codec_obstacle(name for name in stored.codecs if not _is_decoded(name))


def zarrs_obstacle(variable: Variable) -> str:
    """Return why zarrs does not decode the chunks of a variable to the right bits; empty if it does."""
    if obstacle := _order_obstacle(variable):
        return obstacle
    if not variable.chunk_format.has_fill_value:
        return "it has no fill value"
    return _codec_obstacle(name for name in variable.chunk_format.codecs if _plain_name(name) not in ZARRS_CODECS)


def _best_reader(variable: Variable, no_numcodecs: str, no_zarrs: str) -> tuple[str, str]:
    """Choose between readers, of which some have an obstacle."""
    if not no_numcodecs and (no_zarrs or not has_fine_shards(variable)):
        return "numcodecs", "the store is local and its codecs are the usual ones"
    if not no_zarrs:
        return "zarrs", no_numcodecs or "its shards hold many small chunks"
    return "zarr", no_numcodecs


def _numcodecs_obstacle(samples: Samples, variable: Variable) -> str:
    if not (samples.store.is_local or samples.store.reads_parts):
        return NOT_A_DIRECTORY
    return numcodecs_obstacle(variable)


def _zarrs_obstacle(samples: Samples, variable: Variable) -> str:
    if not samples.store.is_local:
        return NOT_A_DIRECTORY
    if find_spec("zarrs") is None:
        return "zarrs is not installed"
    if obstacle := zarrs_obstacle(variable):
        return obstacle
    if any(step != 1 for _, _, step in variable.select):
        return "it is read with a step"
    return "it is small" if variable.is_static else ""


def _order_obstacle(variable: Variable) -> str:
    """Return how values lie in a chunk in another order than in memory; empty if they do not."""
    dtype = np.dtype(variable.dtype)
    if not dtype.isnative:
        return f"its byte order is {dtype.byteorder}"
    return "its order is F" if variable.chunk_format.order == "F" else ""


def _codec_obstacle(names: Iterable[str]) -> str:
    first = next(iter(names), "")
    return f"codec {_plain_name(first)}" if first else ""


def _is_decoded(name: str) -> bool:
    """Return True if numcodecs decodes the codec; numcodecs' own crc32c may store the checksum in front."""
    return _plain_name(name) in NUMCODECS_CODECS and name != "numcodecs.crc32c"


def _plain_name(name: str) -> str:
    return name.removeprefix("numcodecs.")
