"""annbatch on a dense array, its labels as it has them: in memory. Its sources: github.com/scverse/annbatch, 0.3.1.

Its documentation advises against a DataLoader around it, and against worker processes; so there are none.
"""

from __future__ import annotations

import numpy as np
import torch

from peers.engine import (
    BATCH,
    PIPELINES,
    WINDOWS,
    Batches,
    Engine,
    Facts,
    Passes,
    Settings,
    open_arrays,
    split,
    use_pipeline,
)


def annbatch(facts: Facts, settings: Settings) -> Passes:
    import pandas as pd
    from annbatch import Loader

    use_pipeline(settings["pipeline"], settings["threads"])
    x, y = open_arrays(facts["path"])
    labels, indexed = y[:], settings["labels"] == "index"

    def batches(number: int) -> Batches:
        loader = Loader(
            chunk_size=settings["chunk"],
            preload_nchunks=settings["preload"],
            batch_size=settings["message"],
            shuffle=True,
            return_index=indexed,
            to="torch",
            rng=np.random.default_rng(number),
        )
        loader.add_dataset(x, obs=None if indexed else pd.DataFrame({"y": labels}))
        for batch in loader:
            chosen = labels[batch["index"]] if indexed else batch["obs"]["y"].to_numpy(copy=True)
            yield from split([(batch["X"], torch.from_numpy(chosen))])

    return batches


MESSAGE: list[Settings] = [{"message": BATCH}, {"message": 4096}]
LABELS: list[Settings] = [{"labels": "index"}, {"labels": "obs"}]
THREADS: list[Settings] = [{"threads": None}, {"threads": 1}]
ANNBATCH = {"prepare": annbatch, "modules": ("annbatch", "zarrs"), "newest": True}

ENGINES = {
    "annbatch": Engine(
        "annbatch",
        f"runs of rows in random order, {WINDOWS}; its defaults (512 x 32) within 16,384. Labels are read once, before",
        axes=[
            [{"chunk": 16_384, "preload": 4}, {"chunk": 4096, "preload": 16}, {"chunk": 512, "preload": 32}],
            MESSAGE,
            LABELS,
            THREADS,
            PIPELINES,
        ],
        **ANNBATCH,
    ),
    "annbatch-small": Engine(
        "annbatch, small runs",
        f"runs of 1,024 rows in random order, {WINDOWS}. Labels are read once, before",
        axes=[[{"chunk": 1024, "preload": 64}], MESSAGE, LABELS, THREADS, PIPELINES],
        layouts=("sharded",),  # smaller than the chunks of the other
        **ANNBATCH,
    ),
}
