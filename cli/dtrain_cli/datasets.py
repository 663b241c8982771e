"""The data of the templates, as xarray datasets that are written as Zarr."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr

TOKENS_A_CHUNK = 1 << 16
HELD_OUT_FILES = 24


def write_store(dataset: xr.Dataset, path: Path, rows: int = 100) -> None:
    """Write a dataset as Zarr v3 in chunks of `rows` samples, every chunk stored, with checksums."""
    import zarr
    from zarr.codecs import ZstdCodec

    encoding = {
        str(name): {
            "chunks": (rows, *variable.shape[1:]),
            "compressors": (ZstdCodec(level=3, checksum=True),),
        }
        for name, variable in dataset.data_vars.items()
    }
    with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk of zeros is data, not a missing chunk
        dataset.to_zarr(path, zarr_format=3, encoding=encoding, consolidated=False)


def digits() -> xr.Dataset:
    """Return handwritten digits: image float32[sample, y, x], label int64[sample]."""
    import xarray as xr

    from dtrain.errors import UsageError

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "--template digits takes its data from scikit-learn, which is not installed.",
            'Run pip install "dtrain[demo]", or use --template tabular.',
        ) from None
    data = load_digits()
    return xr.Dataset(
        {
            "image": (("sample", "y", "x"), (data.images / 16).astype("float32")),
            "label": (("sample",), data.target.astype("int64")),
        },
        attrs={"title": "Handwritten digits of the UCI repository, as scikit-learn ships them"},
    )


def tabular(rows: int = 20_000, features: int = 16) -> xr.Dataset:
    """Return a regression that a line cannot fit: Friedman's first benchmark (1991) with noise columns."""
    import numpy as np
    import xarray as xr

    rng = np.random.default_rng(0)
    x = rng.random((rows, features))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    noisy = y + rng.normal(size=rows)
    return xr.Dataset(
        {
            "features": (("sample", "feature"), x.astype("float32")),
            "target": (("sample",), ((noisy - noisy.mean()) / noisy.std()).astype("float32")),
        }
    )


def python_sources() -> tuple[xr.Dataset, xr.Dataset]:
    """Return the source files of the Python standard library as bytes: those to train on, and those held out.

    Held out are `HELD_OUT_FILES` whole files, evenly spread among the files of medium length.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "encodings"}
    files = sorted(p for p in root.rglob("*.py") if not left_out.intersection(p.relative_to(root).parts))
    texts = [text for text in (path.read_bytes() for path in files) if text]
    medium = [i for i, text in enumerate(texts) if 2_000 <= len(text) <= 8_000]
    chosen = set(medium[:: max(1, len(medium) // HELD_OUT_FILES)][:HELD_OUT_FILES])
    return (
        _tokens([text for i, text in enumerate(texts) if i not in chosen]),
        _tokens([text for i, text in enumerate(texts) if i in chosen]),
    )


def _tokens(texts: list[bytes]) -> xr.Dataset:
    import numpy as np
    import xarray as xr

    joined = np.frombuffer(b"".join(texts), dtype=np.uint8)
    attributes = {"title": "Source files of the Python standard library", "files": len(texts)}
    return xr.Dataset({"tokens": (("position",), joined)}, attrs=attributes)
