"""Zarr -> units in memory: decoded by numcodecs, zarrs or zarr, and checked for what none of them says."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core import codec_pipeline
from zarr.core.buffer import default_buffer_prototype

from dtrain.data.encoding import is_missing
from dtrain.data.plan.units import Box, box_selection, box_shape, box_slices
from dtrain.data.read.decode import Chunk, Decoder, Undecodable, chunks_of, entry_of, runs_of
from dtrain.data.read.presence import chunk_missing
from dtrain.data.read.store import (
    NO_CHUNK,
    ShardLayout,
    Version,
    any_group,
    array_in,
    ends_in_blosc,
    group_in,
    is_remote,
    is_short_blosc,
    open_store,
    selected_keys,
    shard_layout,
    shards_of,
    touched,
)
from dtrain.data.samples import WHOLE_OBJECT_BYTES, Samples, Select, Variable
from dtrain.errors import (
    ChunkUndecodable,
    DataChanged,
    DtrainError,
    InvalidConfig,
    NonFiniteData,
    OutOfMemory,
    one_line,
)

Array = npt.NDArray[Any]

MANY_CHUNKS, SMALL_CHUNK_BYTES = 256, 32 << 10
"""Shards of so many chunks, each smaller than this, are decoded faster by zarrs: a call from Python costs 15 us."""
MIN_DENSITY = 0.5
"""Inner chunks of a shard are read in one request if they make up this share of the bytes between them."""


class UnitReader:
    """Reads units of all variables, checks them, and counts what it reads. Several threads may share one.

    Parameters
    ----------
    samples : Samples
    reader : str
        ``auto``, ``numcodecs``, ``zarrs`` or ``zarr``; the bits are the same.
    threads : int
        Threads that zarrs decodes with.
    absent : tuple of (int, int)
        Runs of rows that nobody needs (`DataPlan.absent`): chunks that are missing there are no fault.
    """

    def __init__(
        self, samples: Samples, reader: str = "auto", threads: int = 1, absent: tuple[tuple[int, int], ...] = ()
    ) -> None:
        self.samples = samples
        self.absent = absent
        self.readers = choose_readers(samples, reader)
        self.store = open_store(samples.path, samples.config.storage_options)
        with _OPENING, zarr.config.set(_best_settings(samples)):
            group = group_in(self.store, samples.config.group)
            self._arrays: dict[str, Any] = {v.name: array_in(group, samples.path, v.name) for v in samples.variables}
        self._layouts = {name: shard_layout(array) for name, array in self._arrays.items()}
        self._blosc = {name: ends_in_blosc(array) for name, array in self._arrays.items()}
        for array in self._arrays.values():
            self.store.watch(array)
        self._decoders = {
            name: Decoder(self._arrays[name]) for name, (chosen, _) in self.readers.items() if chosen == "numcodecs"
        }
        self._rooms = threading.local()
        self._fast: dict[str, Any] = {}
        if names := [name for name, (chosen, _) in self.readers.items() if chosen == "zarrs"]:
            self._fast, refused = _open_with_zarrs(samples, names, threads)
            for name, why in refused.items():
                if reader == "zarrs":
                    raise InvalidConfig(
                        f'data.reader = "zarrs" does not read {name}: {why}.', 'Set data.reader = "auto", or "zarr".'
                    )
                self.readers[name] = ("zarr", f"zarrs refuses it: {why}")
        self._seen = {v.name: np.zeros(v.grid, np.uint64) for v in samples.variables}
        self._lock, self._keeping = threading.Lock(), threading.Lock()
        self._kept: dict[str, Array] = {}
        self.units_decoded = 0
        self.bytes_decoded = 0

    def read(self, box: Box) -> dict[str, tuple[int, Array]]:
        """Return, by variable, the number of the first row, and the rows, that the anchors of a box need.

        Raises
        ------
        ChunkMissing, ChunkUndecodable, NonFiniteData, DataChanged
            Names the array and the chunk.
        StoreForbidden, StoreUnavailable
            The server refuses or fails.
        """
        found = {v.name: np.empty(box_shape(self.samples, v, box), v.kept_dtype) for v in self.samples.moving}
        self.read_into(box, found)
        return {name: (box.start + self.samples.reach(name)[0], values) for name, values in found.items()}

    def read_into(self, box: Box, out: Mapping[str, Array]) -> int:
        """Fill, by variable, the first rows of ``out[name]`` with what the anchors of a box need.

        Returns the number of bytes.

        Parameters
        ----------
        box : Box
        out : dict of array[rows, *row]
            C-contiguous, of the variable's `kept_dtype`; the first row becomes ``box.start + reach(name)[0]``.
        """
        decoded = 0
        for variable in self.samples.moving:
            select = box_selection(self.samples, variable, box)
            start, stop, _ = select[variable.sample_axis]
            rows = out[variable.name][: stop - start]
            if variable in self.samples.kept_whole:
                first = start - self.samples.first_row
                rows[...] = self._whole(variable)[(slice(first, first + len(rows)), *box_slices(variable, box))]
                if self.samples.config.non_finite == "error":
                    self._check_finite(variable, select, rows)
            else:
                self._fill(variable, select, rows)
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
                self._fill(variable, variable.selection(samples.first_row, samples.num_samples), rows, check=False)
                self._kept[variable.name] = rows
            return self._kept[variable.name]

    def read_rows(self, variable: Variable, start: int, stop: int) -> Array:
        """Return rows ``start:stop`` of one variable, as they are kept."""
        rows = np.empty((stop - start, *variable.row_shape), variable.kept_dtype)
        self._fill(variable, variable.selection(start, stop), rows)
        return rows

    @cached_property
    def statics(self) -> dict[str, Array]:
        """The variables without the sample dimension, read once."""
        found = {}
        for variable in self.samples.variables:
            if variable.is_static:
                found[variable.name] = np.empty(variable.row_shape, variable.kept_dtype)
                self._fill(variable, variable.select, found[variable.name])
        return found

    def _fill(self, variable: Variable, select: Select, out: Array, *, check: bool = True) -> None:
        try:
            if variable.name in self._decoders:
                self._read_files(variable, select, out)
            else:
                self._ask_zarr(variable, select, out)
        except DtrainError:
            raise
        except MemoryError as error:
            raise OutOfMemory(
                f"{self.samples.path}: no memory for {variable.name}{_said_rows(variable, select)}.",
                "Give the workers more memory (cluster.memory), or store smaller chunks.",
            ) from error
        if check and self.samples.config.non_finite == "error":
            self._check_finite(variable, select, out)

    # By numcodecs -------------------------------------------------------------------------------------------

    def _read_files(self, variable: Variable, select: Select, out: Array) -> None:
        """Read the chunks of a local store one by one."""
        target = _as_stored(variable, select, out)
        if self._layouts[variable.name] is not None:
            self._read_shards(variable, select, target)
            return
        for chunk in chunks_of(variable.chunks, select):
            key = self._key(variable, chunk.place)
            stored, version = self._read_file(variable, key)
            if stored is None:
                self._check_absent(variable, key, chunk.place)
            self._decode_chunk(variable, key, stored, chunk, target)
            self._check_version(variable, key, chunk.place, version)

    def _read_shards(self, variable: Variable, select: Select, target: Array) -> None:
        layout = self._layouts[variable.name]
        assert layout is not None
        by_place = {chunk.place: chunk for chunk in chunks_of(variable.chunks, select)}
        for shard in shards_of(self._arrays[variable.name], layout, select):
            key, corner = self._key(variable, shard.place), shard.corner
            chunks = [by_place[place] for place in shard.chunks() if place in by_place]
            if not chunks:
                continue
            whole, version = self._read_file(variable, key) if shard.everything else (None, self.store.version(key))
            index = self._index_of(variable, key, layout) if whole is None else self.store.index_in(key, layout, whole)
            if index is None:
                if self.store.version(key) is not None:
                    raise self._chunk_undecodable(variable, key, "its index is cut short or damaged")
                self._check_absent(variable, key, shard.place)
                for chunk in chunks:
                    self._decode_chunk(variable, key, None, chunk, target)
                self._check_version(variable, key, shard.place, None)
                continue
            stored = []
            for chunk in chunks:
                if entry_of(index, chunk, corner)[0] != NO_CHUNK:
                    stored.append(chunk)
                    continue
                self._check_absent(variable, key, chunk.place, inner=True)
                self._decode_chunk(variable, key, None, chunk, target)
            runs = [(0, 0, stored)] if whole is not None else runs_of(index, stored, corner, MIN_DENSITY)
            for begin, end, among in runs:
                part = whole
                if part is None:
                    part, version = self._read_file(variable, key, begin, end)
                if part is None:
                    raise chunk_missing(self.samples.path, variable, key)
                for chunk in among:
                    start, length = entry_of(index, chunk, corner)
                    if start + length - begin > len(part):
                        raise self._chunk_undecodable(variable, key, "the file is cut short")
                    self._decode_chunk(variable, key, part[start - begin :][:length], chunk, target)
            self._check_version(variable, key, shard.place, version)

    def _decode_chunk(
        self, variable: Variable, key: str, stored: memoryview | None, chunk: Chunk, target: Array
    ) -> None:
        decoder = self._decoders[variable.name]
        if stored is None:
            with np.errstate(over="ignore", invalid="ignore"):
                target[chunk.where] = decoder.fill
            return
        try:
            decoder.decode(stored, chunk, target, self._room("decoded"))
        except Undecodable as error:
            raise self._chunk_undecodable(variable, key, str(error)) from error

    def _read_file(
        self, variable: Variable, key: str, start: int = 0, stop: int | None = None
    ) -> tuple[memoryview | None, Version | None]:
        try:
            return self.store.read_file(key, self._room("stored"), start, stop) or (None, None)
        except OverflowError as error:  # a place in a shard that no file reaches
            raise self._chunk_undecodable(variable, key, "the file is cut short") from error
        except OSError as error:
            raise self._unreadable(variable, key, error) from error

    def _index_of(self, variable: Variable, key: str, layout: ShardLayout) -> npt.NDArray[np.uint64] | None:
        try:
            return self.store.index(key, layout)
        except OSError as error:
            raise self._unreadable(variable, key, error) from error

    def _unreadable(self, variable: Variable, key: str, error: OSError) -> ChunkUndecodable:
        return self._chunk_undecodable(variable, key, f"it cannot be read: {error.strerror}")

    def _key(self, variable: Variable, place: tuple[int, ...]) -> str:
        array = self._arrays[variable.name]
        return (f"{array.path}/" if array.path else "") + str(array.metadata.encode_chunk_key(place))

    def _room(self, what: str) -> Callable[[int], memoryview]:
        """Return what gives memory of the thread that asks: the same again each time."""

        def room(size: int) -> memoryview:
            memory: bytearray = getattr(self._rooms, what, bytearray())
            if len(memory) < size:
                memory = bytearray(size)
                setattr(self._rooms, what, memory)
            return memoryview(memory)[:size]

        return room

    # By zarr or zarrs ---------------------------------------------------------------------------------------

    def _ask_zarr(self, variable: Variable, select: Select, out: Array) -> None:
        array = self._fast.get(variable.name, self._arrays[variable.name])
        keys = list(selected_keys(array, variable.objects, select))
        fast = variable.name in self._fast
        if fast:
            self._look_at_files(variable, keys)
        try:
            with self.store.holding({} if fast else self._parts(variable, select)):
                self._decode(array, variable, select, out)
        except (DtrainError, MemoryError):
            raise
        except Exception as error:
            self._check_objects(variable, select)
            raise self._undecodable(variable, select, error) from error
        self._check_objects(variable, select)
        self._check_inner_chunks(variable, select)

    def _decode(self, array: Any, variable: Variable, select: Select, out: Array) -> None:
        key = tuple(slice(*part) for part in select)
        lengths = tuple(len(range(*part)) for part in select)  # with the dropped dimensions, of one place each
        if variable.sample_axis <= 0 and np.dtype(variable.dtype) == out.dtype and out.size:
            target = default_buffer_prototype().nd_buffer.from_numpy_array(out.reshape(lengths))
            array.get_basic_selection(key, out=target)
            return
        values = np.asarray(array[key]).reshape(lengths)
        with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32 becomes infinite, and is then found
            _as_stored(variable, select, out)[...] = values

    # Faults of stored objects -------------------------------------------------------------------------------

    def _parts(self, variable: Variable, select: Select) -> dict[str, tuple[int, int | None]]:
        """Return which part of each shard to read in one request: all of it, or a run of its inner chunks."""
        layout = self._layouts[variable.name]
        if layout is None:
            return {}
        found: dict[str, tuple[int, int | None]] = {}
        for shard in shards_of(self._arrays[variable.name], layout, select):
            key = self._key(variable, shard.place)
            if tuple(map(len, shard.inside)) == layout.counts:
                continue  # Zarr itself reads the whole shard at once
            if shard.everything:
                found[key] = (0, None)
                continue
            index = self.store.index(key, layout)
            if index is None:
                continue
            wanted = index[np.ix_(*shard.inside)].reshape(-1, 2)
            wanted = wanted[wanted[:, 0] != NO_CHUNK].astype(np.int64)
            if len(wanted) > 1:
                begin, end = int(wanted[:, 0].min()), int(wanted.sum(axis=1).max())
                if wanted[:, 1].sum() >= MIN_DENSITY * (end - begin):
                    found[key] = (begin, end)
        return found

    def _look_at_files(self, variable: Variable, keys: list[str]) -> None:
        """Note what is absent or cut short, for a reader that does not read through the store."""
        for key in keys:
            version = self.store.version(key)
            if version is None:
                self.store.absent.add(key)
                continue
            size, _ = version
            self.store.absent.discard(key)
            self.store.short.discard(key)
            if size == 0 and variable.objects != variable.chunks:
                self.store.short.add(key)
            elif self._blosc[variable.name]:
                with open(os.path.join(self.store.root, key), "rb") as file:
                    if is_short_blosc(file.read(16), size):
                        self.store.short.add(key)

    def _check_objects(self, variable: Variable, select: Select) -> None:
        """Raise what has been noted of these objects while they were read."""
        array = self._arrays[variable.name]
        places = list(itertools.product(*touched(variable.objects, select)))
        keys = list(selected_keys(array, variable.objects, select))
        for key in keys:
            if key in self.store.short:
                raise self._chunk_undecodable(variable, key, "the file is cut short")
        for place, key in zip(places, keys, strict=True):
            if key in self.store.absent:
                self._check_absent(variable, key, place)
        for place, key in zip(places, keys, strict=True) if self.store.root else ():
            self._check_version(variable, key, place, self.store.version(key))

    def _check_inner_chunks(self, variable: Variable, select: Select) -> None:
        """Raise if a shard that was read does not have all of its chunks."""
        layout = self._layouts[variable.name]
        if layout is None or self.samples.config.missing == "fill":
            return
        for shard in shards_of(self._arrays[variable.name], layout, select):
            key = self._key(variable, shard.place)
            index = self.store.index(key, layout)
            if index is None:
                if key not in self.store.absent:
                    raise self._chunk_undecodable(variable, key, "its index is cut short or damaged")
                continue
            for inner in shard.missing(index):
                self._check_absent(variable, key, inner, inner=True)

    def _check_absent(self, variable: Variable, key: str, place: tuple[int, ...], *, inner: bool = False) -> None:
        """Raise for a chunk that is not there, unless the fill value may stand for it, or nobody needs its rows."""
        missing = self.samples.config.missing
        if missing == "fill":
            return
        if missing == "skip" and not variable.is_static:
            rows = variable.chunk_rows if inner else variable.object_rows
            first = place[variable.sample_axis] * rows
            after = min(first + rows, self.samples.num_samples)
            if any(start <= first and after <= stop for start, stop in self.absent):
                return
        raise chunk_missing(self.samples.path, variable, key, inner=place if inner else None)

    def _check_version(self, variable: Variable, key: str, place: tuple[int, ...], now: Version | None) -> None:
        """Compare a file with what it was when it was first read: of that 8 bytes are kept, as files may be many."""
        mark = (hash(now) | 1) & (2**64 - 1)
        seen = self._seen[variable.name]
        if not seen[place]:
            seen[place] = mark
        if seen[place] != mark:
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
                return self._chunk_undecodable(variable, key, one_line(cause))
        return ChunkUndecodable(
            f"{self.samples.path}: {variable.name}{_said_rows(variable, select)} could not be read: {one_line(error)}",
            "Reading it again worked: the storage is unreliable. Run the same command again to continue.",
        )

    def _chunk_undecodable(self, variable: Variable, key: str, reason: str) -> ChunkUndecodable:
        return ChunkUndecodable(
            f"{self.samples.path}: chunk {key} of {variable.name} cannot be decoded: {reason}",
            "Restore it from a copy of the store.",
        )

    def _check_finite(self, variable: Variable, select: Select, values: Array) -> None:
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
        if bad is not None and not variable.is_static:
            start = select[variable.sample_axis][0]
            for first, after in self.absent:
                bad[max(0, first - start) : max(0, after - start)] = False
        if bad is not None and bad.any():
            raise self._non_finite(variable, select, np.argwhere(bad)[0].tolist())

    def _non_finite(self, variable: Variable, select: Select, place: list[int]) -> NonFiniteData:
        where = [part[0] for part in select]
        axes = list(variable.row_axes) if variable.is_static else [variable.sample_axis, *variable.row_axes]
        for axis, index in zip(axes, place, strict=True):
            where[axis] = range(*select[axis])[index]
        chunk = tuple(i // size for i, size in zip(where, variable.objects, strict=True))
        array = self._arrays[variable.name]
        value = array[tuple(where)]  # as stored: in memory it may be a float32
        key = self._key(variable, chunk)
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
    found: dict[str, tuple[str, str]] = {}
    for v in samples.variables:
        why = _why_not(samples, v)
        if why.get(wanted) and not v.is_static:
            raise InvalidConfig(
                f'data.reader = "{wanted}" does not read {v.name}: {why[wanted]}.', 'Set data.reader = "auto".'
            )
        if wanted == "zarr" or why.get(wanted):
            found[v.name] = ("zarr", why.get(wanted) or "asked for")
        elif wanted != "auto":
            found[v.name] = (wanted, "asked for")
        elif not why["numcodecs"] and (why["zarrs"] or not has_fine_shards(v)):
            found[v.name] = ("numcodecs", "the store is local and its codecs are the usual ones")
        elif not why["zarrs"]:
            found[v.name] = ("zarrs", why["numcodecs"] or "its shards hold many small chunks")
        else:
            found[v.name] = ("zarr", why["numcodecs"])
    return found


def has_fine_shards(variable: Variable) -> bool:
    """Whether there is a shard of so many small chunks that zarrs is the better reader."""
    chunks = math.prod(variable.objects) // math.prod(variable.chunks)
    whole = variable.chunk_bytes * chunks <= WHOLE_OBJECT_BYTES  # of larger shards, parts are read
    return whole and chunks >= MANY_CHUNKS and variable.chunk_bytes < SMALL_CHUNK_BYTES


def _why_not(samples: Samples, variable: Variable) -> dict[str, str]:
    """Return, by reader, why it does not read a variable."""
    remote = "the store is remote" if is_remote(samples.path) else ""
    steps = "it is read with a step" if any(step != 1 for _, _, step in variable.select) else ""
    small = "it is small" if variable.is_static else ""
    return {
        "numcodecs": remote or variable.not_numcodecs,
        "zarrs": remote or _no_zarrs() or variable.not_zarrs or steps or small,
    }


def _no_zarrs() -> str:
    try:
        import zarrs  # noqa: F401
    except ImportError:
        return "zarrs is not installed"
    return ""


def _said_rows(variable: Variable, select: Select) -> str:
    return "" if variable.is_static else "[{}:{}]".format(*select[variable.sample_axis][:2])


_OPENING = threading.Lock()  # zarr's configuration belongs to the whole process


def _as_stored(variable: Variable, select: Select, out: Array) -> Array:
    """Return a view of rows with the axes of the array: the samples' where they are stored, and the dropped ones."""
    lengths = [len(range(*part)) for part in select]
    if variable.sample_axis <= 0:
        return out.reshape(lengths)
    axis = variable.sample_axis
    return np.moveaxis(out.reshape(lengths[axis], *lengths[:axis], *lengths[axis + 1 :]), 0, axis)


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
        group = any_group(samples.path, samples.config.group)
        found, refused = {}, {}
        for name in names:
            try:
                found[name] = group[name]
            except Exception as error:  # its metadata say something that zarrs does not know
                refused[name] = one_line(error)
        return found, refused
