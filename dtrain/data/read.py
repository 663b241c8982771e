"""Zarr -> units in memory: decoded by zarr or zarrs, and checked for what neither of them says."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core import codec_pipeline
from zarr.core.buffer import default_buffer_prototype

from dtrain.data.encoding import is_missing
from dtrain.data.presence import chunk_missing
from dtrain.data.samples import Samples, Select, Variable
from dtrain.data.store import (
    NO_CHUNK,
    array_in,
    ends_in_blosc,
    group_in,
    is_remote,
    is_short_blosc,
    open_store,
    selected_keys,
    shard_layout,
    touched,
)
from dtrain.errors import (
    ChunkUndecodable,
    DataChanged,
    DtrainError,
    InvalidConfig,
    NonFiniteData,
    OutOfMemory,
)

Array = npt.NDArray[Any]

MIN_DENSITY = 0.5
"""Inner chunks of a shard are read in one request if they make up this share of the bytes between them."""


class UnitReader:
    """Reads units of all variables, checks them, and counts what it reads. Several threads may share one.

    Parameters
    ----------
    samples : Samples
    reader : str
        ``auto``, ``zarr`` or ``zarrs``; the bits are the same.
    threads : int
        Threads that zarrs decodes with.
    """

    def __init__(self, samples: Samples, reader: str = "auto", threads: int = 1) -> None:
        self.samples = samples
        self.readers = choose_readers(samples, reader)
        self.store = open_store(samples.path, samples.config.storage_options)
        self._root = "" if is_remote(samples.path) else samples.path
        with _OPENING, zarr.config.set(_best_settings(samples)):
            group = group_in(self.store, samples.config.group)
            self._arrays: dict[str, Any] = {v.name: array_in(group, samples.path, v.name) for v in samples.variables}
        self._layouts = {name: shard_layout(array) for name, array in self._arrays.items()}
        self._blosc = {name: ends_in_blosc(array) for name, array in self._arrays.items()}
        for array in self._arrays.values():
            self.store.watch(array)
        self._fast: dict[str, Any] = {}
        if names := [name for name, (chosen, _) in self.readers.items() if chosen == "zarrs"]:
            self._fast, refused = _open_with_zarrs(samples, names, threads)
            for name, why in refused.items():
                if reader == "zarrs":
                    raise InvalidConfig(
                        f'data.reader = "zarrs" does not read {name}: {why}.', 'Set data.reader = "auto", or "zarr".'
                    )
                self.readers[name] = ("zarr", f"zarrs refuses it: {why}")
        self._seen: dict[str, tuple[int, int]] = {}
        self._lock, self._keeping = threading.Lock(), threading.Lock()
        self._kept: dict[str, Array] = {}
        self.units_decoded = 0
        self.bytes_decoded = 0

    def read(self, first: int, stop: int) -> dict[str, tuple[int, Array]]:
        """Return, by variable, the number of the first row, and the rows, that anchors in ``first:stop`` need.

        Raises
        ------
        ChunkMissing, ChunkUndecodable, NonFiniteData, DataChanged
            Names the array and the chunk.
        StoreForbidden, StoreUnavailable
            The server refuses or fails.
        """
        found = {}
        for variable in self.samples.moving:
            low, high = self.samples.reach(variable.name)
            found[variable.name] = np.empty((stop + high - first - low, *variable.row_shape), variable.kept_dtype)
        self.read_into(first, stop, found)
        return {name: (first + self.samples.reach(name)[0], values) for name, values in found.items()}

    def read_into(self, first: int, stop: int, out: Mapping[str, Array]) -> int:
        """Fill, by variable, the first rows of ``out[name]`` with what anchors in ``first:stop`` need.

        Returns the number of bytes.

        Parameters
        ----------
        first, stop : int
            Rows of the sample dimension.
        out : dict of array[rows, *row]
            C-contiguous, of the variable's `kept_dtype`; the first row becomes ``first + reach(name)[0]``.
        """
        decoded = 0
        for variable in self.samples.moving:
            low, high = self.samples.reach(variable.name)
            rows = out[variable.name][: stop + high - first - low]
            if variable in self.samples.kept_whole:
                start = first + low - self.samples.first_row
                rows[...] = self._whole(variable)[start : start + len(rows)]
                if self.samples.config.non_finite == "error":
                    self._check_finite(variable, first + low, rows)
            else:
                self._fill(variable, first + low, stop + high, rows)
                decoded += rows.nbytes
        with self._lock:
            self.units_decoded += 1
            self.bytes_decoded += decoded
        return decoded

    def _whole(self, variable: Variable) -> Array:
        """Return all rows of a variable that is kept whole; read when it is first asked for."""
        with self._keeping:
            if variable.name not in self._kept:
                samples = self.samples
                shape = (samples.num_samples - samples.first_row, *variable.row_shape)
                rows = np.empty(shape, variable.kept_dtype)
                self._fill(variable, samples.first_row, samples.num_samples, rows, finite=False)
                self._kept[variable.name] = rows
            return self._kept[variable.name]

    def read_rows(self, variable: Variable, start: int, stop: int) -> Array:
        """Return rows ``start:stop`` of one variable, as they are kept."""
        rows = np.empty((stop - start, *variable.row_shape), variable.kept_dtype)
        self._fill(variable, start, stop, rows)
        return rows

    @cached_property
    def statics(self) -> dict[str, Array]:
        """The variables without the sample dimension, read once."""
        found = {}
        for variable in self.samples.variables:
            if variable.is_static:
                found[variable.name] = np.empty(variable.row_shape, variable.kept_dtype)
                self._fill(variable, 0, 0, found[variable.name])
        return found

    def _fill(self, variable: Variable, start: int, stop: int, out: Array, *, finite: bool = True) -> None:
        array = self._fast.get(variable.name, self._arrays[variable.name])
        select = variable.selection(start, stop)
        keys = list(selected_keys(array, variable.objects, select))
        fast = variable.name in self._fast
        # a variable that is kept whole is read with the rows that "skip" leaves out
        strict = self.samples.config.missing == "error" or (self.samples.config.missing == "skip" and finite)
        if fast:
            self._look_at_files(variable, keys)
        try:
            with self.store.holding({} if fast else self._parts(variable, select)):
                self._decode(array, variable, select, out)
        except DtrainError:
            raise
        except MemoryError as error:
            raise OutOfMemory(
                f"{self.samples.path}: no memory for {variable.name}[{start}:{stop}].",
                "Give the workers more memory (cluster.memory), or store smaller chunks.",
            ) from error
        except Exception as error:
            self._check_objects(variable, keys, strict)
            raise self._undecodable(variable, select, error) from error
        self._check_objects(variable, keys, strict)
        if strict:
            self._check_inner_chunks(variable, select)
        if finite and self.samples.config.non_finite == "error":
            self._check_finite(variable, start, out)

    def _decode(self, array: Any, variable: Variable, select: Select, out: Array) -> None:
        key = tuple(slice(*part) for part in select)
        lengths = tuple(len(range(*part)) for part in select)  # with the dropped dimensions, of one place each
        if variable.sample_axis <= 0 and np.dtype(variable.dtype) == out.dtype and out.size:
            target = default_buffer_prototype().nd_buffer.from_numpy_array(out.reshape(lengths))
            array.get_basic_selection(key, out=target)
            return
        values = np.asarray(array[key]).reshape(lengths)
        if variable.sample_axis > 0:
            values = np.moveaxis(values, variable.sample_axis, 0)
        with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32 becomes infinite, and is then found
            out[...] = values.reshape(out.shape)

    # Faults of stored objects -------------------------------------------------------------------------------

    def _parts(self, variable: Variable, select: Select) -> dict[str, tuple[int, int | None]]:
        """Return which part of each shard to read in one request: all of it, or a run of its inner chunks."""
        layout = self._layouts[variable.name]
        if layout is None:
            return {}
        found: dict[str, tuple[int, int | None]] = {}
        for _, key, chunks, there in self._shards(variable, select):
            if all(len(inner) == count for inner, count in zip(chunks, layout.counts, strict=True)):
                continue  # Zarr itself reads the whole shard at once
            if all(len(inner) == count for inner, count in zip(chunks, there, strict=True)):
                found[key] = (0, None)
                continue
            index = self.store.index(key, layout)
            if index is None:
                continue
            wanted = index[np.ix_(*chunks)].reshape(-1, 2)
            wanted = wanted[wanted[:, 0] != NO_CHUNK].astype(np.int64)
            if len(wanted) > 1:
                begin, end = int(wanted[:, 0].min()), int(wanted.sum(axis=1).max())
                if wanted[:, 1].sum() >= MIN_DENSITY * (end - begin):
                    found[key] = (begin, end)
        return found

    def _shards(
        self, variable: Variable, select: Select
    ) -> Iterator[tuple[tuple[int, ...], str, tuple[list[int], ...], tuple[int, ...]]]:
        """Yield, for each shard of a selection, place, key, inner chunks touched, and how many lie in the array."""
        array = self._arrays[variable.name]
        layout = self._layouts[variable.name]
        assert layout is not None
        inner = touched(variable.chunks, select)
        shards = touched(variable.objects, select)
        total = [-(-n // size) for n, size in zip(variable.shape, variable.chunks, strict=True)]
        by_shard = [
            {s: [c - s * count for c in chunks if c // count == s] for s in along}
            for along, chunks, count in zip(shards, inner, layout.counts, strict=True)
        ]
        for index, key in zip(itertools.product(*shards), selected_keys(array, variable.objects, select), strict=True):
            chunks = tuple(by_shard[axis][s] for axis, s in enumerate(index))
            there = tuple(
                min(count, total[axis] - s * count)
                for axis, (s, count) in enumerate(zip(index, layout.counts, strict=True))
            )
            yield index, key, chunks, there

    def _look_at_files(self, variable: Variable, keys: list[str]) -> None:
        """Note what is absent or cut short, for a reader that does not read through the store."""
        for key in keys:
            path = os.path.join(self._root, key)
            try:
                size = os.stat(path).st_size
            except OSError:
                self.store.absent.add(key)
                continue
            self.store.absent.discard(key)
            self.store.short.discard(key)
            if size == 0 and variable.objects != variable.chunks:
                self.store.short.add(key)
            elif self._blosc[variable.name]:
                with open(path, "rb") as file:
                    if is_short_blosc(file.read(16), size):
                        self.store.short.add(key)

    def _check_objects(self, variable: Variable, keys: list[str], strict: bool) -> None:
        """Raise what has been noted of these objects while they were read."""
        absent = [key for key in keys if key in self.store.absent]
        short = [key for key in keys if key in self.store.short]
        if short:
            raise self._chunk_undecodable(variable, short[0], "the file is cut short")
        if absent and strict:
            raise chunk_missing(self.samples.path, variable, absent[0])
        if self._root:
            self._check_unchanged(variable, keys)

    def _check_inner_chunks(self, variable: Variable, select: Select) -> None:
        """Raise if a shard that was read does not have all of its chunks."""
        layout = self._layouts[variable.name]
        if layout is None:
            return
        for place, key, chunks, _ in self._shards(variable, select):
            index = self.store.index(key, layout)
            if index is None:
                raise chunk_missing(self.samples.path, variable, key)
            gone = np.argwhere(index[np.ix_(*chunks)][..., 0] == NO_CHUNK)
            if len(gone):
                inside = tuple(along[i] for along, i in zip(chunks, gone[0].tolist(), strict=True))
                inner = tuple(p * n + i for p, n, i in zip(place, layout.counts, inside, strict=True))
                raise chunk_missing(self.samples.path, variable, key, inner=inner)

    def _check_unchanged(self, variable: Variable, keys: list[str]) -> None:
        """Compare the files with what they were when they were first read."""
        for key in keys:
            try:
                found = os.stat(os.path.join(self._root, key))
                now = (found.st_size, found.st_mtime_ns)
            except OSError:
                now = (-1, -1)
            if self._seen.setdefault(key, now) != now:
                raise DataChanged(
                    f"{self.samples.path}: chunk {key} of {variable.name} has been written again since it was read.",
                    "Train on data that nobody writes to; start a new run (--run NAME) for the data as they are now.",
                )

    def _undecodable(self, variable: Variable, select: Select, error: Exception) -> ChunkUndecodable:
        """Find the object that cannot be decoded by reading them one by one, with the reader that failed."""
        array = self._fast.get(variable.name, self._arrays[variable.name])
        keys = selected_keys(array, variable.objects, select)
        for index, key in zip(itertools.product(*touched(variable.objects, select)), keys, strict=True):
            corners = [i * size for i, size in zip(index, variable.objects, strict=True)]
            try:
                array[tuple(slice(c, c + size) for c, size in zip(corners, variable.objects, strict=True))]
            except DtrainError:
                raise
            except Exception as cause:
                return self._chunk_undecodable(variable, key, _one_line(cause))
        rows = "" if variable.is_static else "[{}:{}]".format(*select[variable.sample_axis][:2])
        return ChunkUndecodable(
            f"{self.samples.path}: {variable.name}{rows} could not be read: {_one_line(error)}",
            "Reading it again worked: the storage is unreliable. Run the same command again to continue.",
        )

    def _chunk_undecodable(self, variable: Variable, key: str, reason: str) -> ChunkUndecodable:
        return ChunkUndecodable(
            f"{self.samples.path}: chunk {key} of {variable.name} cannot be decoded: {reason}",
            "Restore it from a copy of the store.",
        )

    def _check_finite(self, variable: Variable, start: int, values: Array) -> None:
        """Raise if a value is not finite, as the model sees it: a large float64 is infinite in float32."""
        if values.dtype.kind == "f":
            with np.errstate(all="ignore"):
                # one pass that writes nothing: the sum is only finite if all values are
                if np.isfinite(np.add.reduce(values, axis=None, dtype=np.float32)):
                    bad = None
                else:
                    bad = ~np.isfinite(values.astype(np.float32, copy=False))
            if variable.encoding is not None and variable.encoding.missing:
                marked = is_missing(values, variable.encoding)
                bad = marked if bad is None else bad | marked
        elif variable.encoding is not None and variable.encoding.missing:
            view = values.view(variable.encoding.unsigned) if variable.encoding.unsigned else values
            bad = is_missing(view, variable.encoding)
        else:
            return
        if bad is not None and bad.any():
            raise self._non_finite(variable, start, np.argwhere(bad)[0].tolist())

    def _non_finite(self, variable: Variable, start: int, place: list[int]) -> NonFiniteData:
        where = [part[0] for part in variable.select]
        axes = list(variable.row_axes) if variable.is_static else [variable.sample_axis, *variable.row_axes]
        for axis, index in zip(axes, place, strict=True):
            where[axis] = start + index if axis == variable.sample_axis else range(*variable.select[axis])[index]
        chunk = tuple(i // size for i, size in zip(where, variable.objects, strict=True))
        array = self._arrays[variable.name]
        value = array[tuple(where)]  # as stored: in memory it may be a float32
        key = (f"{array.path}/" if array.path else "") + array.metadata.encode_chunk_key(chunk)
        marked = variable.encoding is not None and self._is_marked(variable, np.asarray(value))
        stored = f"{value}, which float32 cannot hold" if np.isfinite(value) and not marked else f"{value}"
        return NonFiniteData(
            f"{self.samples.path}: {variable.name}{where} in chunk {key} is {stored}"
            f"{', which marks a missing value' if marked else ''}.",
            'Repair or mask the data, or set data.non_finite = "allow".',
        )

    def _is_marked(self, variable: Variable, value: Array) -> bool:
        assert variable.encoding is not None
        if variable.encoding.unsigned:
            value = value.view(variable.encoding.unsigned)
        return bool(is_missing(value, variable.encoding))


def choose_readers(samples: Samples, wanted: str) -> dict[str, tuple[str, str]]:
    """Return, by variable, the reader and why it is taken.

    Raises
    ------
    InvalidConfig
        zarrs is asked for, but not installed, or does not read a variable.
    """
    reason = _no_zarrs(samples)
    found: dict[str, tuple[str, str]] = {}
    for v in samples.variables:
        steps = any(step != 1 for _, _, step in v.select)
        why = (
            reason
            or v.only_zarr
            or ("it is read with a step" if steps else "")
            or ("it is small" if v.is_static else "")
        )
        if wanted == "zarrs" and why and not v.is_static:
            raise InvalidConfig(
                f'data.reader = "zarrs" does not read {v.name}: {why}.', 'Set data.reader = "auto", or "zarr".'
            )
        if wanted == "zarr" or why:
            found[v.name] = ("zarr", why or "asked for")
        else:
            found[v.name] = (
                "zarrs",
                "asked for" if wanted == "zarrs" else "the store is local and zarrs knows its codecs",
            )
    return found


def _no_zarrs(samples: Samples) -> str:
    if is_remote(samples.path):
        return "the store is remote"
    try:
        import zarrs  # noqa: F401
    except ImportError:
        return "zarrs is not installed"
    return ""


_OPENING = threading.Lock()  # zarr's configuration belongs to the whole process


def _best_settings(samples: Samples) -> dict[str, Any]:
    """Return the settings with which a newer zarr reads faster, and says what is missing."""
    found: dict[str, Any] = {}
    if hasattr(codec_pipeline, "FusedCodecPipeline") and not is_remote(samples.path):
        # zarr 3.3: decodes in the thread that asks; the loader has threads of its own
        found["codec_pipeline.path"] = "zarr.core.codec_pipeline.FusedCodecPipeline"
        found["codec_pipeline.max_workers"] = 1
    if zarr.config.get("array.read_missing_chunks", None) is not None:  # zarr 3.2
        found["array.read_missing_chunks"] = samples.config.missing != "error"
    return found


def _open_with_zarrs(samples: Samples, names: list[str], threads: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the arrays that zarrs reads, and why it does not read the others."""
    settings = {
        "codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
        "codec_pipeline.strict": True,
        "threading.max_workers": threads,
    }
    with _OPENING, zarr.config.set(settings):
        group = zarr.open_group(samples.path, path=samples.config.group or None, mode="r")
        found, refused = {}, {}
        for name in names:
            try:
                found[name] = group[name]
            except Exception as error:  # its metadata say something that zarrs does not know
                refused[name] = _one_line(error)
        return found, refused


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
