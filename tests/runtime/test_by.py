"""Evaluations broken down: figures of each group against its values taken out by hand, in one pass over the data."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from distributed import Client
from torch import nn

import dtrain
from dtrain.asking import Question
from dtrain.data.load.loader import Loader
from dtrain.errors import InvalidConfig, ShapesDiffer
from tests.training import trained

ROWS, LEVELS, LATS = 72, 3, 4
SITES = ["bern", "oslo", "rome"]
TABLE = {"loss": "mse", "metrics": ["mae", "rmse"], "rounds": 1, "batch_size": 8, "optimizer_args": {"lr": 0.01}}
TIMES = np.datetime64("2001-01-01", "ns") + np.arange(ROWS) * np.timedelta64(5, "D")
LAT = np.linspace(60, -60, LATS)
REGION = np.array(["north", "tropics", "tropics", "south"])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fields of five-day steps over one year, with coordinates of all kinds."""
    rng = np.random.default_rng(0)
    dims = ("time", "level", "lat")
    field = rng.normal(size=(2, ROWS, LEVELS, LATS)).astype("float32")
    site = xr.DataArray(np.array(SITES)[np.arange(ROWS) % 3], dims="time")
    dataset = xr.Dataset(
        {"t": (dims, 10 * field[0] + 280), "u": (dims, field[1]), "flag": ("time", np.arange(ROWS) % 2)},
        {
            "time": TIMES,
            "level": [1000, 500, 200],
            "lat": LAT,
            "region": ("lat", REGION),
            "site": site,
            "pressure": ("level", [1e5, 5e4, np.nan]),
        },
    )
    chunks = {"t": {"chunks": (6, LEVELS, LATS)}, "u": {"chunks": (6, LEVELS, LATS)}}
    path = tmp_path_factory.mktemp("by") / "s.zarr"
    dataset.to_zarr(path, zarr_format=2, encoding=chunks)
    return path


class Ahead(nn.Module):
    """The newest input times a learned number, for each lead."""

    def __init__(self, leads: int = 0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, max(1, leads)))
        self.leads = leads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.leads:
            return self.factor[0] * x
        return self.factor[:, None, None] * x[:, None]


def opened(path: Any, **data: Any) -> dtrain.Samples:
    return dtrain.open_samples(path, inputs=["t"], **{"targets": ["t"], "normalize": ["t"], **data})


def start(path: Any, where: Path, leads: int = 3, **data: Any) -> dtrain.Run:
    offsets = {"target_offsets": list(range(1, leads + 1))} if leads else {}
    samples = opened(path, **{**offsets, "split": {"val": 0.2, "test": 0.3}, **data})
    return trained(Ahead, samples, where, TABLE, model_args={"leads": leads})


