from __future__ import annotations

import json
import math
import pickle
import tomllib
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dtrain.config import (
    NOT_BUILT,
    NOT_BUILT_VALUES,
    CodecConfig,
    OuterConfig,
    TrainConfig,
    TrainTable,
    differences,
    flat_values,
    load_config,
    may_change,
    parse_bytes,
    read_tables,
    to_toml,
    value_of,
    without_secrets,
)
from dtrain.errors import ConfigFileNotFound, InvalidConfig, NotSupportedYet, UsageError

# SPEC section 3, its comments shortened
CONTRACT = """
model = "model:build"              # required
model_args = {}

[data]
path = "train.zarr"                # required
inputs = ["image"]                 # required
targets = ["label"]                # required
storage_options = {}
group = ""
isel = {}
sample_dim = "auto"
input_offsets = 0
target_offsets = 0
stride = 1
patch = {}
split = { val = 0.1, test = 0.1 }
split_order = "auto"
val_path = ""
partition = "stratified"
normalize = []
transform = ""
missing = "error"
non_finite = "error"
shuffle = true
memory = "auto"
cache = "auto"
reader = "auto"

[train]
loss = "cross_entropy"             # required
metrics = []
rounds = 20
local_epochs = 1
# local_steps = 50
sync_rounds = 0
batch_size = 100
micro_batch = 0
optimizer = "sgd"
optimizer_args = { lr = 0.01, momentum = 0.9 }
schedule = "constant"
warmup_steps = 0
clip_norm = 0.0
precision = "float32"
device = "auto"
init = ""
seed = 0

[average]
replicas = "auto"
weights = "samples"
reduce = "mean"
inner_state = "keep"
prox = 0.0
max_rejected = 0.25
ema = 0.0
recalibrate_batchnorm = false

[average.mix]
topology = "full"
groups = 0
period = 1

[average.outer]
optimizer = "sgd"
args = { lr = 0.7, momentum = 0.9, nesterov = true }

[average.codec]
name = "int8"
error_feedback = true

[stop]
metric = "val_loss"
mode = "auto"
# target = 0.1
# patience = 5
min_delta = 0.0

[cluster]
scheduler = "local"
workers = "auto"
threads = 1
memory = "auto"
allow_plain = false
slices = "auto"
# tls = { ca = "", cert = "", key = "" }

[run]
dir = "runs"
commit_every = "auto"
keep = 3
trackers = []
"""
REQUIRED = ("model", "data.path", "data.inputs", "data.targets", "train.loss")
SMALLEST = {"model": "m:f", "data": {"path": "x.zarr", "inputs": ["a"], "targets": ["b"]}, "train": {"loss": "mse"}}


def without_optional_tables(tables):
    average = {key: value for key, value in tables["average"].items() if key not in ("outer", "codec")}
    return {**tables, "average": average}


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merged(one, two):
    shared = {k: merged(one[k], two[k]) for k in one.keys() & two.keys() if isinstance(two[k], dict)}
    return {**one, **two, **shared}


@pytest.fixture
def write(tmp_path):
    """Write a config file and return its path."""

    def write(name, content):
        text = content if isinstance(content, str) else tomli_w.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def refused(**tables):
    with pytest.raises(InvalidConfig) as caught:
        TrainConfig(**tables)
    assert caught.value.code == 3
    return caught.value.message


# The contract ---------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_contract():
    printed = dict(flat_values(TrainConfig(**without_optional_tables(tomllib.loads(CONTRACT)))))
    default = dict(flat_values(TrainConfig()))
    assert {key: default.pop(key) for key in REQUIRED} == {
        "model": "",
        "data.path": "",
        "data.inputs": [],
        "data.targets": [],
        "train.loss": "",
    }
    for key in REQUIRED:
        printed.pop(key)
    assert default == printed


def test_the_tables_of_the_contract_are_the_whole_schema():
    def keys(tables, prefix=""):
        for key, value in tables.items():
            inner = isinstance(value, dict) and f"{prefix}{key}" not in ("model_args", "train.optimizer_args")
            yield from keys(value, f"{prefix}{key}.") if inner and value else [f"{prefix}{key}"]

    uncommented = "\n".join(line[2:] if line.startswith("# ") else line for line in CONTRACT.splitlines())
    named = set(keys(without_optional_tables(tomllib.loads(uncommented))))
    named = {"cluster.tls" if key.startswith("cluster.tls.") else key for key in named}
    assert named == {key for key, _ in flat_values(TrainConfig())} - {"average.outer", "average.codec"}


