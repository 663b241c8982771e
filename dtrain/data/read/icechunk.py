"""Repositories of icechunk: one snapshot is read, by all processes and after each resume, whatever is committed later.

``data.storage_options`` choose it (``branch``, ``tag`` or ``snapshot``; branch main by default) and hold credentials
by the names of fsspec. Virtual chunks, which lie in other files, are not read: icechunk wants each place authorised.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.sync import sync
from zarr.storage import WrapperStore

from dtrain.config.values import without_redacted
from dtrain.data.read.codecs import Undecodable
from dtrain.data.read.kind import METADATA_FILES, StorageOptions, StoreKind, is_local_path, local_path, split_versions
from dtrain.data.read.remote import locate_url
from dtrain.data.read.store import ReadStore
from dtrain.data.samples import StoreFacts
from dtrain.errors import (
    ChunkMissing,
    ClusterUnsuitable,
    DataNotFound,
    DtrainError,
    InvalidConfig,
    NotZarr,
    StoreForbidden,
    StoreUnavailable,
    did_you_mean,
    listed,
    one_line,
)

PREFIX = "icechunk+"
"""Begins the URL of a repository on a server, so that other processes need not look what lies there."""
MARKERS = ("refs/branch.main/ref.json", "repo")
"""A repository of format 1 has the first object, one of format 2 the second."""
OBJECT_BYTES = 150
"""Bytes in memory of a chunk's place, in the manifests that icechunk keeps."""
S3_NAMES = {
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "anon": "anonymous",
    "region_name": "region",
}
"""Options of s3fs, and what icechunk calls them; its own names are taken too."""
FORBIDDEN = ("accessdenied", "access denied", "forbidden", "accesskey", "signature", "credential", "permission")
UNREACHABLE = ("dispatch failure", "service error", "error sending request", "timeout", "timed out", "connect")
"""How icechunk says that a server refuses or fails."""


