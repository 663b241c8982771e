"""Replicas that see different classes: what six ways of averaging lose, and in which order.

Run: python benchmarks/heterogeneity.py [--seeds 3] [--json FILE]        (an hour or so; 79 minutes beside other work)

The set-up is that of NVFlare's CIFAR-10 example: eight replicas, 50 rounds of 4 passes over their part, batches of 64;
classes are dealt to the replicas by Dirichlet(alpha). Central training takes as many steps as one replica. The problem
is another one, so that two cores can repeat it: 4,000 rows of 10 classes, each a mixture of six Gaussians in 16
dimensions, and a perceptron with two hidden layers of 64; central training reaches what it does there. Local steps are
plain SGD at a constant rate (there with momentum and a cosine). So values are not to be compared with the published
ones, but their order and their gaps are.

    published   test accuracy on CIFAR-10 (NVFlare, examples/advanced/cifar10/pt/cifar10-sim/README.md, 8 clients); its
                FedOpt is SGD with momentum on the server, so it stands beside FedAvgM
    by hand     the papers' algorithms in a plain PyTorch loop (federated.py)
    dtrain      one store a replica, the same settings

Each method has six settings. The best is chosen by the loop by hand, at alpha 0.1 with the first seed, on 2,000 rows
apart, by the worst of three orders of the rows: at the edge of stability one order may converge by luck. It stands for
all alphas, and for dtrain. Seeds change parts, initial parameters and the order of rows. Test
accuracy on 4,000 rows, mean and deviation over the seeds; a run that diverges counts as a guess.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import federated
import numpy as np
import small_runs
import torch
from federated import Settings
from models.small import perceptron
from torch import nn

from dtrain.errors import Diverged

REPLICAS, BATCH, LOCAL_EPOCHS = 8, 64, 4
ALPHAS = (1.0, 0.5, 0.3, 0.1)
ROWS, VALIDATION, TEST = 4000, 2000, 4000
FEATURES, CLASSES, MODES, HIDDEN = 16, 10, 6, 64
MODEL = {"features": FEATURES, "hidden": HIDDEN, "classes": CLASSES}

RATES = [(rate, 0.0) for rate in (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)]
GRID: dict[str, list[tuple[float, float]]] = {
    "central": RATES,
    "FedAvg": RATES,
    "FedProx": list(itertools.product((0.2, 0.3, 0.5), (0.01, 0.1))),
    "FedNova": RATES,
    "FedAvgM": list(itertools.product((0.1, 0.2, 0.3), (0.6, 0.9))),
    "FedAdam": list(itertools.product((0.2, 0.3, 0.5), (0.03, 0.1))),
    "SCAFFOLD": RATES,
}
"""By method: the values of `Settings`."""
PUBLISHED = {
    ("central", None): 0.8876,
    ("FedAvg", 1.0): 0.8911,
    ("FedAvg", 0.5): 0.8787,
    ("FedAvg", 0.3): 0.8527,
    ("FedAvg", 0.1): 0.8045,
    ("FedProx", 0.1): 0.8059,
    ("FedAvgM", 0.1): 0.8058,
    ("SCAFFOLD", 0.1): 0.8260,
}


ORDERS = 3
"""Of the rows, for each setting that is tried."""


@dataclass(frozen=True)
class Job:
    engine: str
    settings: Settings
    rounds: int
    seed: int = 0
    alpha: float | None = 0.1
    """None: central training."""
    order: int = 0
    """Of the rows, in the loop by hand."""


def write_data(folder: Path, seeds: int) -> None:
    """Write the rows, the parts of each alpha and seed, and a store for each replica; print the most unequal parts."""
    rng = np.random.default_rng(7)
    centres = 1.4 * rng.normal(size=(CLASSES, MODES, FEATURES))
    data = {}
    for split, rows in (("", ROWS), ("_val", VALIDATION), ("_test", TEST)):
        y = rng.integers(CLASSES, size=rows)
        noise = rng.normal(size=(rows, FEATURES))
        data[f"x{split}"] = (centres[y, rng.integers(MODES, size=rows)] + noise).astype("float32")
        data[f"y{split}"] = y
    np.savez(folder / "data.npz", **data)
    small_runs.write_store(folder / "whole.zarr", data["x"], data["y"])
    for seed, alpha in itertools.product(range(seeds), ALPHAS):
        parts = small_runs.dirichlet_parts(data["y"], REPLICAS, alpha, seed)
        small_runs.write_parts(folder / f"{alpha}-{seed}", data["x"], data["y"], parts)
        if seed == 0 and alpha in (max(ALPHAS), min(ALPHAS)):
            print(small_runs.histogram(data["y"], parts, f"alpha {alpha}, rows of class"), end="\n\n", flush=True)


# Runs ----------------------------------------------------------------------------------------------------------------


def passes(job: Job) -> tuple[int, int]:
    """Return rounds and passes a round; central training takes as many steps as a replica."""
    return (job.rounds, LOCAL_EPOCHS) if job.alpha is not None else (max(1, job.rounds * LOCAL_EPOCHS // REPLICAS), 1)


def tables_of(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tables ``[train]`` and ``[average]``."""
    rounds, epochs = passes(job)
    train = {"rounds": rounds, "local_epochs": epochs, "batch_size": BATCH, "seed": job.seed}
    own = job.settings.own
    average: dict[str, dict[str, Any]] = {
        "FedProx": {"prox": own},
        "FedNova": {"weights": "fednova"},
        "FedAvgM": {"outer": {"optimizer": "sgd", "args": {"lr": 1.0, "momentum": own}}},
        "FedAdam": {"outer": {"optimizer": "adam", "args": {"lr": own, "betas": [0.9, 0.99], "eps": 1e-3}}},
        "SCAFFOLD": {"control": True},
    }
    sgd = {"optimizer": "sgd", "optimizer_args": {"lr": job.settings.rate}}
    return {**train, **sgd}, average.get(job.settings.method, {})