def test_the_optional_tables_have_the_defaults_of_the_contract():
    tables = tomllib.loads(CONTRACT)["average"]
    assert OuterConfig().model_dump() == OuterConfig(**tables["outer"]).model_dump() == tables["outer"]
    assert CodecConfig().model_dump() == CodecConfig(**tables["codec"]).model_dump() == tables["codec"]
    assert TrainConfig().average.outer is None
    assert TrainConfig().average.codec is None


def test_a_partial_table_keeps_the_other_defaults():
    config = TrainConfig(data={"split": {"val": 0.3}}, train={"rounds": 3})
    assert (config.data.split.val, config.data.split.test) == (0.3, 0.1)
    assert (config.train.rounds, config.train.batch_size) == (3, 100)


def test_the_printed_config_can_be_loaded(write):
    path = write("dtrain.toml", without_optional_tables(tomllib.loads(CONTRACT)))
    config = load_config(path)
    assert (config.model, config.data.inputs, config.train.loss) == ("model:build", ("image",), "cross_entropy")


# Three languages, one config --------------------------------------------------------------------------------------

RICH = {
    "model": "pkg.net:build",
    "model_args": {"width": 32, "dropout": 0.1, "name": "é", "flags": [True, False], "deep": {"er": [1, 2]}},
    "data": {"path": "x.zarr", "inputs": ["a", "b"], "targets": ["c"], "split": {"val": 0.2, "test": 0.0}},
    "train": {"loss": "mse", "optimizer_args": {"lr": 0.001}, "batch_size": "full", "local_steps": 5, "clip_norm": 1},
    "average": {"replicas": 3},
}


def test_toml_yaml_and_json_give_the_same_config(write):
    toml = load_config(write("a.toml", RICH))
    assert toml == load_config(write("a.json", json.dumps(RICH)))
    assert toml == load_config(write("a.yaml", yaml.safe_dump(RICH)))
    assert toml == load_config(write("a.yml", yaml.safe_dump(RICH)))
    assert toml == TrainConfig(**RICH)
    assert toml.model_args == RICH["model_args"]
    assert toml.train.batch_size == "full"


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", ".1e-2", "0.001", "+1e-3", "10e-4", "1.0e-3"])
def test_a_small_number_is_a_number_in_yaml_too(write, text):
    given = yaml.safe_dump(SMALLEST).replace("loss: mse", f"loss: mse\n  optimizer_args: {{lr: {text}}}")
    assert load_config(write("a.yaml", given)).train.optimizer_args == {"lr": 0.001}


def test_yaml_words_that_look_a_little_like_numbers_stay_words(write):
    tables = read_tables(write("a.yaml", "{a: e3, b: 1e, c: 1e-3x, d: 12e03, e: '1e-3', f: -1, g: 1.5, h: .inf}"))
    assert tables == {"a": "e3", "b": "1e", "c": "1e-3x", "d": 12e3, "e": "1e-3", "f": -1, "g": 1.5, "h": math.inf}


def test_a_config_is_the_same_after_pickling():
    config = TrainConfig(**RICH)
    assert pickle.loads(pickle.dumps(config)) == config


# Files that cannot be read ------------------------------------------------------------------------------------------


def test_a_missing_file_is_exit_code_2(tmp_path):
    with pytest.raises(ConfigFileNotFound, match=r"nothing.toml: no such config file") as caught:
        load_config(tmp_path / "nothing.toml")
    assert caught.value.code == 2


