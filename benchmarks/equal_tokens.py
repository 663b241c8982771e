"""DiLoCo beside data parallel training with the same tokens: what the loss costs, and what the wire saves.

Run: python benchmarks/equal_tokens.py [--seeds 3] [--json FILE]        (about 18 minutes on two quiet cores)

A transformer of 112,448 parameters reads 1,200 global batches of 16 rows of 64 symbols, 1.2 million tokens, each once,
from a source of known entropy (markov.py). M replicas take batches of 16 / M, so that all columns see the same tokens
in as many steps, and average every H = 30 steps (40 rounds). AdamW (0.9, 0.99), weight decay 1 / steps, 60 steps of
warm-up and a cosine, gradients clipped at 1; the outer optimizer is SGD with Nesterov's momentum 0.9 and the published
rates 0.4 (M = 1), 0.6 (2, 4) and 0.8 (8).

Data parallel training is one model with the whole batch, as M processes would compute it. It and DiLoCo of each M have
the same three learning rates; the loops by hand choose the best, with the first seed, by the loss on 2,048 rows apart,
and it stands for dtrain. The loss that counts is that of 2,048 test rows, against data parallel training by the same
engine and seed: 100 (L - L_DP) / L_DP, mean and deviation over the seeds.

    published   35 million parameters on C4, H = 30 (Charles et al. 2025, arXiv:2503.09799)
    by hand     plain PyTorch loops over tensors in memory (diloco.py)
    dtrain      data parallel: M = 1 without an outer optimizer

Traffic counts what a replica sends for averaging, against float32 gradients at every step; "both ways" adds the
float32 parameters that come back, which no codec makes smaller. Published: 4 bits cost nothing (arXiv:2501.18512, with
other formats), and 400 to 500 times less traffic than data parallel training, as far as updates are counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diloco
import numpy as np
import small_runs
import torch
from markov import Source
from models.small import Transformer
from torch import nn

SOURCE, LENGTH, BATCH, H = Source(), 64, 16, 30
MODEL = {"symbols": SOURCE.symbols, "length": LENGTH, "width": 64, "layers": 2}
RATES = (0.008, 0.016, 0.032)
OUTER_RATES = {1: 0.4, 2: 0.6, 4: 0.6, 8: 0.8}
PUBLISHED = {1: -0.1, 2: 0.7, 4: 2.0, 8: 3.9}
CODECS = [(name, feedback) for name in ("bf16", "int8", "int4") for feedback in (False, True)]
CODEC_REPLICAS = 4
THRIFTY = [(replicas, every) for replicas in (2, 4) for every in (75, 100)]
"""M and H that save 500 times and more with four bits an element."""


@dataclass(frozen=True)
class Job:
    engine: str
    replicas: int
    """0: data parallel."""
    rate: float = RATES[1]
    seed: int = 0
    every: int = H
    codec: tuple[str, bool] | None = None
    """Name, and whether errors are fed back."""
    steps: int = 1200

    @property
    def settings(self) -> diloco.Settings:
        """What all replicas share."""
        return diloco.Settings(self.steps, self.rate, BATCH)


# Runs ----------------------------------------------------------------------------------------------------------------


def tables_of(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tables ``[train]`` and ``[average]``."""
    replicas, settings = max(1, job.replicas), job.settings
    train = {
        "rounds": job.steps // job.every,
        "local_steps": job.every,
        "batch_size": BATCH // replicas,
        "class_axis": -1,
        "optimizer": "adamw",
        "optimizer_args": {"lr": job.rate, "betas": [0.9, 0.99], "weight_decay": settings.weight_decay},
        "schedule": "cosine",
        "warmup_steps": settings.warm_up,
        "clip_norm": settings.clip_norm,
        "seed": job.seed,
    }
    average: dict[str, Any] = {}
    if job.replicas:
        args = {"lr": OUTER_RATES[job.replicas], "momentum": 0.9, "nesterov": True}
        average["outer"] = {"optimizer": "sgd", "args": args}
    if job.codec is not None:
        average["codec"] = {"name": job.codec[0], "error_feedback": job.codec[1]}
    return train, average


def with_dtrain(job: Job, folder: Path) -> tuple[nn.Module, float]:
    """Train; return the model, and the bytes that a replica sends a round against its float32 parameters."""
    replicas = max(1, job.replicas)
    stores = [{"path": str(folder / "train.zarr"), "replicas": replicas}]
    model, rows = small_runs.trained(Transformer, small_runs.config_of(stores, *tables_of(job), MODEL))
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    return model, statistics.fmean(row["bytes_reduced"] for row in rows) / replicas / whole


