"""Read chunks through zarr, from any store; or through zarrs, which reads the files of a local store by itself."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import zarr
from zarr.core import codec_pipeline
from zarr.core.buffer import default_buffer_prototype
from zarr.registry import fully_qualified_name, register_pipeline
from zarr.storage import LocalStore, StorePath

from dtrain.data.encoding import Array
from dtrain.data.plan.grid import shards_of
from dtrain.data.plan.missing import absence_of
from dtrain.data.plan.readers import MIN_DENSITY
from dtrain.data.read.codecs import ends_in_blosc, is_truncated_blosc
from dtrain.data.read.faults import DAMAGED_INDEX, Faults, Observation
from dtrain.data.read.heads import Claims
from dtrain.data.read.local import new_buffer, read_part
from dtrain.data.read.rows import as_stored
from dtrain.data.read.shards import ArrayLike, ShardLayout, dense_run, missing_chunks, shard_layout, stored_entries
from dtrain.data.read.store import ReadStore, key_of, objects_of
from dtrain.data.samples import Samples
from dtrain.data.variable import Select, Variable
from dtrain.errors import DtrainError, one_line

_OPENING = threading.Lock()  # zarr's configuration belongs to the whole process


@dataclass(frozen=True, slots=True)
class _Selection:
    """A selection that is read at once, and the stored objects that hold it."""

    array: ArrayLike
    layout: ShardLayout | None
    variable: Variable
    select: Select
    objects: tuple[tuple[tuple[int, ...], str], ...]
    """Place and key of each."""
    guard: ArrayLike | None = None
    """The same array, bounded: where a fault is looked for, it reads an object before `array` does."""


class ZarrReader:
    """Reads variables through zarr. Several threads may share it.

    Parameters
    ----------
    store : ReadStore
        It sees the objects pass, and notes which are absent or truncated.
    arrays : mapping of str to zarr.Array
        By variable, opened in `store`.
    faults : Faults
    """

    def __init__(self, store: ReadStore, arrays: Mapping[str, ArrayLike], faults: Faults) -> None:
        self._store = store
        self.arrays = arrays
        self._faults = faults
        self._layouts = {name: shard_layout(array) for name, array in arrays.items()}

    def read(self, variable: Variable, select: Select, out: Array) -> None:
        """Fill `out` with a selection (`ChunkReader.read`)."""
        name = variable.name
        selection = _selection(self.arrays[name], self._layouts[name], variable, select)
        observe = partial(self._observe, selection)
        with _named(selection, self._faults, observe), self._store.holding(_dense_parts(self._store, selection)):
            decode(selection.array, variable, select, out)
        _check_inner_chunks(self._store, selection, self._faults)

    def _observe(self, selection: _Selection) -> list[Observation]:
        """Return what the store has noted about the objects."""
        store = self._store
        return [
            Observation(place, key, store.is_absent(key), store.is_truncated(key), store.version(key))
            for place, key in selection.objects
        ]


class ZarrsReader:
    """Reads variables through zarrs, which does not read through the store. Several threads may share it.

    Parameters
    ----------
    store : ReadStore
        A local store.
    arrays : mapping of str to zarr.Array
        By variable, opened by `open_with_zarrs`.
    faults : Faults
    by_zarr : ZarrReader
        Reads chunks of which zarrs would not notice that they hold something else, before it has memory for that.
    """

    def __init__(self, store: ReadStore, arrays: Mapping[str, ArrayLike], faults: Faults, by_zarr: ZarrReader) -> None:
        self._store = store
        self._arrays = arrays
        self._faults = faults
        self._by_zarr = by_zarr
        self._layouts = {name: shard_layout(array) for name, array in arrays.items()}
        self._claims = {name: Claims(array) for name, array in arrays.items()}
        self._blosc = {name: ends_in_blosc(array) for name, array in arrays.items()}

    def read(self, variable: Variable, select: Select, out: Array) -> None:
        """Fill `out` with a selection (`ChunkReader.read`)."""
        name = variable.name
        selection = _selection(self._arrays[name], self._layouts[name], variable, select)
        before = [self._look_at(variable, key) for _, key in selection.objects]
        if not self._is_right(selection, before):
            self._by_zarr.read(variable, select, out)
            return
        selection = replace(selection, guard=self._by_zarr.arrays[name])
        with _named(selection, self._faults, partial(self._observe, selection, before)), _panics_are_errors():
            decode(selection.array, variable, select, out)
        _check_inner_chunks(self._store, selection, self._faults)

    def _is_right(self, selection: _Selection, before: Sequence[tuple[bool, bool]]) -> bool:
        """Return True if the chunks of a selection that are there are known to decode to their size."""
        variable, layout, claims = selection.variable, selection.layout, self._claims[selection.variable.name]
        parts = shards_of(variable, selection.select) if variable.has_inner_chunks else itertools.repeat(None)
        for part, (_, key), (is_absent, is_truncated) in zip(parts, selection.objects, before, strict=False):
            if is_absent or is_truncated:  # said afterwards
                continue
            size, _ = self._store.version(key) or (0, 0)
            entries = np.array([[0, size]], np.int64)
            if part is not None:
                index = None if layout is None else self._store.index(key, layout)
                if index is None:
                    return False
                entries = stored_entries(index, part)
                if len(entries) and entries.sum(axis=1).max() > size:
                    return False
            if not claims.are_right(os.path.join(self._store.path, key), entries):
                return False
        return True

    def _look_at(self, variable: Variable, key: str) -> tuple[bool, bool]:
        """Return two flags: the file is absent; it is truncated in a way that zarrs does not notice."""
        version = self._store.version(key)
        if version is None:
            return True, False
        size, _ = version
        if size == 0 and variable.has_inner_chunks:
            return False, True
        if not self._blosc[variable.name]:
            return False, False
        head = read_part(os.path.join(self._store.path, key), new_buffer, 0, 16)
        return False, head is not None and is_truncated_blosc(bytes(head[0]), size)

    def _observe(self, selection: _Selection, before: Sequence[tuple[bool, bool]]) -> list[Observation]:
        pairs = zip(selection.objects, before, strict=True)
        return [Observation(place, key, *seen, self._store.version(key)) for (place, key), seen in pairs]


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """Turn what Rust panics with, which is no Exception, into one, in this context."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(f"zarrs gave up: {one_line(error)}") from None
        raise