def test_a_directory_is_exit_code_2_and_names_the_usual_file(tmp_path):
    with pytest.raises(ConfigFileNotFound, match="is a directory") as caught:
        load_config(tmp_path)
    assert caught.value.code == 2
    assert str(tmp_path / "dtrain.toml") in caught.value.hint


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "a = 1\nmodel = \nb = 2", "line 2"),
        ("a.toml", "a = 1\na = 2\n", "line 2"),
        ("a.yaml", "a: [1", "line 1"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "python/object"),
        ("a.json", '{"a": 1', "line 1"),
        ("a.json", "[" * 100_000, "recursion"),
        ("a.yaml", "- a\n- b", "holds list, not tables"),
        ("a.yaml", "", "holds NoneType, not tables"),
        ("a.json", "3", "holds int, not tables"),
        ("a.yaml", "1: 2", "key 1 is not text"),
        ("a.yaml", "on: 2", "key True is not text"),
    ],
)
def test_a_file_that_is_no_table_of_keys_is_exit_code_3(write, name, text, said):
    with pytest.raises(InvalidConfig) as caught:
        load_config(write(name, text))
    assert caught.value.message.startswith(str(write(name, text)))
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.code == 3


def test_a_file_that_is_not_utf8_is_exit_code_3(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"model = '\xff'")
    with pytest.raises(InvalidConfig, match="cannot be read"):
        load_config(tmp_path / "a.toml")


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_required_key_is_named(write, key):
    tables = json.loads(json.dumps(SMALLEST))
    assert load_config(write("good.toml", tables))
    *above, last = key.split(".")
    (tables[above[0]] if above else tables).pop(last)
    with pytest.raises(InvalidConfig, match=f"{key} is missing"):
        load_config(write("a.toml", tables))


