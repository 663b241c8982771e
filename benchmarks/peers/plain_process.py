"""One plain PyTorch process: the demo's model, tokens in memory, AdamW. What a user has without any cluster."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
from racing import Snapshot, Trial, read_tokens, train_steps

from dtrain_cli.templates.demo_model import build


def train(trial: Trial, data: Path) -> list[Snapshot]:
    """Train in a new process; its start and the reading of the tokens are not timed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "snapshots"
        mp.spawn(_train, args=(trial, data, out))
        snapshots: list[Snapshot] = pickle.loads(out.read_bytes())
    return snapshots


def _train(rank: int, trial: Trial, data: Path, out: Path) -> None:
    torch.set_num_threads(trial.threads)
    torch.manual_seed(trial.seed)
    out.write_bytes(pickle.dumps(train_steps(build(), trial, read_tokens(data / "train.zarr"))))