def _selection(array: ArrayLike, layout: ShardLayout | None, variable: Variable, select: Select) -> _Selection:
    return _Selection(array, layout, variable, select, tuple(objects_of(array, variable, select)))


def decode(array: ArrayLike, variable: Variable, select: Select, out: Array) -> None:
    """Read a selection by an array's own codecs."""
    key = tuple(slice(*part) for part in select)
    lengths = tuple(len(range(*part)) for part in select)  # with the dropped dimensions, of one place each
    if variable.sample_axis <= 0 and np.dtype(variable.dtype) == out.dtype and out.size:
        target = default_buffer_prototype().nd_buffer.from_numpy_array(out.reshape(lengths))
        array.get_basic_selection(key, out=target)
        return
    values = np.asarray(array[key]).reshape(lengths)
    with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32 becomes infinite: checked later
        as_stored(variable, select, out)[...] = values


# Faults -------------------------------------------------------------------------------------------------


@contextmanager
def _named(selection: _Selection, faults: Faults, observe: Callable[[], list[Observation]]) -> Iterator[None]:
    """Name the object at fault, if reading a selection in this context fails or an observation is a fault."""
    try:
        yield
    except DtrainError:
        raise
    except MemoryError as error:
        key = selection.objects[0][1] if len(selection.objects) == 1 else ""
        raise faults.no_memory(selection.variable, selection.select, key) from error
    except Exception as error:
        faults.check(selection.variable, observe())
        raise _undecodable(selection, faults, error) from error
    faults.check(selection.variable, observe())


def _undecodable(selection: _Selection, faults: Faults, error: Exception) -> DtrainError:
    """Find the object that cannot be decoded by reading them one by one, with the reader that failed."""
    variable, readers = selection.variable, [selection.array]
    if selection.guard is not None:
        readers.insert(0, selection.guard)
    for place, key in selection.objects:
        whole = tuple(slice(i * size, (i + 1) * size) for i, size in zip(place, variable.objects, strict=True))
        try:
            for array in readers:
                with _panics_are_errors():
                    array[whole]
        except DtrainError:
            raise
        except MemoryError:
            return faults.no_memory(variable, selection.select, key)
        except Exception as cause:
            return faults.undecodable(variable, key, one_line(cause))
    return faults.unreliable(variable, selection.select, error)


