"""The link to Dask's dashboard is shown only where its page answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Client

from dtrain.runtime.dashboard import dashboard_link

Serve = Callable[[int, str], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A function that starts a server of one answer, and returns the address of its dashboard."""
    servers: list[HTTPServer] = []

    def start(status: int, body: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_pages = self.path == "/individual-plots.json"
                self.send_response(status if is_pages else 404)
                self.end_headers()
                self.wfile.write(body.encode() if is_pages else b"")

            def log_message(self, *values: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/status"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def client_with(link: str | None, port: int = 0) -> Any:
    return SimpleNamespace(
        dashboard_link=link,
        scheduler=SimpleNamespace(address="tcp://127.0.0.1:9"),
        scheduler_info=lambda: {"services": {"dashboard": port}},
    )


def test_a_page_that_answers(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    link = serve(200, '{"Individual Workers": "/individual-workers"}')
    assert dashboard_link(client_with(link)) == link
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert dashboard_link(client_with(link)) == link


def test_a_link_through_jupyterhub_is_looked_up_at_the_scheduler(serve: Serve) -> None:
    port = int(serve(200, '{"a": "/individual-a"}').rpartition(":")[2].partition("/")[0])
    link = "/user/me/proxy/8787/status"
    assert dashboard_link(client_with(link, port)) == link


@pytest.mark.parametrize(("status", "body"), [(200, "{}"), (404, ""), (500, "{"), (200, "<p>Dask needs bokeh</p>")])
def test_a_page_that_shows_nothing(serve: Serve, status: int, body: str) -> None:
    assert dashboard_link(client_with(serve(status, body))) == ""


@pytest.mark.parametrize("link", [None, "", "http://127.0.0.1:9/status", "http://[/status"])
def test_no_page(link: str | None) -> None:
    assert dashboard_link(client_with(link)) == ""


def test_a_scheduler_has_one_if_bokeh_is_there(client: Client) -> None:
    try:
        import bokeh  # type: ignore[import-not-found]  # noqa: F401

        assert dashboard_link(client).startswith("http://")
    except ImportError:
        assert dashboard_link(client) == ""
