"""Bad input: the exit code, and an error in at most four lines that names what was given."""

import http.server
import json
import math
import os
import shutil
import socket
import threading

import numpy as np
import pytest

from tests.cli.helpers import MODEL, blobs, kept, last, objects

BUILD = "import torch\nfrom torch import nn\n\n\ndef build():\n    return {}\n"
LOSS = BUILD.format("nn.Linear(3, 4)") + "\n\ndef loss(outputs, targets):\n    {}\n"


def fails(cli, command, code, words):
    """Run a command; check the exit code, what it tells people and what it tells programs."""
    outcome = cli("-q", "--json", *command)
    assert outcome.code == code, outcome.err
    told = outcome.err.splitlines()
    assert told[0].startswith("error: ")
    assert len(told) <= 4
    assert "Traceback" not in outcome.err
    fault = last(outcome)
    assert list(fault) == ["event", "code", "message", "hint"]
    assert (fault["event"], fault["code"]) == ("error", code)
    assert fault["message"]
    for word in words:
        assert word in outcome.err
        assert word in f"{fault['message']} {fault['hint']}"
    return outcome


def test_an_error_in_words_leaves_stdout_empty(cli, project):
    outcome = cli("train", project({"data": {"path": "nothing.zarr"}}).config)
    assert outcome.out == ""
    assert outcome.err.startswith("error: nothing.zarr: no such file or directory.\n  Looked for /")


# The config file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("plan",), ("train",), ("config", "show")])
def test_no_such_config_file(cli, command):
    fails(cli, (*command, "nowhere/dtrain.toml"), 2, ["nowhere/dtrain.toml", "dtrain init"])


def test_the_config_is_a_directory(cli, project):
    fails(cli, ("train", project().dir), 2, ["job", "is a directory", "dtrain.toml"])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "model = ", ["a.toml", "Invalid value"]),
        ("a.toml", "[data]\npath = 'x'\n[data]\n", ["a.toml", "line 3"]),
        ("a.toml", "model = 'é'".encode("latin-1"), ["a.toml"]),
        ("a.yaml", "data: [1, 2", ["a.yaml", "line 1"]),
        ("a.yaml", "- 1\n- 2\n", ["a.yaml", "list"]),
        ("a.yaml", "", ["a.yaml"]),
        ("a.json", "{'model': 1}", ["a.json", "line 1"]),
        ("a.json", "[]", ["a.json", "list"]),
        ("a.json", "[" * 100_000, ["a.json"]),
        ("a.toml", "", ["a.toml", "model is missing"]),
    ],
)
def test_config_files_that_cannot_be_read(cli, tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    fails(cli, ("train", name), 3, words)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"train": {"batchsize": 8}}, ["train.batchsize", 'did you mean "batch_size"']),
        ({"trian": {"rounds": 8}}, ["trian", 'did you mean "train"']),
        ({"data": {"split": {"vall": 0.1}}}, ["data.split.vall", 'did you mean "val"']),
        ({"optimizer": "sgd"}, ["optimizer", 'did you mean "train.optimizer"']),
        ({"train": {"rounds": "many"}}, ["train.rounds", '"many"', "integer"]),
        ({"train": {"rounds": 0}}, ["train.rounds", "0", "1"]),
        ({"train": {"rounds": True}}, ["train.rounds", "true"]),
        ({"train": {"batch_size": "ful"}}, ["train.batch_size", '"ful"', 'did you mean "full"']),
        ({"data": {"inputs": "x"}}, ["data.inputs", '"x"', "list"]),
        ({"data": {"shuffle": "no"}}, ["data.shuffle", '"no"']),
        ({"data": {"split": {"val": 0.5, "test": 0.5}}}, ["data.split", "val + test = 1"]),
        ({"train": {"local_steps": 5, "local_epochs": 1}}, ["local_epochs and local_steps"]),
        ({"train": {"loss": "mean_squared"}}, ["train.loss", "mean_squared", "mse"]),
        ({"train": {"loss": "crossentropy"}}, ['did you mean "cross_entropy"']),
        ({"train": {"metrics": ["acuracy"]}}, ["train.metrics", 'did you mean "accuracy"']),
        ({"train": {"schedule": "cosin"}}, ["train.schedule", 'did you mean "cosine"']),
        ({"train": {"optimizer": "sdg"}}, ["train.optimizer", "sdg", 'did you mean "sgd"', "adamw"]),
        ({"train": {"optimizer": "lbfgs"}}, ["lbfgs", "not supported"]),
        ({"data": {"memory": "lots"}}, ["data.memory", "lots", "512MB"]),
        ({"data": {"partition": "stratifed"}}, ["data.partition", 'did you mean "stratified"']),
        ({"data": {"sample_dim": "sampel"}}, ["data.sample_dim", 'did you mean "sample"']),
        ({"data": {"group": "trian"}}, ["data.group", "trian"]),
        ({"train": {"rounds": "a", "seed": "b"}}, ["train.rounds", "train.seed", "2 keys are wrong"]),
    ],
)
def test_keys_and_values_that_are_not_allowed(cli, project, tables, words):
    fails(cli, ("train", project(tables).config), 3, words)


