"""The kernel fails or kills the writer at each of its system calls: no committed round is lost, none is half there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.committed import committed_rounds, sweep
from tests.test_checkpoint import STATES, bits, commit, described, left_over, newest_state

CALLS = ("openat", "write", "fsync", "close", "mkdir", "rename")
FAULTS = ("error=ENOSPC", "error=EIO", "signal=SIGKILL")
STRACE = shutil.which("strace")


class Committer:
    """Asks `tests.faults.committer`, and traces its forks."""

    def __init__(self, scratch: Path) -> None:
        command = [sys.executable, "-m", "tests.faults.committer", str(scratch)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._read() == "ready"

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def _ask(self, **asked: Any) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def commit(self, run: Path, way: str, *options: str) -> int:
        """Commit round 2 under strace with more options; return the exit code."""
        assert STRACE is not None
        pid = self._ask(run=str(run), round=2, way=way)
        command = [STRACE, "-f", "-e", f"trace={','.join(CALLS)}", *options, "-p", str(pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            attached = tracer.stderr.readline()
            os.kill(pid, signal.SIGCONT)
            code = self._ask(wait=pid)
            if "attached" not in attached:
                pytest.skip(f"strace may not trace here: {attached.strip()}")
        return code

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def committer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Committer]:
    scratch = tmp_path_factory.mktemp("committer")
    for way in ("held", "files"):
        (scratch / way).mkdir()
    asked = Committer(scratch)
    yield asked
    asked.close()


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.sampled(2)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", ["held", "files"])
def test_the_writer_under_strace(committer: Committer, tmp_path: Path, way: str, fault: str) -> None:
    before = described(tmp_path / "before")
    commit(before, STATES[1])
    calm = shutil.copytree(before, tmp_path / "calm")
    assert committer.commit(calm, way, "-o", str(tmp_path / "log")) == 0
    expected = {1: bits(STATES[1]), 2: bits(newest_state(calm)[0])}  # another process may round another way
    counts = Counter(re.findall(r"^\d+ +(\w+)\(", (tmp_path / "log").read_text(), re.MULTILINE))
    assert set(counts) == set(CALLS)
    ends: Counter[tuple[int, int]] = Counter()
    for call, count in counts.items():
        for number in range(1, count + 1):
            run = shutil.copytree(before, tmp_path / f"{call}-{number}")
            options = ("-o", str(tmp_path / "log"), "-e", f"inject={call}:{fault}:when={number}")
            code = committer.commit(run, way, *options)
            newest = newest_state(run)[0]
            assert newest is not None
            assert bits(newest) == expected[newest.round]
            assert code in (0, -signal.SIGKILL if "SIGKILL" in fault else 8), (call, number)
            assert code != 0 or newest.round == 2, (call, number)
            assert code != 8 or left_over(run) == []
            ends[code, newest.round] += 1
            sweep(run)
            assert left_over(run) == []
            commit(run, STATES[2])
            assert committed_rounds(run) == [1, 2]
            shutil.rmtree(run)
    failed = -signal.SIGKILL if "SIGKILL" in fault else 8
    assert ends[failed, 1] > 20
    assert ends[failed, 2] > 0  # after the rename
