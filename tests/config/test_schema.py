from __future__ import annotations

import math
import pickle
import tomllib

import numpy as np
import pytest
from pydantic import ValidationError

from dtrain.config.average import CodecConfig, OuterConfig
from dtrain.config.files import load_config, to_toml
from dtrain.config.schema import TrainConfig, TrainTable
from dtrain.config.values import flat_values
from dtrain.errors import InvalidConfig
from tests.config.helpers import REQUIRED, RICH

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
sel = {}
dims = {}
sample_dim = "auto"
input_offsets = 0
target_offsets = 0
stride = 1
patch = {}
split = { val = 0.1, test = 0.1 }
gaps = "auto"
split_order = "auto"
val_path = ""
partition = "stratified"
normalize = []
transform = ""
missing = "auto"
non_finite = "error"
weight = ""
balance = ""
shuffle = true
memory = "auto"
cache = "auto"
reader = "auto"

[train]
loss = "cross_entropy"             # required
metrics = []
rounds = 20
local_epochs = 1
eval_every = "auto"
drop_last = false
class_axis = "auto"
freeze = []
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
trim = 0.1
control = false
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
schedule = "constant"
clip_norm = 0.0

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
tls = { ca = "", cert = "", key = "" }

[run]
dir = "runs"
commit_every = "auto"
keep = 3
trackers = []
"""


def without_optional_tables(tables):
    average = {key: value for key, value in tables["average"].items() if key not in ("outer", "codec")}
    return {**tables, "average": average}


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


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
    elsewhere = {"average.outer", "average.codec", "data.split.patches", "data.split.gap", "data.split.by"}
    assert named == {key for key, _ in flat_values(TrainConfig())} - elsewhere


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


def test_a_config_is_the_same_after_pickling():
    config = TrainConfig(**RICH)
    assert pickle.loads(pickle.dumps(config)) == config


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
        ({"data": {"path": [3]}}, "data.path[0] = 3: input should be a table or a valid string"),
        ({"data": {"path": []}}, "data.path: is an empty list; give at least one store"),
        ({"data": {"val_path": []}}, "data.val_path: is an empty list; give at least one store"),
        (
            {"data": {"path": ["a", {"path": "b"}]}},
            "data.path: holds paths and tables; give paths, of stores that are one",
        ),
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


@pytest.mark.parametrize(
    ("loss", "metric", "said"),
    [
        (
            "mse",
            "f1",
            'train.metrics: f1 is of labels: it takes outputs as logits, and train.loss = "mse" is of numbers.\n'
            "With this loss there are mse, mae, rmse, r2, anomaly_correlation; or write a metric of your own.",
        ),
        (
            "cross_entropy",
            "r2",
            'train.metrics: r2 is of numbers, and train.loss = "cross_entropy" is of labels.\n'
            "With this loss there are accuracy, f1, iou, dice, auroc, perplexity, bits_per_byte; or write a metric of "
            "your own.",
        ),
    ],
)
def test_a_metric_of_another_kind_than_the_loss_is_refused(loss, metric, said):
    with pytest.raises(InvalidConfig) as caught:
        TrainConfig(train={"loss": loss, "metrics": ["accuracy", metric]})
    assert str(caught.value) == said
    TrainConfig(train={"loss": "model:loss", "metrics": ["f1", "r2"]})


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


def test_sync_rounds_shorten_rounds_of_local_steps():
    assert TrainConfig(train={"local_steps": 5, "sync_rounds": 3}).train.sync_rounds == 3
    assert TrainConfig(train={"local_epochs": 5, "sync_rounds": 0}).train.sync_rounds == 0
    said = "train.sync_rounds = 3 is for rounds of train.local_steps; without it, a round is train.local_epochs = 1."
    assert refused(train={"sync_rounds": 3}) == said


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


@pytest.mark.parametrize("given", [{"ca": "ca.pem"}, {"ca": "ca.pem", "cert": "a.pem"}, {"key": "key.pem"}])
def test_the_files_of_tls_are_given_together(given):
    message = refused(cluster={"tls": given})
    assert message.startswith("cluster.tls: lacks ")
    assert message.endswith("; give ca, cert and key")


def test_a_list_of_stores():
    config = TrainConfig(data={"path": [{"path": "a.zarr"}, {"path": "b.zarr", "workers": ["w"], "replicas": 2}]})
    assert [(store.path, store.workers, store.replicas) for store in config.data.path] == [
        ("a.zarr", (), 1),
        ("b.zarr", ("w",), 2),
    ]
    assert TrainConfig(**tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize("cache", ["0", "0B", "0MB", "0 GiB", "512MB", "auto"])
def test_sizes_of_the_cache(cache):
    assert TrainConfig(data={"cache": cache}).data.cache == cache


@pytest.mark.parametrize(
    ("given", "dims"),
    [
        ([], {}),
        ({}, {}),
        (["a"], {"a": ()}),
        (["a", "b"], {"a": (), "b": ()}),
        ({"a": []}, {"a": ()}),
        ({"a": ["level", "band"], "b": []}, {"a": ("level", "band"), "b": ()}),
    ],
)
def test_normalize_is_a_list_or_a_table(given, dims):
    config = TrainConfig(data={"inputs": ["a"], "targets": ["b"], "normalize": given})
    assert config.data.mean_dims == dims
    assert TrainConfig(**tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a", 'data.normalize = "a": input should be a list or a table'),
        (3, "data.normalize = 3: input should be a list or a table"),
        ({"a": "level"}, 'data.normalize.a = "level": input should be a list'),
        ({"a": [3]}, "data.normalize.a[0] = 3: input should be a valid string"),
        ({"a": ["x", "x"]}, 'data.normalize.a names the dimension "x" twice'),
        ({"c": ["x"]}, 'data.normalize names "c", which is neither an input nor a target'),
        ([["a"]], "data.normalize[0] = "),
    ],
)
def test_normalize_of_another_kind_is_refused(given, said):
    message = refused(data={"inputs": ["a"], "targets": ["b"], "normalize": given})
    assert message.startswith(said), message


def test_normalize_names_inputs_or_targets():
    with pytest.raises(InvalidConfig, match='data.normalize names "imag", .* did you mean "image"'):
        TrainConfig(data={"inputs": ["image"], "targets": ["y"], "normalize": ["imag"]})


# Values of Python ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (slice(0, 500), {"start": 0, "stop": 500, "step": 1}),
        (slice(10), {"start": 0, "stop": 10, "step": 1}),
        (slice(-10, None), {"start": -10, "stop": None, "step": 1}),
        (slice(np.int64(2), np.int32(9), np.uint8(3)), {"start": 2, "stop": 9, "step": 3}),
        (range(2, 10, 4), {"start": 2, "stop": 7, "step": 4}),
        ([0, 1, 2], {"start": 0, "stop": 3, "step": 1}),
        ((3,), {"start": 3, "stop": 4, "step": 1}),
        ([-3, -2, -1], {"start": -3, "stop": None, "step": 1}),
        ([-4, -2], {"start": -4, "stop": -1, "step": 2}),
        (np.arange(4), {"start": 0, "stop": 4, "step": 1}),
        ({"stop": np.int64(5)}, {"start": 0, "stop": 5, "step": 1}),
        ({"start": 5}, {"start": 5, "stop": None, "step": 1}),
        (np.int16(-2), -2),
    ],
)
def test_isel_takes_what_xarray_takes(given, part):
    config = TrainConfig(data={"isel": {"t": given}})
    assert config.model_dump()["data"]["isel"] == {"t": part}
    stored = TrainConfig(**tomllib.loads(to_toml(config)))
    assert list(flat_values(stored)) == list(flat_values(config))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([0, 1, 3], "data.isel.t: a list selects indices at equal intervals, upwards"),
        ([2, 1], "data.isel.t: a list selects indices at equal intervals, upwards"),
        ([-2, -1, 0], "data.isel.t: a list selects indices at equal intervals, upwards"),
        (range(5, 1, -1), "data.isel.t: a list selects indices at equal intervals, upwards"),
        ([], "data.isel.t: a list selects indices at equal intervals, upwards"),
        (np.array([True, False]), "data.isel.t: a list holds integers only"),
        ([0.0, 1.0], "data.isel.t: a list holds integers only"),
        (slice(5, 1, -1), "data.isel.t.step = -1: input should be greater than or equal to 1"),
        (slice("2000", "2001"), 'data.isel.t.start = "2000": input should be a valid integer'),
        (1.5, "data.isel.t = 1.5: input should be a valid integer or a table"),
        (True, "data.isel.t = true: input should be a valid integer or a table"),
    ],
)
def test_isel_of_another_kind_is_refused(given, said):
    assert refused(data={"isel": {"t": given}}).startswith(said)


def test_numbers_of_numpy_paths_and_ranges_are_taken_as_python_has_them(tmp_path):
    config = TrainConfig(
        model_args={"width": np.int64(3), "deep": [np.float64(0.5), {"on": np.bool_(True)}], "name": np.str_("a")},
        data={
            "path": tmp_path / "a.zarr",
            "val_path": tmp_path / "b.zarr",
            "input_offsets": range(-2, 1),
            "target_offsets": np.array([1, 2]),
            "patch": {"lat": np.int32(8)},
            "split": {"val": np.float32(0.25), "test": np.int64(0)},
        },
        train={
            "rounds": np.int64(7),
            "seed": np.uint32(3),
            "init": tmp_path,
            "optimizer_args": {"lr": np.float64(0.1)},
        },
        average={"replicas": np.int16(2)},
        run={"dir": tmp_path},
    )
    assert config.model_args == {"width": 3, "deep": [0.5, {"on": True}], "name": "a"}
    assert (config.data.path, config.data.val_path) == (str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr"))
    assert (config.data.input_offsets, config.data.target_offsets) == ((-2, -1, 0), (1, 2))
    assert (config.data.patch, config.data.split.val) == ({"lat": 8}, 0.25)
    assert (config.train.rounds, config.train.seed, config.train.init) == (7, 3, str(tmp_path))
    assert (config.average.replicas, config.run.dir) == (2, str(tmp_path))
    assert TrainConfig(**tomllib.loads(to_toml(config))) == config


def test_names_of_dimensions():
    data = {"inputs": ["X", "obs/age"], "targets": ["obs/type"], "dims": {"X": ("cell", "gene"), "obs/age": ["cell"]}}
    config = TrainConfig(data=data)
    assert config.data.dims == {"X": ("cell", "gene"), "obs/age": ("cell",)}
    assert TrainConfig(**tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    ("dims", "said"),
    [
        ({"X": "cell"}, 'data.dims.X = "cell": input should be'),
        ({"X": [1]}, "data.dims.X[0] = 1: input should be a valid string"),
        ({"X": ["cell", "cell"]}, 'data.dims.X names "cell" twice.'),
        ({"X": ["cell", ""]}, "data.dims.X = ['cell', '']: a name is empty."),
        ({"x": ["cell"]}, 'data.dims names "x", which is neither an input nor a target'),
    ],
)
def test_names_of_dimensions_that_are_refused(dims, said):
    assert refused(data={"inputs": ["X"], "targets": ["y"], "dims": dims}).startswith(said)
