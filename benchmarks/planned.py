"""What `dtrain plan` says a round and a worker's memory will be, beside what they are.

    python benchmarks/planned.py digits lm ... examples/forecast/dtrain.toml

A name is a template of `dtrain init`, a path is a config file whose data is there. Each is planned and then trained on
a local cluster, in a fresh run directory. A round: the median of those after the first; rounds are planned for cores
that nothing else needs. Memory: the most that a worker's process held at any time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

DTRAIN = str(Path(sysconfig.get_path("scripts"), "dtrain"))
LOOK_SECONDS = 0.05
MB = 1e6


@dataclass(frozen=True)
class Row:
    name: str
    planned_seconds: float
    seconds: float
    planned_bytes: int
    bytes: int

    def __str__(self) -> str:
        time_ratio, memory_ratio = self.planned_seconds / self.seconds, self.planned_bytes / self.bytes
        return (
            f"{self.name:22} {self.planned_seconds:8.2f} {self.seconds:8.2f} {time_ratio:6.2f}   "
            f"{self.planned_bytes / MB:8.0f} {self.bytes / MB:8.0f} {memory_ratio:6.2f}"
        )


def worker_bytes(driver: psutil.Process) -> int:
    """Return the memory of the largest process that a driver has started: a worker of its local cluster."""
    most = 0
    for process in driver.children(recursive=True):
        try:
            most = max(most, process.memory_info().rss)
        except psutil.Error:
            continue
    return most


def train(config: Path, runs: Path) -> int:
    """Train, and return the peak memory of the workers."""
    command = [DTRAIN, "-q", "train", str(config), "--run", "measured", "--set", f"run.dir={runs}"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    watched, most = psutil.Process(driver.pid), 0
    while driver.poll() is None:
        most = max(most, worker_bytes(watched))
        time.sleep(LOOK_SECONDS)
    if driver.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {driver.returncode}")
    return most


def measured(config: Path, folder: Path, name: str) -> Row:
    said = subprocess.run([DTRAIN, "-q", "--json", "plan", str(config)], check=True, capture_output=True, text=True)
    plan = json.loads(said.stdout.splitlines()[-1])
    most = train(config, folder / "runs")
    rows = [json.loads(line) for line in (folder / "runs" / "measured" / "history.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows]
    return Row(name, plan["round_seconds"], statistics.median(seconds[1:] or seconds), plan["worker_bytes"], most)


def main(names: Sequence[str]) -> list[Row]:
    print(f"{'':22}    s a round               MB of a worker")
    print(f"{'':22}  planned     true  ratio    planned     true  ratio")
    rows = []
    for name in names:
        folder = Path(tempfile.mkdtemp())
        try:
            config = Path(name)
            if not name.endswith(".toml"):
                config = folder / name / "dtrain.toml"
                subprocess.run([DTRAIN, "-q", "init", str(config.parent), "--template", name], check=True)
            rows.append(measured(config, folder, config.parent.name))
            print(rows[-1], flush=True)
        finally:
            shutil.rmtree(folder)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="TEMPLATE_OR_CONFIG")
    main(parser.parse_args(sys.argv[1:]).names)
