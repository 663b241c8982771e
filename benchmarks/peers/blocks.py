"""A DataLoader over blocks, as a careful person writes it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from peers.engine import (
    BATCH,
    BLOCK,
    MESSAGES,
    PIPELINES,
    WINDOW,
    WINDOWS,
    Engine,
    Facts,
    Passes,
    Settings,
    arena,
    fill,
    open_arrays,
    shuffled,
    split,
    use_pipeline,
    worker_options,
)


class Blocks(IterableDataset):
    """Blocks in random order, decoded in place; the rows of a window of several are shuffled and yielded in batches.

    With ``readers`` that many threads decode the next window while this one is yielded. ``message`` rows at a time go
    from a worker to the loop, which splits them into batches, because it is messages that cost.
    """

    def __init__(self, facts: Facts, settings: Settings) -> None:
        self.path, self.rows, self.settings = facts["path"], facts["rows"], settings
        self.number = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.number += 1
        settings, block = self.settings, self.settings["block"]
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        use_pipeline(settings["pipeline"], settings["threads"])
        arrays = open_arrays(self.path)
        order = np.random.default_rng(self.number).permutation(self.rows // block)[worker::workers].tolist()
        windows = [order[start : start + WINDOW // block] for start in range(0, len(order), WINDOW // block)]
        arenas = [arena(WINDOW) for _ in range(2 if settings["readers"] else 1)]
        rng = np.random.default_rng((self.number, worker))

        def read(at: int, number: int, into: tuple[torch.Tensor, torch.Tensor]) -> None:
            for array, out in zip(arrays, into, strict=True):
                fill(array, number * block, (number + 1) * block, out[at * block : (at + 1) * block])

        def start(index: int) -> list[Future[None]]:
            if index == len(windows):
                return []
            return [pool.submit(read, *block, arenas[index % 2]) for block in enumerate(windows[index])]

        with ThreadPoolExecutor(max(1, settings["readers"])) as pool:
            ahead = start(0) if settings["readers"] else []
            for index, window in enumerate(windows):
                x, y = arenas[index % len(arenas)]
                if settings["readers"]:
                    for future in ahead:
                        future.result()
                    ahead = start(index + 1)
                else:
                    for at, number in enumerate(window):
                        read(at, number, (x, y))
                filled = len(window) * block
                yield from shuffled(x[:filled], y[:filled], rng, settings["message"])


def block_loader(facts: Facts, settings: Settings) -> Passes:
    loader = DataLoader(Blocks(facts, settings), batch_size=None, **worker_options(settings))
    return lambda number: loader if settings["message"] == BATCH else split(loader)


ENGINES = {
    "blocks": Engine(
        "DataLoader over blocks, by hand",
        f"blocks in random order, {WINDOWS} (of each worker)",
        block_loader,
        axes=[
            MESSAGES,
            [{"readers": 2}, {"readers": 1}, {"readers": 0}],
            BLOCK,
            [{"threads": None}, {"threads": 1}],
            PIPELINES,
        ],
        modules=("zarrs",),
    ),
    "blocks-small": Engine(
        "DataLoader over small blocks, by hand",
        f"blocks of 1,024 rows in random order, {WINDOWS} (of each worker)",
        block_loader,
        axes=[
            [{"block": 1024}],
            [{"workers": 0, "message": BATCH}],
            [{"readers": 2}, {"readers": 1}, {"readers": 0}],
            [{"threads": None}, {"threads": 1}],
            PIPELINES,
        ],
        modules=("zarrs",),
        layouts=("sharded",),  # smaller than the chunks of the other
    ),
}
