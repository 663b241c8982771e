"""Run one engine in a process of its own: time and memory of its passes, and a check that every row came once."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np
import psutil
import shuffle_score
import stores
import torch
from peers import ENGINES
from peers.engine import BATCH, Batches, Facts, Settings, sampled

RUN = 4096
TIMED_PASSES = 3
ENOUGH_SECONDS = 2.5


class Pass:
    """One pass: the label and the first feature of each row in the order of delivery, and the time it took."""

    def __init__(self, rows: int) -> None:
        # written to, so that the pages are there before memory is counted
        self.labels, self.firsts = np.full(rows, -1, np.int64), np.full(rows, -1, np.float32)
        self.rows = 0
        self.seconds = self.cpu = 0.0

    def take(self, batches: Batches, look: bool) -> None:
        before, began, at = core_seconds(), time.perf_counter(), 0
        for x, y in batches:
            stop = at + len(y)
            if look:
                self.labels[at:stop] = y.numpy()
                self.firsts[at:stop] = x[:, 0].numpy()
            at = stop
        self.seconds, self.rows = time.perf_counter() - began, at
        self.cpu = core_seconds() - before

    def check(self, expected: np.ndarray) -> None:
        """Raise unless each expected row came exactly once, with its own label."""
        if self.rows != len(expected):
            raise AssertionError(f"{self.rows} rows came of {len(expected)}.")
        if not np.array_equal(np.sort(self.labels), expected):
            raise AssertionError("Some rows came twice, others not at all.")
        if not np.array_equal(self.firsts, stores.first_column(self.labels)):
            raise AssertionError("Rows came with the labels of others.")

    def mixed(self) -> float:
        """Return from how many different runs of 4,096 rows a batch comes, on average."""
        runs = np.sort(self.labels[: self.rows // BATCH * BATCH].reshape(-1, BATCH) // RUN, axis=1)
        return float((1 + (np.diff(runs, axis=1) != 0).sum(axis=1)).mean())


def core_seconds() -> float:
    """Return user + system time of this process, and of those that it has started and that are running."""
    workers = family(psutil.Process())[1:]
    return time.process_time() + sum(sum(worker.cpu_times()[:2]) for worker in workers)


def say(event: str, **values: Any) -> None:
    print("\n@" + json.dumps({"event": event, **values}), flush=True)


def child(task: Facts) -> None:
    engine, facts, settings = ENGINES[task["engine"]], task["store"], task["settings"]
    torch.set_num_threads(1)  # tensors are only copied here; threads that spin while they wait take the cores
    if task["convert"]:
        assert engine.conversion is not None
        say("done", **engine.conversion.write(facts, settings))
        return
    for name in engine.modules:
        importlib.import_module(name)
    if reason := engine.missing():
        say("left out", reason=reason)
        return
    expected = sampled(facts, settings)
    made = [Pass(len(expected)) for _ in range(1 + TIMED_PASSES)]
    memory = psutil.Process().memory_info()
    say("ready", rss=memory.rss, private=memory.rss - getattr(memory, "shared", 0))
    began = time.perf_counter()
    passes = engine.prepare(facts, settings)
    prepared = time.perf_counter() - began
    made[0].take(passes(0), look=True)
    done = 1
    while done <= TIMED_PASSES and sum(one.seconds for one in made[1:done]) < ENOUGH_SECONDS:
        made[done].take(passes(done), look=engine.role != "decode")
        done += 1
    say("passed")
    for one in made[: 1 if engine.role == "decode" else done]:
        if engine.role != "gather":
            one.check(expected)
    within, across = shuffle_score.scores(made[0].labels, BATCH)
    say(
        "done",
        rows=len(expected),
        passes=[{"seconds": one.seconds, "cpu": one.cpu} for one in made[1:done]],
        seconds=statistics.median(one.seconds for one in made[1:done]),
        cpu=statistics.median(one.cpu for one in made[1:done]),
        first_seconds=prepared + made[0].seconds,
        mixed=made[0].mixed(),
        within=within,
        across=across,
        sum_y=int(made[0].labels.sum()),
        sum_x0=float(made[0].firsts.sum(dtype=np.float64)),
    )


class Peak(threading.Thread):
    """Samples the resident bytes of a process and its children."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.rss = self.private = 0
        self.over = threading.Event()

    def run(self) -> None:
        members, count = [self.process], 0
        while not self.over.wait(0.05):
            if count % 5 == 0:
                members = family(self.process)
            count += 1
            rss = private = 0
            for member in members:
                try:
                    memory = member.memory_info()
                except psutil.Error:
                    continue
                rss += memory.rss
                private += memory.rss - getattr(memory, "shared", 0)
            self.rss, self.private = max(self.rss, rss), max(self.private, private)


def family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return [process]


def stop(pid: int) -> None:
    """End a process and its children."""
    try:
        members = family(psutil.Process(pid))
    except psutil.Error:
        return
    for member in reversed(members):
        try:
            member.kill()
        except psutil.Error:
            continue


def run(
    name: str, facts: Facts, settings: Settings, timeout: float, newest: str | None, convert: bool = False
) -> Facts:
    """Run one engine in a process of its own; return its figures, or the reason why it failed or was left out.

    ``newest`` is the interpreter of the engines that need a newer one. It ignores PYTHONPATH, so that it does not find
    the packages of this one.
    """
    result = {"engine": name, "store": facts["layout"], "rows_of_store": facts["rows"], "settings": settings}
    if ENGINES[name].newest and newest is None:
        return result | {"left out": "needs --python-newest"}
    interpreter = [newest, "-E"] if ENGINES[name].newest else [sys.executable]
    task = json.dumps({"engine": name, "store": facts, "settings": settings, "convert": convert})
    events: dict[str, Facts] = {}
    peak: Peak | None = None
    expired = threading.Event()
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [*interpreter, __file__, task],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"TMPDIR": folder},
        )
        timer = threading.Timer(timeout, lambda: (expired.set(), stop(process.pid)))
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith('@{"event"'):
                    continue
                event = json.loads(line[1:])
                events[event.pop("event")] = event
                if "ready" in events and peak is None:
                    peak = Peak(process.pid)
                    peak.start()
                if "passed" in events and peak is not None:
                    peak.over.set()
            process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                stop(process.pid)
                process.wait()
            if peak is not None:
                peak.over.set()
                peak.join()
        errors.seek(0)
        tail = errors.read()[-4000:]
    if "left out" in events:
        return result | {"left out": events["left out"]["reason"]}
    if "done" not in events:
        return result | {"failed": f"no end after {timeout:g} s" if expired.is_set() else tail}
    if peak is not None:
        result["peak_rss"] = peak.rss - events["ready"]["rss"]
        result["peak_private"] = peak.private - events["ready"]["private"]
    return result | events["done"]


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