# Wrong keys and values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"train": {"optimizr": "sgd"}}, 'train.optimizr: no such key; did you mean "optimizer"?'),
        ({"train": {"momentun": 1}}, "train.momentun: no such key; [train] has loss, metrics, rounds"),
        ({"trian": {}}, 'trian: no such key; did you mean "train"?'),
        ({"batch_size": 3}, 'batch_size: no such key; did you mean "train.batch_size"?'),
        ({"train": {"replicas": 3}}, 'train.replicas: no such key; did you mean "average.replicas"?'),
        ({"data": {"split": {"vall": 0.1}}}, 'data.split.vall: no such key; did you mean "val"?'),
        ({"average": {"outer": {"optimiser": "sgd"}}}, "average.outer.optimiser: no such key; did you mean"),
        ({"average": {"mix": {"perod": 1}}}, 'average.mix.perod: no such key; did you mean "period"?'),
        ({"xyzzy": 1}, "xyzzy: no such key; the config has model, model_args, data, train"),
        ({"self": 1}, "self: no such key"),
    ],
)
def test_a_misspelt_key_gets_a_guess_or_the_list(tables, said):
    assert said in refused(**tables)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"train": {"rounds": "many"}}, 'train.rounds = "many": input should be a valid integer'),
        ({"train": {"rounds": 2.0}}, "train.rounds = 2.0: input should be a valid integer"),
        ({"train": {"rounds": True}}, "train.rounds = true: input should be a valid integer"),
        ({"train": {"rounds": 0}}, "train.rounds = 0: input should be greater than or equal to 1"),
        ({"train": {"seed": -1}}, "train.seed = -1: input should be greater than or equal to 0"),
        ({"train": {"clip_norm": math.nan}}, "train.clip_norm = NaN: input should be a finite number"),
        ({"train": {"clip_norm": "1"}}, 'train.clip_norm = "1": input should be a valid number'),
        ({"train": {"batch_size": "ful"}}, "input should be a valid integer or 'full'; did you mean \"full\"?"),
        ({"train": {"batch_size": 0}}, "input should be greater than or equal to 1 or 'full'"),
        ({"average": {"replicas": "aut"}}, "input should be a valid integer or 'auto'"),
        ({"train": {"optimizer_args": 3}}, "train.optimizer_args = 3: input should be a table"),
        ({"train": 3}, "train = 3: input should be a table"),
        ({"train": {1: 2}}, "train"),
        ({"data": {"inputs": "image"}}, 'data.inputs = "image": input should be a list'),
        ({"data": {"inputs": [1]}}, "data.inputs[0] = 1: input should be a valid string"),
        ({"data": {"path": 3}}, "data.path = 3: input should be a valid string or a list"),
        ({"data": {"shuffle": "yes"}}, 'data.shuffle = "yes": input should be a valid boolean'),
        ({"data": {"partition": "contigous"}}, 'did you mean "contiguous"?'),
        ({"data": {"memory": True}}, "data.memory = true: input should be a valid string"),
        ({"data": {"memory": -1}}, 'data.memory = "-1" is not a size'),
        ({"data": {"cache": 1.5}}, "data.cache = 1.5: input should be a valid string"),
        (
            {"data": {"path": [{"path": "a", "wrkers": ["x"]}]}},
            'data.path[0].wrkers: no such key; did you mean "workers"?',
        ),
        (
            {"data": {"path": [{"path": "a"}, {"path": "b", "replicas": 0}]}},
            "data.path[1].replicas = 0: input should be gr",
        ),
        ({"data": {"path": [{"path": "a", "workers": "x"}]}}, 'data.path[0].workers = "x": input should be a list'),
        ({"data": {"path": [{"replicas": 2}]}}, "data.path[0].path is missing"),
        ({"data": {"path": ["a"]}}, 'data.path[0] = "a": input should be a table'),
        ({"data": {"input_offsets": {"start": 0}}}, "data.input_offsets.stop is missing"),
        (
            {"data": {"isel": {"a": {"start": 0, "stop": 1, "stp": 2}}}},
            'data.isel.a.stp: no such key; did you mean "stop"',
        ),
        ({"data": {"isel": {"a": "b"}}}, 'data.isel.a = "b": input should be a valid integer or a table'),
        (
            {"data": {"stride": "x", "split": {"val": 2}}},
            'data.stride = "x": input should be a valid integer; data.split.v',
        ),
        ({"data": {"memory": "lots"}}, 'data.memory = "lots" is not a size'),
        ({"cluster": {"memory": "-1GB"}}, 'cluster.memory = "-1GB" is not a size'),
        ({"data": {"split": {"val": 0.5, "test": 0.5}}}, "data.split: val + test = 1 leaves nothing to train on"),
        ({"data": {"split": {"val": 1.0}}}, "data.split.val = 1.0: input should be less than 1"),
        ({"data": {"split": {"val": -0.1}}}, "data.split.val = -0.1: input should be greater than or equal to 0"),
        ({"data": {"input_offsets": "x"}}, 'data.input_offsets = "x": input should be a valid integer or a list'),
        ({"train": {"loss": "mes"}}, 'train.loss = "mes": allowed are mse, mae, huber, cross_entropy, bce or "module:'),
        ({"train": {"loss": "mes"}}, 'did you mean "mse"?'),
        ({"train": {"metrics": ["accurcy"]}}, 'did you mean "accuracy"?'),
        ({"train": {"schedule": "cosin"}}, 'did you mean "cosine"?'),
        ({"train": {"schedule": ":f"}}, 'train.schedule = ":f": allowed are'),
        ({"average": {"max_rejected": 1.1}}, "average.max_rejected"),
        ({"run": {"keep": 0}}, "run.keep = 0: input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(tables, said):
    assert said in refused(**tables)


def test_all_faults_are_named_at_once():
    with pytest.raises(InvalidConfig) as caught:
        TrainConfig(train={"rounds": 0, "sead": 1}, run={"keep": "x"})
    assert "train.rounds" in caught.value.message
    assert 'train.sead: no such key; did you mean "seed"?' in caught.value.message
    assert "run.keep" in caught.value.message
    assert caught.value.hint == "3 keys are wrong."


def test_epochs_and_steps_together_are_refused():
    assert "local_epochs and local_steps are both given" in refused(train={"local_epochs": 1, "local_steps": 5})
    assert TrainTable(local_steps=5).local_epochs == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null"),
        (np.int64(3), "a int64"),
        (np.ones(2), "a ndarray"),
        (print, "a builtin_function_or_method"),
        (b"x", "a bytes"),
    ],
)
@pytest.mark.parametrize("place", [lambda v: v, lambda v: [1, v], lambda v: {"deep": v}])
def test_arguments_that_a_config_file_cannot_hold_are_refused(value, said, place):
    message = refused(model_args={"a": place(value)})
    assert message.startswith("model_args.a")
    assert f" is {said};" in message
    assert refused(train={"optimizer_args": {"lr": value}}).startswith("train.optimizer_args.lr is ")


def test_arguments_put_in_behind_the_check_are_refused_when_written():
    with pytest.raises(InvalidConfig, match=r"model_args\.a is null"):
        to_toml(TrainConfig().model_copy(update={"model_args": {"a": None}}))


def test_a_config_is_frozen():
    config = TrainConfig()
    with pytest.raises(ValidationError):
        config.model = "other:build"
    with pytest.raises(ValidationError):
        config.train.rounds = 3
    assert config == TrainConfig()


