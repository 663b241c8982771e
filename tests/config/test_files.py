from __future__ import annotations

import json
import math
import time
import tomllib
from datetime import date
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dtrain.config.compare import differences
from dtrain.config.files import load_config, read_tables, to_toml
from dtrain.config.schema import TrainConfig
from dtrain.config.values import flat_values, value_of
from dtrain.errors import ConfigFileNotFound, InvalidConfig, UsageError
from tests.config.helpers import REQUIRED, RICH, SMALLEST, merged

# Three languages, one config --------------------------------------------------------------------------------------


def test_toml_yaml_and_json_give_the_same_config(write):
    toml = load_config(write("a.toml", RICH))
    assert toml == load_config(write("a.json", json.dumps(RICH)))
    assert toml == load_config(write("a.yaml", yaml.safe_dump(RICH)))
    assert toml == load_config(write("a.yml", yaml.safe_dump(RICH)))
    assert toml == TrainConfig(**RICH)
    assert toml.model_args == RICH["model_args"]
    assert toml.train.batch_size == "full"


def test_normalize_as_a_table_is_the_same_in_all_three(write):
    tables = merged(SMALLEST, {"data": {"normalize": {"a": ["level", "band"], "b": []}}})
    configs = [
        load_config(write("a.toml", tables)),
        load_config(write("a.json", json.dumps(tables))),
        load_config(write("a.yaml", yaml.safe_dump(tables))),
        TrainConfig(**tables),
    ]
    assert configs[1:] == configs[:-1]
    assert configs[0].data.mean_dims == {"a": ("level", "band"), "b": ()}


def test_a_list_is_not_made_a_table_by_a_setting(write):
    path = write("a.toml", merged(SMALLEST, {"data": {"normalize": ["a"]}}))
    with pytest.raises(InvalidConfig, match="--set data.normalize.b: data.normalize is not a table") as caught:
        load_config(path, ('data.normalize.b=["level"]',))
    assert "--set 'data.normalize={ b = ... }'" in caught.value.hint


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", ".1e-2", "0.001", "+1e-3", "10e-4", "1.0e-3"])
def test_a_small_number_is_a_number_in_yaml_too(write, text):
    given = yaml.safe_dump(SMALLEST).replace("loss: mse", f"loss: mse\n  optimizer_args: {{lr: {text}}}")
    assert load_config(write("a.yaml", given)).train.optimizer_args == {"lr": 0.001}


def test_yaml_words_that_look_a_little_like_numbers_stay_words(write):
    tables = read_tables(write("a.yaml", "{a: e3, b: 1e, c: 1e-3x, d: 12e03, e: '1e-3', f: -1, g: 1.5, h: .inf}"))
    assert tables == {"a": "e3", "b": "1e", "c": "1e-3x", "d": 12e3, "e": "1e-3", "f": -1, "g": 1.5, "h": math.inf}


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
        ("a.json", "[" * 100_000, "nested too deeply"),
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


@pytest.mark.parametrize("text", ["[train]\nrounds = 1\n[train]\nseed = 1\n", "a = 1\na = 2\n"])
def test_what_is_given_twice_has_a_cure(write, text):
    with pytest.raises(InvalidConfig) as caught:
        read_tables(write("a.toml", text))
    assert "given twice: keep one" in caught.value.hint


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
        ('data.normalize=["a"]', "data.normalize", ("a",)),
        ('data.normalize={ a = ["level"], b = [] }', "data.normalize", {"a": ("level",), "b": ()}),
        ('data.normalize.a=["level"]', "data.normalize", {"a": ("level",)}),
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


# The TOML of a run ------------------------------------------------------------------------------------------


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


scalars = st.one_of(st.integers(-(2**60), 2**60), st.booleans(), st.text(max_size=5), st.floats(allow_nan=False))


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=3))
def test_arguments_of_any_kind_come_back_from_toml(arguments):
    config = TrainConfig(model_args=arguments)
    assert differences(config, TrainConfig(**tomllib.loads(to_toml(config)))) == []


def test_arguments_put_in_behind_the_check_are_refused_when_written():
    with pytest.raises(InvalidConfig, match=r"model_args\.a is null"):
        to_toml(TrainConfig().model_copy(update={"model_args": {"a": None}}))


# Hostile files ------------------------------------------------------------------------------------------------------

ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.json", "[" * 100_000, "nested too deeply; at most 64"),
        ("c.json", '{"model_args": ' + '{"a":' * 70 + "1" + "}" * 71, "nested too deeply; at most 64"),
        ("c.toml", "a = " + "[" * 100_000, "nested too deeply; at most 64"),
        ("c.toml", "model_args.a = " + "[" * 70 + "]" * 70, "nested too deeply; at most 64"),
        ("c.toml", "a." * 3000 + "b = 1", "nested too deeply; at most 64"),
        ("c.yaml", "[" * 3000, "nested too deeply; at most 64"),
        ("c.yaml", "model_args: &m\n  a: *m\n", "nested too deeply; at most 64"),
        ("c.yaml", f"{ALIASES}\nmodel_args: {{ a: *a9 }}\n", r"holds [0-9,]+ values; at most 1,000,000"),
        ("c.toml", "# " + "x" * 2**24, "a config file has at most 16,777,216 bytes"),
    ],
)
def test_nested_and_large_files_are_refused_at_once(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(InvalidConfig, match=said):
        load_config(path)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "setting", ["model_args.a=" + "[" * 5000, "a." * 3000 + "b=1", "model_args.a=" + "[" * 70 + "]" * 70]
)
def test_nested_settings_are_refused(tmp_path, setting):
    path = tmp_path / "c.toml"
    path.write_text('model = "m:f"\n')
    with pytest.raises((InvalidConfig, UsageError), match="nested too deeply; at most 64"):
        load_config(path, (setting,))
