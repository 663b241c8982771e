"""Baselines of forecasts: persistence and climatology by hand, kept in the run, the same on clusters; anomalies."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from distributed import Client
from torch import nn

import dtrain
from dtrain import runclimate
from dtrain.calls import job_from_python
from dtrain.data import climatology
from dtrain.data.climatology import train_rows
from dtrain.errors import DiskFull, InvalidConfig, OutOfMemory, RunDamaged
from dtrain.job import with_scheduler
from dtrain.planning import plan_job
from dtrain.plantext import plan_rows
from dtrain.runtime import tasks
from tests.training import bits, trained

LATS, LONS = 3, 2
TABLE = {"loss": "mse", "metrics": ["mae"], "rounds": 1, "batch_size": 16, "optimizer_args": {"lr": 0.01}}


def times(count: int, start: str = "2001-01-01", step: int = 5) -> np.ndarray:
    return np.datetime64(start, "ns") + np.arange(count) * np.timedelta64(step, "D")


def season(at: np.ndarray) -> np.ndarray:
    return 10 * np.cos((at.astype("M8[M]").astype(int) % 12) * np.pi / 6)


def write(path: Path, at: np.ndarray | None, values: np.ndarray, **more: Any) -> Path:
    coordinates = {"lat": more.pop("lat", [50, 0, -50]), "lon": [10, 20], **({} if at is None else {"time": at})}
    dataset = xr.Dataset({"t": (("time", "lat", "lon"), values)}, coordinates)
    dataset.to_zarr(path, zarr_format=2, encoding={"t": {"chunks": (12, LATS, LONS), **more}})
    return path


def field(at: np.ndarray, seed: int = 0) -> np.ndarray:
    """A season, a mean at each place, and noise that lasts."""
    rng = np.random.default_rng(seed)
    noise = np.cumsum(rng.normal(size=(len(at), LATS, LONS)), axis=0) * 0.3
    return (280 + season(at)[:, None, None] + np.arange(LATS * LONS).reshape(LATS, LONS) + noise).astype("float32")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = times(300)  # four years
    return write(tmp_path_factory.mktemp("baselines") / "s.zarr", at, field(at))


class Ahead(nn.Module):
    """The newest input times a learned number, for each lead."""

    def __init__(self, leads: int = 0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((max(1, leads),), 0.9))
        self.leads = leads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        newest = x[:, -1]
        return self.factor[:, None, None] * newest[:, None] if self.leads else self.factor[0] * newest


def opened(path: Any, **data: Any) -> dtrain.Samples:
    given = {"input_offsets": [-1, 0], "target_offsets": [1, 2], "normalize": ["t"], **data}
    return dtrain.open_samples(path, inputs=["t"], targets=["t"], **given)


def start(path: Any, where: Path, cluster: Any = "serial", **more: Any) -> dtrain.Run:
    data = more.pop("data", {})
    leads = more.pop("leads", 2)
    table = {**TABLE, **more.pop("train", {})}
    return trained(Ahead, opened(path, **data), where, table, cluster, model_args={"leads": leads}, **more)


@pytest.fixture(scope="module")
def run(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dtrain.Run:
    return start(path, tmp_path_factory.mktemp("run"))


def normals(t: np.ndarray, months: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The mean of the training rows of each row's month."""
    means = [t[trained & (months == month)].astype("float64").mean(axis=0) for month in range(12)]
    return np.stack(means)[months]


def rmse(error: np.ndarray) -> float:
    return float(np.sqrt(np.nanmean(error.astype("float64") ** 2)))


def months_of(at: np.ndarray) -> np.ndarray:
    return at.astype("M8[M]").astype(int) % 12


def expected(
    run: dtrain.Run, path: Path, anchors: np.ndarray, leads: tuple[int, ...] = (1, 2)
) -> dict[str, np.ndarray]:
    """Errors of the model and the baselines, [anchor, lead, lat, lon]."""
    dataset = xr.open_zarr(path)
    t, at = dataset.t.values, dataset.time.values
    normal = normals(t, months_of(at), train_rows(run.plan.plans[0]))
    valid = anchors[:, None] + np.array(leads)
    return {"persistence": t[anchors][:, None] - t[valid], "climatology": normal[valid] - t[valid]}


ALL = np.arange(1, 298)
"""Anchors of windows [-1, 2] in 300 rows."""


