"""How long does it take to the first batch after a resume? It must not depend on how far the pass had come.

Run: python benchmarks/resume.py [--gb 1] [--repeats 5]

A process opens a store and asks for one shuffled batch of 256 rows at 1, 50 and 99 % of a pass: from nothing, as a
new worker would. Beside it a DataLoader over the same data that can only go on by drawing what it has already given
(torch's IterableDataset without a state of its own) is measured at the same places. Medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import BloscCodec

ROW, CHUNK, BATCH = 256, 4096, 256
PLACES = (0.01, 0.5, 0.99)


def write(path: Path, rows: int) -> None:
    group = zarr.open_group(path, mode="w")
    codec = BloscCodec(cname="lz4")
    x = group.create_array(
        "x", shape=(rows, ROW), chunks=(CHUNK, ROW), dtype="float32", dimension_names=("n", "k"), compressors=codec
    )
    y = group.create_array("y", shape=(rows,), chunks=(CHUNK,), dtype="int64", dimension_names=("n",))
    rng = np.random.default_rng(0)
    for start in range(0, rows, CHUNK):
        x[start : start + CHUNK] = rng.integers(0, 4096, (CHUNK, ROW)).astype("float32")
    y[:] = np.arange(rows)


def dtrain_first_batch(path: str, share: float) -> float:
    import dtrain
    import dtrain.batching  # what is imported is not what is measured
    from dtrain.types import Cursor

    began = time.monotonic()
    samples = dtrain.open_samples(path, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})
    cursor = Cursor(0, int(share * samples.num_samples))
    with dtrain.batches(samples, batch_size=BATCH, cursor=cursor, memory="512MB", cache="0") as batches:
        next(batches)
        return time.monotonic() - began


def replayed_first_batch(path: str, share: float) -> float:
    import torch

    class Blocks(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            group = zarr.open_group(path, mode="r")
            x, y = group["x"], group["y"]
            rng = np.random.default_rng(0)
            order = rng.permutation(x.shape[0] // CHUNK)
            for first in range(0, len(order), 16):
                blocks = order[first : first + 16]
                xs = torch.cat([torch.from_numpy(x[b * CHUNK : (b + 1) * CHUNK]) for b in blocks])
                ys = torch.cat([torch.from_numpy(y[b * CHUNK : (b + 1) * CHUNK]) for b in blocks])
                rows = torch.from_numpy(rng.permutation(len(ys)))
                for start in range(0, len(rows), BATCH):
                    yield xs[rows[start : start + BATCH]], ys[rows[start : start + BATCH]]

    began = time.monotonic()
    rows = zarr.open_group(path, mode="r")["x"].shape[0]
    skip = int(share * rows) // BATCH
    for number, _ in enumerate(torch.utils.data.DataLoader(Blocks(), batch_size=None)):
        if number == skip:
            break
    return time.monotonic() - began


ENGINES = {"dtrain": dtrain_first_batch, "replayed DataLoader": replayed_first_batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        engine, path, share = options.child
        print(json.dumps(ENGINES[engine](path, float(share))))
        return
    found: dict[str, dict[float, list[float]]] = {engine: {place: [] for place in PLACES} for engine in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.zarr"
        write(path, int(options.gb * 1e9) // (ROW * 4) // CHUNK * CHUNK)
        for _ in range(options.repeats):
            for engine in ENGINES:
                for place in PLACES:
                    child = [sys.executable, __file__, "--child", engine, str(path), str(place)]
                    done = subprocess.run(child, check=True, capture_output=True, text=True)
                    found[engine][place].append(json.loads(done.stdout))
    print(f"{'seconds to the first batch':<28}" + "".join(f"{place:>8.0%}" for place in PLACES))
    for engine, places in found.items():
        print(f"{engine:<28}" + "".join(f"{statistics.median(places[place]):>8.2f}" for place in PLACES))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
