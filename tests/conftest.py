"""The hypothesis profile, and fixtures that write stores: shared by all tests."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from hypothesis import settings

from tests.sampling import examples, mark_extra

if TYPE_CHECKING:  # the tests of the data layer run without Dask
    from distributed import Client, LocalCluster

    from dtrain.data.samples import Samples

settings.register_profile("base", deadline=None, derandomize=True, database=None)
settings.load_profile("base")
settings.register_profile("dtrain", examples(60))
settings.load_profile("dtrain")

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it: what is printed would be wrapped
# As in clusters that dtrain starts. Dask's profiler looks at the frames of all threads every 10 ms; where Python 3.11
# collects garbage meanwhile it holds the lock of the interpreter for ever (python/cpython#106883).
os.environ["DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED"] = "False"


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"cluster", "client"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.alone)
    mark_extra(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Where torch and Dask are not installed, as in `make test-newest`, the data layer is tested without them."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if error.name in ("torch", "distributed"):
            pytest.skip(f"{error.name} is not installed")
        raise


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_arrives() -> None:
    # a shell starts background jobs with SIGINT ignored, and children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_log_level() -> Iterator[None]:
    logger = logging.getLogger("dtrain")
    level = logger.level
    yield
    logger.setLevel(level)  # a command with --quiet raises it


@pytest.fixture(autouse=True)
def _own_modules() -> Iterator[None]:
    own = {name: module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "tests"}
    yield
    sys.modules.update(own)  # a function of tests that is loaded by name is imported anew, with its neighbours


@pytest.fixture(scope="session")
def write_store() -> Callable[..., Path]:
    """A function that writes a Zarr group, every chunk of it.

    write_store(path, {"x": dict(dims=("n", "k"), values=..., chunks=(4, 2), shards=(8, 2))}, zarr_format=2)
    """
    return _write_store


def _write_store(
    path: Path,
    arrays: Mapping[str, Mapping[str, Any]],
    *,
    zarr_format: int = 3,
    group: str = "",
    consolidated: bool = False,
) -> Path:
    with warnings.catch_warnings(), zarr.config.set({"array.write_empty_chunks": True}):
        warnings.simplefilter("ignore")  # zarr warns of what the v3 specification lacks; dtrain reads it all the same
        zarr.create_group(path, zarr_format=zarr_format, overwrite=False)
        root = zarr.open_group(path, path=group or None, mode="a", zarr_format=zarr_format)
        for name, described in arrays.items():
            options = dict(described)
            dims, values = options.pop("dims"), np.asarray(options.pop("values"))
            if zarr_format == 3:
                options["dimension_names"] = dims
            else:
                options["fill_value"] = options.get("fill_value")
                if dims is not None:
                    options["attributes"] = {"_ARRAY_DIMENSIONS": list(dims), **options.get("attributes", {})}
            array = root.create_array(name, shape=values.shape, dtype=values.dtype, **options)
            array[...] = values
        if consolidated:
            zarr.consolidate_metadata(path)
    return path


@pytest.fixture(scope="session")
def numbered() -> Callable[..., np.ndarray]:
    """A function that makes an array whose values tell sample and place apart: sample * places + place."""
    return _numbered


def _numbered(count: int, shape: tuple[int, ...] = (), dtype: Any = "float32", axis: int = 0) -> np.ndarray:
    places = max(1, int(np.prod(shape, dtype=int)))
    values = np.arange(count * places).reshape(count, *shape)
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        values = values % 3 == 0
    elif dtype.kind in "ui":
        values = values % (np.iinfo(dtype).max + 1)
    return np.moveaxis(values.astype(dtype), 0, axis)


@pytest.fixture(scope="session")
def chunk_files() -> Callable[..., list[str]]:
    """A function that lists the files of a store that hold data, relative to it."""
    return _chunk_files


def _chunk_files(store: Path, under: str = "") -> list[str]:
    found = (str(path.relative_to(store)) for path in (store / under).rglob("*") if path.is_file())
    return sorted(name for name in found if Path(name).name not in ("zarr.json", ".zgroup", ".zarray", ".zattrs"))


@pytest.fixture(scope="session")
def grid_keys() -> Callable[..., list[str]]:
    """A function that lists the keys of an array's grid of stored objects, written out by hand."""
    return _grid_keys


def _grid_keys(name: str, counts: tuple[int, ...], zarr_format: int) -> list[str]:
    places = itertools.product(*map(range, counts))
    if zarr_format == 2:
        return [f"{name}/{'.'.join(map(str, place))}" for place in places]
    return ["/".join([name, "c", *map(str, place)]) for place in places]


# Whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> Path:
    """A store of 611 samples in ragged chunks: x float64[n, 6], y int32[n]."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(611, 6))
    y = (x @ rng.normal(size=(6, 3))).argmax(1).astype("int32")
    return write_store(
        tmp_path_factory.mktemp("blobs") / "blobs.zarr",
        {
            "x": {"dims": ("n", "f"), "values": x, "chunks": (40, 6)},
            "y": {"dims": ("n",), "values": y, "chunks": (60,)},
        },
    )


@pytest.fixture(scope="session")
def samples(blobs: Path) -> Samples:
    from dtrain.data.source import open_samples

    return open_samples(blobs, inputs=["x"], targets=["y"])


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    from tests.clusters import new_cluster

    with new_cluster(2) as started:
        yield started


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    from distributed import Client

    with Client(cluster, direct_to_workers=True) as connected:
        yield connected
