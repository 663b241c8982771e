"""What the metadata of an array claim of its size, compared with what can be read: before anything is looked for."""

from __future__ import annotations

import math

from dtrain.data.plan.footprint import format_bytes
from dtrain.errors import ChunkTooLarge, UnsuitableVariable

MOST_CHUNKS = 10**8
"""Stored objects of an array, and chunks of a shard, at most: to look for each of them takes minutes by then."""
MOST_BYTES = 2**63 - 1
"""Of all values of an array: beyond it, places and sizes are no numbers that NumPy and files know."""
MOST_CHUNK_BYTES = 1 << 40
"""Of a chunk of a variable: no machine decodes more. What a worker can hold is compared when memory is planned."""
MOST_COLUMN_BYTES = 2 << 30
"""Of a chunk of a coordinate, or of texts: it is decoded beside everything else, where nobody plans for it."""


def check_grid(
    path: str,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    objects: tuple[int, ...],
    itemsize: int,
    *,
    most: int = MOST_CHUNK_BYTES,
) -> None:
    """Refuse chunks without values, too large ones, and more of them than can be looked for.

    Parameters
    ----------
    path, name : str
        Name store and array in errors.
    shape, chunks, objects : tuple of int
        Shape of the array, of a chunk, and of a stored object.
    itemsize : int
        Bytes of a value.
    most : int
        Bytes of a chunk.

    Raises
    ------
    UnsuitableVariable, ChunkTooLarge
    """
    if 0 in (*chunks, *objects):
        raise UnsuitableVariable(
            f"{path}: {name} has chunks of shape {list(chunks)}, which hold no values.",
            "Its metadata are damaged, or it was never written: write it again with chunks of at least 1.",
        )
    if max(math.prod(shape) * itemsize, *shape, 0) > MOST_BYTES:
        raise UnsuitableVariable(
            f"{path}: {name} of shape {list(shape)} would have more than 2^63 bytes.",
            "Its metadata are damaged: restore them from a copy of the store.",
        )
    stored = math.prod(-(-n // size) for n, size in zip(shape, objects, strict=True))
    inner = math.prod(size // chunk for size, chunk in zip(objects, chunks, strict=True))
    for count, text in ((stored, "stored objects"), (inner, "chunks in each shard")):
        if count > MOST_CHUNKS:
            raise UnsuitableVariable(
                f"{path}: {name} of shape {list(shape)} has {count:,} {text}; at most {MOST_CHUNKS:,} can be read.",
                f"Write {name} again with larger chunks.",
            )
    if math.prod(chunks) * itemsize > most:
        raise ChunkTooLarge(
            f"{path}: one chunk of {name} {chunks} decodes to more than {format_bytes(most)}, the most that is read.",
            "Store it in smaller chunks. If it should have others, its metadata are damaged: restore them from a copy.",
        )


def check_whole(path: str, name: str, size: int) -> None:
    """Refuse a column of so many bytes that is read whole.

    Raises
    ------
    UnsuitableVariable
    """
    if size > MOST_COLUMN_BYTES:
        raise UnsuitableVariable(
            f"{path}: {name} would have {format_bytes(size)}; a column of at most {format_bytes(MOST_COLUMN_BYTES)} is "
            "read whole.",
            "Choose a part of it (data.isel). If it should be shorter, its metadata are damaged: restore them.",
        )