@pytest.mark.parametrize("key", ["model", "data.path", "data.inputs", "data.targets", "train.loss"])
def test_keys_that_every_run_needs(cli, project, key):
    job = project(without=(key,))
    fails(cli, ("train", job.config), 3, [str(job.config), f"{key} is missing"])


@pytest.mark.parametrize("table", ["data", "train"])
def test_tables_that_every_run_needs(cli, project, table):
    fails(cli, ("train", project(without=(table,)).config), 3, [f"{table}.", "is missing"])


# The data ----------------------------------------------------------------------------------------------------


def test_no_such_data(cli, project):
    job = project({"data": {"path": "trian.zarr"}})
    fails(cli, ("train", job.config), 5, ["trian.zarr", "no such file", str(job.dir)])


@pytest.mark.parametrize("kind", ["file", "empty", "array", "broken"])
def test_what_is_not_zarr(cli, project, kind):
    job = project()
    path = job.dir / "train.zarr"
    if kind == "broken":
        (path / "zarr.json").write_text("{")
    else:
        shutil.rmtree(path)
        if kind == "file":
            path.write_text("text")
        elif kind == "empty":
            path.mkdir()
        else:
            import zarr

            zarr.create_array(path, shape=(4,), dtype="f4")
    fails(cli, ("train", job.config), 5, ["train.zarr", "Zarr"])


def test_an_unknown_variable(cli, project):
    tables = {"data": {"targets": ["lable"]}}
    fails(cli, ("train", project(tables).config), 3, ['"lable"', 'did you mean "label"', "It has"])


def test_lengths_that_differ(cli, project):
    longer = {**blobs()["label"], "values": np.arange(70) % 4}
    fails(cli, ("train", project(arrays={"label": longer}).config), 3, ["60", "70", "sample"])


def test_variables_without_a_common_dimension(cli, project):
    apart = {**blobs()["label"], "dims": ("station",)}
    fails(cli, ("train", project(arrays={"label": apart}).config), 3, ["label", "station"])


def test_a_variable_of_text(cli, project):
    dates = {"dims": ("sample",), "values": np.zeros(60, "datetime64[s]"), "chunks": (20,)}
    fails(cli, ("train", project(arrays={"label": dates}).config), 3, ["label", "datetime64"])


def test_a_chunk_larger_than_memory(cli, project):
    job = project({"data": {"memory": "200B"}})
    fails(cli, ("train", job.config), 3, ["x", "240 B", "data.memory is 200 B"])


def test_a_window_larger_than_memory(cli, project):
    job = project({"data": {"memory": "1kB"}})
    fails(cli, ("train", job.config), 8, ["(3 open, 1 ahead) of 400 B", "data.memory is 1.0 kB"])


def test_workers_whose_memory_is_full_before_there_are_data(cli, project):
    job = project({"cluster": {"scheduler": "local", "workers": 1, "memory": "150MB"}})
    words = ["A worker may use 143.05 MiB (cluster.memory)", "its process alone", "Set cluster.memory to"]
    fails(cli, ("train", job.config), 8, words)


