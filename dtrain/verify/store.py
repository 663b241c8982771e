"""Verify a store: all metadata and every stored object are read, decoded, and compared with a manifest."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from dtrain.config.schema import DataConfig
from dtrain.data.paths import identity, locate
from dtrain.data.read.documents import NAMES
from dtrain.data.read.kind import is_local_path, local_path
from dtrain.data.read.local import oddity
from dtrain.data.read.nodes import MOST_DOCUMENT, walk
from dtrain.errors import NotZarr, OutOfMemory
from dtrain.urls import redacted_url
from dtrain.verify.contents import Verification
from dtrain.verify.fault import Report
from dtrain.verify.manifest import check_place, read_manifest
from dtrain.verify.result import StoreVerified, Tell

MOST_BYTES = 2**36
"""A larger reference file or archive is not read."""


def verify_store(
    path: str, data: DataConfig, file: Path | None = None, *, report: Report, tell: Tell = lambda *_: None
) -> StoreVerified:
    """Read and decode all of a store.

    Parameters
    ----------
    path : str
        Path or URL; of any kind that training reads.
    data : DataConfig
        Of it, ``storage_options`` and ``missing``.
    file : path, optional
        The manifest: the store is compared with it, or it is written where there is none and nothing is at fault.
    report : callable
        Called with each fault.
    tell : callable, optional
        Called with the progress.

    Raises
    ------
    DataNotFound, NotZarr
        There is nothing, or no Zarr group.
    StoreForbidden, StoreUnavailable, DataChanged
        A server refuses or fails; an archive has been modified while it was read.
    ManifestDamaged, ManifestConflict, UsageError
        The manifest cannot be used.
    OutOfMemory
        The metadata of the store are too large.
    """
    check_regular_store(path)
    manifest = None if file is None else read_manifest(file)
    if file is not None and manifest is None:
        check_place(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what version 3 of Zarr does not specify
        try:
            store = locate(path, Path.cwd(), data.storage_options)
            verification = Verification(store, data, manifest, report)
            verification.metadata(list(walk(store)))
            if file is not None:
                verification.check_manifest(file, redacted_url(identity(path, Path.cwd())))
            verification.objects(tell)
        except MemoryError:
            raise OutOfMemory(f"{path}: there is no memory for its metadata.", "Its documents are too large.") from None
    return verification.result(file, redacted_url(identity(path, Path.cwd())))


def check_regular_store(path: str) -> None:
    """Refuse pipes and devices, which would be waited for, in the place of a store or of its first documents.

    Raises
    ------
    DataNotFound, NotZarr
    """
    if not is_local_path(path) or "::" in path:
        return
    place = local_path(path.removeprefix("file://"), Path.cwd())
    files = [os.path.join(place, name) for name in sorted(NAMES)] if os.path.isdir(place) else [place]
    for name in files:
        if odd := oddity(name, MOST_DOCUMENT if os.path.isdir(place) else MOST_BYTES):
            raise NotZarr(f"{name} is no file of a Zarr store: {odd}.", "Give the path of a store, a run or a round.")