@pytest.fixture(scope="module")
def run(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dtrain.Run:
    """Three leads; validation and test at the end of the year."""
    return start(path, tmp_path_factory.mktemp("run"))


def errors(run: dtrain.Run, path: Path, anchors: np.ndarray, leads: int = 3) -> np.ndarray:
    """Predictions minus targets in kelvin, [anchor, lead, level, lat]."""
    scaling = run.resolved.scalings["t"]
    t = (xr.open_zarr(path).t.values.astype("float64") - scaling.mean[0]) / scaling.std[0]
    factor = run.model.factor.detach().numpy()
    pairs = [(factor[lead] * t[anchors] - t[anchors + lead + 1]) * scaling.std[0] for lead in range(leads)]
    return np.stack(pairs, axis=1)


ALL = np.arange(ROWS - 3)
"""Anchors of three leads."""


def figures(own: np.ndarray) -> tuple[float, float]:
    return float(np.abs(own).mean()), float(np.sqrt((own**2).mean()))


def check(found: xr.Dataset, expected: dict[tuple[Any, ...], np.ndarray], dims: list[str]) -> None:
    """Compare a Dataset with the errors of each group."""
    assert list(found.sizes) == dims
    assert list(found.data_vars) == ["samples", "loss", "mae", "rmse"]
    for key, own in expected.items():
        got = found.sel(dict(zip(dims, key, strict=True)))
        assert (float(got.mae), float(got.rmse)) == pytest.approx(figures(own), rel=1e-5)
    assert int((found.samples > 0).sum()) == len(expected)


# What it may be broken down by ----------------------------------------------------------------------------------


def test_by_lead_at_the_valid_times_that_all_leads_share(run: dtrain.Run, path: Path) -> None:
    found = run.evaluate(opened(path, target_offsets=[1, 2, 3]), split="all", by="lead", baselines=False)
    valid = ALL[:, None] + np.arange(1, 4)
    shared = (valid >= 3) & (valid <= ROWS - 3)
    own = errors(run, path, ALL)
    days = [np.timedelta64(5 * lead, "D") for lead in (1, 2, 3)]
    check(found, {(day,): own[shared[:, n], n] for n, day in enumerate(days)}, ["lead"])
    assert found.samples.values.tolist() == [ROWS - 5] * 3
    assert found.attrs["notes"] == ["leads are scored at the 67 of 71 valid times that all 3 leads share"]
    every = run.evaluate(
        opened(path, target_offsets=[1, 2, 3]), split="all", by=["lead"], all_times=True, baselines=False
    )
    check(every, {(day,): own[:, n] for n, day in enumerate(days)}, ["lead"])
    assert every.attrs["notes"] == []


def test_anchors_of_a_stride_may_share_no_valid_time(path: Path, tmp_path: Path) -> None:
    run = start(path, tmp_path, stride=3)
    found = run.evaluate(by="lead", baselines=False)
    note = "no valid time is shared by all 3 leads: each lead is scored at its own valid times"
    assert found.attrs["notes"] == [note]
    assert len(set(found.samples.values.tolist())) == 1


@pytest.mark.parametrize(
    ("by", "dim", "axis", "label"),
    [
        ("level", "level", 2, [1000, 500, 200]),
        ("lat", "lat", 3, LAT),
        ("region", "region", 3, REGION),
        ("pressure", "pressure", 2, [1e5, 5e4, None]),
    ],
)
def test_by_a_dimension_or_a_coordinate_of_one(
    run: dtrain.Run, path: Path, by: str, dim: str, axis: int, label: list[Any]
) -> None:
    found = run.evaluate(opened(path, target_offsets=[1, 2, 3]), split="all", by=by, baselines=False)
    own = np.moveaxis(errors(run, path, ALL), axis, 0)
    keys = list(dict.fromkeys(one for one in label if one is not None))
    check(found, {(key,): own[[one == key for one in label]] for key in keys}, [dim])


@pytest.mark.parametrize(
    ("by", "dim", "label"),
    [
        ("site", "site", np.array(SITES)[np.arange(ROWS) % 3]),
        ("time.month", "month", TIMES.astype("M8[M]").astype(int) % 12 + 1),
        ("time.season", "season", np.array(["DJF", "MAM", "JJA", "SON"])[TIMES.astype("M8[M]").astype(int) % 12 // 3]),
        ("time", "time", TIMES),
        ("flag", "flag", np.arange(ROWS) % 2),
    ],
)
def test_a_coordinate_of_the_rows_is_that_of_the_valid_time(
    run: dtrain.Run, path: Path, by: str, dim: str, label: np.ndarray
) -> None:
    found = run.evaluate(opened(path, target_offsets=[1, 2, 3]), split="all", by=by, baselines=False)
    own, of_value = errors(run, path, ALL), label[ALL[:, None] + np.arange(1, 4)]
    if by == "time.season":  # December is the first month of the winter
        months = TIMES.astype("M8[M]").astype(int) % 12 + 1
        of_value = np.array(["DJF", "MAM", "JJA", "SON"])[months % 12 // 3][ALL[:, None] + np.arange(1, 4)]
    check(found, {(key,): own[of_value == key] for key in np.unique(of_value)}, [dim])


def test_by_several_at_once(run: dtrain.Run, path: Path) -> None:
    samples = opened(path, target_offsets=[1, 2, 3])
    found = run.evaluate(samples, split="all", by=["region", "lead", "site"], all_times=True, baselines=False)
    own, site = errors(run, path, ALL), np.array(SITES)[(ALL[:, None] + np.arange(1, 4)) % 3]
    expected = {}
    for region, (lead, name) in itertools.product(np.unique(REGION), itertools.product(range(3), SITES)):
        key = (region, np.timedelta64(5 * (lead + 1), "D"), name)
        expected[key] = own[site[:, lead] == name][:, lead][:, :, region == REGION]
    check(found, expected, ["region", "lead", "site"])


def test_samples_without_windows(path: Path, tmp_path: Path) -> None:
    run = start(path, tmp_path, leads=0)
    found = run.evaluate(opened(path), split="all", by=["site", "level"], baselines=False)
    scaling = run.resolved.scalings["t"]
    t = xr.open_zarr(path).t.values.astype("float64") - scaling.mean[0]
    own = (run.model.factor[0].item() - 1) * t
    expected = {
        (name, level): own[np.array(SITES)[np.arange(ROWS) % 3] == name][:, number]
        for name in SITES
        for number, level in enumerate((1000, 500, 200))
    }
    check(found, expected, ["site", "level"])
    assert found.samples.values.tolist() == [[ROWS // 3] * 3] * 3
    lead = run.evaluate(opened(path), split="all", by="lead", baselines=False)
    assert lead.lead.values.tolist() == [0]
    assert lead.samples.values.tolist() == [ROWS]


def test_patches_know_their_places(path: Path, tmp_path: Path) -> None:
    """Patches of 3 of 4 latitudes: the second one begins earlier, so that two latitudes come twice."""
    run = start(path, tmp_path, patch={"lat": 3})
    found = run.evaluate(
        opened(path, target_offsets=[1, 2, 3], patch={"lat": 3}), split="all", by="lat", baselines=False
    )
    own = errors(run, path, ALL)
    check(found, {(lat,): own[..., number] for number, lat in enumerate(LAT)}, ["lat"])
    assert found.samples.values.tolist() == [len(ALL), 2 * len(ALL), 2 * len(ALL), len(ALL)]


def test_the_runs_own_split_and_isel(path: Path, tmp_path: Path) -> None:
    run = start(path, tmp_path, isel={"level": {"start": 1, "stop": 3}, "lat": {"start": 0, "stop": 4, "step": 3}})
    found = run.evaluate(split="val", by=["level", "lat"], baselines=False)
    assert found.level.values.tolist() == [500, 200]
    assert found.lat.values.tolist() == [60, -60]
    whole = run.evaluate(split="val", baselines=False)
    assert float(found.mae.mean()) == pytest.approx(whole["mae"], rel=1e-6)
    assert float((found.rmse**2).mean()) == pytest.approx(whole["rmse"] ** 2, rel=1e-6)


# One pass, the same bits ----------------------------------------------------------------------------------------


def test_groups_cost_no_further_pass_over_the_data(run: dtrain.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many batches are taken from the loaders, and each is given to the model once."""
    taken: list[int] = []
    take = Loader.take

    def counted(loader: Loader) -> Any:
        batch = take(loader)
        taken.append(batch.size)
        return batch

    monkeypatch.setattr(Loader, "take", counted)
    whole = run.scores(None, Question(split="test"), round="last", cluster="serial").samples
    assert sum(taken) == whole > 10
    before = list(taken)
    for by in (("lead", "lat", "site"), ("time.month",), ("level",)):
        taken.clear()
        run.evaluate(by=by, baselines=False)
        assert taken == before


def test_a_cluster_gives_the_same_bits(run: dtrain.Run, client: Client) -> None:
    for by in (["lead", "site"], ["time.month"], ["lat"]):
        serial, cluster = (run.evaluate(by=by, cluster=at, baselines=False) for at in ("serial", client))
        xr.testing.assert_identical(serial, cluster)


def test_one_group_is_the_whole_to_the_bit(run: dtrain.Run) -> None:
    found, whole = run.evaluate(by="variable", baselines=False), run.evaluate(baselines=False)
    assert found["variable"].values.tolist() == ["t"]
    assert {name: float(found[name][0]) for name in whole} == whole


# Other data and models ------------------------------------------------------------------------------------------


def test_several_stores_share_labels(tmp_path: Path) -> None:
    """Categories of one store lie in another order than those of the next, and one store has another site."""
    paths, kept = [], []
    for number, names in enumerate((["oslo", "bern"], ["rome", "oslo"])):
        rng = np.random.default_rng(number)
        t, site = rng.normal(size=(24, LEVELS, LATS)).astype("float32"), np.array(names)[np.arange(24) % 2]
        times = np.datetime64(f"200{number}-01-01", "ns") + np.arange(24) * np.timedelta64(1, "D")
        dataset = xr.Dataset(
            {"t": (("time", "level", "lat"), t)},
            {"time": times, "site": ("time", site), "lat": LAT, "level": [1, 2, 3]},
        )
        paths.append(tmp_path / f"{number}.zarr")
        dataset.to_zarr(paths[-1], zarr_format=2, encoding={"t": {"chunks": (8, LEVELS, LATS)}})
        kept.append((t, site))
    run = start(paths, tmp_path / "joined", leads=0)
    stores = [{"path": str(path), "replicas": 1} for path in paths]
    config = dtrain.TrainConfig(
        data={"path": stores, "inputs": ["t"], "targets": ["t"], "normalize": ["t"]},
        train=TABLE,
        model_args={"leads": 0},
    )
    federated = dtrain.train(Ahead, config=config, cluster="serial", run_dir=tmp_path / "federated", progress=False)
    for own in (run, federated):
        scaling, factor = own.resolved.scalings["t"], own.model.factor[0].item()
        found = own.evaluate(opened(paths) if own is run else None, split="all", by="site", baselines=False)
        t, site = np.concatenate([one for one, _ in kept]), np.concatenate([names for _, names in kept])
        error = (factor - 1) * (t.astype("float64") - scaling.mean[0])
        check(found, {(name,): error[site == name] for name in SITES}, ["site"])


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(2))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.factor[0] * t[:, None], self.factor[1] * u[:, None] + 1


def both(outputs: Any, targets: Any) -> torch.Tensor:
    return ((outputs[0] - targets[0]) ** 2).mean() + ((outputs[1] - targets[1]) ** 2).mean()


def test_several_targets_are_compared_one_by_one(path: Path, tmp_path: Path) -> None:
    samples = dtrain.open_samples(path, inputs=["t", "u"], targets=["t", "u"], target_offsets=[1], normalize=["t"])
    run = trained(Both, samples, tmp_path, {**TABLE, "loss": both, "metrics": [both]})
    with pytest.raises(InvalidConfig, match="by lead, lat: there are 2 targets") as caught:
        run.evaluate(by=["lead", "lat"], baselines=False)
    assert caught.value.hint == "Evaluate each target alone: --by variable beside it."
    by_site = run.evaluate(by="site", baselines=False)  # whole samples: functions of the user's get tuples
    assert list(by_site.data_vars) == ["samples", "loss", "both"]
    with pytest.raises(
        InvalidConfig, match=r"train.metrics has no built-in metric, which could be computed of one target"
    ) as caught:
        run.evaluate(by="variable", baselines=False)
    assert "metrics" in caught.value.hint
    found = run.evaluate(by=["variable", "lat"], metrics=["mae", "rmse"], baselines=False)
    assert found["variable"].values.tolist() == ["t", "u"]
    assert list(found.data_vars) == ["samples", "mae", "rmse"]
    whole = run.evaluate(by="variable", metrics=["mae"], baselines=False)
    assert found.mae.mean("lat").values == pytest.approx(whole.mae.values, rel=1e-6)
    assert 5 < float(whole.mae[0]) < 20  # in kelvin
    assert 0.5 < float(whole.mae[1]) < 3


# Refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "text", "hint"),
    [
        ("latt", 'with that name; did you mean "lat"?', "Allowed are lead, variable, time, level, lat, "),
        ("lat.month", "lat holds no dates (float64), so that there is no month", "--by lat"),
        (["lat", "lat"], 'by names "lat" twice', "Name it once"),
        ("u", "u has the dimensions time, level, lat of lengths [72, 3, 4]; a coordinate lies along one", ""),
        (["time", "time.dayofyear", "lat"], "there are 20,736 groups (time has 72); at most 10,000", "--by time.month"),
    ],
)
def test_what_cannot_be_broken_down_is_named(run: dtrain.Run, by: Any, text: str, hint: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        run.evaluate(by=by, baselines=False)
    assert text in caught.value.message
    assert hint in caught.value.hint


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x.flatten(1)


def flat(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return ((outputs - targets.flatten(1)) ** 2).mean()


def test_outputs_of_another_shape_are_not_cut(path: Path, tmp_path: Path) -> None:
    run = trained(Flat, opened(path), tmp_path, {**TABLE, "loss": flat, "metrics": [flat]})
    assert list(run.evaluate(by="site", baselines=False).data_vars) == ["samples", "loss", "flat"]
    with pytest.raises(ShapesDiffer, match=r"which part of the output belongs to each lat is not known"):
        run.evaluate(by="lat", baselines=False)


def halved(batch: Any, generator: torch.Generator) -> Any:
    from dataclasses import replace

    (x,), (y,) = batch.inputs, batch.targets
    return replace(batch, inputs=(x[..., :2],), targets=(y[..., :2],))


def test_a_transform_that_cuts_targets_is_refused(path: Path, tmp_path: Path) -> None:
    samples = opened(path, transform=halved)
    run = trained(Ahead, samples, tmp_path, TABLE, model_args={"leads": 0})
    assert run.evaluate()["mae"] > 0
    with pytest.raises(ShapesDiffer, match=r"data.transform makes targets of shape \[3, 2\] of t, whose samples have"):
        run.evaluate(by="level", baselines=False)


def test_stores_that_only_their_workers_see(path: Path, tmp_path: Path, client: Client) -> None:
    """Coordinates are read where the store is; baselines are not there, and a note says so."""
    workers = list(client.scheduler_info(n_workers=-1)["workers"])[:1]
    store = {"path": str(path), "workers": workers, "replicas": 2}
    data = {"path": [store], "inputs": ["t"], "targets": ["t"], "normalize": ["t"], "target_offsets": [1, 2, 3]}
    tables = {"data": {**data, "split": {"val": 0.2, "test": 0.3}}, "train": TABLE, "model_args": {"leads": 3}}
    config = dtrain.TrainConfig(**tables)
    run = dtrain.train(Ahead, config=config, cluster=client, run_dir=tmp_path, progress=False)
    found = run.evaluate(by=["lead", "region"], cluster=client)
    assert found.region.values.tolist() == ["north", "south", "tropics"]
    assert found.attrs["notes"][0] == "no baselines: the run's stores are seen by their own workers alone"
    anomalies = run.evaluate(metrics=["anomaly_correlation"], cluster=client)
    assert -1 <= anomalies["anomaly_correlation"] <= 1
    assert (run.directory / "climatology.safetensors").exists()
