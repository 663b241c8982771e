"""Servers on loopback for tests of remote stores: one of files, which fails as it is told to, and one of S3."""

from __future__ import annotations

import logging
import re
import socket
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

Fault = int | str


class Request(NamedTuple):
    method: str
    key: str
    status: int


class FileServer:
    """Serves a directory over HTTP, keeps a log of requests, and fails as it is told to.

    Parameters
    ----------
    root : Path
    ranges : bool
        Whether it answers requests for a part of a file with that part; if not, with the whole file.
    pages : bool
        Whether it shows what a directory holds, with links like those of Apache.
    """

    def __init__(self, root: Path, *, ranges: bool = True, pages: bool = False) -> None:
        self.root = root
        self.ranges = ranges
        self.pages = pages
        self.token = ""
        """What every request must show as its authorization."""
        self.log: list[Request] = []
        self.released = threading.Event()
        self._faults: dict[str, tuple[Fault, int]] = {}
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"files": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, pattern: str, fault: Fault, times: int = 1_000_000) -> None:
        """Fail the first requests for each key that matches, with a status or in another way.

        "stall" does not answer, "drop" closes the connection, "short" breaks off in the middle.
        """
        self._faults[pattern] = (fault, times)

    def mend(self) -> None:
        """Fail no further."""
        self._faults.clear()
        self._asked.clear()

    def requests(self, pattern: str = "") -> list[Request]:
        return [request for request in self.log if re.search(pattern, request.key)]

    def fault(self, key: str) -> Fault | None:
        """Return how to fail this time, if at all."""
        for pattern, (fault, times) in self._faults.items():
            if re.search(pattern, key):
                with self._lock:
                    self._asked[key] += 1
                    if self._asked[key] <= times:
                        return fault
        return None

    def stop(self) -> None:
        """Refuse connections, and end those that are open."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # they are waited for
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that gave up


class _Handler(BaseHTTPRequestHandler):
    files: FileServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet for head and body

    def do_GET(self) -> None:
        files, key = self.files, unquote(self.path.lstrip("/"))
        fault = files.fault(key)
        path = files.root / key
        status, data = 404, b""
        headers = {}
        if path.is_file():
            status, data = 200, path.read_bytes()
            asked = self.headers.get("Range")
            if asked and files.ranges:
                status, data, headers["Content-Range"] = _part(data, asked)
        elif path.is_dir() and files.pages:
            links = ["?C=N;O=D", "/", *(f"{p.name}/" if p.is_dir() else p.name for p in sorted(path.iterdir()))]
            status, data = 200, "".join(f'<a href="{link}">{link}</a>\n' for link in links).encode()
            headers["Content-Type"] = "text/html"
        if files.token and self.headers.get("Authorization") != files.token:
            fault = 401
        if isinstance(fault, int):
            status, data = fault, b""
        files.log.append(Request(self.command, key, status if fault is None or isinstance(fault, int) else 0))
        if fault == "stall":
            files.released.wait()
        if fault in ("stall", "drop"):
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "short":
            self.close_connection = True
            data = data[: len(data) // 2]
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


def _part(data: bytes, asked: str) -> tuple[int, bytes, str]:
    first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", asked).groups()
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(len(data), int(last) + 1) if first and last else len(data)
    if start >= len(data):
        return 416, b"", f"bytes */{len(data)}"
    return 206, data[start:stop], f"bytes {start}-{stop - 1}/{len(data)}"


class S3Server:
    """Moto's S3 with a log of requests."""

    key = "AKIAIOSFODNN7LOOPBACK"
    secret = "wJalrXUtnFEMIK7MDENGbPxRfiCYLOOPBACK"

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        self._server = self._moto._server
        self._server.app = self._logged(self._server.app)
        self.log: list[Request] = []

    def _logged(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def logged(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            def start(status: str, *args: Any) -> Any:
                method = "LIST" if "list-type" in environ["QUERY_STRING"] else environ["REQUEST_METHOD"]
                self.log.append(Request(method, environ["PATH_INFO"].lstrip("/"), int(status.split()[0])))
                return start_response(status, *args)

            return app(environ, start)

        return logged

    @property
    def url(self) -> str:
        host, port = self._moto.get_host_and_port()
        return f"http://{host}:{port}"

    @property
    def options(self) -> dict[str, Any]:
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.url}

    def put(self, key: str, data: bytes = b"", **headers: str) -> None:
        """Write an object, or make a bucket."""
        self._ask("PUT", key, data, **headers)

    def delete(self, key: str) -> None:
        self._ask("DELETE", key)

    def upload(self, folder: Path, key: str, **headers: str) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{key}/{file.relative_to(folder)}", file.read_bytes(), **headers)

    def check_credentials(self, check: bool) -> None:
        """Look at who asks from now on, or let everybody in."""
        self._ask("POST", "moto-api/reset-auth", b"0" if check else b"inf")

    def _ask(self, method: str, path: str, data: bytes | None = None, **headers: str) -> None:
        headers = {"Content-Type": "application/octet-stream", **headers}
        headers["Authorization"] = f"AWS4-HMAC-SHA256 Credential={self.key}/20260101/us-east-1/s3/aws4_request"
        request = urllib.request.Request(f"{self.url}/{path}", data, headers, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10):
            pass

    def stop(self) -> None:
        self._moto.stop()
        self._server.server_close()
