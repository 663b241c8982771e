"""How well is a bounded window shuffled? Entropy of batches, and the loss on sorted data after training.

Run: python benchmarks/shuffle.py [--seeds 5] [--json FILE]

Entropy: from how many units do the rows of a batch come, in bits (Shannon entropy of the shares of the units; a batch
from one unit has 0). Beside dtrain's window of B units, which needs the memory of B:

    block, same memory    B / 2 units are read and shuffled while B / 2 others are used
    block, twice          B units are read and shuffled while B others are used: the memory of 2 B
    full                  all rows of the pass

Loss: two data sets that are stored in the worst order. "Classes": a mixture of 50 Gaussians, one class after the other.
"Time": a regression of which input and noise drift with the seasons and with a trend. Four replicas of 1,000 units
each, a window of 64 units as for 1 GB a replica (100 GB on 100 workers), averaged every 250 steps, two passes, cosine
schedule. Each order trains from each seed with the same settings through dtrain itself;
only the order differs. What counts is the loss on held-out rows at the end: does it lie within what five seeds of a
full shuffle give?
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import nn

import dtrain
import dtrain.resolve
from dtrain.data.load import schedule
from dtrain.data.plan.bins import PartRows
from dtrain.data.plan.order import RowRun, epoch_order
from dtrain.data.plan.partition import plan_data
from dtrain.data.plan.units import DataPlan

Ints = npt.NDArray[np.int64]

FEATURES, CLASSES, ROWS, UNIT, WINDOW, REPLICAS = 32, 50, 444_500, 100, 64, 4
ORDERS = ("full", "dtrain", "block, twice", "block, same memory", "as stored")


# Orders --------------------------------------------------------------------------------------------------------------


def block_order(sizes: Ints, blocks: int, keys: tuple[int, int, int]) -> tuple[Ints, Ints]:
    """Return part and row: units in random order, the rows of so many of them shuffled together."""
    rng = np.random.default_rng(keys)
    order = rng.permutation(len(sizes))
    parts, rows = [], []
    for start in range(0, len(order), blocks):
        chosen = order[start : start + blocks]
        part = np.repeat(chosen, sizes[chosen])
        row = np.concatenate([np.arange(sizes[p]) for p in chosen.tolist()])
        mixed = rng.permutation(len(part))
        parts.append(part[mixed])
        rows.append(row[mixed])
    return np.concatenate(parts), np.concatenate(rows)


def blocks_of(blocks: int, sizes: Ints, *, mixed_units: int, position: int = 0, **keys: Any) -> Iterator[RowRun]:
    """Yield a pass of `block_order` in the form that the loader takes."""
    if not keys["shuffle"]:
        yield from epoch_order(sizes, mixed_units=mixed_units, position=position, **keys)
        return
    part, row = block_order(sizes, blocks, (keys["seed"], keys["replica"], keys["epoch"]))
    part, row = part[position:], row[position:]
    yield RowRun(len(part), partial(PartRows, part, row), tuple(dict.fromkeys(part.tolist())), -1)


def planned(window: int, samples: Any, **options: Any) -> DataPlan:
    """Return dtrain's plan with units and window scaled down."""
    plan = plan_data(samples, **options)
    return replace(plan, unit_rows=UNIT, cell_rows=UNIT, window=window)


# Entropy -------------------------------------------------------------------------------------------------------------


def entropy(parts: Ints, batch: int) -> float:
    """Return the mean over batches of the entropy, in bits, of the units that their rows come from."""
    found = []
    for start in range(0, len(parts) - batch + 1, batch):
        shares = np.unique(parts[start : start + batch], return_counts=True)[1] / batch
        found.append(float(-(shares * np.log2(shares)).sum()))
    return statistics.fmean(found)


