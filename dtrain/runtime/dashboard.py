"""Dask's dashboard: its link, and the page ``dtrain`` that shows a run while it trains.

The link is shown only where the dashboard has pages: the scheduler needs Bokeh for them. The page is added by a plugin
of the scheduler (`dtrain.runtime.board`), which the client of a run registers; it is fed by messages that are sent
past the loop of rounds, which never waits for them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import ProxyHandler, build_opener

import cloudpickle
import dask
from distributed import Client

from dtrain.errors import one_line
from dtrain.runtime import board
from dtrain.runtime.board import plugin
from dtrain.runtime.board.mount import PAGE
from dtrain.runtime.board.plugin import TOPIC, BoardPlugin

for _module in (board, plugin):  # Dask asks for the very module of what it sends, cloudpickle for its packages too
    cloudpickle.register_pickle_by_value(_module)

LOG = logging.getLogger("dtrain")
PAGES = "individual-plots.json"
"""Beside the dashboard: the list of its pages; it is empty where Bokeh is not installed."""
ANSWER_SECONDS = 2.0
SEND_SECONDS = 0.5
"""Rounds that end sooner after one another are sent together."""
SWITCH = "dtrain.dashboard"
"""Of Dask's configuration: False adds no page (DASK_DTRAIN__DASHBOARD=False)."""
NO_LINK = (KeyError, OSError, TimeoutError, ValueError, HTTPException)
"""No dashboard, none that answers, or none of Dask."""


def dashboard_link(client: Client) -> str:
    """Return the link to the scheduler's dashboard; empty if it has none that answers."""
    try:
        link = str(client.dashboard_link or "")
        return link if link and _has_pages(_reachable(client, link)) else ""
    except NO_LINK:
        return ""


def _reachable(client: Client, link: str) -> str:
    """Return the link as this process can open it: one through JupyterHub is for a browser that is logged in."""
    if urlsplit(link).scheme in ("http", "https"):
        return link
    host = urlsplit(client.scheduler.address).hostname or "localhost"
    port = client.scheduler_info()["services"]["dashboard"]
    return f"http://{host}:{port}/status"


def _has_pages(link: str, page: str = "") -> bool:
    """Return True if a dashboard has pages, or a pane of that address."""
    direct = build_opener(ProxyHandler({}))  # a proxy does not know the machines of a cluster
    with direct.open(urljoin(link, PAGES), timeout=ANSWER_SECONDS) as answer:
        pages = json.load(answer)
    return page in pages.values() if page else bool(pages)


# The page -------------------------------------------------------------------------------------------------


def open_page(client: Client, link: str) -> str:
    """Add the page ``dtrain`` to the scheduler's dashboard, and return its link.

    Parameters
    ----------
    client : Client
    link : str
        To the dashboard; empty: Bokeh is not there, and only the numbers are added (``dtrain/state.json``).

    Returns
    -------
    str
        The link to the page, or, where there is none, `link`.
    """
    if not dask.config.get(SWITCH, True):
        return link
    try:
        client.register_plugin(BoardPlugin(_version(), _digest()))
        has_page = bool(link) and _has_pages(_reachable(client, link), f"/individual-{PAGE}-loss")
        return urljoin(link, PAGE) if has_page else link
    except Exception as error:  # whatever a scheduler of another version or configuration raises: training goes on
        LOG.warning("The page dtrain could not be added to Dask's dashboard: %s. Training goes on.", one_line(error))
        return link


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in version("dtrain").split(".") if part.isdigit())


def _digest() -> str:
    """Return what names the source of the plugin."""
    files = sorted(Path(board.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


class Messages:
    """Sends what happens in a run to the page, without waiting.

    Parameters
    ----------
    client : Client
    run_id : str
    now : callable
        A monotonic clock, in seconds.
    """

    def __init__(self, client: Client, run_id: str, now: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._run_id = run_id
        self._now = now
        self._rows: list[Mapping[str, Any]] = []
        self._sent = 0.0
        self._begun = False

    def publish(self, message: Mapping[str, Any]) -> None:
        """Send a message: ``start``, ``round``, ``fault`` or ``end``, with plain values."""
        if message["event"] == "round":
            self._rows.append({name: value for name, value in message.items() if name != "event"})
            if self._now() - self._sent >= SEND_SECONDS:
                self._flush()
            return
        self._begun = self._begun or message["event"] == "start"
        self._flush()
        self._send(message)

    def close(self, text: str = "stopped") -> None:
        """Say that the run has ended, if it has not been said."""
        if self._begun:
            self.publish({"event": "end", "text": text})

    def _flush(self) -> None:
        if self._rows:
            self._send({"event": "rounds", "rows": self._rows})
            self._rows, self._sent = [], self._now()

    def _send(self, message: Mapping[str, Any]) -> None:
        if message["event"] == "end":
            self._begun = False
        try:
            self._client.loop.add_callback(
                _sent, self._client, {**message, "run": self._run_id, "client": self._client.id}
            )
        except Exception:  # the client is closed: nobody looks at the page through it
            self._begun = False


async def _sent(client: Client, message: dict[str, Any]) -> None:
    try:
        await client.scheduler.log_event(topic=TOPIC, msg=message)
    except Exception as error:  # the scheduler is gone, or busy: a page that misses a round harms nobody
        LOG.info("A message to the page dtrain was lost: %s", one_line(error))
