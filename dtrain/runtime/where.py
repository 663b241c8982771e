"""What the argument `cluster` of Python may be: a name, an address, a file, a client, or a cluster."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from distributed import Client

from dtrain.config.functions import described
from dtrain.errors import ClusterUnreachable, InvalidConfig, did_you_mean, one_line
from dtrain.runtime.script import unguarded_line

ALLOWED = 'Allowed are "local", "serial", an address (tcp://127.0.0.1:8786, tls://...), or a scheduler file.'
ALLOWED_IN_PYTHON = (
    'Allowed are "local", "serial", an address such as tcp://127.0.0.1:8786, a scheduler file, a distributed.Client, '
    "or a cluster such as LocalCluster(n_workers=4)."
)
BARE_ADDRESS = re.compile(r"^(?:[^/\s]*@)?(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):\d{1,5}$")
"""``host:port``; a user before it is refused where addresses are, and not taken for the path of a file."""


@runtime_checkable
class ClusterObject(Protocol):
    """A cluster as Dask has them: LocalCluster, SLURMCluster, KubeCluster ..."""

    @property
    def scheduler_address(self) -> str:
        """The address of its scheduler."""
        ...


Where: TypeAlias = "Client | ClusterObject | str | os.PathLike[str]"
"""The argument `cluster`."""


def scheduler_text(where: Where, names: tuple[str, ...] = ("local", "serial")) -> str:
    """Return the ``cluster.scheduler`` that an argument means: a name, an address, or the path of a file, absolute.

    Raises
    ------
    InvalidConfig
        It is none.
    """
    if isinstance(where, Client):
        _check_client(where)
        return str(where.scheduler.address)
    if isinstance(where, str | os.PathLike):
        return full_address(os.fspath(where), names)
    if isinstance(where, type) or not isinstance(where, ClusterObject):
        raise InvalidConfig(f"cluster is {described(where)}.", ALLOWED_IN_PYTHON)
    _check_cluster(where)
    return where.scheduler_address


def full_address(text: str, names: tuple[str, ...] = ("local", "serial")) -> str:
    """Return an address with its protocol, and the path of a scheduler file as an absolute one."""
    is_file = text not in names and Path(text).expanduser().is_file()
    return str(Path(text).expanduser().absolute()) if is_file else with_protocol(text)


def with_protocol(text: str) -> str:
    """Return ``host:port`` as ``tcp://host:port``, anything else as it is."""
    return f"tcp://{text}" if BARE_ADDRESS.match(text) else text


def no_such_place(text: str) -> ClusterUnreachable:
    """Return the error for a text that is no name, no address and no file."""
    guess = did_you_mean(Path(text).name, ("local", "serial"))
    return ClusterUnreachable(f'cluster.scheduler = "{text}": no such scheduler file{guess or "."}', ALLOWED)


@contextmanager
def client_of(where: Where | None) -> Iterator[Client | None]:
    """Give the client that an argument `cluster` means; None for a name or an address, which are opened later.

    A client of a cluster is closed afterwards; a cluster, and a client that was given, are left as they are.

    Raises
    ------
    InvalidConfig, ClusterUnreachable
        It cannot be used.
    """
    if where is None or isinstance(where, str | os.PathLike | Client):
        yield where if isinstance(where, Client) else None
        return
    address = scheduler_text(where)
    try:
        client = Client(where, set_as_default=False)
    except (OSError, TimeoutError, RuntimeError, TypeError, ValueError) as error:
        raise ClusterUnreachable(
            f"The {type(where).__name__} at {address} does not answer: {one_line(error)}", "Start a new cluster."
        ) from error
    with client:
        yield client


def _check_client(client: Client) -> None:
    if client.asynchronous or getattr(client, "_asynchronous", False):
        raise InvalidConfig(
            "cluster is a client that is asynchronous; dtrain waits for results.",
            "Make one that waits: Client(address) outside of a coroutine.",
        )
    ended = client.status in ("closed", "closing", "newly-created") or client.scheduler is None
    if ended or (client.cluster is not None and _has_ended(client.cluster)):
        raise ClusterUnreachable(
            "cluster is a client that is closed, or whose cluster is closed.", "Make a new one: Client(cluster)."
        )


def _check_cluster(cluster: ClusterObject) -> None:
    kind = type(cluster).__name__
    if _has_ended(cluster):
        raise ClusterUnreachable(f"cluster is a {kind} that is closed.", "Start a new one.")
    if getattr(cluster, "asynchronous", False):
        raise InvalidConfig(
            f"cluster is a {kind} that is asynchronous; dtrain waits for results.",
            f"Start one that waits: {kind}(...) without asynchronous=True.",
        )
    if not isinstance(cluster.scheduler_address, str) or "://" not in cluster.scheduler_address:
        raise ClusterUnreachable(f"cluster is a {kind} that has no scheduler yet.", "Start it first.")


def _has_ended(cluster: Any) -> bool:
    status = getattr(cluster, "status", None)
    return str(getattr(status, "name", status)) in ("closed", "closing", "failed", "stopped")


def check_local_start() -> None:
    """Refuse to start worker processes that would run the whole program again.

    Raises
    ------
    InvalidConfig
        The program is a script whose call is not below ``if __name__ == "__main__":``, or this process is such a
        worker that is being started.
    """
    line = unguarded_line(sys._getframe())
    starting = bool(getattr(multiprocessing.current_process(), "_inheriting", False))
    if line is None and not starting:
        return
    file = getattr(sys.modules["__main__"], "__file__", "") or "the script"
    place = f"{Path(file).name}:{line}" if line else Path(file).name
    raise InvalidConfig(
        f'{place}: local workers are processes that import this script; call dtrain below if __name__ == "__main__": '
        "there.",
        'Or use cluster="serial", which starts no processes.',
    )
