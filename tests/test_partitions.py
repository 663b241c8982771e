"""The loss by unit finds bad data: against numbers by hand, in all layouts, anywhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from distributed import Client

import dtrain
from dtrain.errors import InvalidConfig
from dtrain.report.partitions import Partitions, scores
from tests.runtime import models


def train(samples: dtrain.Samples, run_dir: Path, build: Any = models.small, **table: Any) -> dtrain.Run:
    table = {"loss": "cross_entropy", "rounds": 3, "local_steps": 8, "batch_size": 16, **table}
    return dtrain.train(
        build, samples, train=table, average={"replicas": 2}, cluster="serial", run_dir=run_dir, progress=False
    )


@pytest.fixture(scope="module")
def run(samples: dtrain.Samples, tmp_path_factory: pytest.TempPathFactory) -> dtrain.Run:
    return train(samples, tmp_path_factory.mktemp("runs"))


def test_every_sample_is_in_one_unit(run: dtrain.Run) -> None:
    found = run.partitions
    assert found is run.partitions  # computed once
    assert int(found.samples.sum()) == 611
    assert found.first_row.values.tolist() == sorted(found.first_row.values.tolist())
    assert (found.first_row.values // 120 == found.last_row.values // 120).all()  # whole chunks of both
    for replica, size in enumerate(run.plan.sizes):
        own = found.isel(unit=np.flatnonzero(found.partition.values == replica))
        assert int(own.samples.sum()) == size
        assert set(own.split.values.tolist()) == {"train"}
    assert set(found.object.values.tolist()) <= {f"x/c/{n}/0" for n in range(16)}
    assert set(found.start.values.tolist()) == {""}  # there is no coordinate


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_units_of_a_split_add_up_to_its_loss(run: dtrain.Run, split: Any) -> None:
    found = run.partitions
    own = found.isel(unit=np.flatnonzero(found.split.values == split))
    mean = float((own.loss * own.samples).sum() / own.samples.sum())
    assert mean == pytest.approx(run.evaluate(split=split)["loss"], rel=1e-6)
    assert set(own.partition.values.tolist()) == {-1}


def test_a_cluster_finds_the_same(run: dtrain.Run, client: Client) -> None:
    found = run.losses_by_unit(cluster=client)
    assert found.identical(run.partitions)
    first = run.losses_by_unit(round=1)
    assert not np.array_equal(first.loss, found.loss)
    assert np.array_equal(first.first_row, found.first_row)


# Bad data -------------------------------------------------------------------------------------------------------


def linear() -> torch.nn.Module:
    return torch.nn.Linear(4, 1)


@pytest.fixture
def with_bad_chunk(tmp_path: Path, write_store: Callable[..., Path]) -> Path:
    """1,000 rows, of which those of one chunk, 160 to 179, have targets 100 times as large as they should be."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 4)).astype("float32")
    y = x.sum(axis=1, keepdims=True) + 0.01 * rng.normal(size=(1000, 1)).astype("float32")
    y[160:180] *= 100
    time: dict[str, Any] = {"dims": ("time",), "values": np.arange(1000), "chunks": (1000,)}
    time["attributes"] = {"units": "days since 2001-01-01", "calendar": "standard"}
    return write_store(
        tmp_path / "bad.zarr",
        {
            "x": {"dims": ("time", "k"), "values": x, "chunks": (20, 4)},
            "y": {"dims": ("time", "one"), "values": y, "chunks": (20, 1)},
            "time": time,
        },
    )


