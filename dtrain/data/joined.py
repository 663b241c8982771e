"""Describe several stores as one: each is described as a single store is, then all are compared and put in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from typing import TypeAlias

import numpy as np

from dtrain.config.schema import DataConfig
from dtrain.data.column import find_coordinate
from dtrain.data.dataset import hierarchy_of
from dtrain.data.encoding import Array
from dtrain.data.layouts.anndata import gene_names
from dtrain.data.matrix import rows_together
from dtrain.data.members import KEPT_STORES, LONGEST_UNIT_BYTES, check_alike, joined_variable
from dtrain.data.read.extent import check_whole
from dtrain.data.read.retry import settle
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import ReadStore
from dtrain.data.samples import Chosen, Coordinate, Samples, StoreFacts, common_rows
from dtrain.data.selection import select_dims
from dtrain.data.variable import Variable
from dtrain.errors import (
    ChunkUndecodable,
    DtrainError,
    InvalidConfig,
    LengthsDiffer,
    NothingSelected,
    UnsuitableVariable,
    listed,
    one_line,
)

TOGETHER = 16
"""Stores that are described at a time."""
NO_SNAPSHOT = "-"
"""In the place of the snapshot of a store that has none."""
SHOWN = 3
"""Values of a coordinate that a message shows."""

Shared: TypeAlias = Mapping[str, Array]
"""By coordinate of another dimension than that of the samples: its values at the selected places."""


@dataclass(frozen=True, slots=True)
class Member:
    """One of several stores: its samples of all rows, or of those that ``data.sel`` chooses."""

    samples: Samples
    shared: Shared


Describe: TypeAlias = Callable[[DataConfig, str], Member]
"""Describes the store of a table ``[data]`` with one path, at a snapshot."""


def describe_all(config: DataConfig, paths: Sequence[str], snapshot: str, describe: Describe) -> Samples:
    """Describe several stores as one.

    Stores in which ``data.sel`` finds no row are left out.

    Parameters
    ----------
    config : DataConfig
    paths : sequence of str
        Absolute paths, or URLs.
    snapshot : str
        That of each store, as `StoreFacts.snapshot` of the whole has them.
    describe : callable

    Raises
    ------
    LengthsDiffer, UnsuitableVariable
        The stores do not hold the same variables; names two of them.
    InvalidConfig
        Nothing is selected.
    DtrainError
        As for one store.
    """
    one = partial(_described, config, describe)
    with ThreadPoolExecutor(TOGETHER, "dtrain-describe") as pool:
        found = list(pool.map(one, paths, chain(snapshot.split(), repeat("", len(paths)))))
    members = [member for member in found if isinstance(member, Member)]
    if not members:
        raise next(error for error in found if isinstance(error, NothingSelected))
    _check_same(members)
    stores = [member.samples if isinstance(member, Member) else None for member in found]
    joined = _joined(config, _selected(config, [member.samples for member in members]))
    named = tuple(path if one is None else one.path for one, path in zip(stores, paths, strict=True))
    return replace(joined, named=named, store=replace(joined.store, snapshot=_snapshots(stores)))


def _snapshots(stores: Sequence[Samples | None]) -> str:
    """Return the snapshot of each store, with spaces between; empty if none has one."""
    each = ["" if one is None else one.store.snapshot for one in stores]
    return " ".join(one or NO_SNAPSHOT for one in each) if any(each) else ""


def _described(config: DataConfig, describe: Describe, path: str, snapshot: str) -> Member | NothingSelected:
    own = config.model_copy(update={"path": path})
    try:
        return describe(own, "" if snapshot == NO_SNAPSHOT else snapshot)
    except NothingSelected as error:
        return error


# Compared -----------------------------------------------------------------------------------------------------


def _check_same(members: Sequence[Member]) -> None:
    first, paths = members[0], [member.samples.path for member in members]
    for member in members[1:]:
        if member.samples.sample_dim != first.samples.sample_dim:
            raise LengthsDiffer(
                f"{member.samples.path}: samples lie along {member.samples.sample_dim}; in {paths[0]} they lie along "
                f"{first.samples.sample_dim}.",
                "Name the dimension in data.sample_dim, or give it one name in all stores.",
            )
    for number in range(len(first.samples.variables)):
        check_alike(paths, [member.samples.variables[number] for member in members])
    for member in members[1:]:
        for name in member.shared.keys() & first.shared.keys():
            _check_coordinate(name, (member.samples.path, member.shared[name]), (paths[0], first.shared[name]))


def _check_coordinate(name: str, own: tuple[str, Array], first: tuple[str, Array]) -> None:
    """Refuse a coordinate whose values differ, as places of other latitudes, or other genes."""
    (path, values), (first_path, others) = own, first
    is_number = values.dtype.kind in "iufb" and others.dtype.kind in "iufb"
    differs = (
        ~np.isclose(values, others, equal_nan=True) if is_number else values.astype(object) != others.astype(object)
    )
    if differs.any():
        places = np.flatnonzero(differs)
        here, there = (listed(some[places].tolist(), SHOWN) for some in (values, others))
        raise UnsuitableVariable(
            f"{path}: {name} is {here} at {len(places):,} of {len(values):,} places, from {places[0]:,} on; in "
            f"{first_path} it is {there}.",
            f"Stores that are one have the same {name}: write them alike, or choose the same part of each (data.sel).",
        )


def shared_coordinates(samples: Samples, store: ReadStore) -> Shared:
    """Read the coordinates of all dimensions but that of the samples, at the selected places; also names of genes.

    Raises
    ------
    ChunkUndecodable, UnsuitableVariable
        Names the array.
    """
    config, shared, hierarchy = samples.config, dict[str, Array](), hierarchy_of(store)
    for v in samples.variables:
        for axis, dim in enumerate(v.dims):
            if dim == samples.sample_dim or dim in shared:
                continue
            names = (other.name for other in samples.variables if dim in other.dims)
            found = find_coordinate(store, config.group, names, dim, v.shape[axis])
            array = None if isinstance(found, str) else found[1].array
            if array is None and (v.sample_axis, len(v.dims)) == (0, 2):
                array = gene_names(hierarchy, "/".join(filter(None, (config.group.strip("/"), v.array_path))))
            if array is not None:
                shared[dim] = _values(store, array, v.select[axis])
    return shared


def _values(store: ReadStore, array: ArrayLike, part: tuple[int, int, int]) -> Array:
    check_whole(store.path, array.path, len(range(*part)) * np.dtype(array.dtype).itemsize)
    try:
        return np.asarray(array[slice(*part)])
    except DtrainError:
        raise
    except Exception as error:
        settle()
        raise ChunkUndecodable(
            f"{store.path}: {array.path}, which is compared between stores, cannot be decoded: {one_line(error)}",
            "Restore it from a copy of the store.",
        ) from None


# Put in a row -------------------------------------------------------------------------------------------------


def _selected(config: DataConfig, members: Sequence[Samples]) -> list[Samples]:
    """Return the stores that hold rows, with those that ``data.isel`` selects of all rows."""
    dim = members[0].sample_dim
    total = sum(one.num_samples - one.first_row for one in members)
    start, stop = 0, total
    if dim in config.isel:
        start, stop, _ = select_dims({dim: config.isel[dim]}, {dim: total}, dim)[dim][0]
    kept, before = [], 0
    for one in members:
        rows = one.num_samples - one.first_row
        low, high = max(0, start - before), min(rows, stop - before)
        if low < high:
            kept.append(one if (low, high) == (0, rows) else _cut(one, one.first_row + low, one.first_row + high))
        before += rows
    if not kept:
        return list(members[:1])  # plans say that there are no samples
    return kept


def _cut(samples: Samples, start: int, stop: int) -> Samples:
    """Return the samples of some rows."""
    cut = (v if v.is_static else replace(v, select=v.selection(start, stop)) for v in samples.variables)
    return replace(samples, first_row=start, num_samples=stop, variables=tuple(cut))


def _joined(config: DataConfig, members: Sequence[Samples]) -> Samples:
    first = members[0]
    row_bytes = first.row_bytes
    by_name = [[one.variables[number] for one in members] for number in range(len(first.variables))]
    alike = replace(
        first,
        path=_name(members),
        config=config,
        variables=tuple(_cut_together(joined_variable(own, row_bytes, LONGEST_UNIT_BYTES)) for own in by_name),
        store=_facts([one.store for one in members]),
        coordinate=next(
            (one.coordinate for one in members if isinstance(one.coordinate, Coordinate)), first.coordinate
        ),
        chosen=tuple(_chosen(members, number) for number in range(len(first.chosen))),
        members=tuple(members),
        begins=tuple(range(len(members))),
    )
    interval = common_rows([v.object_rows for v in alike.streamed if v.sparse is None] or [1])
    begins = _begins(members, interval)
    stop = begins[-1] + members[-1].num_samples
    variables = tuple(_with_rows(v, alike.first_row, stop) for v in alike.variables)
    return replace(alike, num_samples=stop, variables=variables, begins=begins)


def _cut_together(joined: Variable) -> Variable:
    """Return a variable of all stores; of a sparse one, so many rows are read at once as hold enough chunks."""
    if joined.sparse is None:
        return joined
    rows = rows_together(joined.sparse)
    together = tuple(rows if axis == joined.sample_axis else n for axis, n in enumerate(joined.shape))
    return replace(joined, chunks=together, objects=together)


def _chosen(members: Sequence[Samples], number: int) -> Chosen:
    """Return what ``data.sel`` chooses of a dimension; along the samples, of all stores together."""
    first, last = members[0].chosen[number], members[-1].chosen[number]
    if first.dim != members[0].sample_dim:
        return first
    own = [one.chosen[number] for one in members]
    stop, of = sum(one.stop - one.start for one in own), sum(one.of for one in own)
    return replace(first, last=last.last, start=0, stop=stop, of=of)


def _begins(members: Iterable[Samples], interval: int) -> tuple[int, ...]:
    """Return the row at which each store begins: a multiple of the interval, after all rows of the one before."""
    begins, after = [], 0
    for one in members:
        begins.append(after)
        rows = one.moving[0].shape[one.moving[0].sample_axis]
        after += -(-rows // interval) * interval
    return tuple(begins)


def _with_rows(v: Variable, first: int, stop: int) -> Variable:
    if v.is_static:
        return v
    shape = (*v.shape[: v.sample_axis], stop, *v.shape[v.sample_axis + 1 :])
    return replace(v, shape=shape, select=v.selection(first, stop))


def _name(members: Sequence[Samples]) -> str:
    """Return what names all stores in errors."""
    more = len(members) - 1
    return members[0].path + (f" and {more:,} more store{'s' if more > 1 else ''}" if more else "")


def _facts(stores: Sequence[StoreFacts]) -> StoreFacts:
    """Return what all stores allow."""
    checksums = {one.checksum for one in stores}
    return StoreFacts(
        is_local=all(one.is_local for one in stores),
        can_list=all(one.can_list for one in stores),
        read_ahead=any(one.read_ahead for one in stores),
        reads_parts=all(one.reads_parts or one.is_local for one in stores),
        has_marks=any(one.has_marks for one in stores),
        compared="; ".join(dict.fromkeys(one.compared for one in stores)),
        checksum=checksums.pop() if len(checksums) == 1 else "",
        kept_bytes=sum(sorted(one.kept_bytes for one in stores)[-KEPT_STORES:]),
        notes=tuple(dict.fromkeys(chain.from_iterable(one.notes for one in stores))),
    )


def check_once(paths: Sequence[str], identities: Sequence[str]) -> None:
    """Refuse a store that is named twice: its rows would be in several splits."""
    for number, (path, identity) in enumerate(zip(paths, identities, strict=True)):
        if identity in identities[:number]:
            raise InvalidConfig(f"data.path names {path} twice.", "Name each store once.")