def test_defaults_are_not_shared_between_configs():
    TrainConfig().train.optimizer_args["lr"] = 5.0
    TrainConfig().model_args["a"] = 1
    assert TrainConfig().train.optimizer_args == {"lr": 0.01, "momentum": 0.9}
    assert TrainConfig().model_args == {}


# Features to come ---------------------------------------------------------------------------------------------------

OTHER = {
    "data.storage_options": {"anon": True},
    "data.isel": {"level": 3},
    "data.input_offsets": [0, 1],
    "data.target_offsets": {"start": 1, "stop": 129},
    "data.stride": 2,
    "data.patch": {"lat": 64},
    "data.val_path": "val.zarr",
    "data.normalize": ["a"],
    "data.transform": "m:f",
    "data.cache": "1GB",
    "train.sync_rounds": 1,
    "train.precision": "bfloat16",
    "average.reduce": "median",
    "average.inner_state": "reset",
    "average.prox": 0.1,
    "average.ema": 0.9,
    "average.recalibrate_batchnorm": True,
    "average.mix.topology": "ring",
    "average.mix.groups": 2,
    "average.mix.period": 2,
    "average.outer": {},
    "average.codec": {"name": "bf16"},
    "stop.metric": "val_accuracy",
    "stop.mode": "max",
    "stop.target": 0.1,
    "stop.patience": 5,
    "stop.min_delta": 0.1,
    "cluster.slices": 2,
    "cluster.tls": {"ca": "x"},
    "run.trackers": ["m:f"],
}


@pytest.mark.parametrize("key", NOT_BUILT)
def test_what_is_not_built_is_refused_by_name(key):
    with pytest.raises(NotSupportedYet) as caught:
        TrainConfig(**nested(key, OTHER[key]))
    assert caught.value.message.startswith(f"{key} = ")
    assert f"this version does not have {NOT_BUILT[key]} yet." in caught.value.message
    assert caught.value.code == 3


@pytest.mark.parametrize(
    "key", [key for key, value in flat_values(TrainConfig()) if key in NOT_BUILT and value is not None]
)
def test_the_default_of_what_is_not_built_may_be_given(key):
    default = dict(flat_values(TrainConfig()))[key]
    assert TrainConfig(**nested(key, default)) == TrainConfig()


@pytest.mark.parametrize("key", NOT_BUILT_VALUES)
def test_a_value_that_is_not_built_is_refused_by_name(key):
    value, feature = NOT_BUILT_VALUES[key]
    with pytest.raises(NotSupportedYet) as caught:
        TrainConfig(**nested(key, value))
    assert caught.value.message == f"{key} = {json.dumps(value)}: this version does not have {feature} yet."


def test_a_list_of_stores():
    config = TrainConfig(data={"path": [{"path": "a.zarr"}, {"path": "b.zarr", "workers": ["w"], "replicas": 2}]})
    assert [(store.path, store.workers, store.replicas) for store in config.data.path] == [
        ("a.zarr", (), 1),
        ("b.zarr", ("w",), 2),
    ]
    assert TrainConfig(**tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize("cache", ["0", "0B", "512MB", "auto"])
def test_sizes_of_the_cache(cache):
    assert TrainConfig(data={"cache": cache}).data.cache == cache


def test_normalize_names_inputs_or_targets():
    with pytest.raises(InvalidConfig, match='data.normalize names "imag", .* did you mean "image"'):
        TrainConfig(data={"inputs": ["image"], "targets": ["y"], "normalize": ["imag"]})


# Settings on the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def with_settings(write, monkeypatch, tmp_path):
    """Load the smallest config with settings on top, from another directory."""
    (tmp_path / "elsewhere").mkdir()
    path = write("dtrain.toml", SMALLEST)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return lambda *settings: load_config(path, settings)


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("train.rounds=50", "train.rounds", 50),
        (" train.rounds = 50 ", "train.rounds", 50),
        ("train.clip_norm=1e-3", "train.clip_norm", 0.001),
        ("train.clip_norm=2", "train.clip_norm", 2.0),
        ("data.shuffle=false", "data.shuffle", False),
        ("data.split={ val = 0.2, test = 0.0 }", "data.split.val", 0.2),
        ("data.split.val=0.25", "data.split.val", 0.25),
        ("train.optimizer=adam", "train.optimizer", "adam"),
        ('train.optimizer="adam"', "train.optimizer", "adam"),
        ("train.optimizer_args={lr = 0.1}", "train.optimizer_args", {"lr": 0.1}),
        ("train.optimizer_args.lr=0.1", "train.optimizer_args", {"lr": 0.1}),
        ("train.metrics=['mae']", "train.metrics", ("mae",)),
        ("train.loss=mine:loss", "train.loss", "mine:loss"),
        ("cluster.scheduler=tcp://10.0.0.1:8786", "cluster.scheduler", "tcp://10.0.0.1:8786"),
        ("model_args.name=a=b", "model_args", {"name": "a=b"}),
        ("model_args.deep.er.width=3", "model_args", {"deep": {"er": {"width": 3}}}),
        ("train.batch_size=full", "train.batch_size", "full"),
    ],
)
def test_a_setting_is_toml_or_a_bare_word(with_settings, setting, key, value):
    assert value_of(with_settings(setting), key) == value


