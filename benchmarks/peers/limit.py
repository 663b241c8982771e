"""The limit: decode every chunk once, and gather rows into batches; nothing else."""

from __future__ import annotations

import numpy as np
import torch

from peers.engine import (
    BATCH,
    BLOCK,
    WINDOW,
    WINDOWS,
    Batches,
    Engine,
    Facts,
    Passes,
    Settings,
    arena,
    fill,
    open_arrays,
    use_pipeline,
)


def decode(facts: Facts, settings: Settings) -> Passes:
    use_pipeline(settings["pipeline"], settings["threads"])
    arrays = open_arrays(facts["path"])
    out = arena(settings["block"])

    def batches(number: int) -> Batches:
        for start in range(0, facts["rows"], settings["block"]):
            stop = min(start + settings["block"], facts["rows"])
            for array, values in zip(arrays, out, strict=True):
                fill(array, start, stop, values[: stop - start])
            yield out[0][: stop - start], out[1][: stop - start]

    return batches


def gather(facts: Facts, settings: Settings) -> Passes:
    full = arena(WINDOW)
    ring = [arena(BATCH) for _ in range(4)]

    def batches(number: int) -> Batches:
        rng = np.random.default_rng(number)
        for start in range(0, facts["rows"], WINDOW):
            order = torch.from_numpy(rng.permutation(min(WINDOW, facts["rows"] - start)))
            for at in range(0, len(order), BATCH):
                chosen, out = order[at : at + BATCH], ring[at // BATCH % len(ring)]
                for values, batch in zip(full, out, strict=True):
                    if settings["by"] == "index_select":
                        torch.index_select(values, 0, chosen, out=batch)
                    else:
                        np.take(values.numpy(), chosen.numpy(), axis=0, out=batch.numpy(), mode="clip")
                yield out

    return batches


ENGINES = {
    **{
        f"decode-{name}": Engine(
            f"limit: decode with {name}",
            "none",
            decode,
            axes=[[{"pipeline": name}], [*BLOCK, {"block": 65_536}], [{"threads": 1}, {"threads": None}]],
            modules=("zarrs",),
            role="decode",
        )
        for name in ("zarr", "zarrs")
    },
    "gather": Engine(
        "limit: gather",
        WINDOWS,
        gather,
        axes=[[{"by": "index_select"}, {"by": "take"}]],
        role="gather",
    ),
}
