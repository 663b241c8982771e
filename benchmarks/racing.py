"""The parts that the engines of race.py share: trials, snapshots, the peers' batches and steps, the evaluation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import zarr
from torch import nn

from dtrain.algorithm.schedules import schedule_named
from dtrain_cli.templates.demo_model import CONTEXT, build

Tokens = npt.NDArray[np.uint8]
WEIGHT_DECAY, CLIP_NORM, WARMUP_STEPS = 0.01, 1.0, 40
EVALUATED_AT_ONCE = 64


@dataclass(frozen=True)
class Trial:
    """One training."""

    lr: float
    batch: int
    """Samples of a step in each process."""
    steps: int
    """Of each process."""
    seed: int
    threads: int = 1
    """Of a plain process; where there are two processes each has one."""
    snapshots: int = 1
    """Evenly spaced, the last one after the last step."""

    @property
    def marks(self) -> frozenset[int]:
        """The steps after which a snapshot is taken."""
        return frozenset(round(self.steps * k / self.snapshots) for k in range(1, self.snapshots + 1))


@dataclass(frozen=True)
class Snapshot:
    """The model on the way."""

    step: int
    seconds: float
    """In training, from before the first step."""
    state: dict[str, torch.Tensor]


def read_tokens(path: Path) -> Tokens:
    tokens: Tokens = zarr.open_group(path, mode="r")["tokens"][:]
    return tokens


def windows(tokens: Tokens) -> Tokens:
    """Return the samples of the demo, uint8[sample, CONTEXT + 1]: each window and the token after it."""
    return np.lib.stride_tricks.sliding_window_view(tokens, CONTEXT + 1)[::CONTEXT]


def batches(tokens: Tokens, trial: Trial, rank: int, processes: int) -> Iterator[torch.Tensor]:
    """Yield int64[batch, CONTEXT + 1] without end: in each pass every process has its own share of all windows."""
    rows = windows(tokens)
    for epoch in itertools.count():
        own = np.random.default_rng((trial.seed, epoch)).permutation(len(rows))[rank::processes]
        for start in range(0, len(own) - trial.batch + 1, trial.batch):
            yield torch.from_numpy(rows[own[start : start + trial.batch]].astype(np.int64))


def train_steps(module: nn.Module, trial: Trial, tokens: Tokens, rank: int = 0, processes: int = 1) -> list[Snapshot]:
    """Take the steps of a peer: AdamW, linear warm-up, cosine, clipped gradients, as in the demo's file."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=trial.lr, weight_decay=WEIGHT_DECAY)
    factor = schedule_named("cosine", WARMUP_STEPS)
    snapshots, began = [], perf_counter()
    for step, rows in enumerate(itertools.islice(batches(tokens, trial, rank, processes), trial.steps)):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(module(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
        optimizer.param_groups[0]["lr"] = trial.lr * factor(step, trial.steps)
        optimizer.step()
        if step + 1 in trial.marks:
            state = getattr(module, "module", module).state_dict()  # DistributedDataParallel wraps the model
            copied = {name: tensor.clone() for name, tensor in state.items()}
            snapshots.append(Snapshot(step + 1, perf_counter() - began, copied))
    return snapshots


def bits_per_byte(state: dict[str, torch.Tensor], tokens: Tokens) -> float:
    """Return the mean negative log2-likelihood of all windows of held-out tokens; infinite if it is not finite."""
    module = build()
    module.load_state_dict(state)
    module.eval()
    rows, total = windows(tokens), 0.0
    with torch.inference_mode():
        for start in range(0, len(rows), EVALUATED_AT_ONCE):
            chosen = torch.from_numpy(rows[start : start + EVALUATED_AT_ONCE].astype(np.int64))
            logits = module(chosen[:, :-1]).flatten(0, 1)
            total += float(F.cross_entropy(logits, chosen[:, 1:].flatten(), reduction="sum"))
    bits = total / (len(rows) * CONTEXT * math.log(2))
    return bits if math.isfinite(bits) else math.inf


def reached(snapshots: list[Snapshot], target: float, tokens: Tokens) -> tuple[float, float | None]:
    """Return the last snapshot's bits per byte, and the seconds from which on they stayed below `target`.

    Snapshots are evaluated from the last one back to the first that is above; between it and the next one the bits
    are taken to fall in a straight line.
    """
    final = later = bits_per_byte(snapshots[-1].state, tokens)
    if final > target:
        return final, None
    for before, after in zip(snapshots[-2::-1], snapshots[:0:-1], strict=True):
        bits = bits_per_byte(before.state, tokens)
        if bits > target:
            share = (bits - target) / (bits - later) if math.isfinite(bits) else 1.0
            return final, before.seconds + share * (after.seconds - before.seconds)
        later = bits
    return final, snapshots[0].seconds
