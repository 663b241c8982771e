"""Does training wait for data? Two workers out of core, beside the same steps on tensors in memory in two processes.

Run: python benchmarks/training.py [--rows 524288] [--rounds 6] [--hidden 512]

The store holds float32[rows, 256] in blosc chunks of 4,096 rows. The same model (two layers), the same batches of 256,
the same number of steps:

    dtrain        a local cluster of two workers; data.memory holds a part of the data, and none is cached
    dtrain warm   the same, all units cached after the first pass
    own loop      two processes, each with `dtrain.batches` over half of the data and the loop of "in memory": the data
                  path without rounds
    own loop warm the same, all units cached
    in memory     two processes, each with half of the data as tensors: the gather of a batch, and the step

An epoch's time is that of a round less its first one. Steps compete with decoding for the same cores, so that with
decoding c_d and steps c_s core-seconds an epoch cannot take less than (c_d + c_s) / 2: `limit`, from the processor
time of decoding alone and of the in-memory processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from resume import write
from torch import nn

ROW, BATCH = 256, 256


def build(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(ROW, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Flatten(0))


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return ((outputs - targets.float()) ** 2).mean()


def run_epochs(model: nn.Module, one_pass: Any, epochs: int, start: Any, out: Any) -> None:
    """Train for some passes; tell the seconds and processor seconds of each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    for _ in range(epochs):
        start.wait()
        began, used = time.monotonic(), time.process_time()
        for inputs, targets in one_pass():
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            optimizer.step()
        start.wait()
        out.put((time.monotonic() - began, time.process_time() - used))


def in_memory(rows: int, hidden: int, epochs: int, start: Any, out: Any) -> None:
    """Train on half of the rows as tensors."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(rows // 2, ROW), torch.zeros(rows // 2)
    model = build(hidden)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(x))
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            yield x[batch], y[batch]

    run_epochs(model, batches, epochs, start, out)


def own_loop(replica: int, path: str, rows: int, hidden: int, epochs: int, cache: str, start: Any, out: Any) -> None:
    """Train on half of the rows out of a store, as `in_memory` does on tensors."""
    import dtrain

    torch.set_num_threads(1)
    torch.manual_seed(0)
    samples = dtrain.open_samples(path, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})
    batches = dtrain.batches(
        samples, batch_size=BATCH, replica=replica, replicas=2, epochs=epochs, memory="2GB", cache=cache
    )
    model = build(hidden)

    def one_pass() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in itertools.islice(batches, rows // 2 // BATCH):
            yield batch.inputs[0], batch.targets

    run_epochs(model, one_pass, epochs, start, out)


def epochs_of(target: Any, arguments: list[tuple[Any, ...]], epochs: int) -> list[tuple[float, float]]:
    """Return, by epoch, seconds and processor seconds of two processes."""
    context = mp.get_context("spawn")
    start, out = context.Barrier(2), context.Queue()
    workers = [context.Process(target=target, args=(*given, start, out)) for given in arguments]
    for worker in workers:
        worker.start()
    found = [out.get() for _ in range(2 * epochs)]
    for worker in workers:
        worker.join()
    pairs = [found[2 * k : 2 * k + 2] for k in range(epochs)]
    return [(max(a[0], b[0]), a[1] + b[1]) for a, b in pairs]


def dtrain_rounds(path: Path, hidden: int, rounds: int, cache: str) -> tuple[list[float], list[float], list[float]]:
    """Return by round its seconds, those of its longest task, and those that its steps waited for batches."""
    import dtrain

    samples = dtrain.open_samples(
        path, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0}, memory="2GB", cache=cache
    )
    train = {"loss": "training:loss", "rounds": rounds, "batch_size": BATCH, "optimizer_args": {"lr": 1e-12}}
    config = dtrain.TrainConfig(train=train, average={"replicas": 2}, cluster={"workers": 2}, run={"commit_every": 100})
    seconds, local, waited = [], [], []
    for result in dtrain.train_rounds("training:build", samples, config=config, model_args={"hidden": hidden}):
        seconds.append(result.seconds)
        local.append(max(c.seconds for c in result.contributions))
        waited.append(max(c.waited for c in result.contributions))
    return seconds, local, waited


def decode_seconds(path: Path) -> float:
    """Return the processor seconds that decoding all units takes."""
    from dtrain.data.plan.partition import plan_data
    from dtrain.data.read.units import UnitReader
    from dtrain.data.source import open_samples

    samples = open_samples(path, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})
    plan, reader = plan_data(samples, replicas=2, seed=0), UnitReader(samples)
    slots = {name: values for name, (_, values) in reader.read(plan.unit_box(0)).items()}
    used = time.process_time()
    for unit in range(plan.num_units):
        reader.read_into(plan.unit_box(unit), slots)
    return time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1 << 19)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = ("in memory", "limit", "own loop", "own loop warm", "dtrain", "dtrain warm")
    found: dict[str, list[float]] = {name: [] for name in (*names, "steps", "steps warm", "waited")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.zarr"
        write(path, options.rows)
        for _ in range(options.repeats):
            epochs = epochs_of(in_memory, [(options.rows, options.hidden, options.rounds)] * 2, options.rounds)[1:]
            found["in memory"] += [seconds for seconds, _ in epochs]
            decoding = decode_seconds(path)
            found["limit"] += [(decoding + used) / 2 for _, used in epochs]
            for cache, warm in (("0", ""), ("auto", " warm")):
                given = [(n, str(path), options.rows, options.hidden, options.rounds, cache) for n in range(2)]
                found[f"own loop{warm}"] += [s for s, _ in epochs_of(own_loop, given, options.rounds)[2:]]
                seconds, local, waited = dtrain_rounds(path, options.hidden, options.rounds, cache)
                found[f"dtrain{warm}"] += seconds[2:]
                found[f"steps{warm}"] += local[2:]
                found["waited"] += waited[2:]
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name in names:
        print(
            f"{name:<13} {medians[name]:>7.2f} s an epoch   {options.rows / medians[name]:>10,.0f} samples/s   "
            f"{medians['limit'] / medians[name]:.2f} of limit   {medians['in memory'] / medians[name]:.2f} of memory"
        )
    print(
        f"of a round the longest task took {medians['steps']:.2f} s, warm {medians['steps warm']:.2f} s; "
        f"its steps waited for batches {medians['waited']:.3f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
