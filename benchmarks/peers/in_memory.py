"""A TensorDataset that holds the whole store in memory."""

from __future__ import annotations

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from peers.engine import BATCH, Engine, Facts, Passes, Settings, open_arrays, use_pipeline


def in_memory(facts: Facts, settings: Settings) -> Passes:
    use_pipeline("zarrs")
    x, y = open_arrays(facts["path"])
    dataset = TensorDataset(torch.from_numpy(x[:]), torch.from_numpy(y[:]))
    if settings["indexed"] == "rows":
        loader = DataLoader(dataset, batch_size=BATCH, shuffle=True)
    else:
        loader = DataLoader(dataset, batch_size=None, sampler=BatchSampler(RandomSampler(dataset), BATCH, False))
    return lambda number: loader


ENGINES = {
    "memory": Engine(
        "TensorDataset in memory",
        "full",
        in_memory,
        axes=[[{"indexed": "batches"}, {"indexed": "rows"}]],
        modules=("zarrs",),
        role="own",
    ),
}
