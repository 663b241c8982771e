"""Predictions on a cluster: the bytes of a serial run, whoever computed them, wherever they were written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import icechunk
import numpy as np
import pytest
import torch
import xarray as xr
from distributed import Client

import dtrain
from dtrain.data.write import local
from dtrain.data.write.documents import Objects
from dtrain.errors import DiskFull, UserCodeFailed
from dtrain.predict import write
from tests.predict import models
from tests.predict.test_output import contents
from tests.runtime.models import Slow


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> Path:
    values = np.random.default_rng(0).normal(size=(40, 12, 9)).astype("float32")
    arrays = {"f": {"dims": ("t", "y", "x"), "values": values, "chunks": (2, 6, 9)}}
    return write_store(tmp_path_factory.mktemp("fields") / "fields.zarr", arrays)


def slow_context(seconds: float = 0.0) -> torch.nn.Module:
    model = Slow(seconds)
    model.inner = models.context()
    return model


@pytest.fixture(scope="module")
def run(fields: Path, tmp_path_factory: pytest.TempPathFactory) -> dtrain.Run:
    samples = dtrain.open_samples(
        fields, inputs=["f"], targets=["f"], patch={"y": 5, "x": 4}, normalize=["f"], split={"val": 0.0, "test": 0.0}
    )
    return dtrain.train(
        slow_context,
        samples,
        train={"loss": "mse", "rounds": 1, "batch_size": 9},
        average={"replicas": 1},
        cluster="serial",
        run_dir=tmp_path_factory.mktemp("predicting") / "runs",
        progress=False,
    )


@pytest.fixture(scope="module")
def calm(run: dtrain.Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("calm") / "calm.zarr"
    run.predict_to(out)
    return contents(out)


def test_a_cluster_writes_the_bytes_of_a_serial_run(
    run: dtrain.Run, calm: dict[str, bytes], client: Client, tmp_path: Path
) -> None:
    done = run.predict_to(tmp_path / "out.zarr", cluster=client)
    assert contents(tmp_path / "out.zarr") == calm
    assert (done.new, done.samples) == (40 * 3 * 3, 40 * 3 * 3)
    assert not [key for keys in client.processing().values() for key in keys]


@dataclass(frozen=True)
class Elsewhere:
    """A writer whose directory only the driver reaches, as on machines without a shared disk."""

    inner: local.LocalWriter
    driver: int

    def fresh(self) -> Elsewhere:
        return self

    def is_reached(self) -> bool:
        return os.getpid() == self.driver

    def put(self, objects: Objects) -> None:
        assert os.getpid() == self.driver
        self.inner.put(objects)

    def receipt(self) -> None:
        return None


def test_without_a_shared_disk_chunks_go_through_the_driver(
    run: dtrain.Run, calm: dict[str, bytes], client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        local.LocalSink, "writer", lambda sink: Elsewhere(local.LocalWriter(sink.path, sink._run_id), os.getpid())
    )
    run.predict_to(tmp_path / "out.zarr", cluster=client)
    assert contents(tmp_path / "out.zarr") == calm


def test_forks_of_a_session_are_merged(run: dtrain.Run, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "out.icechunk"
    run.predict_to(path, cluster=client)
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    found = xr.open_zarr(repository.readonly_session("main").store, consolidated=False).load()
    np.testing.assert_array_equal(found.f.values, run.predict().f.values)


def test_a_worker_that_is_killed_changes_nothing(
    run: dtrain.Run,
    calm: dict[str, bytes],
    tmp_path: Path,
    own_client: Client,
    kill_worker_in: Callable[[Client, str], Any],
) -> None:
    opened = dtrain.load_run(run.directory, model=lambda: slow_context(0.02), trust_code=True)
    killing = kill_worker_in(own_client, "predict-")
    opened.predict_to(tmp_path / "out.zarr", cluster=own_client)
    assert not killing.is_alive()
    assert contents(tmp_path / "out.zarr") == calm


def test_what_is_interrupted_goes_on_elsewhere(
    run: dtrain.Run, calm: dict[str, bytes], client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = iter(range(100))
    real = write._Totals.add

    def add(totals: Any, span: Any) -> None:
        real(totals, span)
        if next(count) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(write._Totals, "add", add)
        with pytest.raises(KeyboardInterrupt):
            run.predict_to(tmp_path / "out.zarr", cluster=client)
    assert run.predict_to(tmp_path / "out.zarr", resume=True).new < 360
    assert contents(tmp_path / "out.zarr") == calm


def broken() -> torch.nn.Module:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = models.context()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 2:
                raise ValueError("too many for me")
            result: torch.Tensor = self.inner(x)
            return result

    return Broken()


def test_a_fault_of_the_model_is_named(run: dtrain.Run, client: Client, tmp_path: Path) -> None:
    opened = dtrain.load_run(run.directory, model=broken, trust_code=True)
    with pytest.raises(UserCodeFailed, match="Predicting raised ValueError: too many for me"):
        opened.predict_to(tmp_path / "out.zarr", cluster=client)


def test_a_full_disk_of_a_worker_is_exit_8(
    run: dtrain.Run, client: Client, tmp_path: Path, calm: dict[str, bytes]
) -> None:
    out = tmp_path / "out.zarr"

    def fill() -> None:
        import errno

        from dtrain.data.write import local

        local.__dict__["kept"] = local.write_synced

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        local.write_synced = full

    def free() -> None:
        from dtrain.data.write import local

        local.write_synced = local.__dict__.pop("kept")

    client.run(fill)
    try:
        with pytest.raises(DiskFull, match="No space left on device"):
            run.predict_to(out, cluster=client)
    finally:
        client.run(free)
    run.predict_to(out, cluster=client, resume=True)
    assert contents(out) == calm


# Lazily -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["threads", "synchronous", "client"])
def scheduler(request: pytest.FixtureRequest, client: Client) -> Iterator[str]:
    if request.param == "client":
        with client.as_current():
            yield "client"
    else:
        with dask.config.set(scheduler=request.param):
            yield request.param


def test_lazy_predictions_have_the_same_bits(run: dtrain.Run, scheduler: str, tmp_path: Path, calm: Any) -> None:
    threads = torch.get_num_threads()
    lazy = run.predict()
    written = write_calm(run, tmp_path)
    np.testing.assert_array_equal(lazy.f.isel(t=slice(10, 14)).values, written[10:14])
    np.testing.assert_array_equal(lazy.f.mean(("y", "x")).values, xr.DataArray(written).mean(("dim_1", "dim_2")).values)
    lazy.drop_attrs().to_zarr(tmp_path / "own.zarr", consolidated=False)
    np.testing.assert_array_equal(xr.open_zarr(tmp_path / "own.zarr", consolidated=False).f.values, written)
    assert torch.get_num_threads() == threads


def write_calm(run: dtrain.Run, tmp_path: Path) -> Any:
    run.predict_to(tmp_path / "calm.zarr")
    return xr.open_zarr(tmp_path / "calm.zarr").f.values


def test_only_what_is_asked_for_is_computed_and_parameters_are_one_key(run: dtrain.Run) -> None:
    few = run.predict().f.isel(t=[0]).data
    graph = dict(few.__dask_optimize__(few.__dask_graph__(), few.__dask_keys__()))
    assert sum("dtrain-model" in str(key) for key in graph) == 1
    assert sum("dtrain-unit" in str(key) for key in graph) == 1
