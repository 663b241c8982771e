"""Zip archives: their central directory in little memory, and members that many threads read at once.

Python's `zipfile` reads one member at a time, and keeps 800 bytes of each. Here it is 38 bytes, and each read opens the
file for itself. The CRC-32 of a member is verified when all of it is read, and before a part of it is read first.

References
----------
PKWARE, .ZIP File Format Specification (APPNOTE.TXT) 6.3.10: local header (4.3.7), central directory (4.3.12) and its
end (4.3.14 to 4.3.16), ZIP64 (4.5.3).
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from io import FileIO
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from dtrain.data.read.codecs import TRUNCATED, Undecodable
from dtrain.data.read.documents import NAMES
from dtrain.data.read.local import Scratch, version_of
from dtrain.errors import DataChanged, NotZarr

END, END64, LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
ENTRY, HEADER = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
MOST_COMMENT = 1 << 16
LONG = 0xFFFFFFFF
"""Stands for a number that is in the extra field of ZIP64."""
STORED, DEFLATED = 0, 8
"""The methods of compression that are read."""
ENCRYPTED, UTF8 = 1, 1 << 11
"""Flags of a member."""
BLOCK = 1 << 16
"""Bytes that are read or inflated at once."""
MEMBER_BYTES = 95
"""Bytes in memory of one member while the archive is opened; 38 are kept."""


# The central directory --------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A line of the central directory."""

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    """Bytes in the archive."""
    size: int
    """Bytes of the content."""
    offset: int
    """Where the local header lies."""


def entries_of(path: str) -> Iterator[Entry]:
    """Yield the files of an archive, in the order of its central directory; a later one replaces one of the same name.

    Raises
    ------
    NotZarr
        The file is no archive or truncated, or a member is stored in a way that is not read.
    """
    try:
        with open(path, "rb", buffering=BLOCK) as file:
            start, stop, shift = _directory(file)
            file.seek(start)
            while file.tell() < stop:
                entry = _entry(file, shift)
                if not entry.name.endswith("/"):
                    _check_entry(path, entry)
                    yield entry
    except NotZarr:
        raise
    except (struct.error, ValueError) as error:
        raise NotZarr(
            f"{path} is no zip archive, or its end is missing.", "Copy it again, or pack the directory of the store."
        ) from error


def _directory(file: BinaryIO) -> tuple[int, int, int]:
    """Return start and stop of the central directory, and by how much the offsets in it are shifted."""
    length = file.seek(0, os.SEEK_END)
    first = max(0, length - MOST_COMMENT - END.size)
    file.seek(first)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0:
        raise ValueError("no end of a central directory")
    *_, size, offset, _ = END.unpack_from(tail, at)
    stop = first + at
    if stop >= LOCATOR64.size:
        file.seek(stop - LOCATOR64.size)
        signature, _, place, _ = LOCATOR64.unpack(file.read(LOCATOR64.size))
        if signature == b"PK\6\7":
            file.seek(place)
            signature, *_, size, offset = END64.unpack(file.read(END64.size))
            if signature != b"PK\6\6":
                raise ValueError("no end of a central directory of ZIP64")
            stop = place
    if size > stop:
        raise ValueError("a central directory that is longer than the file")
    return stop - size, stop, stop - size - offset


def _entry(file: BinaryIO, shift: int) -> Entry:
    """Read the next line of a central directory."""
    signature, *fields = ENTRY.unpack(file.read(ENTRY.size))
    if signature != b"PK\1\2":
        raise ValueError("no line of a central directory")
    _, _, flags, method, _, _, crc, packed, size, of_name, of_extra, of_comment, _, _, _, offset = fields
    name = file.read(of_name).decode("utf-8" if flags & UTF8 else "cp437")
    extra = file.read(of_extra)
    file.seek(of_comment, os.SEEK_CUR)
    size, packed, offset = _long(extra, size, packed, offset)
    if offset + shift < 0:
        raise ValueError("a member that begins before the file")
    return Entry(name, flags, method, crc, packed, size, offset + shift)


def _long(extra: bytes, *numbers: int) -> list[int]:
    """Return numbers, those of them that need 8 bytes from the extra field."""
    at = 0
    while LONG in numbers and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            longer = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(longer, LONG) if number == LONG else number for number in numbers]
        at += 4 + length
    return list(numbers)


def _check_entry(path: str, entry: Entry) -> None:
    if entry.flags & ENCRYPTED:
        raise NotZarr(f"{path}: {entry.name} is encrypted.", "Pack the store again, without a password.")
    if entry.method not in (STORED, DEFLATED):
        raise NotZarr(
            f"{path}: {entry.name} is compressed by method {entry.method}; stored and deflated members are read.",
            "Pack the store again with zip -0 -r: Zarr has compressed its chunks already.",
        )


# Members ----------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A file in an archive."""

    number: int
    offset: int
    packed: int
    size: int
    crc: int
    is_stored: bool


