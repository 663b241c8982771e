"""Splits that ``data.split`` gives by coordinate or by group: read from the store once, at a run's first start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dtrain.data.column import ColumnReader, describe_column, find_coordinate
from dtrain.data.dataset import NamedArray, open_named
from dtrain.data.groups import DealtGroups, Groups, count_groups, deal_groups, label_rows
from dtrain.data.paths import locate
from dtrain.data.places import CoordinateIndex, Places
from dtrain.data.plan.labels import (
    BY_SHARE,
    LABELS,
    LEFT_OUT,
    REST,
    GivenSplits,
    Labels,
    as_text,
    range_labels,
    runs_of,
    tile_labels,
)
from dtrain.data.plan.splits import Runs
from dtrain.data.read.inventory import of_each
from dtrain.data.read.store import ReadStore
from dtrain.data.samples import Coordinate, Samples
from dtrain.errors import DtrainError, InvalidConfig, NothingSelected, TooFewSamples, did_you_mean, one_line
from dtrain.urls import redacted_url

SHOWN_RANGES = 3
"""Ranges of a split that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a split holds, in the words of the coordinate or variable that it is given by."""

    by: str
    """The dimension, or the variable of groups."""
    places: int
    """Rows, or places of a patched dimension."""
    ranges: tuple[tuple[str, str], ...] = ()
    """First and last value of each of the first ranges."""
    num_ranges: int = 0
    groups: int | None = None

    def __str__(self) -> str:
        if self.groups is not None:
            return f"{self.groups:,} group{'s' if self.groups != 1 else ''}"
        shown = [first if first == last else f"{first} to {last}" for first, last in self.ranges]
        more = [f"{self.num_ranges - len(shown):,} more"] if self.num_ranges > len(shown) else []
        return ", ".join([*shown, *more])


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The given splits of a store, and what `plan` says about them."""

    splits: GivenSplits = BY_SHARE
    held: Mapping[str, Held] = field(default_factory=dict)
    """By split, ``train`` too."""
    note: str = ""
    """What a person should know of it."""


SHARES = Found()
"""No split is given."""


# Described ------------------------------------------------------------------------------------------------


def split_column(samples: Samples, store: ReadStore) -> Coordinate | str:
    """Return what the splits of samples are given by, or why it cannot be read; an empty text if they are shares."""
    split, group = samples.config.split, samples.config.group
    if split.by:
        return row_column(samples, store, split.by)
    if not split.ranges:
        return ""
    dim = next(dim for dim, _ in split.ranges.values())
    sizes = _sizes(samples)
    if dim not in sizes:
        return f"there is no dimension {dim}{did_you_mean(dim, sizes)}; dimensions are {', '.join(sizes)}"
    names = [v.name for v in samples.variables if dim in v.dims]
    found = find_coordinate(store, group, names, dim, sizes[dim])
    if not isinstance(found, str) and found[1].categories is not None:
        found = f"{found[0]} holds codes of categories"
    return found if isinstance(found, str) else describe_column(samples.path, *found)


def row_column(samples: Samples, store: ReadStore, by: str) -> Coordinate | str:
    """Return a variable that has the dimension of the samples alone, or why it cannot be read."""
    config = samples.config
    try:
        named: NamedArray = open_named(store, config.group, (by,), config.dims)[by]
    except DtrainError as error:
        return one_line(error).removeprefix(f"{redacted_url(samples.path)}: ").removesuffix(".")
    rows = _sizes(samples)[samples.sample_dim]
    if named.dims != (samples.sample_dim,) or named.shape != (rows,):
        return f"it has the dimensions {', '.join(named.dims) or 'none'} of lengths {list(named.shape)}"
    column = describe_column(samples.path, by, named)
    if isinstance(column, str):
        return column
    # in several stores, one code may stand for different categories
    return replace(column, variable=replace(column.variable, categories=named.categories))


def _sizes(samples: Samples) -> dict[str, int]:
    return {dim: n for v in samples.variables for dim, n in zip(v.dims, v.shape, strict=True)}


# Ranges ---------------------------------------------------------------------------------------------------


