"""Choose places of dimensions by coordinate (``data.sel``): the same selection as by index (``data.isel``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from dtrain.config.schema import DataConfig
from dtrain.config.slices import LabelSlice
from dtrain.data.column import ColumnReader, describe_column, find_coordinate
from dtrain.data.dataset import NamedArray, sizes_of
from dtrain.data.places import CoordinateIndex, Places
from dtrain.data.read.store import ReadStore
from dtrain.data.samples import Chosen, Samples
from dtrain.data.selection import Selected
from dtrain.errors import InvalidConfig, NothingSelected, did_you_mean


def choose_dims(
    config: DataConfig, store: ReadStore, arrays: Mapping[str, NamedArray], sample_dim: str
) -> tuple[Selected, tuple[Chosen, ...]]:
    """Resolve ``data.sel``: the coordinates that it names are read.

    Parameters
    ----------
    config : DataConfig
    store : ReadStore
    arrays : mapping of str to NamedArray
        By variable.
    sample_dim : str

    Raises
    ------
    InvalidConfig
        There is no such dimension, coordinate or value, nothing is selected, or no equal intervals.
    ChunkMissing, ChunkUndecodable
        Names the chunk of the coordinate.
    """
    chosen = tuple(_choose(config, store, arrays, dim, is_samples=dim == sample_dim) for dim in config.sel)
    return {one.dim: ((one.start, one.stop, one.step), one.is_dropped) for one in chosen}, chosen


def _choose(
    config: DataConfig, store: ReadStore, arrays: Mapping[str, NamedArray], dim: str, *, is_samples: bool
) -> Chosen:
    key, wanted = f"data.sel.{dim}", config.sel[dim]
    sizes = sizes_of(arrays)
    if dim not in sizes:
        raise InvalidConfig(
            f"{key}: no such dimension{did_you_mean(dim, sizes)}", f"Dimensions are {', '.join(sizes)}."
        )
    index = _index(config, store, [name for name, named in arrays.items() if dim in named.dims], dim, sizes[dim])
    is_dropped, step = False, 1
    if isinstance(wanted, tuple):
        start, stop, step = _listed(index, key, wanted)
    else:
        places = _range(index, key, wanted, is_samples=is_samples)
        start, stop, is_dropped = places.start, places.stop, places.is_one
        step = wanted.step if isinstance(wanted, LabelSlice) else 1
    if is_samples and (is_dropped or step != 1):
        raise InvalidConfig(
            f"{key} chooses {'a single place' if is_dropped else 'places apart'}: {dim} is the dimension of the "
            "samples, of which a run of rows is needed.",
            f"Give a start and a stop, {key} = {{ start = ..., stop = ... }}; data.stride takes every n-th row.",
        )
    first, last = index.texts(start, range(start, stop, step)[-1])
    return Chosen(
        dim=dim, first=first, last=last, start=start, stop=stop, step=step, of=sizes[dim], is_dropped=is_dropped
    )


def _range(index: CoordinateIndex, key: str, wanted: str | float | LabelSlice, *, is_samples: bool) -> Places:
    """Return the chosen places; of several stores, one without such rows is left out, and no other place may lack."""
    try:
        return index.range(key, wanted)
    except NothingSelected as error:
        if is_samples:
            raise
        raise InvalidConfig(error.message, error.hint) from None


def _index(config: DataConfig, store: ReadStore, names: Sequence[str], dim: str, size: int) -> CoordinateIndex:
    found = find_coordinate(store, config.group, names, dim, size)
    if not isinstance(found, str) and found[1].categories is not None:
        found = f"{found[0]} holds codes of categories"
    column = found if isinstance(found, str) else describe_column(store.path, *found)
    if isinstance(column, str):
        raise InvalidConfig(f"data.sel.{dim}: {store.path}: {column}.", f"Choose by index: data.isel.{dim}.")
    base = Samples(
        path=store.path, config=config, sample_dim=dim, num_samples=size, variables=(), store=store.facts
    )  # of the coordinate alone
    return CoordinateIndex(ColumnReader(base, column, 0, size), store.path, dim)


def _listed(index: CoordinateIndex, key: str, wanted: Sequence[str | float]) -> tuple[int, int, int]:
    """Return the slice that selects several values: start, stop and step."""
    places = [index.range(key, value) for value in wanted]
    starts = [place.start for place in places if place.stop - place.start == 1]
    step = starts[1] - starts[0] if len(starts) > 1 else 1
    if len(starts) < len(wanted) or not starts or step < 1 or starts != list(range(starts[0], starts[-1] + 1, step)):
        raise InvalidConfig(
            f"{key} = {json.dumps(wanted)}: a list chooses single places at equal intervals, upwards.",
            f"These are at {', '.join(str(place.start) for place in places) or 'no place'}. Give a start and a stop.",
        )
    return starts[0], starts[-1] + 1, step
