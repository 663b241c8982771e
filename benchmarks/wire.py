"""Who wins on which wire: utilisation of gloo DDP and of dtrain at slower and slower rates, beside a published surface.

    python benchmarks/wire.py --json wire.json             both parts: 15 minutes on two quiet cores
    python benchmarks/wire.py --parts surface --codecs none int8 int4
    python benchmarks/wire.py --parts target --target-wire 1000
    python benchmarks/wire.py --wires 5000 --local-steps 8 --cell-seconds 1 --limit 10          does it run? 1 minute

Needs Linux, root (or unprivileged user namespaces) and iproute2: the program starts itself again by `unshare --net`,
and gives the loopback interface there an MTU of 1500 and a token bucket (`tc qdisc ... tbf`, burst 256 kB).

Published: diloco-measured (github.com/Adnan082/diloco-measured, 2026-08; torchft, 4 machines with one L40S each, tc),
30,846,720 parameters. A step computes for 26.2 ms, a ring of 4 moves 2 x 3/4 x 4 bytes x parameters = 185 MB through
each machine's link at every synchronization: at 5 Gbit/s 0.296 s, or 11.3 steps; at 1 Gbit/s 57, at 200 Mbit/s 283, at
50 Mbit/s 1,130. This ratio of time on the wire to time of a step is kept. Here two replicas exchange 2 x 4 bytes x
parameters over one interface: one replica's parameters to the reducer and the mean back; gloo's all-reduce moves as
many. So our rate is 2 x 32 bits x parameters / (ratio x our time of a step), and our time of a step is measured: two
processes at once, of one thread each, on tensors in memory, nothing exchanged.

Utilisation is this time of a step x steps / time, for both, as published for DDP. Rounds are pipelined as always. The
wire is slow only around the measured rounds: start-up, a warm-up round and the last state pass at full speed. Published
values are DiLoCo's (medians of 3 runs) beside dtrain's plain averaging, and DDP's (one run); LocalSGD's are up to 6
points lower at H = 128 and 5 Gbit/s. Where we differ: one interface carries both directions, as a half-duplex link
would. On links of their own, full-duplex, gloo would send both halves of an exchange at the same time and take half as
long at the same rate, dtrain would not: at equal rates of such links count its time on the wire twice.

Target: seconds until the loss on 512 held-out rows is at most --target, over one wire, for several H and for the H that
`dtrain plan --probe` recommends there. The data: 256 features of 6 hidden numbers, whose sines are to be found. SGD
with momentum and one learning rate, for all alike; evaluated every 32 steps or H, which counts as time for all alike.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from namespace import bytes_sent, enter, narrow, narrowed, passing_rate, widen
from peers.ddp import on_two
from wire_peer import (
    BATCH,
    EVALUATED_EVERY,
    LR,
    MOMENTUM,
    WARM_UP,
    build,
    ddp_cell,
    ddp_target,
    step_alone,
    write,
)

import dtrain
from dtrain.errors import InvalidConfig

STEP, LINK_BYTES = 0.0262, 2 * 3 / 4 * 4 * 30_846_720
PUBLISHED = {  # % by wire in Mbit/s; 0: DDP, else DiLoCo's H
    0: {50: 0.04, 200: 0.18, 1000: 1.13, 5000: 5.28},
    1: {50: 0.07, 200: 0.32, 1000: 1.74, 5000: 7.76},
    8: {50: 0.55, 200: 2.48, 1000: 12.35, 5000: 40.24},
    32: {50: 2.41, 200: 10.01, 1000: 36.01, 5000: 68.10},
    128: {50: 11.55, 200: 36.09, 1000: 71.52, 5000: 87.00},
}
Found = dict[str, Any]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def steps_on_wire(wire: int) -> float:
    """Return how many steps' time a synchronization of the published run is on its wire of so many Mbit/s."""
    return 8 * LINK_BYTES / (wire * 1e6) / STEP


def our_rate(wire: int, step: float) -> float:
    """Return the bits a second at which our exchange is on the wire for as many of our steps."""
    parameters = sum(parameter.numel() for parameter in build().parameters())
    return 2 * 32 * parameters / (steps_on_wire(wire) * step)


# dtrain ---------------------------------------------------------------------------------------------------


