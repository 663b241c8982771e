"""MNIST-1D: how much accuracy does averaging cost? Central training by hand, and dtrain with one and four replicas.

Run: python benchmarks/mnist1d.py [--seeds 3] [--json FILE]        (about 9 minutes on two quiet cores)

The data are the 4,000 + 1,000 rows of the package mnist1d (benchmarks/requirements.txt), the models those of the paper:
logistic regression, a perceptron with two hidden layers, a small convolutional network (Greydanus 2020,
arXiv:2011.14439). All columns have the same budget: 100 passes over the data, Adam, global batches of 100 rows, a
cosine schedule, and the best of the same three learning rates.

    published     the package's README (its notebook, 6,000 steps of Adam at a constant 0.01, ends at 92 % for the CNN)
    by hand       a plain PyTorch loop over tensors in memory
    M = 1         dtrain, one replica: the same steps, read from Zarr
    M = 4         four replicas with batches of 25, averaged after each pass over their part (40 steps)
    DiLoCo        the same with an outer optimizer (0.6, momentum 0.9, Nesterov: arXiv:2503.09799)
    Dirichlet     M = 4 averaged, on parts whose classes are dealt out by Dirichlet(0.1); the parts are printed

The learning rate is chosen with the first seed, by the accuracy on 1,000 further rows of the generator. Seeds change
the initial parameters, the order of rows and the parts. Test accuracy in percent, mean and deviation over the seeds.
The goal: the averaged network of four replicas lies within one point of central training.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import small_runs
import torch
import torch.nn.functional as F
from models.small import digits
from torch import nn

BATCH, REPLICAS, ALPHA = 100, 4, 0.1
RATES = (0.003, 0.01, 0.03)
PUBLISHED = {"logistic": 32, "MLP": 68, "CNN": 94}
DILOCO = {"optimizer": "sgd", "args": {"lr": 0.6, "momentum": 0.9, "nesterov": True}}
METHODS: dict[str, dict[str, Any]] = {
    "by hand": {},
    "M = 1": {"replicas": 1},
    "M = 4": {"replicas": REPLICAS},
    "M = 4, DiLoCo": {"replicas": REPLICAS, "outer": DILOCO},
    f"M = 4, Dirichlet {ALPHA}": {"replicas": REPLICAS},
}
"""By column: the table ``[average]``."""


# Data --------------------------------------------------------------------------------------------------------------

GENERATE = """
import sys
import numpy as np
from mnist1d.data import get_dataset_args, make_dataset
data = make_dataset(get_dataset_args())
more = get_dataset_args()
more.num_samples, more.train_split, more.seed = 1000, 1.0, 43
further = make_dataset(more)
x = {"x": data["x"], "x_test": data["x_test"], "x_val": further["x"]}
y = {"y": data["y"], "y_test": data["y_test"], "y_val": further["y"]}
np.savez(sys.argv[1], **{k: v.astype("float32") for k, v in x.items()}, **{k: v.astype("int64") for k, v in y.items()})
"""


def generate(path: Path) -> None:
    """Write the data of the package, in a process of its own: here its name is that of this script."""
    command = [sys.executable, "-P", "-c", GENERATE, str(path)]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1]
        sys.exit(f"{said}\nThe package mnist1d makes the data: pip install -r benchmarks/requirements.txt")


# Runs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    model: str
    method: str
    rate: float
    seed: int
    epochs: int


def by_hand(job: Job, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """Train on tensors in memory."""
    torch.manual_seed(job.seed)
    model = digits(job.model)
    optimizer = torch.optim.Adam(model.parameters(), job.rate)
    steps = job.epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(job.epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model


def with_dtrain(job: Job, folder: Path) -> nn.Module:
    """Train from the stores of the folder."""
    average = METHODS[job.method]
    train = {
        "rounds": job.epochs,
        "local_epochs": 1,
        "batch_size": BATCH // average["replicas"],
        "optimizer": "adam",
        "optimizer_args": {"lr": job.rate},
        "schedule": "cosine",
        "seed": job.seed,
    }
    whole = [{"path": str(folder / "whole.zarr"), "replicas": average["replicas"]}]
    stores = small_runs.stores_in(folder / f"parts-{job.seed}") if "Dirichlet" in job.method else whole
    return small_runs.trained(digits, small_runs.config_of(stores, train, average, {"kind": job.model}))[0]


def accuracies(job: Job, folder: Path) -> dict[str, float]:
    """Train, and return the accuracy on the further rows of the generator and on the test rows."""
    data = {name: torch.from_numpy(values) for name, values in np.load(folder / "data.npz").items()}
    model = by_hand(job, data["x"], data["y"]) if job.method == "by hand" else with_dtrain(job, folder)
    return {split: small_runs.score(model, data[f"x_{split}"], data[f"y_{split}"])[1] for split in ("val", "test")}


# The table -----------------------------------------------------------------------------------------------------------

Found = Mapping[Job, Mapping[str, float]]


def chosen(found: Found) -> dict[tuple[str, str], Job]:
    """Return, by model and method, the job with the best learning rate."""
    best: dict[tuple[str, str], Job] = {}
    for job, result in found.items():
        key = job.model, job.method
        if key not in best or result["val"] > found[best[key]]["val"]:
            best[key] = job
    return best


def report(found: Found, best: Mapping[tuple[str, str], Job], seeds: int) -> None:
    """Print the table, the learning rates, and whether the goal is met."""
    tests = {key: [found[replace(job, seed=s)]["test"] for s in range(seeds)] for key, job in best.items()}
    rows = [
        [model, f"{PUBLISHED[model]}", *(small_runs.spread(tests[model, method], 1) for method in METHODS)]
        for model in PUBLISHED
    ]
    print(small_runs.markdown(["model", "published", *METHODS], rows))
    rates = [[model, *(f"{best[model, method].rate:g}" for method in METHODS)] for model in PUBLISHED]
    print("\n" + small_runs.markdown(["learning rate chosen", *METHODS], rates))
    gap = statistics.fmean(tests["CNN", "M = 4"]) - statistics.fmean(tests["CNN", "by hand"])
    met = "met" if gap >= -1 else "not met"
    print(f"\nCNN, M = 4 averaged less central by hand: {gap:+.1f} points; the goal of at least -1 is {met}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "data.npz")
        data = np.load(folder / "data.npz")
        x, y = data["x"], data["y"]
        small_runs.write_store(folder / "whole.zarr", x, y)
        for seed in range(options.seeds):
            parts = small_runs.dirichlet_parts(y, REPLICAS, ALPHA, seed)
            small_runs.write_parts(folder / f"parts-{seed}", x, y, parts)
            print(small_runs.histogram(y, parts, f"seed {seed}, rows of class"), end="\n\n", flush=True)
        run = partial(accuracies, folder=folder)
        grid = [Job(model, method, r, 0, options.epochs) for model in PUBLISHED for method in METHODS for r in RATES]
        found = small_runs.run_all(run, grid, options.processes)
        best = chosen(found)
        more = [replace(job, seed=seed) for job in best.values() for seed in range(1, options.seeds)]
        found |= small_runs.run_all(run, more, options.processes)
    report(found, best, options.seeds)
    small_runs.write_json(options.json, [{**asdict(job), **result} for job, result in found.items()])


if __name__ == "__main__":
    main()
