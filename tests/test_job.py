"""A job: the same from a config file and from Python, and refused before anything is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import dtrain
from dtrain.calls import job_from_python
from dtrain.config.schema import TrainConfig
from dtrain.config.split import SplitConfig
from dtrain.data.samples import Samples
from dtrain.errors import DataNotFound, InvalidConfig, UnknownVariable
from dtrain.job import job_from_config, open_sources
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


# A configuration and arguments beside it ----------------------------------------------------------------------

LOSS = {"loss": "cross_entropy"}


def test_without_samples_and_model_the_configuration_names_them(base: Path, blobs: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(base)
    (base / "link.zarr").symlink_to(blobs)
    given = config(blobs, data={"path": "link.zarr", "val_path": "link.zarr", "split": {"val": 0.0}}, run={"dir": "r"})
    job = job_from_python(None, None, {}, given)
    assert isinstance(job.functions["model"](width=2), nn.Module)
    assert (job.samples.path, job.base) == (str(base / "link.zarr"), base)
    assert (job.config.data.path, job.config.data.val_path) == (str(base / "link.zarr"),) * 2  # found from elsewhere
    assert job.held_out is not None
    again = job_from_python(None, None, {}, job.config)
    assert (again.config, again.samples) == (job.config, job.samples)


def test_several_stores_of_a_configuration(base: Path, blobs: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(blobs.parent)
    stores = [{"path": blobs.name, "replicas": 2}, {"path": f"file://{blobs}", "workers": ["tcp://127.0.0.1:1"]}]
    job = job_from_python(models.small, None, {}, TrainConfig(data={**DATA, "path": stores}, train=LOSS))
    assert [source.replicas for source in job.sources] == [2, 1]
    assert [store.path for store in job.config.data.path] == [str(blobs), f"file://{blobs}"]  # type: ignore[union-attr]
    samples = dtrain.open_samples(blobs, **DATA)
    with pytest.raises(InvalidConfig, match=r"samples have data\.path = .*blobs.zarr\", and config has \[{"):
        job_from_python(models.small, samples, {}, TrainConfig(data={"path": stores}, train=LOSS))


DATA: dict[str, Any] = {"inputs": ["x"], "targets": ["y"]}


@pytest.mark.parametrize(
    "keys",
    [
        {"normalize": ["x"]},
        {"split": {"val": 0.3, "test": 0.0}},
        {"shuffle": False},
        {"isel": {"n": {"start": 10, "stop": 200}}},
        {"target_offsets": 3, "stride": 2},
        {"partition": "contiguous", "split_order": "sequential"},
        {"memory": "1GB", "cache": "0", "reader": "zarr", "missing": "skip", "non_finite": "allow"},
        {"transform": "tests.runtime.test_data_path:noisy"},
    ],
    ids=lambda keys: "-".join(keys),
)
def test_keys_that_samples_leave_out_are_those_of_the_configuration(blobs: Path, keys: dict[str, Any]) -> None:
    whole = job_from_python(models.small, dtrain.open_samples(blobs, **DATA, **keys), {}, TrainConfig(train=LOSS))
    plain = dtrain.open_samples(blobs, **DATA)
    for table in (keys, {**DATA, **keys}, {**DATA, **keys, "path": f"file://{blobs}/"}):
        given = TrainConfig(train=LOSS, data=table)
        job = job_from_python(models.small, plain, {}, given)
        assert job.config.data.model_dump() == whole.config.data.model_dump()
        assert job.samples == whole.samples
    both = job_from_python(
        models.small, dtrain.open_samples(blobs, **DATA, **keys), {}, TrainConfig(train=LOSS, data=keys)
    )
    assert both.samples == whole.samples


def test_a_split_is_agreed_share_by_share(blobs: Path) -> None:
    samples = dtrain.open_samples(blobs, **DATA, split={"val": 0.2})
    job = job_from_python(models.small, samples, {}, TrainConfig(train=LOSS, data={"split": {"test": 0.3}}))
    assert job.samples.config.split.model_dump() == job.config.data.split.model_dump()
    assert job.samples.config.split == SplitConfig(val=0.2, test=0.3)
    job = job_from_python(models.small, samples, {}, TrainConfig(train=LOSS, data={"split": {"val": 0.2}}))
    assert job.samples is samples
    with pytest.raises(InvalidConfig, match=r"data\.split\.val = 0\.2, and config has 0\.1"):
        job_from_python(models.small, samples, {}, TrainConfig(train=LOSS, data={"split": {"val": 0.1, "test": 0.3}}))


@pytest.mark.parametrize(
    ("own", "theirs", "said"),
    [
        ({}, {"path": "elsewhere.zarr"}, r'data\.path = ".*blobs\.zarr", and config has "elsewhere\.zarr"'),
        ({}, {"inputs": ["y"]}, r'data\.inputs = \["x"\], and config has \["y"\]'),
        ({}, {"targets": ["x"]}, r'data\.targets = \["y"\], and config has \["x"\]'),
        ({"shuffle": True}, {"shuffle": False}, r"data\.shuffle = true, and config has false"),  # given, though default
        ({"normalize": ("x",)}, {"normalize": []}, r'data\.normalize = \["x"\], and config has \[\]'),
        ({"stride": 2}, {"stride": 3}, r"data\.stride = 2, and config has 3"),
        ({"isel": {"f": 1}}, {"isel": {"f": 2}}, r'data\.isel = {"f": 1}, and config has {"f": 2}'),
        (
            {"stride": 2, "memory": "1GB"},
            {"stride": 3, "memory": "2GB"},
            r'data\.memory = "1GB", and config has "2GB"; data\.stride = 2, and config has 3',
        ),
        (
            {"storage_options": {"key": "secret1"}},
            {"storage_options": {"key": "secret2"}},
            r"data\.storage_options, and config has others\.",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_keys_that_both_give_and_that_differ_are_refused(
    blobs: Path, own: dict[str, Any], theirs: dict[str, Any], said: str
) -> None:
    samples = dtrain.open_samples(blobs, **DATA)
    samples = replace(samples, config=samples.config.model_copy(update=own))
    with pytest.raises(InvalidConfig, match=said) as caught:
        job_from_python(models.small, samples, {}, TrainConfig(train=LOSS, data=theirs))
    assert "secret" not in str(caught.value)
    assert "leave samples out" in caught.value.hint


def test_model_and_its_arguments_must_not_contradict_the_configuration(samples: Samples) -> None:
    given = TrainConfig(train=LOSS, model="tests.runtime.models:slow", model_args={"seconds": 0.5})
    for model, args in ((None, None), ("tests.runtime.models:slow", {"seconds": 0.5}), (models.slow, None)):
        job = job_from_python(model, samples, {}, given, args)  # type: ignore[arg-type]
        assert (job.config.model, job.config.model_args) == ("tests.runtime.models:slow", {"seconds": 0.5})
        assert job.functions["model"].__qualname__ == "slow"
    with pytest.raises(InvalidConfig, match='model = "tests.runtime.models:small", and config has model = ".*slow"'):
        job_from_python(models.small, samples, {}, given)
    for args in ({}, {"seconds": 0.4}):
        with pytest.raises(InvalidConfig, match=r'model_args = {.*}, and config has model_args = {"seconds": 0\.5}'):
            job_from_python(None, samples, {}, given, args)
    job = job_from_python(models.slow, samples, {"train": LOSS}, None, {"seconds": 0.1})
    assert job.config.model_args == {"seconds": 0.1}
    with pytest.raises(InvalidConfig, match="model_args.seconds is a complex"):
        job_from_python(models.slow, samples, {"train": LOSS}, None, {"seconds": 1j})


def test_what_is_missing_is_named(samples: Samples) -> None:
    with pytest.raises(InvalidConfig, match="model is missing"):
        job_from_python(None, samples, {"train": LOSS}, None)
    with pytest.raises(InvalidConfig, match="samples are missing"):
        job_from_python(models.small, None, {"train": LOSS}, None)
    with pytest.raises(InvalidConfig, match="config is a dict; a dtrain.TrainConfig is needed"):
        job_from_python(models.small, samples, {}, {"train": LOSS})  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="samples is a str, not what open_samples returns"):
        job_from_python(models.small, "blobs.zarr", {"train": LOSS}, None)  # type: ignore[arg-type]
