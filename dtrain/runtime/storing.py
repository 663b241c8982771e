r"""The state after a round, from the workers to files and back: nobody holds all of it.

    parameters of the model  --.
    what replica 0 keeps     ---+--> a file each, in a directory of the run --> committed --> the next segment
    what replica 1 keeps     --'

A worker that shares the run's directory writes what it holds, and reads what it needs. Whether it shares it shows when
it writes: the directory is new, so that a worker that finds it sees the driver's file system. Else the driver writes
and reads, a few MB at a time. A lost value of a segment is read from its file again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from distributed import Future

from dtrain.algorithm.params import without_frozen
from dtrain.algorithm.slices import Slice, Slices, cut_broadcast, cut_outer, cut_params
from dtrain.config.average import AverageConfig
from dtrain.errors import DiskFull, RunDamaged
from dtrain.runtime import remote
from dtrain.runtime.client import SCATTERED_AT_ONCE, TaskClient
from dtrain.runtime.handles import ClusterRound, are_small
from dtrain.runtime.plugins import RESOURCE
from dtrain.runtime.reducing import Before, Sliced
from dtrain.statefiles import (
    CONTROLS,
    EMA,
    Part,
    distinct,
    outer_name,
    params_name,
    read_control,
    read_outer,
    read_params,
    read_replica,
    replica_name,
    write_part,
)
from dtrain.types import Broadcast, Flat, Layout, Parameters, Position, StateFile, StoredState

AT_ONCE_BYTES = 64 << 20
"""What the driver holds of a state, where it writes and reads the files: at least one part."""


def look_at(directory: Path) -> tuple[str, int, tuple[str, ...]]:
    """Return what tells a directory from one of the same name on another machine; the nearest one that exists.

    Nothing is written. Two machines with equal disks look alike: what a run does shows when it commits.
    """
    there = next((path for path in (directory, *directory.parents) if path.is_dir()), Path("/"))
    try:
        return str(there), there.stat().st_ino, tuple(sorted(os.listdir(there)))
    except OSError as error:
        return str(there), 0, (str(error),)


# To files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Writing:
    """How a part of a state is put together on a worker, and by which."""

    make: Callable[..., Part]
    given: tuple[Any, ...]
    at: str


def stored(
    client: TaskClient,
    held: ClusterRound,
    position: Position,
    directory: Path,
    places: Mapping[int, str],
    config: AverageConfig,
    *,
    by_workers: bool,
    meanwhile: Callable[[], None],
) -> StoredState:
    """Write the state after a round to files in a directory.

    Parameters
    ----------
    client : TaskClient
    held : ClusterRound
    position : Position
        After the round.
    directory : path
        New, and empty.
    places : mapping of int to str
        By replica: its worker.
    config : AverageConfig
    by_workers : bool
        Whether to let workers try.
    meanwhile : callable
        Called now and then.

    Raises
    ------
    SegmentLost
        A value is lost.
    DiskFull
        The driver could not write a file.
    """
    vectors, broadcast = distinct([held.model, *held.before.broadcast], _keys)
    outers, outer = distinct(held.before.outer, _keys)
    writings = dict(_writings(held, vectors, outers, outer, places, config))
    files = _by_workers(client, writings, position.round, directory, meanwhile) if by_workers else {}
    left = {name: writing for name, writing in writings.items() if name not in files}
    for name, file in _by_driver(client, left, position.round, directory, meanwhile):
        files[name] = file
    return StoredState(
        position=position,
        layout=held.layout,
        vectors=tuple(files[params_name(number)] for number in range(len(vectors))),
        broadcast=tuple(broadcast[1:]),
        replicas=tuple(files[replica_name(replica)] for replica in range(len(held.replicas))),
        outers=tuple((files[outer_name(number)],) if one else () for number, one in enumerate(outers)),
        outer=tuple(outer),
        ema=files.get(EMA),
        control=files.get(CONTROLS),
        by_workers=not left,
    )


def _writings(
    held: ClusterRound,
    vectors: Sequence[Sliced],
    outers: Sequence[Sliced],
    outer: Sequence[int],
    places: Mapping[int, str],
    config: AverageConfig,
) -> Iterator[tuple[str, _Writing]]:
    """Yield name and writing of each file; a replica's where it lies."""
    broadcast = held.before.broadcast
    for number, vector in enumerate(vectors):
        at = next((places[k] for k, own in enumerate(broadcast) if _keys(own) == _keys(vector)), places[0])
        yield params_name(number), _Writing(remote.whole_model, ([*vector], held.frozen_sent), at)
    if held.ema is not None:
        yield EMA, _Writing(remote.whole_model, ([*held.ema], held.frozen_sent), places[0])
    if config.control:
        yield CONTROLS, _Writing(remote.whole_control, ([*broadcast[0]],), places[0])
    is_averaged = config.inner_state == "average"
    for replica, own in enumerate(held.replicas):
        start = [*broadcast[replica]] if is_averaged else None
        yield replica_name(replica), _Writing(remote.whole_replica, (own, start), places[replica])
    for number, one in enumerate(outers):
        first = outer.index(number)
        if one:
            given = [*one], [*broadcast[first]]
            yield outer_name(number), _Writing(remote.whole_outer, given, places[first])