class Archive:
    """The members of an archive. Threads and stores may share it.

    Parameters
    ----------
    path : str

    Raises
    ------
    NotZarr
        As `entries_of`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.version = version_of(path)
        """Size and time of the file."""
        hashes, *columns = (array(code) for code in "qQQQIB")
        documents: dict[str, None] = {}
        for entry in entries_of(path):
            hashes.append(hash(entry.name))
            facts = (entry.offset, entry.packed, entry.size, entry.crc, entry.method == STORED)
            for column, fact in zip(columns, facts, strict=True):
                column.append(fact)
            if entry.name.rpartition("/")[2] in NAMES:
                documents[entry.name] = None
        self.documents = tuple(documents)
        """Names of the metadata documents."""
        order = np.argsort(np.asarray(hashes), kind="stable")
        self._hashes, *self._columns = (_in_order(column, order) for column in (hashes, *columns))
        self._verified = bytearray(len(order))

    @property
    def nbytes(self) -> int:
        """Bytes in memory, at most."""
        return MEMBER_BYTES * len(self._hashes)

    def find(self, name: str) -> Member | None:
        """Return the member of a name, the last one if there are several; None if there is none."""
        key = hash(name)
        number = bisect_right(self._hashes, key) - 1  # NumPy takes 7 us for it
        if number < 0 or self._hashes[number] != key:
            return None
        offset, packed, size, crc, stored = (column[number] for column in self._columns)
        return Member(number, offset, packed, size, crc, bool(stored))

    def read(
        self, name: str, member: Member, scratch: Scratch, start: int, stop: int, *, verify: bool = True
    ) -> memoryview:
        """Return the bytes ``start:stop`` of a member.

        Parameters
        ----------
        name : str
        member : Member
            Of that name.
        scratch : callable
            Gives a scratch buffer of so many bytes to read into.
        start, stop : int
            Within the member.
        verify : bool
            Read all of a member once before its first part is returned.

        Raises
        ------
        Undecodable
            The member is truncated, its checksum is wrong, or it cannot be inflated.
        DataChanged
            The archive has been modified since it was opened.
        """
        value = scratch(max(0, stop - start))
        is_whole, is_verified = len(value) == member.size, self._verified[member.number] or not verify
        with open(self.path, "rb", buffering=0) as file:
            self._check_version(file)
            place = _content_at(file, name, member)
            if member.is_stored and (is_whole or is_verified):
                file.seek(place + start)
                if _fill(file, value) < len(value):
                    raise Undecodable(TRUNCATED)
                if is_whole:
                    _check_crc(zlib.crc32(value), member)
            else:
                file.seek(place)
                _copy(_content(file, member), member, start, value)
                self._verified[member.number] = True
        return value

    def _check_version(self, file: FileIO) -> None:
        facts = os.fstat(file.fileno())
        if (facts.st_size, facts.st_mtime_ns) != self.version:
            raise DataChanged(
                f"{self.path} has been modified since it was opened.",
                "Train on data that nobody writes to; start a new run (--run NAME) for the data as they are now.",
            )


def _in_order(column: array[int], order: npt.NDArray[np.int64]) -> array[int]:
    return array(column.typecode, np.asarray(column)[order].tobytes())


def _content_at(file: FileIO, name: str, member: Member) -> int:
    """Return where the content of a member begins: behind its own header, which names it once more."""
    file.seek(member.offset)
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise Undecodable(TRUNCATED)
    signature, _, flags, *_, of_name, of_extra = HEADER.unpack(header)
    place: int = member.offset + HEADER.size + of_name + of_extra
    own = file.read(of_name).decode("utf-8" if flags & UTF8 else "cp437", "replace")
    if signature != b"PK\3\4" or own != name:
        raise Undecodable("its header in the archive is damaged")
    return place


def _content(file: FileIO, member: Member) -> Iterator[bytes]:
    """Yield the content of a member in blocks."""
    inflate, left = zlib.decompressobj(-zlib.MAX_WBITS), member.packed
    while left and (block := file.read(min(BLOCK, left))):
        left -= len(block)
        if member.is_stored:
            yield block
            continue
        while block:
            yield inflate.decompress(block, BLOCK)
            block = inflate.unconsumed_tail
    yield inflate.flush()


def _copy(content: Iterator[bytes], member: Member, start: int, value: memoryview) -> None:
    """Fill `value` with the content from `start` on, and verify all of it."""
    at = crc = 0
    try:
        for block in content:
            low, high = max(start, at), min(start + len(value), at + len(block))
            if low < high:
                value[low - start : high - start] = block[low - at : high - at]
            crc, at = zlib.crc32(block, crc), at + len(block)
            if at > member.size:
                raise Undecodable("it is longer than the archive says")
    except zlib.error as error:
        raise Undecodable(f"it cannot be inflated: {error}") from error
    if at < member.size:
        raise Undecodable(TRUNCATED)
    _check_crc(crc, member)


def _check_crc(crc: int, member: Member) -> None:
    if crc != member.crc:
        raise Undecodable("its CRC-32 in the archive is wrong")


def _fill(file: FileIO, value: memoryview) -> int:
    """Fill memory from a file, and return how many bytes there were."""
    done = 0
    while done < len(value):
        count: int = file.readinto(value[done:])
        if not count:
            break
        done += count
    return done