# Figures by hand ------------------------------------------------------------------------------------------------


def test_persistence_and_climatology_by_hand(run: dtrain.Run, path: Path) -> None:
    errors = expected(run, path, ALL)
    found = run.evaluate(opened(path), split="all")
    assert isinstance(found, dict)
    for name, error in errors.items():
        assert found[f"rmse_{name}"] == pytest.approx(rmse(error), rel=1e-5)
        assert found[f"mae_{name}"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
        assert found[f"skill_{name}"] == pytest.approx(1 - found["rmse"] / rmse(error), rel=1e-5)
    assert list(found)[:3] == ["loss", "mae", "rmse"]
    assert run.evaluate(opened(path), split="all", baselines=False) == {k: found[k] for k in ("loss", "mae")}


def test_by_lead_and_place(run: dtrain.Run, path: Path) -> None:
    errors = expected(run, path, ALL)
    found = run.evaluate(opened(path), split="all", by=["lead", "lat"], all_times=True)
    for name, error in errors.items():
        by_hand = np.sqrt((error.astype("float64") ** 2).mean(axis=(0, 3)))
        np.testing.assert_allclose(found[f"rmse_{name}"].values, by_hand, rtol=1e-5)
        np.testing.assert_allclose(found[f"skill_{name}"], 1 - found.rmse / by_hand, rtol=1e-5)
    assert found.attrs["notes"] == [
        "persistence: each lead is as the newest input",
        "climatology: the mean of the training rows at each place, by calendar month: each month is in 3 to 4 years of "
        "them",
    ]


def test_a_target_without_a_window(path: Path, tmp_path: Path) -> None:
    run = start(path, tmp_path, leads=0, data={"target_offsets": 2, "input_offsets": [-2, 0]})
    anchors = np.arange(2, 298)
    errors = expected(run, path, anchors, (2,))
    found = run.evaluate(opened(path, target_offsets=2, input_offsets=[-2, 0]), split="all")
    assert [found[f"rmse_{name}"] for name in errors] == pytest.approx([rmse(e) for e in errors.values()], rel=1e-5)


def test_the_anomaly_correlation_is_of_differences_from_the_climatology(path: Path, tmp_path: Path) -> None:
    run = start(path, tmp_path, train={"metrics": ["anomaly_correlation"]}, data={"weight": "cos(lat)"})
    assert -1 < run.rows[-1]["val_anomaly_correlation"] <= 1
    found = run.evaluate(opened(path, weight="cos(lat)"), split="all")
    dataset = xr.open_zarr(path)
    t = dataset.t.values.astype("float64")
    normal = normals(dataset.t.values, months_of(dataset.time.values), train_rows(run.plan.plans[0]))
    valid = ALL[:, None] + np.array([1, 2])
    scaling = run.resolved.scalings["t"]
    factor = run.model.factor.detach().numpy()[:, None, None]
    model = factor * (t[ALL][:, None] - scaling.mean[0]) + scaling.mean[0]
    weight = np.cos(np.deg2rad(dataset.lat.values))[:, None]
    for name, forecast in (
        ("anomaly_correlation", model),
        ("anomaly_correlation_persistence", t[ALL][:, None] + 0 * t[valid]),
    ):
        a, b = forecast - normal[valid], t[valid] - normal[valid]
        correlation = (weight * a * b).sum() / np.sqrt((weight * a**2).sum() * (weight * b**2).sum())
        assert found[name] == pytest.approx(correlation, rel=1e-4)
    assert "anomaly_correlation_climatology" not in found  # it has no anomalies


# Computed once, the same everywhere -----------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replicas whose training rows are read for a climatology."""
    seen: list[int] = []
    take = tasks.take_places

    def counted(resident: Any, replica: int, progress: Any) -> Any:
        seen.append(replica)
        return take(resident, replica, progress)

    monkeypatch.setattr(tasks, "take_places", counted)
    return seen


def test_the_training_rows_are_read_once(path: Path, tmp_path: Path, passes: list[int]) -> None:
    run = start(path, tmp_path)
    assert passes == []
    first = run.evaluate()
    assert passes == [0, 1]
    assert run.evaluate() == dtrain.load_run(run.directory, model=Ahead).evaluate() == first
    assert run.evaluate(opened(path), split="all", by="lead") is not None
    assert passes == [0, 1]
    (run.directory / "climatology.safetensors").unlink()
    assert run.evaluate() == first
    assert passes == [0, 1, 0, 1]
    (run.directory / "climatology.safetensors").write_bytes(b"broken")
    with pytest.raises(RunDamaged, match="climatology.safetensors cannot be read"):
        run.evaluate()


def test_of_a_run_that_needs_it_the_file_belongs_to_the_run(path: Path, tmp_path: Path, passes: list[int]) -> None:
    run = start(path, tmp_path, train={"metrics": ["anomaly_correlation"]})
    assert passes == [0, 1]
    assert len(json.loads((run.directory / "plan.json").read_text())["climatology"]) == 64
    run.evaluate()
    assert passes == [0, 1]
    file = run.directory / "climatology.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(RunDamaged, match="has been modified since the run was started"):
        dtrain.load_run(run.directory, model=Ahead).evaluate()
    file.unlink()
    with pytest.raises(RunDamaged, match="climatology.safetensors is missing"):
        dtrain.load_run(run.directory, model=Ahead).evaluate()


def test_a_continued_run_has_the_same_bits(path: Path, tmp_path: Path, client: Client) -> None:
    table = {"metrics": ["anomaly_correlation", "rmse"], "rounds": 4, "eval_every": 1}
    calm = start(path, tmp_path / "calm", train=table)
    parts = start(path, tmp_path / "parts", train={**table, "rounds": 2}, run="r")
    parts = start(path, tmp_path / "parts", train=table, run="r")
    cluster = start(path, tmp_path / "cluster", client, train=table)
    assert bits(calm.rows) == bits(parts.rows) == bits(cluster.rows)
    files = [(one.directory / "climatology.safetensors").read_bytes() for one in (calm, parts, cluster)]
    assert files[0] == files[1] == files[2]


def test_a_cluster_gives_the_same_bits(path: Path, tmp_path: Path, client: Client) -> None:
    runs = [start(path, tmp_path / name) for name in ("a", "b")]
    serial, cluster = (run.evaluate(by="lead", cluster=at) for run, at in zip(runs, ("serial", client), strict=True))
    xr.testing.assert_identical(serial, cluster)
    files = [(run.directory / "climatology.safetensors").read_bytes() for run in runs]
    assert files[0] == files[1]


# Layouts --------------------------------------------------------------------------------------------------------


def check(run: dtrain.Run, samples: dtrain.Samples, t: np.ndarray, normal: np.ndarray, anchors: np.ndarray) -> None:
    """Compare baselines of two leads with those of arrays."""
    valid = anchors[:, None] + np.array([1, 2])
    found = run.evaluate(samples, split="all")
    assert found["rmse_climatology"] == pytest.approx(rmse(normal[valid] - t[valid]), rel=1e-5)
    assert found["rmse_persistence"] == pytest.approx(rmse(t[anchors][:, None] - t[valid]), rel=1e-5)


@pytest.mark.parametrize("at", [None, times(300, step=1), times(300, "2001-01-01")[:100]])
def test_without_two_years_of_dates_it_is_one_mean(tmp_path: Path, at: np.ndarray | None) -> None:
    t = field(times(300))[: 300 if at is None else len(at)]
    path = write(tmp_path / "s.zarr", at, t)
    run = start(path, tmp_path / "run", data={"gaps": "allow"})
    trained = train_rows(run.plan.plans[0])
    normal = np.broadcast_to(t[trained].astype("float64").mean(axis=0), t.shape)
    check(run, opened(path, gaps="allow"), t, normal, np.arange(1, len(t) - 2))
    notes = run.evaluate(by="lead").attrs["notes"]
    why = "rows have no dates" if at is None else "not each month is in two years of them"
    assert f"climatology: the mean of the training rows at each place, not by calendar month: {why}" in notes


def test_patches_and_packed_values(path: Path, tmp_path: Path) -> None:
    """Patches of 2 of 3 latitudes; the second one begins earlier. Values are packed in 16 bits."""
    at = times(300)
    packing = {"dtype": "int16", "scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -32768}
    packed = write(tmp_path / "packed.zarr", at, field(at), **packing)
    t = xr.open_zarr(packed).t.values
    run = start(packed, tmp_path / "run", data={"patch": {"lat": 2}})
    normal = normals(t, months_of(at), train_rows(run.plan.plans[0]))
    valid, rows = ALL[:, None] + np.array([1, 2]), [0, 1, 1, 2]
    found = run.evaluate(opened(packed, patch={"lat": 2}), split="all")
    assert found["rmse_persistence"] == pytest.approx(rmse((t[ALL][:, None] - t[valid])[:, :, rows]), rel=1e-5)
    assert found["rmse_climatology"] == pytest.approx(rmse((normal[valid] - t[valid])[:, :, rows]), rel=1e-5)


def test_places_that_are_held_out_have_no_climatology_of_their_own(path: Path, tmp_path: Path) -> None:
    """Training patches cover some latitudes: at others there is no training row, and nothing is made up."""
    data = {"patch": {"lat": 1}, "split": {"patches": True, "val": 0.0, "test": 0.34}}
    run = start(path, tmp_path, data=data)
    found = run.evaluate(split="test")
    assert np.isnan(found["rmse_climatology"])
    assert found["rmse_persistence"] > 0


def test_missing_values_count_nowhere(tmp_path: Path) -> None:
    at = times(300)
    t = field(at)
    t[:, 0, 0] = np.nan  # land
    t[np.random.default_rng(1).random(t.shape) < 0.1] = np.nan
    path = write(tmp_path / "s.zarr", at, t)
    data = {"non_finite": {"min_valid": 0.3}}
    run = start(path, tmp_path / "run", data=data)
    trained, means = train_rows(run.plan.plans[0]), []
    for month in range(12):
        own = t[trained & (months_of(at) == month)].astype("float64")
        count = np.isfinite(own).sum(axis=0)
        means.append(np.where(count, np.nansum(own, axis=0) / np.maximum(1, count), np.nan))
    normal = np.stack(means)[months_of(at)]
    found = run.evaluate(opened(path, **data), split="all")
    valid = ALL[:, None] + np.array([1, 2])
    assert found["rmse_climatology"] == pytest.approx(rmse(normal[valid] - t[valid]), rel=1e-4)
    assert np.isfinite(found["rmse_persistence"])


def test_several_stores_and_federated_ones(tmp_path: Path) -> None:
    """Four years in two stores: as one, and each with replicas of its own."""
    at = times(300)
    t = field(at)
    paths = [write(tmp_path / f"{n}.zarr", at[own], t[own]) for n, own in enumerate((slice(144), slice(144, 300)))]
    run = start(paths, tmp_path / "joined")
    trained = train_rows(run.plan.plans[0])
    begins = [begin for begin, _, _ in run.plan.plans[0].members]
    assert begins == [0, 144]
    anchors = np.array([a for a in ALL if not {a - 1, a, a + 1, a + 2} >= {143, 144}])
    check(run, opened(paths), t, normals(t, months_of(at), trained), anchors)
    stores = [{"path": str(one), "replicas": 1} for one in paths]
    data = {"path": stores, "inputs": ["t"], "targets": ["t"], "input_offsets": [-1, 0], "target_offsets": [1, 2]}
    config = dtrain.TrainConfig(data={**data, "normalize": ["t"]}, train=TABLE, model_args={"leads": 2})
    federated = dtrain.train(Ahead, config=config, cluster="serial", run_dir=tmp_path / "federated", progress=False)
    rows = np.concatenate([train_rows(plan) for plan in federated.plan.plans])
    normal = normals(t, months_of(at), rows)
    valid = anchors[:, None] + np.array([1, 2])
    found = federated.evaluate(split="all")
    assert found["rmse_climatology"] == pytest.approx(rmse(normal[valid] - t[valid]), rel=1e-5)


def test_other_data_of_the_same_places(run: dtrain.Run, path: Path, tmp_path: Path) -> None:
    at = times(60, "2010-03-02", step=1)
    other = write(tmp_path / "other.zarr", at, field(at, seed=5))
    dataset = xr.open_zarr(path)
    means = [
        dataset.t.values[train_rows(run.plan.plans[0]) & (months_of(dataset.time.values) == m)].mean(axis=0)
        for m in range(12)
    ]
    check(run, opened(other), field(at, seed=5), np.stack(means)[months_of(at)], np.arange(1, 58))
    elsewhere = write(tmp_path / "elsewhere.zarr", at, field(at), lat=[60, 0, -60])
    found = run.evaluate(opened(elsewhere), split="all", by="lead")
    assert "rmse_persistence" in found
    assert "rmse_climatology" not in found
    assert f"no climatology: the climatology is of other places than t of {elsewhere}" in found.attrs["notes"]
    undated = write(tmp_path / "undated.zarr", None, field(at))
    notes = run.evaluate(opened(undated, gaps="allow"), split="all", by="lead").attrs["notes"]
    assert f"no climatology: the climatology is by calendar month, and rows of {undated} have no dates" in notes
    with pytest.raises(InvalidConfig, match="anomaly_correlation: the climatology is of other places"):
        run.evaluate(opened(elsewhere), split="all", metrics=["anomaly_correlation"])


# Where there are none -------------------------------------------------------------------------------------------


class Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def shifted(batch: Any, generator: torch.Generator) -> Any:
    return batch


@pytest.mark.parametrize(
    ("model", "data", "note"),
    [
        (Same, {"input_offsets": 0, "target_offsets": 0}, []),  # no forecast
        (Same, {"input_offsets": [0, 1], "target_offsets": [1, 2]}, []),  # some leads are inputs
        (Ahead, {"target_offsets": 1, "transform": shifted}, ["no baselines: data.transform may change what they"]),
    ],
)
def test_without_a_forecast_there_are_no_baselines(
    path: Path, tmp_path: Path, model: Any, data: dict[str, Any], note: list[str]
) -> None:
    run = trained(model, opened(path, **data), tmp_path, TABLE)
    assert set(run.evaluate()) == {"loss", "mae"}
    found = run.evaluate(by="lat").attrs["notes"]
    assert [text[: len(note[0])] for text in found] == note
    assert not (run.directory / "climatology.safetensors").exists()


def test_a_climatology_that_takes_too_much_memory(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(path, tmp_path)
    monkeypatch.setattr(climatology, "MOST_BYTES", 12 * 6 * 12 - 1)
    notes = run.evaluate(by="lead").attrs["notes"]
    assert any("not by calendar month, which would take more than" in note for note in notes)
    (run.directory / "climatology.safetensors").unlink()
    monkeypatch.setattr(climatology, "MOST_BYTES", 6)
    found = run.evaluate(by="lead")
    assert "rmse_persistence" in found
    note = "no climatology: a climatology of t has 6 places and takes 1 MB; at most 0 MB are used"
    assert note in found.attrs["notes"]
    with pytest.raises(OutOfMemory, match="A climatology of t has 6 places and takes 1 MB; at most 0 MB are used"):
        start(path, tmp_path / "b", train={"metrics": ["anomaly_correlation"]})


def test_a_plan_says_what_a_climatology_is_of_and_computes_none(path: Path, passes: list[int]) -> None:
    tables = {"train": {"loss": "mse", "metrics": ["anomaly_correlation"]}, "average": {"replicas": 2}}
    job = job_from_python(Ahead, opened(path), tables, None, {"leads": 2})
    job = replace(job, config=with_scheduler(job.config, "serial"))
    shown = dict(plan_rows(job, plan_job(job)))["climatology"]
    assert shown == (
        "the mean of the training rows at each place, by calendar month: each month is in 3 to 4 years of them; the "
        "first start reads these rows once, 288 B on each worker"
    )
    assert passes == []


def test_anomalies_of_labels_are_refused(path: Path, tmp_path: Path, write_store: Callable[..., Path]) -> None:
    store = write_store(
        tmp_path / "s.zarr",
        {
            "x": {"dims": ("n", "k"), "values": np.ones((40, 3), "float32"), "chunks": (10, 3)},
            "y": {"dims": ("n", "k"), "values": np.ones((40, 3), "int8"), "chunks": (10, 3)},
        },
    )
    samples = dtrain.open_samples(store, inputs=["x"], targets=["y"])
    with pytest.raises(InvalidConfig, match="the target y has none: it is no float"):
        trained(Same, samples, tmp_path / "run", {**TABLE, "metrics": ["anomaly_correlation"]})


def test_where_the_run_cannot_be_written_to_it_is_not_kept(
    run: dtrain.Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(path, tmp_path)

    def full(*arguments: Any) -> str:
        raise DiskFull("climatology.safetensors could not be written.")

    caplog.handler.setLevel(logging.NOTSET)  # a cluster of another test may have raised it
    monkeypatch.setattr(runclimate, "write_climate", full)
    assert "rmse_climatology" in run.evaluate()
    assert "The climatology is not kept: climatology.safetensors could not be written." in caplog.text
