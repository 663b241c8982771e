"""Write the data of the example: Python source text, and the English of Python's manual. Run: python data.py

Both are part of Python. A store holds one array of bytes, tokens uint8[position].
"""

import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import xarray as xr
import zarr


def write_tokens(path, texts, num_bytes):
    """Write texts as one array in chunks of 16,384 bytes."""
    joined = np.frombuffer(b"".join(texts)[:num_bytes], np.uint8)
    dataset = xr.Dataset({"tokens": (("position",), joined)})
    with zarr.config.set({"array.write_empty_chunks": True}):
        dataset.to_zarr(path, mode="w", encoding={"tokens": {"chunks": (16_384,)}}, consolidated=False)


def main(directory, num_bytes=4_000_000):
    """Write source.zarr to train on first, manual.zarr to fine-tune on, and held-out texts of both."""
    source = [file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    manual = [topics[name].encode() for name in sorted(topics)]
    for name, texts in (("source", source), ("manual", manual)):
        write_tokens(Path(directory, f"{name}.zarr"), [t for i, t in enumerate(texts) if i % 8], num_bytes)
        write_tokens(Path(directory, f"{name}-val.zarr"), texts[::8], num_bytes // 80)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
