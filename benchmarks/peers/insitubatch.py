"""insitubatch, which reads stored chunks in one event loop. Its sources: github.com/emfdavid/insitubatch, 0.2.0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peers.engine import BATCH, WINDOW, WINDOWS, Batches, Engine, Facts, Passes, Settings, split


def insitubatch(facts: Facts, settings: Settings) -> Passes:
    """Open the store anew for each pass: its pool keeps decoded chunks, and each pass is to decode every row."""
    from insitubatch import InSituDataset, obstore_store, open_geometries, split_by_chunk, to_torch
    from zarr.storage import LocalStore

    def batches(number: int) -> Batches:
        path = Path(facts["path"]).resolve()
        store = LocalStore(path, read_only=True) if settings["store"] == "zarr" else obstore_store(path.as_uri())
        geometries = open_geometries(store, variables=["x", "y"])
        dataset = InSituDataset(
            store,
            split_by_chunk(geometries["x"], fractions=(1.0, 0.0, 0.0)),
            geometries,
            batch_size=settings["message"],
            block_chunks=WINDOW // geometries["x"].sample_chunk_size,
            max_inflight=settings["inflight"],
            prefetch_depth=settings["prefetch"],
        )
        # the constructor does not take it; 0 is min(32, cores + 4)
        dataset.scheduler_config = replace(dataset.scheduler_config, decode_threads=settings["threads"])
        dataset.set_epoch(number)
        yield from split((tensors["x"], tensors["y"]) for tensors in map(to_torch, dataset.train))

    return batches


ENGINES = {
    "insitubatch": Engine(
        "insitubatch",
        f"stored chunks (shards, where there are) in random order, {WINDOWS}",
        insitubatch,
        axes=[
            [{"message": BATCH}, {"message": 4096}],
            [{"inflight": 32}, {"inflight": 8}, {"inflight": 2}],
            [{"threads": 0}, {"threads": 2}, {"threads": 1}],
            [{"prefetch": 2}, {"prefetch": 32}],
            [{"store": "obstore"}, {"store": "zarr"}],
        ],
        modules=("insitubatch",),
        newest=True,
    ),
}