def test_settings_leave_the_neighbours_alone_and_the_last_one_counts(with_settings):
    config = with_settings("data.split.val=0.3", "train.rounds=3", "train.rounds=4")
    assert (config.data.split.val, config.data.split.test) == (0.3, 0.1)
    assert (config.train.rounds, config.train.loss, config.data.inputs) == (4, "mse", ("a",))


@pytest.mark.parametrize(
    ("setting", "key", "path"),
    [
        ("data.path=other.zarr", "data.path", "{cwd}/other.zarr"),
        ("data.path='other.zarr'", "data.path", "{cwd}/other.zarr"),
        ("data.path=/abs/other.zarr", "data.path", "/abs/other.zarr"),
        ("data.path=s3://bucket/other.zarr", "data.path", "s3://bucket/other.zarr"),
        ("train.init=start.safetensors", "train.init", "{cwd}/start.safetensors"),
        ("run.dir=runs", "run.dir", "{cwd}/runs"),
        ("run.dir=~/runs", "run.dir", "{home}/runs"),
        ("train.init=", "train.init", ""),
    ],
)
def test_paths_in_settings_are_relative_to_the_working_directory(with_settings, monkeypatch, setting, key, path):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert value_of(with_settings(setting), key) == path.format(cwd=Path.cwd(), home="/home/somebody")


def test_paths_in_the_file_are_left_as_they_are(with_settings):
    assert with_settings().data.path == "x.zarr"


@pytest.mark.parametrize("setting", ["train.rounds", "=3", " =3", ""])
def test_a_setting_without_key_or_value_is_exit_code_2(with_settings, setting):
    with pytest.raises(UsageError, match="write it as key=value") as caught:
        with_settings(setting)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.roundss=3", 'did you mean "rounds"'),
        ("train.rounds=many", 'train.rounds = "many"'),
        ("train.rounds.deep=3", "train.rounds"),
        ("model.deep=3", "--set model.deep: model is not a table"),
        ("..=3", "no such key"),
    ],
)
def test_a_wrong_setting_is_exit_code_3(with_settings, setting, said):
    with pytest.raises(InvalidConfig) as caught:
        with_settings(setting)
    assert said in caught.value.message
    assert caught.value.code == 3


def test_a_size_may_be_a_number_of_bytes():
    data = TrainConfig(data={"memory": 512_000_000, "cache": 0}).data
    assert (parse_bytes(data.memory, "data.memory"), data.cache) == (512_000_000, "0")


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MB", 512 * 10**6), ("2GiB", 2 * 2**30), ("1000", 1000), ("1.5 KiB", 1536), ("1kb", 1000)],
)
def test_sizes_are_parsed(text, size):
    assert parse_bytes(text, "data.memory") == size


