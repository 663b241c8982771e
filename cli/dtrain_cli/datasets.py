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


def weather(days: int = 1461, lat: int = 24, lon: int = 48) -> xr.Dataset:
    """Return daily temperatures: float32[time, lat, lon] in K, waves that travel and fade, and a yearly cycle.

    Each wave has a complex amplitude that turns by a fixed angle a day, shrinks, and receives noise: an autoregression
    of order one. So the best forecast knows how each wave moves, and persistence does not.
    """
    import numpy as np
    import xarray as xr

    rng = np.random.default_rng(0)
    time = np.datetime64("2015-01-01", "ns") + np.arange(days) * np.timedelta64(1, "D")
    south_north, west_east = (np.arange(lat) + 0.5) / lat, np.arange(lon) / lon
    field = np.zeros((days, lat, lon))
    for across in (1, 2, 3):
        for along in (1, 2, 3, 4, 5):
            turn, kept = np.exp(1j * (0.25 * along - 0.4 / along)), 0.97
            noise = (rng.normal(size=(days, 2)) @ [1, 1j]) * np.sqrt(1 - kept**2)
            amplitude = np.empty(days, complex)
            amplitude[0] = rng.normal() + 1j * rng.normal()
            for day in range(1, days):
                amplitude[day] = kept * turn * amplitude[day - 1] + noise[day]
            wave = np.sin(np.pi * across * south_north)[:, None] * np.exp(-2j * np.pi * along * west_east)
            field += 4 / (across + along) * np.real(amplitude[:, None, None] * wave)
    season = -10 * np.cos(2 * np.pi * np.arange(days) / 365.25)[:, None, None]
    mean = 275 + 25 * np.sin(np.pi * south_north)[:, None]
    values = mean + season + field + 0.1 * rng.normal(size=field.shape)
    return xr.Dataset(
        {"temperature": (("time", "lat", "lon"), values.astype("float32"), {"units": "K"})},
        coords={"time": time, "lat": 90 - 180 * south_north, "lon": 360 * west_east},
        attrs={"title": "Made by a random generator: travelling waves"},
    )


def cells(images: int = 80, side: int = 128, count: int = 25) -> xr.Dataset:
    """Return pictures of cells: image uint16[sample, y, x] under uneven light, and mask uint8[sample, y, x]."""
    import numpy as np
    import xarray as xr

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    image, mask = np.zeros((images, side, side), "uint16"), np.zeros((images, side, side), "uint8")
    for picture in range(images):
        bright = np.zeros((side, side))
        for _ in range(count):
            dy, dx = y - rng.integers(side), x - rng.integers(side)
            angle, (a, b) = rng.uniform(0, np.pi), rng.uniform(4, 10, 2)
            u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
            distance = np.sqrt((u / a) ** 2 + (v / b) ** 2)
            mask[picture] |= distance < 1
            bright = np.maximum(bright, rng.uniform(0.4, 1) / (1 + np.exp(8 * (distance - 1))))
        towards = rng.uniform(0, 2 * np.pi)
        light = 0.5 + (x * np.cos(towards) + y * np.sin(towards)) / side / 3
        mean = 400 + 2_000 * light + 1_200 * bright
        image[picture] = np.clip(mean + rng.normal(0, 250, mean.shape), 0, 65_535)
    dims = ("sample", "y", "x")
    return xr.Dataset(
        {"image": (dims, image), "mask": (dims, mask)}, attrs={"title": "Made by a random generator: ellipses"}
    )


def python_sources() -> tuple[xr.Dataset, xr.Dataset]:
    """Return the source files of the Python standard library as bytes: those to train on, and those held out.

    Held out are `HELD_OUT_FILES` whole files, evenly spread among the files of medium length.
    """
    texts = _standard_library()
    medium = [i for i, text in enumerate(texts) if 2_000 <= len(text) <= 8_000]
    chosen = set(medium[:: max(1, len(medium) // HELD_OUT_FILES)][:HELD_OUT_FILES])
    return (
        _tokens([text for i, text in enumerate(texts) if i not in chosen]),
        _tokens([text for i, text in enumerate(texts) if i in chosen]),
    )


def some_python_sources() -> xr.Dataset:
    """Return one in eight of the source files of the Python standard library as bytes."""
    return _tokens(_standard_library()[::8])


def _standard_library() -> list[bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "encodings"}
    files = sorted(p for p in root.rglob("*.py") if not left_out.intersection(p.relative_to(root).parts))
    return [text for text in (path.read_bytes() for path in files) if text]


def _tokens(texts: list[bytes]) -> xr.Dataset:
    import numpy as np
    import xarray as xr

    joined = np.frombuffer(b"".join(texts), dtype=np.uint8)
    attributes = {"title": "Source files of the Python standard library", "files": len(texts)}
    return xr.Dataset({"tokens": (("position",), joined)}, attrs=attributes)
