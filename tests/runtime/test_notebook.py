"""What a notebook defines and changes between runs: each run sees it as it is then, and leaves it as it is."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

import dtrain
from dtrain.checkpoint import load_params
from dtrain.data.samples import Samples
from dtrain.runfiles import round_directory
from dtrain.runtime import codebytes
from dtrain.runtime.codebytes import live_functions, pickle_functions, sent, unpickle_functions
from dtrain.runtime.usercode import load_function

CELL = """
    from torch import nn

    WIDTH = 16

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))

        def forward(self, x):
            return self.layers(x)

    def build():
        return Net()
"""


@pytest.fixture
def notebook() -> dict[str, Any]:
    """The names of a notebook after its first cell."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(CELL), "<cell 1>", "exec"), names)
    return names


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[Client]:
    """A cluster whose workers are threads of this process."""
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=2,
            processes=False,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as started,
        Client(started) as connected,
    ):
        yield connected


@pytest.fixture(params=["serial", "threads", "processes"])
def where(request: pytest.FixtureRequest) -> Any:
    fixtures = {"threads": "in_this_process", "processes": "client"}
    return request.getfixturevalue(fixtures[request.param]) if request.param in fixtures else request.param


@pytest.fixture
def start(samples: Samples, tmp_path: Path) -> Callable[..., dtrain.Run]:
    def start(build: Any, cluster: Any, given: Samples = samples, **train: Any) -> dtrain.Run:
        table = {"loss": "cross_entropy", "rounds": 2, "local_steps": 2, "batch_size": 16, **train}
        average = {"replicas": 2}
        return dtrain.train(
            build, given, train=table, average=average, cluster=cluster, run_dir=tmp_path / "runs", progress=False
        )

    return start


def width(run: dtrain.Run) -> int:
    """The width of the model that a run has committed."""
    params = load_params(round_directory(run.directory, 2))
    (bias,) = [entry for entry in params.layout.entries if entry.name == "layers.0.bias"]
    return bias.shape[0]


@pytest.mark.sampled(2)
def test_each_run_sees_the_notebook_as_it_is_then(
    notebook: dict[str, Any], start: Callable[..., dtrain.Run], where: Any
) -> None:
    init = notebook["Net"].__init__
    for wanted in (16, 64):
        notebook["WIDTH"] = wanted
        run = start(notebook["build"], where)
        assert width(run) == wanted
        assert run.model.layers[0].out_features == wanted  # type: ignore[union-attr,index]
        assert isinstance(run.model, notebook["Net"])
        assert run.evaluate(split="test", cluster=where)["loss"] > 0
        opened = dtrain.load_run(run.directory, model=notebook["build"])
        assert opened.evaluate(split="val", cluster=where)["loss"] == run.rows[-1]["val_loss"]
        assert isinstance(opened.model, notebook["Net"])
    assert notebook["Net"].__init__ is init
    assert init.__globals__ is notebook
    assert codebytes._LIVE == {}


def test_a_class_that_is_defined_again_is_used(
    notebook: dict[str, Any], start: Callable[..., dtrain.Run], where: Any
) -> None:
    start(notebook["build"], where)
    exec(compile(textwrap.dedent(CELL).replace("WIDTH, 3", "WIDTH, 5"), "<cell 2>", "exec"), notebook)
    run = start(notebook["build"], where)
    assert run.model.layers[2].out_features == 5  # type: ignore[union-attr,index]


FUNCTIONS = """
    import dataclasses
    import torch

    FACTOR = 1.0

    class Scaled:
        def __init__(self, name):
            self.name = name

        def __call__(self, value):
            return FACTOR * value

    def build():
        return torch.nn.Linear(6, 3)

    def loss(outputs, targets):
        return Scaled("loss")(torch.nn.functional.cross_entropy(outputs, targets))

    def metric(outputs, targets):
        return Scaled("metric")(outputs.square().mean())

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] = Scaled("optimizer")(0.01)
            return super().step(closure)

    def optimizer(parameters, **options):
        return Optimizer(parameters, lr=0.01)

    def transform(batch, generator):
        return dataclasses.replace(batch, inputs=tuple(map(Scaled("transform"), batch.inputs)))
"""


@pytest.mark.sampled(2)
def test_loss_metric_optimizer_and_transform_are_left_as_they_are(
    start: Callable[..., dtrain.Run], where: Any, tmp_path: Path, blobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given.py").write_text(textwrap.dedent(FUNCTIONS))
    monkeypatch.delitem(sys.modules, "given", raising=False)
    build = load_function("model", "given:build", tmp_path)
    module = sys.modules["given"]
    data = dtrain.open_samples(blobs, inputs=["x"], targets=["y"], transform="given:transform")
    options = {"loss": "given:loss", "metrics": ["given:metric"], "optimizer": "given:optimizer", "optimizer_args": {}}
    scaled, before = module.Scaled, vars(module.Scaled).copy()  # type: ignore[attr-defined]
    shas, metrics = [], []
    for factor in (1.0, 3.0, 1.0):
        module.FACTOR = factor  # type: ignore[attr-defined]
        run = start(build, where, data, **options)
        shas.append(run.rows[-1]["params_sha256"])
        metrics.append(run.rows[-1]["val_metric"])
        assert sys.modules["given"] is module
    assert shas[0] == shas[2] != shas[1]
    assert metrics[0] == metrics[2] != metrics[1]
    assert module.Scaled is scaled  # type: ignore[attr-defined]
    assert vars(scaled) == before
    assert scaled.__call__.__globals__ is vars(module)
    monkeypatch.delitem(sys.modules, "given")


# The bytes ------------------------------------------------------------------------------------------------------


def test_functions_are_themselves_while_they_are_sent(notebook: dict[str, Any], tmp_path: Path) -> None:
    functions = {"model": notebook["build"]}
    with sent(functions, tmp_path) as code:
        with sent(functions, tmp_path) as again:
            assert again == code
        assert unpickle_functions(code)["model"] is notebook["build"]
    assert live_functions(code) is None
    assert unpickle_functions(code)["model"] is not notebook["build"]


def test_what_is_unpickled_never_meets_a_class_that_is_there(notebook: dict[str, Any], tmp_path: Path) -> None:
    exec("import enum\nclass Mode(enum.Enum):\n    A = 1\ndef build():\n    return Net, Mode", notebook)
    live, before = notebook["build"](), vars(notebook["Net"]).copy()
    code = pickle_functions({"model": notebook["build"]}, tmp_path)
    first, second = (unpickle_functions(code)["model"]() for _ in range(2))
    for one, other in ((first, live), (second, live), (first, second)):
        assert all(a is not b for a, b in zip(one, other, strict=True))
    assert vars(notebook["Net"]) == before
    assert issubclass(first[1], Enum)
    assert code == pickle_functions({"model": notebook["build"]}, tmp_path)