@pytest.mark.parametrize("text", ["", "0", "-1MB", "much", "0.1B", "MB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InvalidConfig, match=r"data\.memory"):
        parse_bytes(text, "data.memory")


# What is kept in a run ----------------------------------------------------------------------------------------------

CONFIGS = {
    "defaults": {},
    "smallest": SMALLEST,
    "rich": RICH,
    "steps": merged(SMALLEST, {"train": {"local_steps": 7}}),
    "epochs": merged(SMALLEST, {"train": {"local_epochs": 7}}),
    "odd values": {"model_args": {"a": math.inf, "b": 2**70, "c": (1, 2), "d": date(2020, 1, 2), "e": 'q"\n\\'}},
    "infinity": {"train": {"optimizer_args": {"lr": 0.1, "max_exp_avg": -math.inf}}},
}
configs = pytest.mark.parametrize("tables", CONFIGS.values(), ids=CONFIGS.keys())


@configs
def test_toml_gives_the_config_back(tables):
    config = TrainConfig(**tables)
    back = TrainConfig(**tomllib.loads(to_toml(config)))
    assert differences(config, back) == []
    assert dict(flat_values(back)) == dict(flat_values(config))
    assert to_toml(back) == to_toml(config)


def test_infinity_is_kept_as_infinity():
    config = TrainConfig(model_args={"a": math.inf})
    assert tomllib.loads(to_toml(config))["model_args"] == {"a": math.inf}
    assert differences(config, TrainConfig(model_args={"a": 1.0})) == [("model_args", {"a": math.inf}, {"a": 1.0})]


def test_the_written_toml_names_every_value():
    written = tomllib.loads(to_toml(TrainConfig(train={"local_steps": 3})))
    assert written["train"]["local_steps"] == 3
    assert "local_epochs" not in written["train"]
    assert written["average"]["mix"] == {"topology": "full", "groups": 0, "period": 1}
    assert "outer" not in written["average"]


def test_differences_name_the_key_and_both_values():
    old = TrainConfig(**SMALLEST)
    new = TrainConfig(**merged(SMALLEST, {"train": {"rounds": 3, "local_steps": 5}, "data": {"inputs": ["a", "c"]}}))
    assert differences(old, new) == [
        ("data.inputs", ["a"], ["a", "c"]),
        ("train.rounds", 20, 3),
        ("train.local_steps", None, 5),
    ]
    assert differences(new, new) == []


scalars = st.one_of(st.integers(-(2**60), 2**60), st.booleans(), st.text(max_size=5), st.floats(allow_nan=False))


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=3))
def test_arguments_of_any_kind_come_back_from_toml(arguments):
    config = TrainConfig(model_args=arguments)
    assert differences(config, TrainConfig(**tomllib.loads(to_toml(config)))) == []


MAY_CHANGE = {
    "train.rounds",
    "stop.metric",
    "stop.mode",
    "stop.target",
    "stop.patience",
    "stop.min_delta",
    "cluster.scheduler",
    "cluster.workers",
    "cluster.memory",
    "cluster.allow_plain",
    "cluster.slices",
    "cluster.tls",
    "run.dir",
    "run.commit_every",
    "run.keep",
    "run.trackers",
    "data.memory",
    "data.cache",
    "data.reader",
    "data.storage_options",
}


def test_a_continued_run_may_change_what_the_contract_says():
    config = TrainConfig()
    assert {key for key, _ in flat_values(config) if may_change(key, config)} == MAY_CHANGE


@pytest.mark.parametrize("schedule", ["cosine", "linear", "mine:schedule"])
def test_the_rounds_may_not_change_where_the_rate_depends_on_them(schedule):
    config = TrainConfig(train={"schedule": schedule})
    assert {key for key, _ in flat_values(config) if may_change(key, config)} == MAY_CHANGE - {"train.rounds"}


def test_a_run_keeps_no_secrets():
    options = {"key": "AK", "secret": "xyz", "anon": False, "client_kwargs": {"endpoint_url": "http://h", "token": "t"}}
    headers = without_secrets(TrainConfig(data={"storage_options": {"headers": {"Authorization": "Bearer 1"}}}))
    assert headers.data.storage_options == {"headers": {"Authorization": "***"}}
    config = TrainConfig(data={"path": "s3://b/a.zarr", "storage_options": options})
    kept = without_secrets(config).data.storage_options
    assert kept == {
        "key": "***",
        "secret": "***",
        "anon": False,
        "client_kwargs": {"endpoint_url": "http://h", "token": "***"},
    }
    assert "xyz" not in repr(config)
    with pytest.raises(InvalidConfig) as caught:
        TrainConfig(data={"storage_options": "secret"})
    assert "secret" not in caught.value.message