def test_a_bad_chunk_is_found_by_name_and_date(with_bad_chunk: Path, tmp_path: Path) -> None:
    samples = dtrain.open_samples(with_bad_chunk, inputs=["x"], targets=["y"])
    run = train(samples, tmp_path / "runs", linear, loss="mse", local_steps=40)
    found = run.partitions
    store = zarr.open_group(with_bad_chunk, mode="r")
    x, y = (torch.tensor(store[name][:]) for name in ("x", "y"))  # type: ignore[index]
    for unit in found.unit.values.tolist():  # each has 20 rows of its own
        one = found.sel(unit=unit)
        rows = slice(int(one.first_row), int(one.last_row) + 1)
        assert int(one.samples) == 20
        assert float(one.loss) == pytest.approx((run.model(x[rows]) - y[rows]).square().mean().item(), rel=1e-4)
    worst = found.worst(1)
    assert (worst.first_row.item(), worst.last_row.item()) == (160, 179)
    assert worst.object.item() == "x/c/8/0"
    assert (worst.start.item(), worst.stop.item()) == ("2001-06-10", "2001-06-29")
    assert found.standing_out.first_row.values.tolist() == [160]
    html = found._repr_html_()
    assert "x/c/8/0" in html
    assert "1 of which stand out" in html
    assert html.count("<circle") == found.sizes["unit"]
    assert repr(found).splitlines()[1].split()[0] in ("train", "val", "test")
    assert found.to_pandas().loss.idxmax() == worst.unit.item()


def test_units_that_stand_out_do_so_by_robust_numbers() -> None:
    losses = np.array([1.0, 1.1, 0.9, 1.05, 0.95, np.nan, 9.0])
    found = scores(losses)
    assert np.isinf(found[5])
    assert (found > 6.0).tolist() == [False] * 5 + [True, True]
    assert scores(np.array([2.0, 2.0, 2.0])).tolist() == [0.0] * 3
    assert scores(np.array([np.nan])).tolist() == [np.inf]


# Layouts --------------------------------------------------------------------------------------------------------


class Pixels(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(x)
        return out


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", [{"shards": (10, 1, 16, 16)}, {"zarr_format": 2}, {"several": True}])
def test_boxes_shards_and_several_stores(
    layout: dict[str, Any], tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    rng = np.random.default_rng(1)
    options = {"chunks": (2, 1, 8, 8), **{k: v for k, v in layout.items() if k == "shards"}}
    dims = ("t", "c", "y", "x")
    stores = []
    for name in ("a", "b") if "several" in layout else ("a",):
        values = rng.normal(size=(40, 1, 16, 16)).astype("float32")
        arrays = {v: {"dims": dims, "values": values, **options} for v in ("u", "w")}
        stores.append(write_store(tmp_path / f"{name}.zarr", arrays, zarr_format=layout.get("zarr_format", 3)))
    where = stores if len(stores) > 1 else stores[0]
    samples = dtrain.open_samples(where, inputs=["u"], targets=["w"], patch={"y": 8, "x": 8})
    found = train(samples, tmp_path / "runs", Pixels, loss="mse").partitions
    assert int(found.samples.sum()) == len(stores) * 40 * 4
    assert set(found.store.values.tolist()) == {str(store) for store in stores}
    assert found.first_row.max() < 40  # counted in each store
    first = "u/0.0.0.0" if "zarr_format" in layout else "u/c/0/0/0/0"
    assert first in found.object.values.tolist()


# Plots ----------------------------------------------------------------------------------------------------------


def test_a_plot_names_what_stands_out(with_bad_chunk: Path, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    samples = dtrain.open_samples(with_bad_chunk, inputs=["x"], targets=["y"])
    ax = train(samples, tmp_path / "runs", linear, loss="mse", local_steps=40).partitions.plot()
    assert [text.get_text() for text in ax.texts] == ["x/c/8/0"]
    assert sum(len(line.get_xdata()) for line in ax.lines) == 50
    plt.close("all")


def test_without_matplotlib_a_plot_names_the_extra(run: dtrain.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(InvalidConfig, match="Plots need a package that is not installed") as caught:
        run.partitions.plot()
    assert caught.value.hint == 'pip install "dtrain[plots]".'


def test_it_is_said_how_long_a_pass_takes(
    run: dtrain.Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dtrain.run.UNITS_SECONDS", 0.0)
    with caplog.at_level(logging.WARNING, "dtrain"):
        run.losses_by_unit()
    (text,) = [record.getMessage() for record in caplog.records]
    assert text.startswith(f"{run.directory.name}: evaluating {run.partitions.sizes['unit']} units, in 0:0")


def test_parts_of_the_data_set_are_still_shown(run: dtrain.Run) -> None:
    assert isinstance(run.partitions.isel(unit=0), Partitions)
    for part in (run.partitions.isel(unit=0), run.partitions.isel(unit=[]), run.partitions[["loss"]]):
        assert part._repr_html_()
        assert repr(part)
