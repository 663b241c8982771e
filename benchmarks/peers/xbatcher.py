"""xbatcher: its own batches, and large ones cut by hand."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from peers.engine import (
    BATCH,
    PIPELINES,
    WINDOW,
    WINDOWS,
    WORKERS,
    Batches,
    Engine,
    Facts,
    Passes,
    Settings,
    arena,
    shuffled,
    use_pipeline,
    worker_options,
)


class Piped(Dataset):
    """A dataset that sets the codec pipeline in the process in which it is used."""

    def __init__(self, dataset: Any, pipeline: str) -> None:
        self.dataset, self.pipeline, self.process = dataset, pipeline, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if self.process != os.getpid():
            use_pipeline(self.pipeline)
            self.process = os.getpid()
        return self.dataset[index]


def as_tensor(values: Any) -> torch.Tensor:
    return torch.from_numpy(values.values)


def xbatcher(facts: Facts, settings: Settings) -> Passes:
    import xarray as xr
    from xbatcher import BatchGenerator
    from xbatcher.loaders.torch import MapDataset

    patch = settings["patch"]
    use_pipeline(settings["pipeline"])
    dataset = xr.open_zarr(facts["path"], chunks={} if settings["dask"] else None, consolidated=False)
    generators = [BatchGenerator(dataset[name], dict(dataset[name].sizes) | {"sample": patch}) for name in ("x", "y")]
    patches = MapDataset(*generators, transform=as_tensor, target_transform=as_tensor)
    loader = DataLoader(Piped(patches, settings["pipeline"]), batch_size=None, shuffle=True, **worker_options(settings))
    if patch == BATCH:
        return lambda number: loader
    x, y = arena(WINDOW)

    def batches(number: int) -> Batches:
        rng = np.random.default_rng(number)
        filled = 0
        for patch_x, patch_y in loader:
            x[filled : filled + patch] = patch_x
            y[filled : filled + patch] = patch_y
            filled += patch
            if filled == WINDOW:
                yield from shuffled(x, y, rng)
                filled = 0
        yield from shuffled(x[:filled], y[:filled], rng)

    return batches


ENGINES = {
    "xbatcher": Engine(
        "xbatcher, its batches",
        "batches in random order, the 256 rows of each consecutive",
        xbatcher,
        axes=[[{"patch": BATCH}], WORKERS, PIPELINES, [{"dask": False}, {"dask": True}]],
        modules=("zarrs", "xarray", "xbatcher.loaders.torch"),
    ),
    "xbatcher-blocks": Engine(
        "xbatcher, large batches cut by hand",
        f"large batches in random order, {WINDOWS}",
        xbatcher,
        axes=[[{"patch": 16_384}, {"patch": 4096}], WORKERS, PIPELINES, [{"dask": False}, {"dask": True}]],
        modules=("zarrs", "xarray", "xbatcher.loaders.torch"),
    ),
}