def configured(local_steps: int, rounds: int, data: Path, codec: str = "none", **train: Any) -> dtrain.TrainConfig:
    read = {"path": str(data / "train.zarr"), "inputs": ["x"], "targets": ["y"], "split": {"val": 0.0, "test": 0.0}}
    sgd = {"optimizer": "sgd", "optimizer_args": {"lr": LR, "momentum": MOMENTUM}}
    return dtrain.TrainConfig(
        data=read | ({"val_path": str(data / "val.zarr")} if train else {}),
        train={"loss": "mse", "rounds": rounds, "local_steps": local_steps, "batch_size": BATCH, **sgd, **train},
        average={"replicas": 2} | ({"codec": {"name": codec}} if codec != "none" else {}),
        cluster={"workers": 2, "threads": 1},
        run={"commit_every": rounds},
    )


def dtrain_cell(local_steps: int, codec: str, rounds: int, rate: float, data: Path) -> tuple[float, float]:
    """Return seconds and bytes of a round, as the mean over `rounds` of them; one more runs out at full speed."""
    config = configured(local_steps, WARM_UP + rounds + 1, data, codec)
    seconds, sent = 0.0, 0
    try:
        for result in dtrain.train_rounds(build, config=config):
            if result.round == WARM_UP - 1:
                narrow(rate)
            if result.round == WARM_UP:
                sent = bytes_sent()
            if WARM_UP < result.round <= WARM_UP + rounds:
                seconds += result.seconds
            if result.round == WARM_UP + rounds:
                sent = bytes_sent() - sent
                widen()
    finally:
        widen()
    return seconds / rounds, sent / rounds


