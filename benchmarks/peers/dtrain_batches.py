"""dtrain.batches."""

from __future__ import annotations

from itertools import islice

from peers.engine import BATCH, Batches, Engine, Facts, Passes, Settings


def without_batches() -> str:
    import dtrain

    return "" if hasattr(dtrain, "batches") else "this dtrain has no dtrain.batches"


def ours(facts: Facts, settings: Settings) -> Passes:
    import dtrain

    samples = dtrain.open_samples(facts["path"], inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})
    chosen = {"reader": settings["reader"], "memory": settings["memory"], "cache": "0"}
    stream = dtrain.batches(samples, batch_size=BATCH, epochs=None, **chosen)

    def batches(number: int) -> Batches:
        for (x,), y in islice(stream, facts["rows"] // BATCH):
            yield x, y

    return batches


ENGINES = {
    "dtrain": Engine(
        "dtrain",
        "units in random order, rows within a staggered window of units",
        ours,
        axes=[[{"reader": "auto"}, {"reader": "zarr"}, {"reader": "zarrs"}]],
        modules=("dtrain", "dtrain.data.source", "zarrs"),
        missing=without_batches,
    ),
}