def entropies(units: int, rows: int, window: int, batch: int) -> dict[str, float]:
    """Return the entropy of each order, ends of the pass included."""
    sizes = np.full(units, rows)
    ours = epoch_order(sizes, mixed_units=window, shuffle=True, seed=0, replica=0, epoch=0)
    return {
        "dtrain": entropy(np.concatenate([run.part for run in ours]), batch),
        "block, same memory": entropy(block_order(sizes, window // 2, (0, 0, 0))[0], batch),
        "block, twice": entropy(block_order(sizes, window, (0, 0, 0))[0], batch),
        "full": entropy(np.random.default_rng(0).permutation(np.repeat(np.arange(units), rows)), batch),
    }


# Sorted data ---------------------------------------------------------------------------------------------------------


def classes(rng: np.random.Generator) -> tuple[Any, Any]:
    centres = rng.normal(size=(CLASSES, FEATURES)) * 0.45
    y = np.sort(rng.integers(CLASSES, size=ROWS))
    return centres[y] + rng.normal(size=(ROWS, FEATURES)), y


def time(rng: np.random.Generator) -> tuple[Any, Any]:
    t = np.linspace(0, 1, ROWS)
    season = np.stack([np.sin(2 * np.pi * (3 * t + k / FEATURES)) for k in range(FEATURES)], axis=1)
    x = season + 1.5 * t[:, None] + rng.normal(size=(ROWS, FEATURES))
    w = rng.normal(size=(FEATURES, 8))
    y = np.tanh(x @ w / 4).sum(1) * (1 + t) + np.sin(6 * np.pi * t) + 0.5 * rng.normal(size=ROWS)
    return x / 2, y / y.std()


def write(path: Path, x: Any, y: Any) -> None:
    shutil.rmtree(path, ignore_errors=True)
    group = zarr.create_group(path)
    with zarr.config.set({"array.write_empty_chunks": True}):  # labels of class 0
        for name, values in (("x", x.astype("float32")), ("y", y if y.dtype.kind == "i" else y.astype("float32"))):
            shape, names = (UNIT, *values.shape[1:]), ("n", "f")[: values.ndim]
            array = group.create_array(
                name, shape=values.shape, dtype=values.dtype, chunks=shape, dimension_names=names
            )
            array[...] = values


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))


def final_loss(path: Path, model: Any, loss: str, seed: int, order: str, out: Path) -> float:
    """Train, and return the loss on the rows that were held out: the same ones for every order."""
    shutil.rmtree(out, ignore_errors=True)
    samples = dtrain.open_samples(path, inputs=["x"], targets=["y"], shuffle=order != "as stored")
    blocks = {"block, twice": WINDOW, "block, same memory": WINDOW // 2}.get(order)
    # of a full shuffle, and of a block order as the loader takes it, all units are open at once
    window = WINDOW if order in ("dtrain", "as stored") else 1 << 20
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(dtrain.resolve, "plan_data", partial(planned, window)))
        if blocks is not None:
            patches.enter_context(mock.patch.object(schedule, "epoch_order", partial(blocks_of, blocks)))
        run = dtrain.train(
            model,
            samples,
            train={
                "loss": loss,
                "rounds": 25,
                "local_steps": 250,
                "batch_size": 32,
                "optimizer_args": {"lr": 0.02, "momentum": 0.9},
                "schedule": "cosine",
                "seed": seed,
            },
            average={"replicas": REPLICAS},
            cluster="serial",
            run="shuffle",
            run_dir=out,
            progress=False,
        )
    return float(run.history.val_loss.values[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"entropy": [], "loss": {}}
    names = ("dtrain", "block, twice", "block, same memory", "full")
    print("| units x rows, window, batch | " + " | ".join(names) + " |\n|---|" + "---:|" * len(names))
    for units, rows, window, batch in (
        (512, 128, 16, 128),
        (1000, 1024, 64, 256),
        (1000, 2048, 32, 256),
        (1000, 4096, 16, 256),
        (1000, 8192, 8, 256),
    ):
        bits = entropies(units, rows, window, batch)
        found["entropy"].append({"units": units, "rows": rows, "window": window, "batch": batch, **bits})
        print(f"| {units} x {rows}, {window}, {batch} | " + " | ".join(f"{bits[name]:.3f}" for name in names) + " |")
    print("\n| data, order | mean loss | least | most | within full |\n|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, make, model, loss in (
            ("classes", classes, classifier, "cross_entropy"),
            ("time", time, regressor, "mse"),
        ):
            path = Path(folder, f"{name}.zarr")
            write(path, *make(np.random.default_rng(0)))
            for order in ORDERS:
                losses = [final_loss(path, model, loss, s, order, Path(folder, "run")) for s in range(arguments.seeds)]
                found["loss"][f"{name}, {order}"] = losses
                full = found["loss"][f"{name}, full"]
                mean = statistics.fmean(losses)
                within = "yes" if min(full) <= mean <= max(full) else "no"
                print(
                    f"| {name}, {order} | {mean:.4f} | {min(losses):.4f} | {max(losses):.4f} | {within} |", flush=True
                )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