@pytest.mark.slow
def test_a_model_that_workers_have_no_memory_for(cli, project):
    wide = BUILD.format("nn.Sequential(nn.Linear(3, 4_000_000), nn.Linear(4_000_000, 4))")
    job = project({"cluster": {"scheduler": "local", "workers": 2, "memory": "400MB"}}, model=wide)
    fails(cli, ("train", job.config), 8, ["ran out of memory", "model:build", "cluster.memory"])


def test_fewer_samples_than_replicas(cli, project):
    job = project({"average": {"replicas": 50}})
    fails(cli, ("train", job.config), 3, ["48 training samples", "average.replicas = 50"])


def test_a_split_of_less_than_a_sample(cli, project):
    job = project({"data": {"split": {"val": 0.001}}})
    fails(cli, ("train", job.config), 3, ["data.split.val = 0.001"])


@pytest.mark.parametrize("command", ["plan", "train"])
def test_windows_across_jumps_of_time(cli, project, command):
    days = np.arange(60) + np.arange(60) // 5 * 2  # from Monday to Friday
    time = {"dims": ("sample",), "values": days, "chunks": (60,), "attributes": {"units": "days since 2001-01-01"}}
    job = project({"data": {"input_offsets": [-1, 0]}}, arrays={"sample": time})
    words = ["sample jumps 11 times in 59 steps (18.6%)", "from 2001-01-05 to 2001-01-08 at row 5", '"allow"']
    fails(cli, (command, job.config), 3, words)
    fails(cli, (command, job.config, "--set", "data.gaps=error"), 3, ['(data.gaps = "error")'])
    fails(cli, (command, job.config, "--set", "data.gaps=never"), 3, ["data.gaps", "auto", "drop", "allow"])


def test_a_store_without_samples(cli, project):
    none = {key: {**value, "values": value["values"][:0]} for key, value in blobs().items()}
    fails(cli, ("train", project(arrays=none).config), 3, ["no samples"])


def test_a_missing_chunk(cli, project):
    job = project()
    (job.dir / "train.zarr/x/c/1/0").unlink()
    words = ["train.zarr", "x/c/1/0", "(1 of 3)", 'data.missing = "fill"']
    fails(cli, ("plan", job.config), 5, words)
    fails(cli, ("train", job.config), 5, words)
    assert cli("-q", "train", job.config, "--set", "data.missing=fill").code == 0