def with_dtrain(job: Job, folder: Path) -> nn.Module:
    """Train from a store for each replica."""
    whole = [{"path": str(folder / "whole.zarr"), "replicas": 1}]
    stores = whole if job.alpha is None else small_runs.stores_in(folder / f"{job.alpha}-{job.seed}")
    return small_runs.trained(perceptron, small_runs.config_of(stores, *tables_of(job), MODEL))[0]


def by_hand(job: Job, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """Train on the same parts as tensors in memory."""
    torch.manual_seed(job.seed)
    model, parts = perceptron(**MODEL), [torch.arange(len(x))]
    if job.alpha is not None:
        owned = small_runs.dirichlet_parts(y.numpy(), REPLICAS, job.alpha, job.seed)
        parts = [torch.from_numpy(rows) for rows in owned]
    torch.manual_seed(job.seed + 1000 * job.order)
    federated.train(model, job.settings, x, y, parts, *passes(job), BATCH)
    return model


def accuracies(job: Job, folder: Path) -> dict[str, float]:
    """Train, and return the accuracy on the validation and on the test rows."""
    data = {name: torch.from_numpy(values) for name, values in np.load(folder / "data.npz").items()}
    try:
        model = with_dtrain(job, folder) if job.engine == "dtrain" else by_hand(job, data["x"], data["y"])
    except Diverged:  # the loop by hand ends with NaN, and scores the same
        return dict.fromkeys(("val", "test"), 1 / CLASSES)
    return {
        split: small_runs.score(model, data[f"x_{split}"], data[f"y_{split}"])[1] / 100 for split in ("val", "test")
    }


# The table -----------------------------------------------------------------------------------------------------------

Found = Mapping[Job, Mapping[str, float]]


def tested(found: Found) -> dict[tuple[str, str, float | None], list[float]]:
    """Return the test accuracies by engine, method and alpha."""
    tests: dict[tuple[str, str, float | None], list[float]] = {}
    for job, result in found.items():
        tests.setdefault((job.engine, job.settings.method, job.alpha), []).append(result["test"])
    return tests


def report(found: Found, best: Mapping[str, Settings]) -> None:
    """Print settings, accuracies, and the order and gaps at the smallest alpha."""
    chosen = [[method, f"{one.rate:g}", f"{one.own:g}" if one.own else ""] for method, one in best.items()]
    print(small_runs.markdown(["chosen", "local rate", "mu, momentum, outer rate"], chosen) + "\n")
    tests, rows = tested(found), []
    for method, alpha in [("central", None), *itertools.product(list(GRID)[1:], ALPHAS)]:
        published = f"{PUBLISHED[method, alpha]:.4f}" if (method, alpha) in PUBLISHED else ""
        values = [tests.get((engine, method, alpha)) for engine in ("by hand", "dtrain")]
        cells = [small_runs.spread(value, 3) if value else "not run" for value in values]
        rows.append([method, alpha or "", published, *cells])
    print(small_runs.markdown(["method", "alpha", "published", "by hand", "dtrain"], rows) + "\n")
    means = {key: statistics.fmean(values) for key, values in tests.items()}
    means |= {("published", *key): value for key, value in PUBLISHED.items()}
    for engine in ("published", "by hand", "dtrain"):
        at_least = {method: value for (who, method, alpha), value in means.items() if (who, alpha) == (engine, 0.1)}
        order = " > ".join(sorted(at_least, key=lambda method: -at_least[method]))
        fall = means[engine, "FedAvg", 1.0] - means[engine, "FedAvg", 0.1]
        regained = f"{at_least['SCAFFOLD'] - at_least['FedAvg']:+.3f}" if "SCAFFOLD" in at_least else "not run"
        print(f"{engine}: {order} at alpha 0.1; FedAvg from alpha 1 to 0.1: {-fall:+.3f}; SCAFFOLD there: {regained}")


def tuned(run: Callable[[Job], Mapping[str, float]], rounds: int, processes: int) -> dict[str, Settings]:
    """Return the best settings of each method."""
    settings = [Settings(method, *values) for method, grid in GRID.items() for values in grid]
    jobs = [
        Job("by hand", one, rounds, alpha=None if one.method == "central" else 0.1, order=order)
        for one, order in itertools.product(settings, range(ORDERS))
    ]
    found = small_runs.run_all(run, jobs, processes)
    worst = {one: min(found[job]["val"] for job in jobs if job.settings == one) for one in settings}
    return {method: max((one for one in settings if one.method == method), key=worst.__getitem__) for method in GRID}


def runs_in_dtrain(settings: Settings) -> bool:
    """Whether this version of dtrain has a method; say so if not."""
    reason = small_runs.refusal(*tables_of(Job("dtrain", settings, 1)))
    if reason is not None:
        print(f"dtrain does not run {settings.method}: {reason}", end="\n\n", flush=True)
    return reason is None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, options.seeds)
        run = partial(accuracies, folder=folder)
        best = tuned(run, options.rounds, options.processes)
        jobs = [
            Job(engine, settings, options.rounds, seed, alpha)
            for method, settings in best.items()
            for engine in ("by hand", "dtrain")
            if engine == "by hand" or runs_in_dtrain(settings)
            for alpha in ([None] if method == "central" else ALPHAS)
            for seed in range(options.seeds)
        ]
        found = small_runs.run_all(run, jobs, options.processes)
    report(found, best)
    small_runs.write_json(options.json, [{**asdict(job), **result} for job, result in found.items()])


if __name__ == "__main__":
    main()
