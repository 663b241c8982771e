"""A DataLoader that reads one row at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler

from peers.engine import (
    BATCH,
    PIPELINES,
    Engine,
    Facts,
    Passes,
    Settings,
    open_arrays,
    sampled,
    use_pipeline,
    worker_options,
)


class Rows(Dataset):
    def __init__(self, path: str, rows: int, pipeline: str) -> None:
        self.path, self.rows, self.pipeline = path, rows, pipeline
        self.arrays: tuple[Any, Any] | None = None

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.arrays is None:
            use_pipeline(self.pipeline)
            self.arrays = open_arrays(self.path)
        return torch.from_numpy(self.arrays[0][index]), int(self.arrays[1][index])


def per_sample(facts: Facts, settings: Settings) -> Passes:
    rows = Rows(facts["path"], facts["rows"], settings["pipeline"])
    sampler = SubsetRandomSampler(sampled(facts, settings).tolist())
    loader = DataLoader(rows, batch_size=BATCH, sampler=sampler, **worker_options(settings))
    return lambda number: loader


ENGINES = {
    "per-sample": Engine(
        "DataLoader, row by row",
        "full",
        per_sample,
        axes=[[{"sample": 2048}], [{"workers": 2}, {"workers": 1}, {"workers": 0}], PIPELINES],
        modules=("zarrs",),
    ),
}
