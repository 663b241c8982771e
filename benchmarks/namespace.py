"""A network namespace of its own, whose loopback interface is as slow as a wire."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INSIDE = "DTRAIN_WIRE_NAMESPACE"
MTU = 1500
BURST, LATENCY = "256kb", "50ms"


def enter() -> None:
    """Start this program again in a network namespace of its own, and return there; else exit with a sentence."""
    if INSIDE in os.environ:
        _call("ip", "link", "set", "lo", "mtu", str(MTU), "up")
        return
    if absent := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        sys.exit(f"{' and '.join(absent)} not found: install the package iproute2 (apt-get install iproute2).")
    apart = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        sys.exit(f"`{' '.join(apart)}` is not allowed here: run as root on Linux, in a container with CAP_SYS_ADMIN.")
    os.environ[INSIDE] = "1"
    os.execvp(apart[0], [*apart, sys.executable, *sys.argv])


def narrow(rate: float) -> None:
    """Let at most `rate` bits a second pass, of all processes together."""
    limits = ["rate", f"{rate:.0f}bit", "burst", BURST, "latency", LATENCY]
    _call("tc", "qdisc", "replace", "dev", "lo", "root", "tbf", *limits)


def widen() -> None:
    """Lift the limit, if there is one."""
    subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], capture_output=True)


@contextmanager
def narrowed(rate: float) -> Iterator[None]:
    narrow(rate)
    try:
        yield
    finally:
        widen()


def bytes_sent() -> int:
    """Return the bytes that have passed since the start, headers included."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    counts = next(line.split(":")[1].split() for line in lines if line.strip().startswith("lo:"))
    return int(counts[8])


def passing_rate(size: int) -> float:
    """Return the bits a second at which one connection sends `size` bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def receive() -> None:
            connection, _ = server.accept()
            with connection:
                left = size
                while left:
                    left -= len(connection.recv(1 << 20))
                connection.sendall(b"!")

        receiver = threading.Thread(target=receive)
        receiver.start()
        with socket.create_connection(server.getsockname()) as sender:
            began = time.perf_counter()
            sender.sendall(bytes(size))
            sender.recv(1)
            seconds = time.perf_counter() - began
        receiver.join()
    return 8 * size / seconds


def _call(*command: str) -> None:
    subprocess.run(command, check=True)