def _by_workers(
    client: TaskClient,
    writings: Mapping[str, _Writing],
    number: int,
    directory: Path,
    meanwhile: Callable[[], None],
) -> dict[str, StateFile]:
    """Let workers write; return the files that are there."""
    tasks = {
        f"write-r{number:05d}-{_stem(name)}": (directory / name, writing.make, *writing.given)
        for name, writing in writings.items()
    }
    at = [writing.at for writing in writings.values()]
    written = client.gather(client.submit_each(write_file, tasks, at=at, resources=RESOURCE), meanwhile)
    return {name: file for name, file in zip(writings, written, strict=True) if file is not None and _is_there(file)}


def write_file(path: Path, make: Callable[..., Part], *given: Any) -> StateFile | None:
    """Write a part of a state on a worker; None if the directory is not there, or cannot be written to."""
    part = make(*given)
    try:
        return write_part(path, part)
    except DiskFull:
        return None


def _is_there(file: StateFile) -> bool:
    """Whether the driver sees a file that a worker has written, and may read it."""
    try:
        with open(file.path, "rb") as opened:
            return os.fstat(opened.fileno()).st_size == file.nbytes
    except OSError:
        return False


def _by_driver(
    client: TaskClient,
    writings: Mapping[str, _Writing],
    number: int,
    directory: Path,
    meanwhile: Callable[[], None],
) -> Iterator[tuple[str, StateFile]]:
    """Write parts on the driver, some at a time, and yield their files."""

    def write(some: Sequence[str]) -> list[StateFile]:
        tasks = {f"part-r{number:05d}-{_stem(name)}": (writings[name].make, *writings[name].given) for name in some}
        at = [writings[name].at for name in some]
        parts = client.gather(client.submit_each(remote.called, tasks, at=at, resources=RESOURCE), meanwhile)
        return [write_part(directory / name, part) for name, part in zip(some, parts, strict=True)]

    names, sizes = list(writings), list[int]()
    while names:
        count = at_once(max(sizes, default=AT_ONCE_BYTES))
        some, names = names[:count], names[count:]
        files = write(some)
        yield from zip(some, files, strict=True)
        sizes += [file.nbytes for file in files]