def test_a_chunk_that_goes_missing_while_training(cli, project, trained):
    job = project()
    assert cli("-q", "train", job.config).code == 0
    (job.dir / "train.zarr/x/c/1/0").rename(job.dir / "aside")
    fails(cli, ("train", job.config, "--set", "train.rounds=3"), 5, ["x/c/1/0"])
    assert kept(job.run) == [1, 2]
    (job.dir / "aside").rename(job.dir / "train.zarr/x/c/1/0")
    outcome = cli("--json", "train", job.config, "--set", "train.rounds=3")
    assert last(outcome)["params_sha256"] == trained(3)[-1]["params_sha256"]


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_chunk_that_cannot_be_decoded(cli, project, content):
    job = project()
    chunk = job.dir / "train.zarr/x/c/1/0"
    chunk.write_bytes(chunk.read_bytes()[:-3] if content is None else content)
    fails(cli, ("train", job.config), 5, ["train.zarr", "x/c/1/0", "cannot be decoded"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_that_are_not_finite(cli, project, value):
    x = blobs()["x"]
    x["values"][27, 1] = value
    job = project(arrays={"x": x})
    fails(cli, ("train", job.config), 5, ["train.zarr", "x[27, 1]", str(value), "data.non_finite"])


# The model, the loss, the optimizer -----------------------------------------------------------------------------


@pytest.mark.sampled(10)
@pytest.mark.parametrize(
    ("tables", "model", "words"),
    [
        ({"model": "model:biuld"}, MODEL, ["model:biuld", 'did you mean "build"']),
        ({"model": "modle:build"}, MODEL, ["modle:build", "modle.py"]),
        ({}, None, ["model:build", "model.py"]),
        ({"model": "model"}, MODEL, ['"model"', "module:function"]),
        ({"model": "model:build", "train": {"loss": "losses:mine"}}, MODEL, ["train.loss", "losses.py"]),
        ({}, "def build():\n    return (\n", ["model", "SyntaxError", "model.py, line 2"]),
        ({}, "import os\n\nx = 1 / 0\n", ["ZeroDivisionError", "division by zero", "model.py:3"]),
        ({}, "import no_such_package\n", ["ModuleNotFoundError", "no_such_package", "model.py:1"]),
        ({}, "build = 5\n", ["model:build", "no function build"]),
        ({}, BUILD.format("5"), ["int", "torch.nn.Module"]),
        ({}, BUILD.format("None"), ["None", "torch.nn.Module"]),
        ({}, BUILD.format("nn.Linear"), ["type", "torch.nn.Module"]),
        ({}, BUILD.format("1 / 0"), ["ZeroDivisionError", "model.py:6"]),
        ({"model_args": {"depth": 3}}, MODEL, ["TypeError", "depth"]),
        ({}, BUILD.format("nn.Linear(3, 4).double()"), ["weight", "float64", "float32"]),
        ({}, BUILD.format("nn.Linear(3, 4).half()"), ["weight", "float16", "float32"]),
        ({}, BUILD.format("nn.LazyLinear(4)"), ["weight", "lazy"]),
        ({}, BUILD.format("nn.Flatten()"), ["Flatten", "no parameters"]),
        ({}, BUILD.format("nn.Linear(5, 4)"), ["x float32[8, 3]", "5"]),
        ({}, BUILD.format("nn.Bilinear(3, 3, 4)"), ["x float32[8, 3]", "input2"]),
        ({}, BUILD.format("nn.Sequential(nn.Linear(3, 4), nn.Flatten(0))"), ["float32[32]", "int64[8]"]),
        ({"train": {"loss": "mse"}}, BUILD.format("nn.Linear(3, 4)"), ["float32[8, 4]", "int64[8]"]),
        ({}, BUILD.format("nn.LSTM(3, 4)"), ["tuple", "int64[8]"]),
        ({}, BUILD.format("nn.Linear(3, 2)"), ["float32[8, 2]", "label int64[8]"]),
    ],
)
def test_models_that_cannot_be_trained(cli, project, tables, model, words):
    job = project(tables, model=model)
    fails(cli, ("plan", job.config), 3, words)
    assert not (job.dir / "runs").exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return outputs.mean() * float('nan')", ["first batch", "nan"]),
        ("return outputs.mean() * float('inf')", ["first batch", "inf"]),
        ("return outputs", ["scalar", "float32[8, 4]"]),
        ("return 1.0", ["scalar", "float"]),
        ("raise ValueError('my own words')", ["my own words"]),
        pytest.param("return 1 / 0", ["ZeroDivisionError", "model.py:10"]),
        pytest.param("return {}['mine']", ["KeyError", "mine", "model.py:10"]),
        pytest.param("assert False, 'my own words'", ["AssertionError", "my own words", "model.py:10"]),
        pytest.param("return undefined", ["NameError", "undefined", "model.py:10"]),
        ("return outputs.detach().mean()", ["grad"]),
    ],
)
def test_losses_that_cannot_be_trained(cli, project, body, words):
    job = project({"train": {"loss": "model:loss"}}, model=LOSS.format(body))
    fails(cli, ("plan", job.config), 3, words)
    assert not (job.dir / "runs").exists()


def test_an_exception_of_the_model_in_the_middle_of_training(cli, project):
    model = MODEL.replace(
        "\n    def forward(self, x):\n",
        "        nn.init.zeros_(self.layers[2].bias)\n\n    def forward(self, x):\n"
        "        if self.layers[2].bias.max() > 0.2:\n            1 / 0\n",
    )
    job = project(model=model)
    outcome = fails(cli, ("train", job.config, "--set", "train.rounds=30"), 3, ["ZeroDivisionError", "model.py:16"])
    assert "Round" in last(outcome)["message"]
    assert kept(job.run)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"learning_rate": 0.1}, ["SGD", "learning_rate"]),
        ({"lr": -1.0}, ["SGD", "-1.0"]),
        ({"lr": "fast"}, ["SGD", "fast"]),
    ],
)
def test_arguments_that_the_optimizer_refuses(cli, project, arguments, words):
    fails(cli, ("train", project({"train": {"optimizer_args": arguments}}).config), 3, words)


