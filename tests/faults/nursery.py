"""A process that has imported PyTorch and Dask, and forks drivers, schedulers and workers: they start at once.

It reads one JSON object a line from stdin. {"argv": [...], "cwd": ..., "out": ..., "err": ...} starts a program, and is
answered with its process id; {"poll": pid} is answered with its exit code, or null while it runs.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dtrain_cli.main import DASK_LOGGING

FROZEN_SECONDS = 4.0
"""In place of dtrain's 30 s."""
MODULES = {
    "dtrain": "dtrain_cli.main",
    "scheduler": "distributed.cli.dask_scheduler",
    "worker": "distributed.cli.dask_worker",
}


class Nursery:
    """Starts the process, and asks it for others."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == {"ready": True}

    def start(self, *argv: str, where: Path, out: Path | None = None, err: Path | None = None) -> int:
        """Start a program; return its process id."""
        asked = {"argv": argv, "cwd": str(where), "out": str(out or os.devnull), "err": str(err or os.devnull)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._read()["pid"])

    def poll(self, pid: int) -> int | None:
        """Return the exit code of a program, minus the signal that ended it; None while it runs."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"poll": pid}) + "\n")
        self._process.stdin.flush()
        code: int | None = self._read()["code"]
        return code

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End it, and all that it has started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _run(asked: dict[str, Any]) -> None:
    """Become the program that is asked for."""
    for descriptor, path in ((0, os.devnull), (1, asked["out"]), (2, asked["err"])):
        own = os.open(path, (os.O_WRONLY | os.O_CREAT | os.O_APPEND) if descriptor else os.O_RDONLY, 0o600)
        os.dup2(own, descriptor)
    os.chdir(asked["cwd"])
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    name, *arguments = asked["argv"]
    sys.argv = [name, *arguments]
    code = 0
    try:
        importlib.import_module(MODULES[name]).main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Fork what is asked for, until stdin is closed."""
    os.environ["DASK_LOGGING"] = repr(DASK_LOGGING)  # as the command sets it before Dask is imported
    for module in ("torch", "dtrain.trainer", "dtrain.runtime.remote", "distributed.nanny", *MODULES.values()):
        importlib.import_module(module)
    from dtrain.runtime import frozen

    frozen.Heartbeats.__init__.__defaults__ = (FROZEN_SECONDS, time.monotonic)
    answer = os.fdopen(os.dup(1), "w")
    print(json.dumps({"ready": True}), file=answer, flush=True)
    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            pid = asked["poll"]
            if codes[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                codes[pid] = os.waitstatus_to_exitcode(status) if ended else None
            print(json.dumps({"code": codes[pid]}), file=answer, flush=True)
            continue
        if (pid := os.fork()) == 0:
            answer.close()
            _run(asked)
        codes[pid] = None
        print(json.dumps({"pid": pid}), file=answer, flush=True)
    for pid in [pid for pid, code in codes.items() if code is None]:
        os.kill(pid, signal.SIGKILL)  # it is not reaped: the id is its own
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
