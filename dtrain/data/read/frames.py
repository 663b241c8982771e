"""The headers of zstd's frames: how many bytes they hold, and where they end; nothing is decoded.

References
----------
RFC 8878, Zstandard Compression: frames (3.1.1), their headers (3.1.1.1), blocks (3.1.1.2), skippable frames (3.1.2).
"""

from __future__ import annotations

MAGIC, SKIPPABLE = 0xFD2FB528, 0x184D2A50
BLOCK = 128 << 10
"""The most bytes of a block."""
RAW, REPEATED, RESERVED = 0, 1, 3
"""Types of blocks."""
UNREADABLE = 1 << 64
"""Stands for the size of what is no frame, or of a truncated one."""


def zstd_size(stored: memoryview) -> int | None:
    """Return the decoded bytes that the header of a zstd frame states; None if it does not."""
    if len(stored) < 6 or bytes(stored[:4]) != b"\x28\xb5\x2f\xfd":
        return None
    flags = stored[4]
    single = flags >> 5 & 1
    length = (single, 2, 4, 8)[flags >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    if not length or start + length > len(stored):
        return None
    return int.from_bytes(stored[start : start + length], "little") + (256 if length == 2 else 0)


def zstd_bounds(stored: memoryview) -> tuple[int, bool]:
    """Return the most bytes that frames of zstd can decode to, and True if their headers state that number.

    A header may lie; then decoding into memory of that size fails. Where one states no size, its blocks are counted.
    """
    total, is_stated, at = 0, True, 0
    while at < len(stored):
        magic = int.from_bytes(stored[at : at + 4], "little")
        if magic & ~0xF == SKIPPABLE and at + 8 <= len(stored):
            at += 8 + int.from_bytes(stored[at + 4 : at + 8], "little")
            if at > len(stored):
                return UNREADABLE, False
            continue
        found = _blocks(stored, at) if magic == MAGIC else None
        if found is None:
            return UNREADABLE, False
        end, most = found
        stated = zstd_size(stored[at:])
        total, is_stated, at = total + (most if stated is None else stated), is_stated and stated is not None, end
    return total, is_stated


def _blocks(stored: memoryview, start: int) -> tuple[int, int] | None:
    """Return where the frame that begins at a place ends, and the most bytes that its blocks decode to."""
    if start + 6 > len(stored):
        return None
    flags, most, is_last = stored[start + 4], 0, False
    single = flags >> 5 & 1
    at = start + 5 + (1 - single) + (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6]
    while not is_last:
        if at + 3 > len(stored):
            return None
        header = int.from_bytes(stored[at : at + 3], "little")
        is_last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        most += size if kind in (RAW, REPEATED) else BLOCK
        at += 3 + (1 if kind == REPEATED else size)
    end = at + 4 * (flags >> 2 & 1)
    return (end, most) if end <= len(stored) else None