def find_ranges(samples: Samples) -> Found:
    """Find the rows or patches of splits that are given by coordinate.

    Raises
    ------
    InvalidConfig
        The dimension has no coordinate, or is neither that of the samples nor patched; there is no such value, nothing
        is selected, or val and test overlap.
    TooFewSamples
        The gap leaves nothing of a split, or no patch lies whole in it.
    ChunkMissing, ChunkUndecodable, DataChanged
        Names the chunk of the coordinate.
    """
    split = samples.config.split
    if not split.ranges:
        return SHARES
    dim = next(dim for dim, _ in split.ranges.values())
    along_rows = dim == samples.sample_dim
    found = of_each(samples, _find) if along_rows else [_find(samples.stores[0])]
    places = _all_places(found)
    lengths = [len(one.places) for one in found]
    labels = range_labels(sum(lengths), places, split.gap)
    held = {
        name: _held(found, dim, labels, label)
        for name, label in (("train", REST), *LABELS.items())
        if label == REST or name in places
    }
    _check_left(samples, labels, places)
    if along_rows:
        rows = np.full(samples.num_samples, LEFT_OUT, np.uint8)
        for one, begin, own in zip(
            found, samples.begins or (0,), np.split(labels, np.cumsum(lengths[:-1])), strict=True
        ):
            rows[begin + one.places.start : begin + one.places.stop] = own
        return Found(splits=GivenSplits(rows=as_text(rows)), held=held)
    cut = next(cut for cut in samples.tiles.cuts if cut.dim == dim)
    tiles = tile_labels(labels, cut)
    _check_patches(samples, tiles, held, cut.size)
    return Found(splits=GivenSplits(dim=dim, tiles=as_text(tiles)), held=held)


@dataclass(frozen=True, slots=True)
class _OfStore:
    """What ``data.split`` gives in one store."""

    index: CoordinateIndex
    places: range
    """The selected places of the dimension."""
    wanted: Mapping[str, Places]
    """By split; none that the store has no place of."""
    lacks: Mapping[str, NothingSelected]
    """By split that the store has no place of: what says so."""


def _find(samples: Samples) -> _OfStore:
    """Look up the ranges of splits in one store."""
    split = samples.config.split
    dim = next(dim for dim, _ in split.ranges.values())
    first, stop, step = _selected(samples, dim)
    index = CoordinateIndex(ColumnReader(samples, _coordinate(samples, dim), first, stop), samples.path, dim)
    wanted: dict[str, Places] = {}
    lacks: dict[str, NothingSelected] = {}
    for name, (_, value) in split.ranges.items():
        try:
            wanted[name] = index.range(f"data.split.{name}.{dim}", value)
        except NothingSelected as error:
            lacks[name] = error
    _check_apart(samples, wanted)
    return _OfStore(index, range(first, stop, step), wanted, lacks)


