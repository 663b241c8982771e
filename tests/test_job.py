"""A job: the same from a config file and from Python, and refused before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import dtrain
from dtrain.config.schema import TrainConfig
from dtrain.data.samples import Samples
from dtrain.errors import DataNotFound, InvalidConfig, UnknownVariable
from dtrain.job import job_from_config, job_from_python, open_sources
from tests.runtime import models

MODEL = "from torch import nn\n\ndef build(width=3):\n    return nn.Linear(6, width)\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def config(blobs: Path, **tables: Any) -> TrainConfig:
    data = {"path": str(blobs), "inputs": ["x"], "targets": ["y"], **tables.pop("data", {})}
    return TrainConfig(
        model="model:build", data=data, train={"loss": "cross_entropy"} | tables.pop("train", {}), **tables
    )


def test_functions_samples_and_code_of_a_config(base: Path, blobs: Path) -> None:
    job = job_from_config(config(blobs), base)
    assert job.functions.keys() == job.code.keys() == {"model"}
    assert isinstance(job.functions["model"](width=4), nn.Module)
    assert job.samples.path == str(blobs)
    assert job.held_out is None
    assert job.all_sources == job.sources
    before = job.code
    (base / "model.py").write_text(MODEL + "\n")
    assert job_from_config(config(blobs), base).code != before


def test_the_same_job_from_python(blobs: Path, samples: Samples) -> None:
    job = job_from_python(models.small, samples, {"train": {"loss": "mse"}, "average": None}, None)
    assert job.functions == {"model": models.small}
    assert job.config.model == "tests.runtime.models:small"
    assert job.config.data.path == str(blobs)
    assert job.base == Path(models.__file__).parent
    again = job_from_python(models.small, samples, {}, TrainConfig(train={"loss": "mse"}))
    assert again.config == job.config


def test_several_stores_each_with_its_workers(base: Path, blobs: Path) -> None:
    stores = [{"path": str(blobs), "replicas": 2}, {"path": "only/there.zarr", "workers": ["tcp://10.0.0.1:1"]}]
    first, second = open_sources(config(blobs, data={"path": stores}).data, base)
    assert (first.described.path, first.replicas, first.workers) == (str(blobs), 2, ())
    assert (second.samples, second.replicas, second.workers) == (None, 1, ("tcp://10.0.0.1:1",))
    assert second.config.path == "only/there.zarr"


def test_the_held_out_store_is_described_too(base: Path, blobs: Path) -> None:
    held_out = config(blobs, data={"val_path": str(blobs), "split": {"val": 0.0}})
    job = job_from_config(held_out, base)
    assert job.held_out is not None
    assert job.all_sources == (*job.sources, job.held_out)
    with pytest.raises(DataNotFound, match=r"nowhere\.zarr"):
        job_from_config(config(blobs, data={"val_path": "nowhere.zarr", "split": {"val": 0.0}}), base)


@pytest.mark.parametrize(
    ("tables", "error", "match"),
    [
        ({"train": {"optimizer": "sdg"}}, InvalidConfig, 'optimizer = "sdg".*did you mean "sgd"'),
        ({"average": {"outer": {"optimizer": "muon"}}}, InvalidConfig, "works on whole tensors"),
        ({"stop": {"metric": "val_acc", "target": 1.0}}, InvalidConfig, 'stop.metric = "val_acc" is not computed'),
        ({"train": {"metrics": ["model:nothing"]}}, InvalidConfig, "model has no function nothing"),
        ({"data": {"inputs": ["z"]}}, UnknownVariable, 'variable "z" not found'),
    ],
)
def test_names_are_refused_before_a_place_is_opened(
    base: Path, blobs: Path, tables: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        job_from_config(config(blobs, **tables), base)


def test_tables_and_a_config_contradict_each_other(samples: Samples) -> None:
    given = TrainConfig(train={"loss": "mse"})
    with pytest.raises(InvalidConfig, match="config= and train= are both given"):
        job_from_python(models.small, samples, {"train": {"rounds": 2}}, given)
    with pytest.raises(InvalidConfig, match=r"train\.loss is missing"):
        job_from_python(models.small, samples, {}, None)
    with pytest.raises(InvalidConfig, match=r"train\.loss is a function"):
        job_from_python(models.small, samples, {"train": {"loss": dtrain.train}}, None)