def by_hand(job: Job, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """Train on the same rows as tensors in memory."""
    torch.manual_seed(job.seed)
    model, order = Transformer(**MODEL), torch.randperm(len(x))
    x, y = x[order], y[order]
    if job.replicas == 0:
        return diloco.data_parallel(model, job.settings, x, y)
    return diloco.diloco(model, job.settings, x, y, job.replicas, job.every, OUTER_RATES[job.replicas])


def run(job: Job, folder: Path) -> dict[str, float]:
    """Train, and return the loss on the validation and on the test rows, and the share of the bytes."""
    arrays = np.load(folder / "data.npz")
    data = {name: torch.from_numpy(arrays[name]).long() for name in arrays.files}
    if job.engine == "dtrain":
        model, share = with_dtrain(job, folder)
    else:
        model, share = by_hand(job, data["x"], data["y"]), 1.0
    losses = {split: small_runs.score(model, data[f"x_{split}"], data[f"y_{split}"])[0] for split in ("val", "test")}
    return {**losses, "share": share}


def write_data(folder: Path, steps: int, held_out: int) -> None:
    """Write exactly the rows that are read once, as a store, and the held-out rows."""
    data = {}
    for seed, (split, rows) in enumerate({"": steps * BATCH, "_val": held_out, "_test": held_out}.items()):
        data[f"x{split}"], data[f"y{split}"] = SOURCE.rows(rows, LENGTH, seed)
    np.savez(folder / "data.npz", **data)
    small_runs.write_store(folder / "train.zarr", data["x"], data["y"], chunk=100)


# The tables ----------------------------------------------------------------------------------------------------------

Found = Mapping[Job, Mapping[str, float]]


def excess(found: Found, job: Job, base: Job, seeds: int) -> str:
    """Return by how many percent a loss is above another one of the same seed."""
    tests = [[found[replace(one, seed=seed)]["test"] for seed in range(seeds)] for one in (job, base)]
    return small_runs.spread([100 * (a - b) / b for a, b in zip(*tests, strict=True)], 2)


def traffic(found: Found, job: Job) -> list[str]:
    """Return how many times less is sent than with data parallel training: updates alone, and both ways."""
    share = found[job]["share"]
    return [f"{job.every / share:.0f}", f"{2 * job.every / (share + 1):.0f}"]


def report_replicas(found: Found, best: Mapping[int, Job], seeds: int) -> None:
    """Print the losses of data parallel training, and what DiLoCo costs by M."""
    floor, rows = SOURCE.least_loss(LENGTH), []
    for engine in ("by hand", "dtrain"):
        base = replace(best[0], engine=engine)
        losses = [found[replace(base, seed=seed)]["test"] for seed in range(seeds)]
        above = statistics.fmean(losses) - floor
        print(
            f"data parallel, {engine}: {small_runs.spread(losses, 4)} nats, {above:.4f} above the source's {floor:.4f}"
        )
    for replicas in PUBLISHED:
        ours = replace(best[replicas], engine="dtrain")
        both = [
            excess(found, replace(ours, engine=e), replace(best[0], engine=e), seeds) for e in ("by hand", "dtrain")
        ]
        rows.append([replicas, f"{PUBLISHED[replicas]:+.1f}", *both, f"{ours.rate:g}", *traffic(found, ours)])
    head = ["M", "published, %", "by hand, %", "dtrain, %", "rate", "updates / 1", "both ways / 1"]
    print("\n" + small_runs.markdown(head, rows))


def report_codecs(found: Found, jobs: Sequence[Job], plain: Job, seeds: int) -> None:
    """Print what codecs cost beside none."""
    rows = [["none", "", "0", *traffic(found, plain)]]
    for job in jobs:
        assert job.codec is not None
        name, feedback = job.codec
        rows.append([name, "yes" if feedback else "no", excess(found, job, plain, seeds), *traffic(found, job)])
    head = [f"codec, M = {plain.replicas}", "error feedback", "loss above none, %", "updates / 1", "both ways / 1"]
    print("\n" + small_runs.markdown(head, rows))


def report_thrifty(found: Found, jobs: Sequence[Job], base: Job, seeds: int) -> None:
    """Print the combinations that send 500 times less, beside data parallel training."""
    rows = [[f"M = {j.replicas}, H = {j.every}", excess(found, j, base, seeds), *traffic(found, j)] for j in jobs]
    print("\n" + small_runs.markdown(["int4, error feedback", "dtrain, %", "updates / 1", "both ways / 1"], rows))
    print("The goal is at most 1 % at 500.")


def tuned(start: Callable[[Job], Mapping[str, float]], steps: int, processes: int) -> tuple[dict[int, Job], Found]:
    """Return the job with the best learning rate by M, and all results."""
    grid = [Job("by hand", replicas, rate, steps=steps) for replicas in (8, 4, 2, 1, 0) for rate in RATES]
    found = small_runs.run_all(start, grid, processes)
    of = {replicas: [job for job in found if job.replicas == replicas] for replicas in (0, *PUBLISHED)}
    return {replicas: min(jobs, key=lambda job: found[job]["val"]) for replicas, jobs in of.items()}, found


def compressed(best: Mapping[int, Job]) -> tuple[list[Job], list[Job]]:
    """Return the jobs of each codec and of the thrifty combinations, none where dtrain refuses them."""
    plain = replace(best[CODEC_REPLICAS], engine="dtrain")
    codecs = [replace(plain, codec=codec) for codec in CODECS]
    thrifty = [replace(best[m], engine="dtrain", every=every, codec=("int4", True)) for m, every in THRIFTY]
    for job in codecs:
        reason = small_runs.refusal(*tables_of(job))
        if reason is not None:
            print(f"dtrain does not run codecs: {reason}", end="\n\n", flush=True)
            return [], []
    return codecs, thrifty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200, help="a multiple of 300")
    parser.add_argument("--held-out", type=int, default=2048, help="rows")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, options.steps, options.held_out)
        start = partial(run, folder=folder)
        best, found = tuned(start, options.steps, options.processes)
        codecs, thrifty = compressed(best)
        chosen = [*(replace(job, engine="dtrain") for job in best.values()), *codecs, *thrifty, *best.values()]
        seeded = [replace(job, seed=seed) for job in chosen for seed in range(options.seeds)]
        more = small_runs.run_all(start, [job for job in seeded if job not in found], options.processes)
        found = {**found, **more}
    report_replicas(found, best, options.seeds)
    if codecs:
        report_codecs(found, codecs, replace(best[CODEC_REPLICAS], engine="dtrain"), options.seeds)
        report_thrifty(found, thrifty, replace(best[0], engine="dtrain"), options.seeds)
    small_runs.write_json(options.json, [{**asdict(job), **result} for job, result in found.items()])


if __name__ == "__main__":
    main()