def dtrain_target(local_steps: int, seed: int, data: Path, target: float, limit: float) -> tuple[float, float, int]:
    """Return the seconds until the held-out loss is at most `target`, or `limit`; that loss, and the steps."""
    every = max(1, EVALUATED_EVERY // local_steps)
    config = configured(local_steps, 100_000 // local_steps, data, eval_every=every, seed=seed)
    seconds, loss = 0.0, math.inf
    for result in dtrain.train_rounds(build, config=config):
        seconds, loss = seconds + result.seconds, result.metrics.get("val_loss", loss)
        if loss <= target or seconds > limit:
            return seconds, loss, result.round * local_steps
    raise AssertionError


# The two parts --------------------------------------------------------------------------------------------


def surface(options: argparse.Namespace, step: float, data: Path) -> list[Found]:
    """Measure every cell: DDP (H = 0), and dtrain for each H and codec, on each wire."""
    cells = [(0, "none"), *((h, codec) for codec in codecs(options.codecs, data) for h in options.local_steps)]
    found = []
    for wire in options.wires:
        rate = our_rate(wire, step)
        for h, codec in cells:
            expected = (max(1, h) + steps_on_wire(wire)) * step
            rounds = min(40, max(2, math.ceil(options.cell_seconds / expected)))
            if h:
                seconds, sent = dtrain_cell(h, codec, rounds, rate, data)
            else:
                seconds, sent = on_two(ddp_cell, rounds, rate)
            used = max(1, h) * step / seconds
            found.append({"wire": wire, "h": h, "codec": codec, "utilisation": used, "seconds": seconds, "bytes": sent})
            say(f"{wire} Mbit/s, {label(h, codec)}: {used:.2%}; a round {seconds:.3f} s, {sent / 1e6:.1f} MB")
    return found


def codecs(wanted: list[str], data: Path) -> list[str]:
    built = []
    for codec in wanted:
        try:
            configured(1, 1, data, codec)
            built.append(codec)
        except InvalidConfig as error:
            say(f"{codec}: left out: {error.message}")
    return built


def recommended(rate: float, data: Path) -> int:
    """Return the local steps that `dtrain plan --probe` recommends on this wire."""
    with narrowed(rate):
        plan = dtrain.plan(build, config=configured(8, 100, data), probe=True)
    steps: int = plan.record["cadence"]["recommended"]
    say(f"plan --probe recommends H = {steps}: {plan.record['probe']}")
    return steps


def targets(options: argparse.Namespace, step: float, data: Path) -> list[Found]:
    rate, found = our_rate(options.target_wire, step), []
    chosen = recommended(rate, data)
    for seed in range(options.seeds):
        for h in sorted({0, *options.target_steps, chosen}):
            with narrowed(rate):
                if h:
                    seconds, loss, steps = dtrain_target(h, seed, data, options.target, options.limit)
                else:
                    seconds, loss, steps = on_two(ddp_target, seed, options.target, options.limit)
            known, reached = loss if math.isfinite(loss) else None, loss <= options.target
            one = {"h": h, "seed": seed, "seconds": seconds, "loss": known, "steps": steps, "reached": reached}
            found.append(one | {"recommended": h == chosen})
            say(f"{label(h, 'none')}, seed {seed}: loss {loss:.3f} after {steps} steps, {seconds:.1f} s")
    return found


# Tables ---------------------------------------------------------------------------------------------------


def label(h: int, codec: str) -> str:
    return f"dtrain{'' if codec == 'none' else f' {codec}'}, H = {h}" if h else "DDP, gloo"


def print_surface(found: list[Found], rates: dict[int, float]) -> None:
    print("Utilisation in %, published in brackets.\n")
    print("| | " + " | ".join(f"{wire} Mbit/s (here {rate / 1e6:.0f})" for wire, rate in rates.items()) + " |")
    print("|---|" + "---:|" * len(rates))
    for h, codec in dict.fromkeys((cell["h"], cell["codec"]) for cell in found):
        ours = {c["wire"]: 100 * c["utilisation"] for c in found if (c["h"], c["codec"]) == (h, codec)}
        published = {wire: PUBLISHED.get(h, {}).get(wire) if codec == "none" else None for wire in rates}
        texts = [f"{ours[w]:.2f}" + (f" ({published[w]:.2f})" if published[w] is not None else "") for w in rates]
        print(f"| {label(h, codec)} | {' | '.join(texts)} |")


def print_targets(found: list[Found], target: float) -> None:
    print(f"\n| | s to loss {target:g}, mean | least and most | steps |\n|---|---:|---:|---:|")
    for h in dict.fromkeys(one["h"] for one in found):
        own = [one for one in found if one["h"] == h]
        seconds, steps = [one["seconds"] for one in own], statistics.mean(one["steps"] for one in own)
        cells = [f"{statistics.mean(seconds):.1f}", f"{min(seconds):.1f} to {max(seconds):.1f}", f"{steps:,.0f}"]
        if not all(one["reached"] for one in own):
            cells[0] = f"not in {max(seconds):.0f}"
        note = ", as plan --probe recommends" if own[0]["recommended"] else ""
        print(f"| {label(h, 'none')}{note} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["surface", "target"], default=["surface", "target"])
    parser.add_argument("--wires", type=int, nargs="+", default=[50, 200, 1000, 5000], help="published, in Mbit/s")
    parser.add_argument("--local-steps", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--codecs", nargs="+", choices=["none", "bf16", "int8", "int4"], default=["none"])
    parser.add_argument("--cell-seconds", type=float, default=4.0, help="of measured rounds, at least two")
    parser.add_argument("--target", type=float, default=0.08)
    parser.add_argument("--target-steps", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--seeds", type=int, default=2, help="of each training to the target")
    parser.add_argument("--target-wire", type=int, default=5000, help="published, in Mbit/s")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds to the target, then it is given up")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    enter()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write(data)
        step = on_two(step_alone, 200)
        rates = {wire: our_rate(wire, step) for wire in options.wires}
        passing = {}
        for wire, rate in rates.items():
            with narrowed(rate):
                passing[wire] = passing_rate(max(2_000_000, int(rate / 8)))
            say(f"{wire} Mbit/s is {rate / 1e6:.1f} here, {passing[wire] / 1e6:.1f} pass; a step {step * 1e3:.1f} ms")
        found: Found = {"step": step, "rates": rates, "passing": passing}
        if "surface" in options.parts:
            found["surface"] = surface(options, step, data)
        if "target" in options.parts:
            found["target"] = targets(options, step, data)
        found["step_after"] = on_two(step_alone, 200)
    print(f"A step of {1e3 * step:.1f} ms before, {1e3 * found['step_after']:.1f} ms after.")
    if "surface" in found:
        print_surface(found["surface"], rates)
    if "target" in found:
        print_targets(found["target"], options.target)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