def test_training_that_diverges(cli, project):
    job = project(
        {"train": {"loss": "model:loss", "optimizer_args": {"lr": 1e30}}},
        model=LOSS.format("return (outputs ** 2).mean()"),
    )
    outcome = fails(cli, ("train", job.config), 7, ["Round 1", "2 of 2 replicas", "learning rate"])
    assert [event["event"] for event in objects(outcome.out)] == ["error"]


# The cluster -----------------------------------------------------------------------------------------------------


def test_a_scheduler_that_does_not_answer(cli, project, monkeypatch):
    monkeypatch.setattr("dtrain.runtime.connect.CONNECT_TIMEOUT", 0.5)
    address = "tcp://127.0.0.1:1"
    fails(cli, ("train", project().config, "--scheduler", address), 6, [address, "dask scheduler"])


def test_a_port_that_takes_connections_and_never_answers(cli, project, monkeypatch, tmp_path):
    """Such as a tunnel whose far end is gone."""
    monkeypatch.setattr("dtrain.runtime.connect.CONNECT_TIMEOUT", 0.5)
    config = project().config
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        fails(cli, ("train", config, "--scheduler", address), 6, [address, "dask scheduler"])
        (tmp_path / "scheduler.json").write_text(json.dumps({"address": address}))
        fails(cli, ("train", config, "--scheduler", "scheduler.json"), 6, ["scheduler.json"])


def test_a_port_where_something_else_answers(cli, project, monkeypatch):
    monkeypatch.setattr("dtrain.runtime.connect.CONNECT_TIMEOUT", 0.5)
    monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "log_message", lambda *arguments: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.server_port}"
        fails(cli, ("train", project().config, "--scheduler", address), 6, [address, "dask scheduler"])
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "code", "words"),
    [
        ("tcp://203.0.113.7:8786", 3, ["tcp://203.0.113.7:8786", "cluster.allow_plain"]),
        ("tcp://127.evil.example:1", 3, ["tcp://127.evil.example:1"]),
        ("tls://127.0.0.1:8786", 3, ["tls://127.0.0.1:8786", "cluster.tls", "dtrain certs"]),
        ("tls://203.0.113.7:8786", 3, ["tls://203.0.113.7:8786", "cluster.tls", "dtrain certs"]),
        ("ucx://127.0.0.1:8786", 3, ["ucx://127.0.0.1:8786", "tcp:// and tls://"]),
        ("http://127.0.0.1:8786", 3, ["http://127.0.0.1:8786"]),
        ("scheduler.json", 6, ["scheduler.json", "no such scheduler file"]),
        ("locla", 6, ["locla", '"local"']),
        ("127.0.0.1:8786", 6, ["127.0.0.1:8786"]),
    ],
)
def test_addresses_that_lead_nowhere(cli, project, monkeypatch, address, code, words):
    monkeypatch.setattr("dtrain.runtime.connect.CONNECT_TIMEOUT", 0.5)
    fails(cli, ("train", project().config, "--scheduler", address), code, words)


@pytest.mark.parametrize(
    "text",
    [
        '{"address": "tcp://127.0.0.1:1"}',
        "",
        '{"address": "tcp:',
        "[]",
    ],
)
def test_a_scheduler_file_that_leads_nowhere(cli, project, monkeypatch, tmp_path, text):
    monkeypatch.setattr("dtrain.runtime.connect.CONNECT_TIMEOUT", 0.5)
    (tmp_path / "scheduler.json").write_text(text)
    fails(cli, ("train", project().config, "--scheduler", "scheduler.json"), 6, ["scheduler.json"])


@pytest.mark.parametrize("address", ["tcp://203.0.113.7:8786", "tls://127.0.0.1:8786", "203.0.113.7:8786"])
def test_a_scheduler_file_that_leads_where_an_address_may_not(cli, project, tmp_path, address):
    (tmp_path / "scheduler.json").write_text(json.dumps({"address": address}))
    words = [address, "needs certificates"] if address.startswith("tls") else [f"leads to {address}", "allow_plain"]
    fails(cli, ("train", project().config, "--scheduler", "scheduler.json"), 3, words)


