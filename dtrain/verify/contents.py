"""The contents of a store, as they are looked at: metadata first, then objects, beside a manifest."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

from dtrain.config.schema import DataConfig
from dtrain.data.read.codecs import Undecodable
from dtrain.data.read.nodes import Node
from dtrain.data.read.pieces import Place
from dtrain.data.read.presence import which_exist
from dtrain.data.read.store import ReadStore
from dtrain.data.read.whole import Look, ObjectReader
from dtrain.errors import NotZarr, UsageError
from dtrain.verify.array import Stored, places, stored_array
from dtrain.verify.fault import Counting, Fault, Report
from dtrain.verify.manifest import ArrayContents, Comparison, Entry, Manifest, entry_of, grown, write_manifest
from dtrain.verify.result import ArrayVerified, Compared, StoreVerified, Tell
from dtrain.verify.threads import in_threads

REQUESTS = 16
"""Objects of a server that are requested at a time."""
MEMORY_BYTES = 1 << 30
"""Fewer objects are looked at together, if they would take more memory than this; one always is."""
TOGETHER = 32
"""Objects that a thread takes at once."""


class Verification:
    """What is known of a store by now.

    Parameters
    ----------
    store : ReadStore
    data : DataConfig
        Of it, ``missing``.
    manifest : Manifest, optional
        That the store is compared with.
    report : callable
        Called with each fault.
    """

    def __init__(self, store: ReadStore, data: DataConfig, manifest: Manifest | None, report: Report) -> None:
        self._store, self._data, self._report = store, data, Counting(report)
        self._before = manifest
        self._compared = None if manifest is None else Comparison(manifest)
        self._now = Manifest("", store.facts.snapshot)
        self._stored: list[Stored] = []
        self._verified: list[ArrayVerified] = []
        self._groups = self._objects = self._nbytes = 0
        self._writes = False
        self._notes: list[str] = []

    # Metadata -----------------------------------------------------------------------------------------------

    def metadata(self, nodes: list[Node]) -> None:
        """Look at all documents."""
        for node in nodes:
            for key, document in node.documents.items():
                self._nbytes += len(document)
                self._now.documents[key] = entry_of(document)
            if node.fault:
                self._report(Fault("damaged", node.key, node.fault, node.path))
            elif node.array is None:
                self._groups += 1
            else:
                self._take(node)
        if not self._stored and not self._report.counts and not (self._store.facts.can_list or len(nodes) > 1):
            raise NotZarr(
                f"{self._store.path}: which arrays it has is not known: the server lists no directories, and the group "
                "has no consolidated metadata.",
                "Consolidate them, zarr.consolidate_metadata(path), or verify a copy on a disk.",
            )

    def _take(self, node: Node) -> None:
        assert node.array is not None
        try:
            self._stored.append(stored_array(node.array, self._data.missing))
        except Undecodable as error:
            self._report(Fault("damaged", next(iter(node.documents)), str(error), node.path))

    # The manifest -------------------------------------------------------------------------------------------

    def check_manifest(self, file: Path, path: str) -> None:
        """Compare the documents with those of a manifest, which may be of another place, but not of another store."""
        self._writes = self._before is None
        inside = os.path.relpath(file, self._store.path) if self._store.facts.is_local else ".."
        if any(inside.startswith(f"{stored.name}/") for stored in self._stored if stored.name):
            raise UsageError(f"--manifest {file} lies in an array of the store.", "Name a place beside the store.")
        if self._before is None or self._compared is None:
            return
        own = {key for key, entry in self._now.documents.items() if self._before.documents.get(key) == entry}
        is_array = {key for key in own if key.rpartition("/")[0] in self._before.arrays}
        if self._before.path != path and self._before.arrays and not is_array:
            raise UsageError(
                f"{file} is the manifest of another store, {self._before.path}: no array of {self._store.path} has the "
                "metadata that it lists.",
                "Give the manifest of this store, or the name of a new one.",
            )
        if self._before.path != path:
            self._notes.append(f"The manifest was written for {self._before.path}.")
        if self._before.snapshot != self._now.snapshot and self._before.snapshot:
            self._notes.append(f"The manifest was written for snapshot {self._before.snapshot}.")
        for key, entry in self._now.documents.items():
            self._say(self._compared.document(key, entry))
        self._notes += self._growth()

    def _growth(self) -> Iterator[str]:
        assert self._before is not None
        for stored in self._stored:
            before = self._before.arrays.get(stored.name)
            if before is not None and grown(before.shape, stored.variable.shape):
                shapes = (" x ".join(f"{n:,}" for n in shape) for shape in (before.shape, stored.variable.shape))
                yield f"{stored.name} has grown since the manifest was written: {' to '.join(shapes)}."

    # Objects ------------------------------------------------------------------------------------------------

    def objects(self, tell: Tell) -> None:
        """Look at all stored objects."""
        done, of = 0, sum(stored.variable.num_objects for stored in self._stored)
        tell(0, of, 0)
        for stored in self._stored:
            chunks = absent = 0
            for look in self._looks(stored):
                done, chunks, absent = done + 1, chunks + look.chunks, absent + self._absent(stored, look)
                self._objects += look.nbytes is not None
                self._nbytes += look.nbytes or 0
                for why in look.faults:
                    self._report(Fault("damaged", look.key, why, stored.name))
                self._compare(stored, look)
                tell(done, of, self._nbytes)
            checksums = stored.variable.checksums or bool(self._store.facts.checksum)
            self._verified.append(ArrayVerified(stored.name, chunks, absent, stored.reads_as, checksums))

    def _looks(self, stored: Stored) -> Iterator[Look]:
        hashes = self._writes or self._compared is not None
        reader = ObjectReader(self._store, stored.array, stored.variable, hashes=hashes)
        most = REQUESTS if self._store.facts.read_ahead else _cpus()
        threads = max(1, min(most, MEMORY_BYTES // max(1, reader.object_bytes), stored.variable.num_objects))

        def look(some: list[tuple[Place, bool]]) -> list[Look]:
            return [reader.look(place) if there else reader.absent(place) for place, there in some]

        together = max(1, min(TOGETHER, stored.variable.num_objects // (4 * threads)))
        for looks in in_threads(look, _batched(self._places(stored), together), threads):
            yield from looks

    def _places(self, stored: Stored) -> Iterator[tuple[Place, bool]]:
        """Yield the place of each object, and False if a server's list lacks it: it need not be requested."""
        grid, facts = stored.variable.grid, self._store.facts
        if facts.read_ahead and facts.can_list and not facts.has_marks and stored.variable.num_objects:
            there = which_exist(self._store, stored.array, stored.variable, stored.variable.select)
            yield from zip(places(grid), map(bool, there), strict=True)
        else:
            yield from ((place, True) for place in places(grid))

    def _absent(self, stored: Stored, look: Look) -> int:
        """Return how many chunks of an object are not stored, and say so where that is a fault."""
        if self._compared is None and stored.needs_all:
            why = f"Zarr reads it as {stored.reads_as}"
            if look.nbytes is None:
                self._report(Fault("missing", look.key, f"it is not stored; {why}", stored.name))
            for place in look.absent:
                self._report(Fault("missing", look.key, f"chunk {place} in it is not stored; {why}", stored.name))
        return look.chunks if look.nbytes is None else len(look.absent)

    def _compare(self, stored: Stored, look: Look) -> None:
        if look.nbytes is None:
            return
        entry = Entry(look.nbytes, look.sha256) if look.sha256 else None
        if self._compared is not None:
            self._say(self._compared.object(stored.name, look.key, entry))
        elif self._writes and entry is not None:
            own = self._now.arrays.setdefault(stored.name, ArrayContents(stored.variable.shape))
            own.objects[look.key] = entry

    def _say(self, fault: Fault | None) -> None:
        if fault is not None:
            self._report(fault)

    def result(self, file: Path | None, path: str) -> StoreVerified:
        """Write the manifest, or say what of it has not been found; return what has been looked at."""
        for fault in () if self._compared is None else self._compared.missing():
            self._report(fault)
        manifest: Compared = ""
        if self._compared is not None:
            manifest = "differs" if self._report.counts else "the same"
        elif file is not None:
            manifest = "not written" if self._report.counts else "written"
        if file is not None and manifest == "written":
            for stored in self._stored:
                self._now.arrays.setdefault(stored.name, ArrayContents(stored.variable.shape))
            written = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            write_manifest(file, Manifest(path, self._now.snapshot, written, self._now.documents, self._now.arrays))
        return StoreVerified(
            path=self._store.path,
            snapshot=self._store.facts.snapshot,
            groups=self._groups,
            arrays=tuple(self._verified),
            objects=self._objects,
            nbytes=self._nbytes,
            faults=dict(self._report.counts),
            manifest=manifest,
            notes=tuple(self._notes),
        )


def _cpus() -> int:
    """Return the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batched(items: Iterator[tuple[Place, bool]], count: int) -> Iterator[list[tuple[Place, bool]]]:
    while some := list(itertools.islice(items, count)):
        yield some