def at_once(nbytes: int) -> int:
    """Return how many parts of a size the driver holds at once.

    >>> at_once(1), at_once(20_000_000), at_once(1_000_000_000)
    (16, 3, 1)
    """
    return min(max(AT_ONCE_BYTES // max(nbytes, 1), 1), SCATTERED_AT_ONCE)


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _keys(handles: Sliced) -> tuple[str, ...]:
    return tuple(handle.key for handle in handles)


# And back -------------------------------------------------------------------------------------------------


def restored(
    client: TaskClient, state: StoredState, at: Mapping[int, str], slices: Slices, *, by_workers: bool
) -> ClusterRound:
    """Bring a state from its files to the workers of its replicas.

    Parameters
    ----------
    client : TaskClient
    state : StoredState
    at : mapping of int to str
        By replica: its worker.
    slices : Slices
        Of the reducer.
    by_workers : bool
        Whether workers read the files; else the driver does.

    Raises
    ------
    SegmentLost
        A worker is lost; also where one cannot read a file, when the value is asked for.
    RunDamaged
        The driver finds a file missing, or other than it was written.
    """
    back = _Back(client, by_workers)
    layout, replicas = state.layout, range(len(state.replicas))
    places = [
        [at[k] for k in replicas if state.broadcast[k] == number] or [at[0]] for number in range(len(state.vectors))
    ]
    starts = [
        back.cut(read_start, (file, state.control, layout), cut_broadcast, slices, f"start-{number}", places[number])
        for number, file in enumerate(state.vectors)
    ]
    outers: list[Sliced] = []
    for number, files in enumerate(state.outers):
        where = [at[state.outer.index(number)]]
        cut = partial(cut_outer, params=layout.num_params)
        outers.append(back.cut(read_outer, (files,), cut, slices, f"outer-{number}", where) if files else ())
    averaged = (
        None if state.ema is None else back.cut(read_flat, (state.ema, layout), cut_params, slices, "ema", [at[0]])
    )
    frozen = None
    if layout.num_frozen:
        frozen = back.one(read_frozen, (state.vectors[0], layout), "frozen", list(at.values()))
    sizes = [file.nbytes for file in chain(state.replicas, *state.outers)]
    return ClusterRound(
        before=Before(
            tuple(starts[number] for number in state.broadcast),
            tuple(outers[number] for number in state.outer),
            slices,
            len(slices) == 1 and are_small(sizes),
        ),
        replicas=back.each(read_replica, state.replicas, "replica", [at[k] for k in replicas]),
        model=starts[0],
        ema=averaged,
        layout=layout,
        frozen=None,
        frozen_sent=frozen,
    )


@dataclass(frozen=True, slots=True)
class _Back:
    """Reads parts of a state on workers, or on the driver, which sends them."""

    client: TaskClient
    by_workers: bool

    def one(self, read: Callable[..., Any], given: tuple[Any, ...], name: str, places: Sequence[str]) -> Future:
        """Read a part for some workers; others fetch it from them."""
        if self.by_workers:
            return self.client.submit(read_file, f"read-{name}", read, *given, at=places[0], resources=RESOURCE)
        return self.client.scatter(read(*given), places)

    def cut(
        self,
        read: Callable[..., Any],
        given: tuple[Any, ...],
        cut: Callable[[Any, Slice], Any],
        slices: Slices,
        name: str,
        places: Sequence[str],
    ) -> Sliced:
        """Read a part and cut it into slices."""
        if self.by_workers and len(slices) > 1:
            whole = self.one(read, given, name, places)
            return tuple(
                self.client.submit(cut, f"cut-{name}-s{one.number}", whole, one, at=places[0]) for one in slices
            )
        if self.by_workers:
            return (self.one(read, given, name, places),)
        part = read(*given)
        return tuple(self.client.scatter(cut(part, one), places) for one in slices)

    def each(
        self, read: Callable[[StateFile], Any], files: Sequence[StateFile], name: str, places: Sequence[str]
    ) -> tuple[Future, ...]:
        """Read a part for each replica."""
        if self.by_workers:
            tasks = {f"read-{name}-k{k}": (read, file) for k, file in enumerate(files)}
            return tuple(self.client.submit_each(read_file, tasks, at=list(places), resources=RESOURCE))
        with ThreadPoolExecutor(at_once(max(file.nbytes for file in files))) as pool:
            send = partial(self._sent, read)
            return tuple(pool.map(send, files, places))

    def _sent(self, read: Callable[[StateFile], Any], file: StateFile, place: str) -> Future:
        return self.client.scatter(read(file), [place])


class NotSeen(OSError):
    """A worker does not see a file as it was written; the driver may."""


def read_file(read: Callable[..., Any], *given: Any) -> Any:
    """Read a part of a state on a worker.

    Raises
    ------
    NotSeen
    """
    try:
        return read(*given)
    except RunDamaged as error:
        raise NotSeen(error.message) from error


def read_start(file: StateFile, control: StateFile | None, layout: Layout) -> Broadcast:
    """Read what a replica starts from, without the frozen parameters."""
    return Broadcast(read_flat(file, layout), control=None if control is None else read_control(control))


def read_flat(file: StateFile, layout: Layout) -> Parameters:
    """Read parameters without the frozen ones."""
    return without_frozen(read_params(file, layout))


def read_frozen(file: StateFile, layout: Layout) -> Flat:
    """Read the frozen parameters."""
    return read_params(file, layout).frozen
