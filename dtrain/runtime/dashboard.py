"""The link to Dask's dashboard, where there is one: the scheduler needs bokeh for it."""

from __future__ import annotations

import json
from http.client import HTTPException
from urllib.parse import urljoin, urlsplit
from urllib.request import ProxyHandler, build_opener

from distributed import Client

PAGES = "individual-plots.json"
"""Beside the dashboard: the list of its pages; it is empty where bokeh is not installed."""
ANSWER_SECONDS = 2.0


def dashboard_link(client: Client) -> str:
    """Return the link to the scheduler's dashboard; empty if it has none that answers."""
    try:
        link = str(client.dashboard_link or "")
        return link if link and _has_pages(_reachable(client, link)) else ""
    except (
        KeyError,
        OSError,
        TimeoutError,
        ValueError,
        HTTPException,
    ):  # none, none that answers, or not of Dask
        return ""


def _reachable(client: Client, link: str) -> str:
    """Return the link as this process can open it: one through JupyterHub is for a browser that is logged in."""
    if urlsplit(link).scheme in ("http", "https"):
        return link
    host = urlsplit(client.scheduler.address).hostname or "localhost"
    port = client.scheduler_info()["services"]["dashboard"]
    return f"http://{host}:{port}/status"


def _has_pages(link: str) -> bool:
    direct = build_opener(ProxyHandler({}))  # a proxy does not know the machines of a cluster
    with direct.open(urljoin(link, PAGES), timeout=ANSWER_SECONDS) as answer:
        return bool(json.load(answer))
