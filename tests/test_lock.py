from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from dtrain import lock
from dtrain.errors import DiskFull, RunLocked
from dtrain.lock import holder, locked

HOLD = """
import sys
from pathlib import Path
from dtrain.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
print("released", flush=True)
"""


@contextmanager
def held_by_another_process(run):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def write_lock(run, host, age):
    path = run / "LOCK"
    path.write_text(json.dumps({"host": host, "pid": 77, "since": "2026-01-02T03:04:05+0000"}) + "\n")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_the_lock_names_its_holder_and_is_gone_afterwards(tmp_path):
    with locked(tmp_path):
        said = json.loads((tmp_path / "LOCK").read_text())
        assert (said["host"], said["pid"]) == (socket.gethostname(), os.getpid())
        assert abs(time.mktime(time.strptime(said["since"][:19], "%Y-%m-%dT%H:%M:%S")) - time.time()) < 100
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_another_process_is_refused_and_told_who_holds_it(tmp_path):
    with held_by_another_process(tmp_path) as process:
        with pytest.raises(RunLocked) as caught, locked(tmp_path):
            pass
        said = f"{tmp_path} is being trained by process {process.pid} on {socket.gethostname()} since 20"
        assert caught.value.message.startswith(said)
        assert caught.value.code == 4
        process.communicate("go\n")
    with locked(tmp_path):
        pass


def test_the_refused_one_leaves_the_lock_as_it_is(tmp_path):
    with held_by_another_process(tmp_path):
        before = (tmp_path / "LOCK").read_bytes()
        for _ in range(2):
            with pytest.raises(RunLocked), locked(tmp_path):
                pass
        assert (tmp_path / "LOCK").read_bytes() == before


def test_a_killed_holder_lets_go_at_once(tmp_path):
    with held_by_another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / "LOCK").exists()
        started = time.monotonic()
        with locked(tmp_path):
            assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()
        assert time.monotonic() - started < 5


def test_the_lock_is_released_when_training_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        pass


def test_the_same_process_cannot_take_it_twice(tmp_path):
    with locked(tmp_path):
        with pytest.raises(RunLocked, match=f"process {os.getpid()} "), locked(tmp_path):
            pass
        assert (tmp_path / "LOCK").exists()


def test_two_runs_have_two_locks(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with locked(tmp_path / "a"), locked(tmp_path / "b"):
        assert all((tmp_path / name / "LOCK").exists() for name in ("a", "b"))


# Other machines, where flock may not reach ----------------------------------------------------------------------


def test_a_fresh_lock_of_another_machine_is_respected(tmp_path):
    path = write_lock(tmp_path, "elsewhere", age=lock.STALE_SECONDS - 20)
    before = path.read_bytes()
    with pytest.raises(RunLocked, match="process 77 on elsewhere since 2026-01-02"), locked(tmp_path):
        pass
    assert path.read_bytes() == before


def test_a_stale_lock_of_another_machine_is_taken_over(tmp_path):
    write_lock(tmp_path, "elsewhere", age=lock.STALE_SECONDS + 20)
    with locked(tmp_path):
        assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "LOCK").exists()


def test_a_lock_of_another_machine_with_a_date_in_the_future_is_watched(tmp_path, monkeypatch):
    """Of a machine whose clock is wrong, or of a run that was copied with its dates."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    path = write_lock(tmp_path, "elsewhere", age=-86_400)
    ahead = path.stat().st_mtime
    done = threading.Event()

    def beat():
        while not done.wait(0.1):
            os.utime(path, (ahead, path.stat().st_mtime + 1))

    holder = threading.Thread(target=beat)
    holder.start()
    try:
        with pytest.raises(RunLocked, match="process 77 on elsewhere"), locked(tmp_path):
            pass
    finally:
        done.set()
        holder.join()
    with locked(tmp_path):  # nobody touches it any more
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_of_this_machine_that_nobody_holds_is_taken_however_fresh(tmp_path):
    write_lock(tmp_path, socket.gethostname(), age=0)
    with locked(tmp_path):
        assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "garbage", "[1]", "3", "null", '{"host"', "\xff"])
def test_a_lock_that_says_nothing_is_taken(tmp_path, text):
    (tmp_path / "LOCK").write_bytes(text.encode("latin-1"))
    with locked(tmp_path):
        assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()


def test_the_holder_keeps_the_lock_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    with locked(tmp_path):
        long_ago = time.time() - 1000
        os.utime(tmp_path / "LOCK", (long_ago, long_ago))
        deadline = time.monotonic() + 10
        while (tmp_path / "LOCK").stat().st_mtime < long_ago + 500 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - (tmp_path / "LOCK").stat().st_mtime < 10


def test_a_lock_is_stale_only_after_several_beats():
    assert lock.STALE_SECONDS >= 3 * lock.BEAT_SECONDS


# Looking without taking -----------------------------------------------------------------------------------------


def test_the_holder_can_be_asked_for(tmp_path):
    assert holder(tmp_path) is None
    assert holder(tmp_path / "nothing") is None
    with held_by_another_process(tmp_path) as process:
        assert holder(tmp_path)["pid"] == process.pid
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert holder(tmp_path) is None
    write_lock(tmp_path, "elsewhere", age=0)
    assert holder(tmp_path)["host"] == "elsewhere"
    write_lock(tmp_path, "elsewhere", age=1000)
    assert holder(tmp_path) is None
    (tmp_path / "LOCK").write_text("garbage")
    assert holder(tmp_path) is None


def test_asking_takes_nothing(tmp_path):
    write_lock(tmp_path, socket.gethostname(), age=0)
    before = (tmp_path / "LOCK").stat().st_mtime, (tmp_path / "LOCK").read_bytes()
    holder(tmp_path)
    assert ((tmp_path / "LOCK").stat().st_mtime, (tmp_path / "LOCK").read_bytes()) == before
    with locked(tmp_path):
        assert holder(tmp_path)["pid"] == os.getpid()


# Disks ----------------------------------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_written_is_exit_code_8(tmp_path, monkeypatch):
    with pytest.raises(DiskFull, match="LOCK cannot be written: No such file") as caught, locked(tmp_path / "gone"):
        pass
    assert caught.value.code == 8

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFull, match="No space left"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass
