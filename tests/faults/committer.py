"""A process that commits rounds in forks of its own; each stops first, so that it can be watched from outside.

It reads one JSON object a line from stdin. {"run": DIR, "round": n, "way": "held" or "files"} is answered with the
process id of a fork that has stopped; {"wait": pid} with its exit code: 0 if it is committed, 8 for a disk error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from dtrain.checkpoint import FORMAT, uncommitted
from dtrain.errors import DiskFull
from dtrain.files import write_bytes
from dtrain.runfiles import sha256
from dtrain.statefiles import STATE, state_files, stored_state
from dtrain.types import StateFile, StoredState, TrainState
from tests.test_checkpoint import STATES, commit, described


def as_files(state: TrainState, directory: Path) -> StoredState:
    """Write the parts of a state to files, as workers do."""
    files: dict[str, StateFile] = {}
    described: dict[str, Any] = {}
    for name, data in state_files(state, "plan", FORMAT):
        assert isinstance(data, bytes)
        if name == STATE:
            described = json.loads(data)
        else:
            write_bytes(directory / name, data)
            files[name] = StateFile(directory / name, len(data), sha256(data))
    return stored_state(described, files)[0]


def committed(run: Path, number: int, way: str) -> int:
    """Commit a round; return the exit code."""
    try:
        if way == "held":
            commit(run, STATES[number])
            return 0
        with uncommitted(run) as directory:
            commit(run, as_files(STATES[number], directory(number)))
        return 0
    except DiskFull as error:
        return error.code


def _answer(asked: dict[str, Any]) -> int:
    if "wait" in asked:
        return os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            code = committed(Path(asked["run"]), asked["round"], asked["way"])
        finally:
            os._exit(code)
    os.waitpid(pid, os.WUNTRACED)
    return pid


def main(scratch: Path) -> None:
    """Import what a commit imports, then answer."""
    torch.set_num_threads(1)
    for way in ("held", "files"):
        committed(described(scratch / way), 1, way)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
