"""Which sink a path or URL means."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from dtrain.data.read.icechunk import PREFIX, is_repository
from dtrain.data.read.kind import is_local_path
from dtrain.data.read.remote import HTTP_URLS, locate_url
from dtrain.data.write.icechunk import IcechunkSink
from dtrain.data.write.local import LocalSink
from dtrain.data.write.remote import RemoteSink
from dtrain.data.write.sink import Sink
from dtrain.errors import UsageError

REPOSITORY_SUFFIX = ".icechunk"
"""A path that ends so means a repository, also one that is not there yet."""
ARCHIVES = (".zip", ".json", ".parq", ".parquet")


def open_sink(path: str, base: Path) -> Sink:
    """Return where a path or URL leads; a relative path is relative to `base`. Nothing is made.

    Raises
    ------
    UsageError
        Nothing can be written there.
    InvalidConfig
        A package is missing, or the URL cannot be used.
    """
    plain = path.rstrip("/") or path
    if plain.endswith(ARCHIVES):
        raise UsageError(
            f"--out {path}: predictions are written by several processes, which {Path(plain).suffix} does not allow.",
            'Name a directory, for example "predictions.zarr", a URL, or an icechunk repository.',
        )
    if plain.startswith(HTTP_URLS):
        raise UsageError(
            f"--out {path}: nothing can be written over HTTP.", "Name a directory, or a URL such as s3://."
        )
    inner = plain.removeprefix(PREFIX)
    if not is_local_path(inner):
        located = locate_url(inner, base)
        is_named = plain.startswith(PREFIX) or plain.endswith(REPOSITORY_SUFFIX)
        return IcechunkSink(PREFIX + located) if is_named else RemoteSink(located)
    local = unquote(inner.removeprefix("file://")) if inner.startswith("file://") else inner
    located = str(Path(base, Path(local).expanduser()).absolute())
    if plain.startswith(PREFIX) or plain.endswith(REPOSITORY_SUFFIX) or is_repository(located):
        return IcechunkSink(located)
    return LocalSink(located)
