"""References in kerchunk's formats: for each key of a Zarr store the bytes of some other file, or the value itself.

References
----------
kerchunk, Specifications: references as JSON (versions 0 and 1), and in Parquet, a file for each run of chunks.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.read.documents import NAMES
from dtrain.errors import InvalidConfig, NotZarr, one_line
from dtrain.urls import bare_url, redacted_url

JSON_BYTES = 300
"""Bytes in memory of a reference that was written as JSON, besides those of its text."""
PARQUET_BYTES = 20
"""Bytes in memory of a reference that was written as Parquet."""
ABSENT, INLINE = -1, -2
"""In place of the number of a file."""


class Reference(NamedTuple):
    """Bytes of a file."""

    url: str
    """As it is written."""
    start: int
    stop: int | None
    """None: all of the file."""


Found: TypeAlias = bytes | Reference | None
"""A value, where it lies, or that there is none."""


class References(Protocol):
    """What a reference file says. Threads may share it."""

    async def prepare(self, keys: Iterable[str] | None = None) -> None:
        """Read the references of some keys, or of all; before, they cannot be found."""
        ...

    def find(self, key: str) -> Found:
        """Return what a key refers to."""
        ...

    def documents(self) -> Sequence[str]:
        """Return the keys of all metadata documents."""
        ...

    def all_keys(self) -> Iterator[str]:
        """Yield all keys; all are prepared."""
        ...

    def urls(self) -> set[str]:
        """Return all files that are referred to, as they are written; all keys are prepared."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in memory, at most."""
        ...


def mark_of(found: Found) -> str | None:
    """Return a text that tells one reference from another, whichever folder its file lies in.

    It has ``***`` in place of a query, which may be a signature.
    """
    if found is None:
        return None
    if isinstance(found, bytes):
        return f"inline {len(found)} {zlib.crc32(found):08x}"
    url = redacted_url(found.url)
    return f"{found.start} {found.stop} {bare_url(url).rpartition('/')[2]}{url[len(bare_url(url)) :]}"


# JSON -----------------------------------------------------------------------------------------------------


class JsonReferences:
    """References in a JSON file.

    Parameters
    ----------
    path : str
        Names the file in errors.
    text : bytes

    Raises
    ------
    NotZarr
        It holds no references, or such that have to be computed.
    """

    def __init__(self, path: str, text: bytes) -> None:
        try:
            table = json.loads(text)
            refs, templates = table["refs"], table.get("templates") or {}
            if table.get("gen") or any("{{" in text for text in templates.values()):
                raise NotZarr(
                    f"{path}: its references are computed (gen, or nested templates); only written ones are read.",
                    "Write it again with each reference in full: by ReferenceFileSystem.save_json of fsspec.",
                )
            for key, value in refs.items():  # in place: there may be millions
                refs[key] = _parsed(value, templates)
        except NotZarr:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise NotZarr(
                f'{path} holds no kerchunk references ("refs"): {type(error).__name__}: {one_line(error)}',
                "data.path is the directory of a Zarr group, or a reference file as kerchunk or VirtualiZarr write it.",
            ) from None
        self._refs: dict[str, bytes | Reference] = refs
        self.nbytes = JSON_BYTES * len(refs) + 2 * len(text)  # the text, and the names in it

    async def prepare(self, keys: Iterable[str] | None = None) -> None:
        """Do nothing: all are there."""

    def find(self, key: str) -> Found:
        """Return what a key refers to."""
        return self._refs.get(key)

    def documents(self) -> list[str]:
        """Return the keys of all metadata documents."""
        return [key for key in self._refs if key.rpartition("/")[2] in NAMES]

    def all_keys(self) -> Iterator[str]:
        """Yield all keys."""
        return iter(self._refs)

    def urls(self) -> set[str]:
        """Return all files that are referred to."""
        return {found.url for found in self._refs.values() if isinstance(found, Reference)}


def _parsed(value: Any, templates: Mapping[str, str]) -> bytes | Reference:
    """Return a reference as it is written in JSON."""
    if isinstance(value, str):
        return base64.b64decode(value[7:]) if value.startswith("base64:") else value.encode()
    if isinstance(value, dict):
        return json.dumps(value).encode()
    url, *part = value
    if not isinstance(url, str) or not url:
        raise ValueError(f"a reference without a file: {value}")
    for name, text in templates.items() if "{{" in url else ():
        url = url.replace(f"{{{{{name}}}}}", text)
    if "{{" in url:
        raise ValueError(f"a template that is not defined: {url}")
    start, size = map(int, part) if part else (0, -1)
    if start < 0 or (part and size < 0):
        raise ValueError(f"a reference to negative bytes: {value}")
    return Reference(url, start, start + size if part else None)


# Parquet --------------------------------------------------------------------------------------------------

ReadFiles: TypeAlias = Callable[[Sequence[str]], Awaitable[list[bytes | None]]]
"""Returns the contents of some files below the directory of the references; None for one that is not there."""


@dataclass(frozen=True, slots=True)
class _Field:
    """The references of an array, by the number of its chunk in C order."""

    files: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    """0 with start 0: all of the file."""
    inline: Mapping[int, bytes]
    names: Sequence[str]
    """The files."""

    def find(self, number: int) -> Found:
        file = int(self.files[number]) if number < len(self.files) else ABSENT
        if file == ABSENT:
            return None
        if file == INLINE:
            return self.inline[number]
        start, size = int(self.starts[number]), int(self.sizes[number])
        return Reference(self.names[file], start, start + size if start or size else None)