def _all_places(found: Sequence[_OfStore]) -> dict[str, list[tuple[int, int]]]:
    """Return, by split, its places in all stores, counted through from store to store.

    Raises
    ------
    NothingSelected
        No store has a place of a split.
    """
    places: dict[str, list[tuple[int, int]]] = {name: [] for name in (*found[0].wanted, *found[0].lacks)}
    before = 0
    for one in found:
        first, step = one.places.start, one.places.step
        for name, own in one.wanted.items():
            start, stop = (-(-(place - first) // step) + before for place in (own.start, own.stop))
            places[name].append((start, stop))
        before += len(one.places)
    for name, ranges in places.items():
        if not ranges:
            raise found[0].lacks[name]
    return places


def _selected(samples: Samples, dim: str) -> tuple[int, int, int]:
    """Return the places of the sample dimension or of a patched one: start, stop and step."""
    if dim == samples.sample_dim:
        return samples.first_row, samples.num_samples, 1
    if dim not in {cut.dim for cut in samples.tiles.cuts}:
        raise InvalidConfig(
            f"data.split: {dim} is neither the dimension of the samples, {samples.sample_dim}, nor cut by data.patch.",
            f"Give ranges of {samples.sample_dim}, or cut {dim} into patches: data.patch = {{ {dim} = ... }}.",
        )
    return next(v.select[v.dims.index(dim)] for v in samples.variables if dim in v.dims)


def _coordinate(samples: Samples, dim: str) -> Coordinate:
    column = samples.split_column
    if isinstance(column, str):
        hint = "Write the coordinate into the store (xarray: assign_coords), or hold out shares: data.split.test = 0.1."
        raise InvalidConfig(f"data.split: {samples.path}: {column or f'{dim} was not described'}.", hint)
    return column


def _check_apart(samples: Samples, wanted: Mapping[str, Places]) -> None:
    if len(wanted) == 2 and max(p.start for p in wanted.values()) < min(p.stop for p in wanted.values()):
        count = min(p.stop for p in wanted.values()) - max(p.start for p in wanted.values())
        raise InvalidConfig(
            f"data.split: val and test share {count:,} places of {samples.path}; both ends of a range are included.",
            "Let one of them end before the other begins.",
        )


def _check_left(samples: Samples, labels: Labels, wanted: Iterable[str]) -> None:
    for name in ("train", *wanted):
        if not (labels == LABELS.get(name, REST)).any():
            raise TooFewSamples(
                f"{samples.path}: the ranges of data.split, with gap = {samples.config.split.gap}, leave nothing of "
                f"{'the training split' if name == 'train' else name}.",
                "Hold out less, or use a smaller gap.",
            )


def _check_patches(samples: Samples, tiles: Labels, held: Mapping[str, Held], size: int) -> None:
    for name, one in held.items():
        if not (tiles == LABELS.get(name, REST)).any():
            raise TooFewSamples(
                f"{samples.path}: no patch of {size} places lies whole in {name}, which is {one.by} {one}.",
                "Cut smaller patches, or choose a longer range.",
            )


def _held(found: Sequence[_OfStore], dim: str, labels: Labels, label: int) -> Held:
    """Describe the places of a label by their coordinate."""
    begins, ends = (rows.astype(np.int64) for rows in runs_of(as_text(labels), label))
    shown = list(zip(begins[:SHOWN_RANGES].tolist(), ends[:SHOWN_RANGES].tolist(), strict=True))
    ranges = tuple((_text(found, start), _text(found, stop - 1)) for start, stop in shown)
    return Held(by=dim, places=int((ends - begins).sum()), ranges=ranges, num_ranges=len(begins))


def _text(found: Sequence[_OfStore], place: int) -> str:
    """Return the coordinate's value at a place that is counted through from store to store."""
    for one in found:
        if place < len(one.places):
            break
        place -= len(one.places)
    return one.index.texts(one.places[place])[0]


# Groups ---------------------------------------------------------------------------------------------------


def split_shares(samples: Samples) -> dict[str, float]:
    """Return the shares of validation and test that groups are dealt by."""
    return {**samples.config.split.shares, **({"val": 0.0} if samples.config.val_path else {})}


def found_groups(samples: Samples, dealt: DealtGroups, own: Groups) -> Found:
    """Return the splits of a store whose groups have been dealt."""
    labels, by = dealt.of(own.keys), samples.config.split.by
    shares = split_shares(samples)
    held = {
        name: Held(by=by, places=int(own.rows[labels == label].sum()), groups=int((labels == label).sum()))
        for name, label in (("train", REST), *LABELS.items())
        if label == REST or shares[name] > 0
    }
    chunks = "1 chunk" if own.absent == 1 else f"{own.absent:,} chunks"
    note = f"{chunks} of {by} not stored: the fill value is a group" if own.absent else ""
    return Found(splits=GivenSplits(rows=label_rows(samples, dealt)), held=held, note=note)


def find_given(samples: Samples, seed: int, absent: Runs = ()) -> Found:
    """Find the splits of a single store that are given by coordinate or by group.

    Parameters
    ----------
    samples : Samples
    seed : int
        Of the run.
    absent : tuple of (int, int)
        Runs of rows that are not used.
    """
    if not samples.config.split.by:
        return find_ranges(samples)
    own = count_groups(samples, absent)
    return found_groups(samples, deal_groups([own], split_shares(samples), seed), own)


# Without given splits ---------------------------------------------------------------------------------------


def leakage_note(samples: Samples) -> str:
    """Return a sentence about shares that are drawn at random from rows along time; empty where it does not apply."""
    config, split = samples.config, samples.config.split
    drawn = [name for name, share in split_shares(samples).items() if share > 0]
    is_given = bool(split.ranges or split.by or split.patches)
    if samples.has_windows or is_given or config.split_order != "auto" or not drawn:
        return ""
    dim = samples.sample_dim
    samples = samples.stores[0]
    store = locate(samples.path, Path.cwd(), config.storage_options)
    found = find_coordinate(store, config.group, (v.name for v in samples.moving), dim, _sizes(samples)[dim])
    column = found if isinstance(found, str) else describe_column(samples.path, *found)
    if isinstance(column, str) or not _is_time(column):
        return ""
    return (
        f"rows of {dim} that follow each other may be alike, and are drawn at random into train and "
        f"{' and '.join(drawn)}: losses of {' and '.join(drawn)} may be too good. Hold out the end instead "
        f'(data.split_order = "sequential"), or dates: data.split = {{ test = {{ {dim} = {{ start = "..." }} }} }}'
    )


def _is_time(column: Coordinate) -> bool:
    return np.dtype(column.variable.dtype).kind == "M" or " since " in str(column.attributes.get("units", ""))