class SnapshotStore(WrapperStore[Store]):
    """The store of a snapshot.

    Parameters
    ----------
    store : icechunk.IcechunkStore
    path : str
        Names it in errors.
    snapshot : str
    chosen : str
        How it was chosen, for people; empty if by its id.
    chunks : int
        Chunks that its manifests list.
    """

    def __init__(self, store: Store, path: str, snapshot: str, chosen: str, chunks: int) -> None:
        super().__init__(store)
        self.path, self.snapshot, self.chosen, self.chunks = path, snapshot, chosen, chunks

    def _with_store(self, store: Store) -> SnapshotStore:
        return type(self)(store, self.path, self.snapshot, self.chosen, self.chunks)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object or a part of it; None if the snapshot does not have it.

        Raises
        ------
        ChunkMissing
            The snapshot has it, and the repository does not.
        StoreForbidden, StoreUnavailable
            A server refuses or fails.
        Undecodable
            It cannot be read.
        """
        try:
            return await self._store.get(key, prototype, byte_range)
        except Exception as error:
            said = text_of(error)
            if "not found" in said.lower():
                raise ChunkMissing(
                    f"{self.path}: {key} is in snapshot {self.snapshot}, but not in the repository: {said}",
                    "Restore the repository from a copy.",
                ) from None
            raise server_fault(said, f"{self.path}: {key}") or Undecodable(said) from error

    async def exists(self, key: str) -> bool:
        """Return True if the snapshot has an object."""
        try:
            return await self._store.exists(key)
        except Exception as error:
            raise damaged(self.path, error) from error

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys that begin so."""
        try:
            async for key in self._store.list_prefix(prefix):
                yield key
        except Exception as error:
            raise damaged(self.path, error) from error

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names in a group."""
        try:
            async for name in self._store.list_dir(prefix):
                yield name
        except Exception as error:
            raise damaged(self.path, error) from error


def damaged(path: str, error: Exception) -> DtrainError:
    """Return the error for a repository of which icechunk cannot read a file."""
    said = text_of(error)
    return server_fault(said, path) or NotZarr(
        f"{path}: the icechunk repository cannot be read: {said}", "Restore the repository from a copy."
    )


def text_of(error: Exception) -> str:
    """Return what icechunk says of an error and of its cause, without where in its code that was."""
    first, *lines = str(error).splitlines() or [one_line(error)]
    first = first.strip().removeprefix("x ")
    causes = [cause for line in lines if (cause := line.partition("-> ")[2]) and cause not in first]
    return ": ".join([first, *causes])


def server_fault(said: str, what: str) -> DtrainError | None:
    """Return the error of a server that refuses or fails; None if that is not what has been said."""
    if any(word in said.lower() for word in FORBIDDEN):
        return StoreForbidden(
            f"{what}: access was refused: {said}",
            "Give credentials in the environment or in data.storage_options, or anon = true for open data.",
        )
    if any(word in said.lower() for word in UNREACHABLE):
        return StoreUnavailable(
            f"{what} could not be read: {said}",
            "Look at data.path, credentials and network. The same command continues; committed rounds are safe.",
        )
    return None


# Where repositories lie -------------------------------------------------------------------------------------


def repository_at(store: ReadStore) -> str:
    """Return the URL by which a repository is read, if one lies where a server has no Zarr group; else nothing."""
    if store.facts.is_local or store.facts.snapshot or not any(map(store.has_document, MARKERS)):
        return ""
    return PREFIX + store.path


def is_repository(path: str) -> bool:
    """Return True for the path of a directory that holds a repository, and for a URL that is marked as one."""
    if not is_local_path(path):
        return path.startswith(PREFIX)
    folder = plain_path(path)
    if not os.path.isdir(os.path.join(folder, "snapshots")):
        return False
    repository, group = (
        any(os.path.exists(os.path.join(folder, name)) for name in names) for names in (MARKERS, METADATA_FILES)
    )
    return repository and not group


def plain_path(path: str) -> str:
    """Return the path of a file URL; another path as it is."""
    return unquote(path.removeprefix("file://")) if path.startswith("file://") else path


def _locate(path: str, base: Path) -> str:
    if path.startswith(PREFIX):
        return PREFIX + locate_url(path.removeprefix(PREFIX), base)
    return local_path(plain_path(path), base)


# Opening ----------------------------------------------------------------------------------------------------


def _open(path: str, storage_options: StorageOptions) -> SnapshotStore:
    icechunk = icechunk_module(path)
    chosen, options = split_versions(without_redacted(storage_options))
    if len(chosen) > 1:
        raise InvalidConfig(
            f"data.storage_options have {' and '.join(chosen)}: one of them chooses what is read.",
            "Keep one; without any, the newest snapshot of branch main is read.",
        )
    repository = _repository(icechunk, path, options)
    ((key, name),) = (chosen or {"branch": "main"}).items()
    session = _session(path, repository, key, str(name))
    try:
        chunks = sync(_count_chunks(repository, session.snapshot_id))
    except Exception as error:
        raise damaged(path, error) from error
    return SnapshotStore(session.store, path, session.snapshot_id, "" if key == "snapshot" else f"{key} {name}", chunks)


async def _count_chunks(repository: Any, snapshot: str) -> int:
    """Return how many chunks the manifests of a snapshot list."""
    if hasattr(repository, "list_manifest_files_async"):  # icechunk 2, whose blocking call keeps Python's lock
        manifests = await repository.list_manifest_files_async(snapshot)
    else:
        manifests = (await repository.lookup_snapshot_async(snapshot)).manifests
    return sum(manifest.num_chunk_refs for manifest in manifests)


def icechunk_module(path: str) -> Any:
    """Return the module of icechunk, which must not write its warnings to standard output."""
    try:
        import icechunk
    except ImportError as error:
        raise InvalidConfig(
            f"{path}: reading an icechunk repository needs a package that is not installed: {one_line(error)}",
            'Install it here and on the workers: pip install "dtrain[icechunk]".',
        ) from None
    if "ICECHUNK_LOG" not in os.environ:
        icechunk.set_logs_filter("off")
    return icechunk


def _repository(icechunk: Any, path: str, options: dict[str, Any]) -> Any:
    """Return an opened repository."""
    try:
        return icechunk.Repository.open(storage_of(icechunk, path.removeprefix(PREFIX), options))
    except DtrainError:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidConfig(f"{path}: cannot be opened: {one_line(error)}", "Look at data.storage_options.") from None
    except Exception as error:
        if "upgrade the icechunk" in str(error):
            needs = "Python 3.12 or newer, and there icechunk 2" if sys.version_info < (3, 12) else "icechunk 2"
            raise ClusterUnsuitable(
                f"{path} is a repository of format 2; icechunk {icechunk.__version__} reads format 1 alone.",
                f"It needs {needs}, here and on the workers.",
            ) from None
        raise server_fault(text_of(error), path) or NotZarr(
            f"{path}: no icechunk repository can be opened: {text_of(error)}", "Look at data.path."
        ) from None


def _session(path: str, repository: Any, key: str, name: str) -> Any:
    """Return a session that reads a branch, a tag or a snapshot."""
    try:
        return repository.readonly_session(**{"snapshot_id" if key == "snapshot" else key: name})
    except Exception as error:
        if fault := server_fault(text_of(error), path):
            raise fault from None
        if key == "snapshot":
            raise DataNotFound(
                f"{path}: snapshot {name} cannot be read: {text_of(error)}",
                "It may have expired. Choose another one, a tag or a branch in data.storage_options.",
            ) from None
        known = sorted(repository.list_branches() if key == "branch" else repository.list_tags())
        raise DataNotFound(
            f"{path}: there is no {key} {name}{did_you_mean(name, known) or '.'}", f"It has {listed(known) or 'none'}."
        ) from None


def storage_of(icechunk: Any, url: str, options: dict[str, Any]) -> Any:
    """Return the storage of icechunk for a path or URL."""
    if is_local_path(url):
        return icechunk.local_filesystem_storage(url)
    protocol, _, rest = url.partition("://")
    place, _, prefix = rest.partition("/")
    match protocol:
        case "s3" | "s3a":
            return icechunk.s3_storage(bucket=place, prefix=prefix, **_s3_options(options))
        case "gs" | "gcs":
            return icechunk.gcs_storage(bucket=place, prefix=prefix, **options)
        case "az" | "abfs":
            return icechunk.azure_storage(container=place, prefix=prefix, **options)
        case "http" | "https" if hasattr(icechunk, "http_storage"):
            return icechunk.http_storage(url, **options)
    raise InvalidConfig(
        f"{url}: icechunk {icechunk.__version__} reads no repository behind {protocol}://.",
        "Repositories are read from directories, s3://, gs:// and az://; from icechunk 2 on also from https://.",
    )


def _s3_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of s3fs or of icechunk by icechunk's names."""
    flat = {key: value for key, value in options.items() if key != "client_kwargs"} | options.get("client_kwargs", {})
    own = {S3_NAMES.get(key, key): value for key, value in flat.items()}
    if "endpoint_url" in own:  # what servers other than Amazon's need
        plain = {"allow_http": own["endpoint_url"].startswith("http://"), "force_path_style": True}
        own = {"region": "us-east-1", **plain, **own}
    return own


def _nothing_there(path: str) -> DtrainError:
    return NotZarr(
        f"{path}: the snapshot that is read holds no Zarr group.",
        "Commit a group first, or choose a branch, tag or snapshot in data.storage_options.",
    )


def _facts(store: SnapshotStore) -> StoreFacts:
    newest = f", the newest of {store.chosen}" if store.chosen.startswith("branch") else ""
    tagged = f", {store.chosen}" if store.chosen.startswith("tag") else ""
    return StoreFacts(
        is_local=False,
        read_ahead=not is_local_path(store.path),
        compared=f"snapshot {store.snapshot} is read again, whatever has been committed",
        kept_bytes=OBJECT_BYTES * store.chunks,
        snapshot=store.snapshot,
        notes=(
            ("snapshot", f"{store.snapshot}{newest}{tagged}"),
            ("checksums", "icechunk verifies none when it reads; chunks have those of their codecs alone"),
        ),
    )


ICECHUNK = StoreKind(matches=is_repository, open=_open, facts=_facts, locate=_locate, nothing_there=_nothing_there)