def test_a_scheduler_file_in_a_setting_is_relative_to_the_working_directory(cli, project, monkeypatch, tmp_path):
    monkeypatch.setattr("dtrain.runtime.connect.CONNECT_TIMEOUT", 0.5)
    (tmp_path / "scheduler.json").write_text('{"address": "tcp://127.0.0.1:1"}')
    words = ["No Dask scheduler answers", str(tmp_path / "scheduler.json")]
    fails(cli, ("train", project().config, "--set", "cluster.scheduler=scheduler.json"), 6, words)


# Runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "eval"])
@pytest.mark.parametrize("name", ["jbo", "job/runs/jbo", "/nowhere/at/all", "job/dtrain.toml"])
def test_no_such_run(cli, job, command, name):
    fails(cli, (command, name), 2, [name, *(['did you mean "job"'] if name == "jbo" else [])])


@pytest.mark.parametrize("command", [("status",), ("status", "job"), ("eval", "job")])
def test_no_run_at_all(cli, command):
    fails(cli, command, 2, ["run"])


def test_a_name_that_several_runs_have(cli, project):
    for name in ("one", "two"):
        assert cli("-q", "train", project(name=name).config, "--run", "same").code == 0
    fails(cli, ("status", "same"), 2, ["one/runs/same", "two/runs/same"])


@pytest.mark.parametrize("number", ["7", "0", "-1", "bset", "1.0", ""])
def test_no_such_round(cli, job, number):
    fails(cli, ("eval", job.run, f"--round={number}"), 2, [f'"{number}"', "best, last and 1, 2, 3, 4"])


def test_no_such_split(cli, job):
    fails(cli, ("eval", job.run, "--split", "train"), 2, ['"train"', "val, test and all"])


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_without_samples(cli, project, split):
    job = project({"data": {"split": {"val": 0.0, "test": 0.0}}})
    assert cli("-q", "train", job.config).code == 0
    fails(cli, ("eval", job.run, "--split", split), 3, [f'"{split}"', "no samples"])


@pytest.mark.parametrize("name", ["config.toml", "env.json", "plan.json"])
@pytest.mark.parametrize("command", ["status", "eval", "train"])
def test_a_run_whose_files_are_damaged(cli, job, command, name):
    (job.run / name).write_text('{"half')
    fails(cli, (command, job.config if command == "train" else job.run), 5, [name])


def test_a_run_whose_history_is_lost(cli, job):
    (job.run / "history.jsonl").unlink()
    for command in ("status", "eval", "train"):
        fails(cli, (command, job.config if command == "train" else job.run), 5, ["history.jsonl"])


def test_a_run_directory_that_cannot_be_made(cli, project):
    job = project({"run": {"dir": "model.py/runs"}})
    fails(cli, ("train", job.config), 8, ["job/model.py/runs/job", "run.dir"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_directory_that_may_not_be_written(cli, project):
    job = project()
    (job.dir / "runs").mkdir(mode=0o500)
    fails(cli, ("train", job.config), 8, ["job/runs", "run.dir"])


def test_a_disk_that_is_full(cli, project, monkeypatch):
    import errno

    real = os.write

    def full(descriptor, data):
        if len(data) > 150:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    job = project()
    monkeypatch.setattr("dtrain.files.os.write", full)
    fails(cli, ("train", job.config), 8, ["No space left", "same command"])
    monkeypatch.undo()
    monkeypatch.chdir(job.dir.parent)
    assert cli("-q", "train", job.config).code == 0


def test_a_model_that_asks_for_ctrl_c(cli, project):
    job = project(model=BUILD.replace("{}", "(_ for _ in ()).throw(KeyboardInterrupt)"))
    fails(cli, ("train", job.config), 130, ["Ctrl-C", "same command"])


def test_a_bug_is_said_to_be_one(cli, project, monkeypatch):
    def broken(job, full=False):
        raise RuntimeError("not\nhandled")

    monkeypatch.setattr("dtrain.planning.plan_job", broken)
    fails(cli, ("plan", project().config), 1, ["RuntimeError: not handled", "bug of dtrain", "--debug"])
