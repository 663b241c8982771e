"""The race: bits per byte of the demo's held-out files after equal time on two cores, beside plain PyTorch.

    python benchmarks/race.py --json race.json         process, ddp and average-3: 38 minutes on two quiet cores
    python benchmarks/race.py --json race.json --engines demo average-10 data_parallel          another 38 minutes
    python benchmarks/race.py --seconds 8 --seeds 1 --tune 3 --probe 30                does it run at all? 5 minutes

The demo's model (260,000 parameters), data and held-out files, as `dtrain init demo` writes them. Engines:

    process        one plain PyTorch process, on one or two threads, whichever takes more steps a second
    ddp            DistributedDataParallel over gloo, two processes of one thread each
    demo           dtrain with the settings of the demo's file
    average-3, -10 dtrain, parameters and the states of AdamW averaged every 3 or 10 steps
    data_parallel  dtrain, one local step of SGD a round, AdamW outside

dtrain has two replicas on two local workers of one thread each. The peers read tokens from memory, in shuffled windows
of the same length; dtrain reads its Zarr store. AdamW has weight decay 0.01, a cosine over all steps and gradients
clipped at norm 1; the warm-up is 40 steps (data_parallel: none, its outer schedule has no warm-up).

Equal tuning: each engine has the same grid of learning rates and of batch sizes (samples a process), one training of
--tune seconds for each pair, on a seed of its own; the pair with the fewest bits is used for all seeds. A short
training may prefer a higher rate than a long one: the same for all engines.

Equal time: a probe of --probe steps measures the steps a second over its last two thirds, for each engine and batch
size. A training takes as many steps as fit into its time at that rate, so that the cosine ends with the time. The
engines take turns, seed by seed: other load on the machine meets all of them.

What counts as time: for the peers from before the first step to after the last one; for dtrain the sum of the seconds
of its rounds, the first one from its submission on. So the start of processes and the reading of tokens by the peers
are apart (dtrain's first round builds the model and opens the store on its second worker, which is counted), and so is
the evaluation: each engine keeps 20 snapshots on the way, which are evaluated afterwards by one function. dtrain's are
commits, which it makes anyway: its rounds wait for them; gathering and placing the state are apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from peers import ddp, plain_process
from racing import CLIP_NORM, WARMUP_STEPS, WEIGHT_DECAY, Snapshot, Tokens, Trial, bits_per_byte, reached, read_tokens

import dtrain
from dtrain.algorithm.params import tensors_of
from dtrain.errors import Diverged, DtrainError
from dtrain_cli import datasets
from dtrain_cli.templates.demo_model import build

Tables = dict[str, dict[str, Any]]
TARGET = 2.3
SNAPSHOTS = 20
TUNING_SEED = 1000


# dtrain ---------------------------------------------------------------------------------------------------


def demo() -> Tables:
    tables: Tables = tomllib.loads((files("dtrain_cli") / "templates" / "demo.toml").read_text(encoding="utf-8"))
    return tables


def averaged(local_steps: int) -> Tables:
    adamw = {"optimizer": "adamw", "optimizer_args": {"weight_decay": WEIGHT_DECAY}}
    steps = {"schedule": "cosine", "warmup_steps": WARMUP_STEPS, "clip_norm": CLIP_NORM, "local_steps": local_steps}
    return {"train": {**adamw, **steps}, "average": {"inner_state": "average"}}


def data_parallel() -> Tables:
    outer = {"optimizer": "adamw", "args": {"weight_decay": WEIGHT_DECAY}, "schedule": "cosine", "clip_norm": CLIP_NORM}
    inner = {"optimizer": "sgd", "optimizer_args": {"lr": 1.0, "momentum": 0.0}, "local_steps": 1}
    return {"train": inner, "average": {"outer": outer}}


def configured(settings: Tables, trial: Trial, data: Path) -> dtrain.TrainConfig:
    """Return the configuration of a trial; its learning rate is that of AdamW, be it inside or outside."""
    read = {key: value for key, value in demo()["data"].items() if key != "val_path"}
    train = {**settings["train"], "loss": "cross_entropy", "metrics": [], "seed": trial.seed, "batch_size": trial.batch}
    train["rounds"] = max(1, trial.steps // train["local_steps"])
    average = {**settings["average"], "replicas": 2}
    if train["optimizer"] == "sgd":
        outer = average["outer"]
        average["outer"] = {**outer, "args": {**outer["args"], "lr": trial.lr}}
    else:
        train["optimizer_args"] = {**train["optimizer_args"], "lr": trial.lr}
    return dtrain.TrainConfig(
        data={**read, "path": str(data / "train.zarr")},
        train=train,
        average=average,
        cluster={"workers": 2, "threads": 1},
        run={"commit_every": max(1, train["rounds"] // trial.snapshots)},
    )


def through_dtrain(settings: Tables, trial: Trial, data: Path) -> list[Snapshot]:
    seconds, steps, snapshots = 0.0, 0, []
    for result in dtrain.train_rounds(build, config=configured(settings, trial, data)):
        seconds, steps = seconds + result.seconds, steps + result.steps // len(result.contributions)
        if result.state is not None:
            state = {name: tensor.clone() for name, tensor in tensors_of(result.state.model).items()}
            snapshots.append(Snapshot(steps, seconds, state))
    return snapshots


# Engines --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    title: str
    train: Callable[[Trial, Path], list[Snapshot]]
    threads: tuple[int, ...] = (1,)
    refused: str = ""


def dtrain_engine(title: str, settings: Tables) -> Engine:
    try:
        configured(settings, Trial(1e-3, 1, 1, 0), Path())
    except DtrainError as error:
        return Engine(title, lambda trial, data: [], refused=error.message)
    return Engine(title, lambda trial, data: through_dtrain(settings, trial, data))


def engines() -> dict[str, Engine]:
    return {
        "process": Engine("one PyTorch process", plain_process.train, threads=(1, 2)),
        "ddp": Engine("DistributedDataParallel, gloo", ddp.train),
        "demo": dtrain_engine("dtrain, the demo's file", demo()),
        "average-3": dtrain_engine("dtrain, averaged every 3 steps", averaged(3)),
        "average-10": dtrain_engine("dtrain, averaged every 10 steps", averaged(10)),
        "data_parallel": dtrain_engine("dtrain, data_parallel", data_parallel()),
    }


# The race -------------------------------------------------------------------------------------------------


def steps_a_second(engine: Engine, batch: int, steps: int, lr: float, data: Path) -> tuple[float, int]:
    """Return the rate of an engine at its better number of threads, and that number."""
    rates = []
    for threads in engine.threads:
        first, *_, last = engine.train(Trial(lr, batch, steps, TUNING_SEED, threads, snapshots=3), data)
        rates.append(((last.step - first.step) / (last.seconds - first.seconds), threads))
    return max(rates)


def tuned_bits(engine: Engine, trial: Trial, data: Path, held_out: Tokens) -> float:
    try:
        return bits_per_byte(engine.train(trial, data)[-1].state, held_out)
    except Diverged:
        return math.inf


def tune(engine: Engine, options: argparse.Namespace, data: Path, held_out: Tokens) -> dict[str, Any]:
    """Measure the rates of an engine and try its grid; return what was found, and no runs yet."""
    probes = {b: steps_a_second(engine, b, options.probe, options.rates[0], data) for b in options.batches}
    say(f"{engine.title}: " + ", ".join(f"batch {b}: {r:.1f} steps/s, threads {t}" for b, (r, t) in probes.items()))
    tuning = []
    for batch, lr in itertools.product(options.batches, options.rates):
        rate, threads = probes[batch]
        steps = int(options.tune * rate)
        bits = tuned_bits(engine, Trial(lr, batch, steps, TUNING_SEED, threads), data, held_out)
        tuning.append({"bits": bits, "lr": lr, "batch": batch, "steps": steps})
        say(f"{engine.title}: lr {lr:g}, batch {batch}: {bits:.3f} bits after {steps} steps")
    best = min(tuning, key=lambda tried: tried["bits"])
    rate, threads = probes[best["batch"]]
    setting = {"lr": best["lr"], "batch": best["batch"], "threads": threads, "steps": int(options.seconds * rate)}
    return {"title": engine.title, "setting": setting, "probes": probes, "tuning": tuning, "runs": []}


def race(engine: Engine, setting: dict[str, Any], seed: int, data: Path, held_out: Tokens) -> dict[str, Any]:
    """Train an engine at its setting, and evaluate its snapshots."""
    snapshots = engine.train(Trial(**setting, seed=seed, snapshots=SNAPSHOTS), data)
    (bits, to_target), last = reached(snapshots, TARGET, held_out), snapshots[-1]
    say(f"{engine.title}: seed {seed}: {bits:.3f} bits, {last.step} steps in {last.seconds:.1f} s")
    return {"seed": seed, "bits": bits, "steps": last.step, "seconds": last.seconds, "to_target": to_target}


def write(data: Path) -> Path:
    for name, dataset in zip(("train.zarr", "val.zarr"), datasets.python_sources(), strict=True):
        datasets.write_store(dataset, data / name, datasets.TOKENS_A_CHUNK)
    return data


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def row(found: dict[str, Any]) -> str:
    runs, setting = found["runs"], found["setting"]
    bits = [run["bits"] for run in runs]
    times = [run["to_target"] for run in runs if run["to_target"] is not None]
    to_target = f"{statistics.mean(times):.0f} ({len(times)} of {len(runs)})" if times else "not reached"
    chosen = f"{setting['lr']:g}, {setting['batch']}, {setting['threads']}"
    steps, seconds = (statistics.mean(run[key] for run in runs) for key in ("steps", "seconds"))
    spread = f"{statistics.mean(bits):.3f} ({min(bits):.3f} to {max(bits):.3f})"
    return f"| {found['title']} | {chosen} | {steps:,.0f} | {seconds:.1f} | {spread} | {to_target} |"


def main() -> None:
    known = engines()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=known, default=["process", "ddp", "average-3"])
    parser.add_argument("--seconds", type=float, default=110.0, help="of training")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", type=float, default=12.0, help="seconds of each training of the grid")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.002, 0.004, 0.008])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32], help="samples a process")
    parser.add_argument("--probe", type=int, default=60, help="steps that measure the rate; at least 30")
    parser.add_argument("--json", type=Path, help="engines that the file holds already stay, so that parts add up")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # of all processes that are started too
    found = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    chosen = {name: known[name] for name in options.engines if not known[name].refused}
    for name in options.engines:
        if name not in chosen:
            say(f"{known[name].title}: left out, this version refuses it: {known[name].refused}")
    with tempfile.TemporaryDirectory() as folder:
        data = write(Path(folder))
        held_out = read_tokens(data / "val.zarr")
        found |= {name: tune(engine, options, data, held_out) for name, engine in chosen.items()}
        for seed, (name, engine) in itertools.product(range(options.seeds), chosen.items()):
            found[name]["runs"].append(race(engine, found[name]["setting"], seed, data, held_out))
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    print("| engine | lr, batch, threads | steps | s in training | bits per byte | s to 2.3 bits |")
    print("|---|---|---:|---:|---:|---:|")
    for name in (name for name in known if name in found):
        print(row(found[name]))


if __name__ == "__main__":
    main()