def _check_inner_chunks(store: ReadStore, selection: _Selection, faults: Faults) -> None:
    """Raise if a shard that was read does not have all of its chunks."""
    variable, layout = selection.variable, selection.layout
    if layout is None or not faults.looks_for_missing(variable):
        return
    for part in shards_of(variable, selection.select):
        key = key_of(selection.array, part.place)
        index = store.index(key, layout)
        if index is not None:
            for inner in missing_chunks(part, index):
                faults.check_missing(variable, key, inner, inner=True)
        elif not store.is_absent(key):
            raise faults.undecodable(variable, key, DAMAGED_INDEX)


def _dense_parts(store: ReadStore, selection: _Selection) -> dict[str, tuple[int, int | None]]:
    """Return which part of each shard to read in one request: all of it, or a run of its inner chunks."""
    layout = selection.layout
    if layout is None:
        return {}
    parts: dict[str, tuple[int, int | None]] = {}
    for part in shards_of(selection.variable, selection.select):
        key = key_of(selection.array, part.place)
        if tuple(map(len, part.inside)) == layout.counts:
            continue  # zarr itself reads the whole shard at once
        if part.is_whole:
            parts[key] = (0, None)
        elif (index := store.index(key, layout)) is not None and (run := dense_run(index, part, MIN_DENSITY)):
            parts[key] = run
    return parts


# Opening ------------------------------------------------------------------------------------------------


@contextmanager
def best_settings(samples: Samples) -> Iterator[None]:
    """Set, for arrays opened in this context, that a newer zarr reads faster and reports missing chunks."""
    settings: dict[str, str | int] = {}
    if hasattr(codec_pipeline, "FusedCodecPipeline") and samples.store.is_local:
        settings["codec_pipeline.path"] = _one_thread_pipeline()
    if zarr.config.get("array.read_missing_chunks", None) is not None:  # zarr 3.2
        settings["array.read_missing_chunks"] = any(absence_of(samples, v) != "error" for v in samples.stored)
    with _OPENING, zarr.config.set(settings):
        yield


@cache
def _one_thread_pipeline() -> str:
    """Register a pipeline of zarr 3.3 that reads and decodes in one thread, and return its name.

    zarr looks up the number of its threads at each read, in a setting of the whole process. Units are read by threads
    of the loader; the requests and the processor time of further threads would count for nobody.
    """
    fused: Any = codec_pipeline.FusedCodecPipeline  # type: ignore[attr-defined]

    class OneThread(fused):  # type: ignore[misc]
        def read_sync(self, batch: Any, out: Any, drop_axes: tuple[int, ...] = (), max_workers: int = 1) -> Any:
            return super().read_sync(batch, out, drop_axes)

    register_pipeline(OneThread)
    return fully_qualified_name(OneThread)


def open_with_zarrs(
    path: str, arrays: Mapping[str, ArrayLike], threads: int
) -> tuple[dict[str, ArrayLike], dict[str, str]]:
    """Open arrays of a local store once more, to be read by zarrs.

    Parameters
    ----------
    path : str
        The directory of the store.
    arrays : mapping of str to zarr.Array
        By variable, as they have been opened.
    threads : int
        Threads that zarrs decodes with.

    Returns
    -------
    opened : dict of str to zarr.Array
    refused : dict of str to str
        By variable that zarrs does not read, the reason.
    """
    import zarrs  # noqa: F401  # it registers its pipeline

    store = LocalStore(path, read_only=True)
    settings = {
        "codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
        "codec_pipeline.strict": True,
        "threading.max_workers": threads,
    }
    opened: dict[str, ArrayLike] = {}
    refused: dict[str, str] = {}
    with _OPENING, zarr.config.set(settings):
        for name, array in arrays.items():
            try:
                of_zarrs = zarr.AsyncArray(metadata=array.metadata, store_path=StorePath(store, array.path))
            except Exception as error:  # its metadata say something that zarrs does not know
                refused[name] = one_line(error)
            else:
                opened[name] = zarr.Array(of_zarrs)
    return opened, refused
