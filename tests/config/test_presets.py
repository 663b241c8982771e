"""Presets of averaging are configurations, each with its source."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from dtrain.config.files import load_config, to_toml
from dtrain.config.presets import PRESETS, preset_named
from dtrain.config.schema import TrainConfig
from dtrain.config.values import value_of
from dtrain.errors import UsageError
from tests.config.helpers import merged

NAMES = (
    "data_parallel, local_sgd, post_local_sgd, fedavg, fedprox, fednova, fedavgm, fedadam, diloco, slowmo, "
    "hierarchical, ring, exponential, scaffold"
)
RUNS = {
    "classes": {"model": "m:f", "data": {"path": "x", "inputs": ["a"], "targets": ["b"]}, "train": {"loss": "bce"}},
    "stores": {
        "model": "pkg.net:build",
        "model_args": {"width": 3},
        "data": {"path": [{"path": "a"}, {"path": "b", "replicas": 3}], "inputs": ["a", "b"], "targets": ["a"]},
        "train": {"loss": "model:loss", "metrics": ["mse"], "precision": "bfloat16"},
    },
    "forecast": {
        "model": "m:f",
        "data": {
            "path": "s3://bucket/era5.zarr",
            "inputs": ["t"],
            "targets": ["t"],
            "input_offsets": [-1, 0],
            "target_offsets": 1,
            "patch": {"lat": 64},
        },
        "train": {"loss": "mse", "freeze": ["encoder.*"], "micro_batch": 4},
        "stop": {"patience": 3},
    },
}


def keys_of(tables, prefix=""):
    for name, value in tables.items():
        if isinstance(value, dict) and name not in ("args", "optimizer_args"):
            yield from keys_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


every = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)


def test_the_presets_are_those_of_the_contract():
    assert ", ".join(PRESETS) == NAMES
    assert all(name == preset.name for name, preset in PRESETS.items())


@every
@pytest.mark.parametrize("run", RUNS)
def test_every_preset_is_accepted_with_any_data_model_and_loss(preset, run):
    config = TrainConfig(**merged(RUNS[run], preset.tables))
    for key, value in keys_of(preset.tables):
        assert value_of(config, key) == value, key


@every
def test_every_preset_comes_back_from_a_config_file(write, preset):
    config = TrainConfig(**merged(RUNS["classes"], preset.tables))
    assert load_config(write("dtrain.toml", to_toml(config))) == config


@every
def test_every_preset_changes_something_and_names_its_paper(preset):
    assert set(preset.tables) <= {"train", "average"}
    assert TrainConfig(**merged(RUNS["classes"], preset.tables)) != TrainConfig(**RUNS["classes"])
    assert re.search(r"\b(19|20)\d\d, arXiv:\d{4}\.\d{5}\b", preset.source)
    assert preset.summary[-1] != "."
    assert preset.about.strip()
    assert preset.adapt.strip()


def test_published_values():
    diloco, fedadam = (TrainConfig(**PRESETS[name].tables) for name in ("diloco", "fedadam"))
    assert diloco.average.outer is not None
    assert diloco.average.outer.args == {"lr": 0.7, "momentum": 0.9, "nesterov": True}
    assert (diloco.train.local_steps, diloco.train.clip_norm) == (500, 1.0)
    assert fedadam.average.outer is not None
    assert fedadam.average.outer.args == {"lr": 0.1, "betas": [0.9, 0.99], "eps": 1e-3}


def test_a_name_that_is_none():
    with pytest.raises(UsageError, match=r'dilco: no such preset; did you mean "diloco"\?') as caught:
        preset_named("dilco")
    assert caught.value.code == 2
    assert NAMES in caught.value.hint


def test_presets_are_listed_without_torch():
    code = "import sys, dtrain.config.presets; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