class ParquetReferences:
    """References in a directory of Parquet files; those of an array are read when its first chunk is asked for.

    Parameters
    ----------
    path : str
        Names the directory in errors.
    document : bytes or None
        Its file ``.zmetadata``.
    read_files : callable

    Raises
    ------
    NotZarr
        It holds no references.
    """

    def __init__(self, path: str, document: bytes | None, read_files: ReadFiles) -> None:
        self._path, self._read_files = path, read_files
        try:
            table = json.loads(document or b"")
            self._metadata: dict[str, Any] = table["metadata"]
            self._together = int(table["record_size"])
            arrays = (key for key in self._metadata if key.rpartition("/")[2] == ".zarray")
            self._grids = {key.rpartition("/")[0]: _grid(self._metadata[key]) for key in arrays}
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise NotZarr(
                f"{path} is no directory of kerchunk references: its .zmetadata cannot be read: {one_line(error)}",
                "data.path is a directory as kerchunk.df.refs_to_dataframe or VirtualiZarr writes it.",
            ) from None
        self._fields: dict[str, _Field] = {}
        self._loading = asyncio.Lock()
        self.nbytes = PARQUET_BYTES * sum(map(math.prod, self._grids.values()))

    async def prepare(self, keys: Iterable[str] | None = None) -> None:
        """Read the references of the arrays that keys belong to, or of all."""
        wanted = set(self._grids) if keys is None else {key.rpartition("/")[0] for key in keys} & self._grids.keys()
        for name in sorted(wanted.difference(self._fields)):
            async with self._loading:
                if name not in self._fields:
                    numbers = range(math.ceil(math.prod(self._grids[name]) / self._together))
                    contents = await self._read_files([f"{name}/refs.{number}.parq" for number in numbers])
                    self._fields[name] = await asyncio.to_thread(self._field, name, contents)

    def find(self, key: str) -> Found:
        """Return what a key refers to."""
        if key in self._metadata:
            return json.dumps(self._metadata[key]).encode()
        name, _, place = key.rpartition("/")
        grid = self._grids.get(name)
        if grid is None:
            return None
        try:
            number = int(np.ravel_multi_index(tuple(map(int, place.split("."))), grid)) if grid else 0
        except ValueError:  # no place of this grid
            return None
        return self._fields[name].find(number)

    def documents(self) -> list[str]:
        """Return the keys of all metadata documents."""
        return list(self._metadata)

    def all_keys(self) -> Iterator[str]:
        """Yield all keys."""
        yield from self._metadata
        for name, grid in self._grids.items():
            for place in np.ndindex(*grid):
                key = f"{name}/{'.'.join(map(str, place)) or '0'}"
                if self.find(key) is not None:
                    yield key

    def urls(self) -> set[str]:
        """Return all files that are referred to."""
        return {url for field in self._fields.values() for url in field.names}

    def _field(self, name: str, contents: Sequence[bytes | None]) -> _Field:
        """Return the references of an array, from the contents of its files."""
        count = math.prod(self._grids[name])
        names: dict[str, int] = {}
        inline: dict[int, bytes] = {}
        files = np.full(count, ABSENT, np.int32)
        starts, sizes = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for number, content in enumerate(contents):
            if content is None:  # no chunk of it is stored
                continue
            columns, first = self._columns(f"{name}/refs.{number}.parq", content), number * self._together
            length = min(self._together, count - first, *map(len, columns.values()))
            part = slice(first, first + length)
            if "path" in columns:
                files[part] = _file_numbers(columns["path"][:length], names)
                starts[part], sizes[part] = columns["offset"][:length], columns["size"][:length]
            for row, value in enumerate(columns.get("raw", ())[:length]):
                if isinstance(value, bytes | str):
                    files[first + row] = INLINE
                    inline[first + row] = value if isinstance(value, bytes) else value.encode()
        return _Field(files, starts, sizes, inline, list(names))

    def _columns(self, file: str, content: bytes) -> dict[str, Any]:
        import pandas as pd

        try:
            table = pd.read_parquet(io.BytesIO(content))
        except ImportError as error:
            raise InvalidConfig(
                f"{self._path}: reading references in Parquet needs a package that is not installed: {one_line(error)}",
                'Install it here and on the workers: pip install "dtrain[kerchunk]".',
            ) from None
        except Exception as error:
            raise NotZarr(
                f"{self._path}: {file} cannot be read: {one_line(error)}", "Restore it from a copy."
            ) from None
        return {name: table[name].to_numpy() for name in table.columns}


def _grid(document: Mapping[str, Any]) -> tuple[int, ...]:
    """Return how many chunks an array has along each dimension."""
    return tuple(math.ceil(n / size) for n, size in zip(document["shape"], document["chunks"], strict=True))


def _file_numbers(paths: Sequence[Any], names: dict[str, int]) -> list[int]:
    """Return the numbers of files by their names, which new ones are added to."""
    return [names.setdefault(path, len(names)) if isinstance(path, str) and path else ABSENT for path in paths]
