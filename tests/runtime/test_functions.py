"""Losses, metrics, optimizers, schedules and transforms that are functions or objects of a Python program."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import Client, LocalCluster
from torch import nn

import dtrain
from dtrain.config.schema import TrainConfig
from dtrain.data.samples import Samples
from dtrain.errors import InvalidConfig, RunConflict, UserCodeFailed
from dtrain.runtime.codetext import source_sha256
from tests.training import rewrite

HERE = "tests.runtime.test_functions"


def build() -> nn.Module:
    return nn.Linear(6, 3)


def other_build() -> nn.Module:
    return nn.Linear(6, 3)


def my_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return 2 * F.cross_entropy(outputs, targets)


def other_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return 3 * F.cross_entropy(outputs, targets)


def share(outputs: torch.Tensor, targets: torch.Tensor, top: int = 1) -> torch.Tensor:
    return (outputs.topk(top, 1).indices == targets[:, None]).any(1).float().mean()


def falling(step: int, total: int) -> float:
    return 1 - step / total


def doubled(batch: Any, generator: torch.Generator) -> Any:
    return dataclasses.replace(batch, inputs=tuple(2 * x for x in batch.inputs))


def tripled(batch: Any, generator: torch.Generator) -> Any:
    return dataclasses.replace(batch, inputs=tuple(3 * x for x in batch.inputs))


class Weighted:
    """A loss that holds tensors and counts its calls."""

    def __init__(self, weight: float) -> None:
        self.weight = torch.tensor([1.0, weight, 1.0])
        self.calls = 0

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return F.cross_entropy(outputs, targets, weight=self.weight)


class Halving(torch.optim.SGD):
    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, lr=lr / 2)


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[Client]:
    """A cluster whose workers are threads of this process."""
    options: dict[str, Any] = {"dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL}
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, processes=False, **options) as started,
        Client(started) as connected,
    ):
        yield connected


@pytest.fixture
def train(samples: Samples, tmp_path: Path) -> Callable[..., dtrain.Run]:
    def train(cluster: Any = "serial", given: Samples | None = None, model: Any = build, **table: Any) -> dtrain.Run:
        options = {key: table.pop(key) for key in ("run", "config") if key in table}
        train = {"loss": "cross_entropy", "rounds": 2, "local_steps": 3, "batch_size": 16, **table}
        if "config" not in options:
            options |= {"train": train, "average": {"replicas": 2}}
        return dtrain.train(
            model, given or samples, cluster=cluster, run_dir=tmp_path / "runs", progress=False, **options
        )

    return train


# All kinds of functions, in all places ------------------------------------------------------------------------------


def kinds() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By name: the table [train], and what config.toml says of it."""

    def nested(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return my_loss(outputs, targets)

    renamed = partial(share, top=2)
    renamed.__name__ = "top_2"  # type: ignore[attr-defined]
    tempered: Any = lambda outputs, targets: my_loss(outputs / 2, targets)  # noqa: E731
    local = f"{HERE}:kinds."
    return {
        "functions": (
            {"loss": my_loss, "metrics": ["accuracy", share], "schedule": falling, "optimizer": Halving},
            {
                "loss": f"{HERE}:my_loss",
                "metrics": ("accuracy", f"{HERE}:share"),
                "schedule": f"{HERE}:falling",
                "optimizer": f"{HERE}:Halving",
            },
        ),
        "lambdas": (
            {"loss": tempered, "schedule": lambda step, total: 0.5, "optimizer": lambda p: torch.optim.Adam(p)},
            {"loss": f"{local}<lambda>", "schedule": f"{local}<lambda>", "optimizer": f"{local}<lambda>"},
        ),
        "nested": ({"loss": nested}, {"loss": f"{local}nested"}),
        "partials": (
            {"loss": partial(my_loss), "metrics": [share, renamed], "optimizer": partial(torch.optim.Adam, lr=0.01)},
            {
                "loss": f"{HERE}:my_loss()",
                "metrics": (f"{HERE}:share", f"{HERE}:top_2()"),
                "optimizer": "torch.optim.adam:Adam()",
            },
        ),
        "objects": (
            {"loss": Weighted(2.0), "metrics": [Weighted(3.0)]},
            {"loss": f"{HERE}:Weighted()", "metrics": (f"{HERE}:Weighted()",)},
        ),
        "modules": (
            {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), "optimizer": torch.optim.Adam},
            {"loss": "torch.nn.modules.loss:CrossEntropyLoss()", "optimizer": "adam"},
        ),
        "torch": ({"loss": F.cross_entropy}, {"loss": "torch.nn.functional:cross_entropy"}),
        "methods": ({"loss": Weighted(2.0).__call__}, {"loss": f"{HERE}:Weighted.__call__()"}),
    }


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", kinds())
def test_functions_and_objects_give_the_same_bits_everywhere(
    train: Callable[..., dtrain.Run], in_this_process: Client, client: Client, kind: str
) -> None:
    given, names = kinds()[kind]
    runs = [train(place, **given) for place in ("serial", in_this_process, client)]
    assert len({run.rows[-1]["params_sha256"] for run in runs}) == 1
    assert len({run.rows[-1]["val_loss"] for run in runs}) == 1
    for run in runs:
        stored = dtrain.load_run(run.directory).config.train
        assert {key: getattr(stored, key) for key in names} == names
        last = run.rows[-1]
        assert run.evaluate(split="val", cluster=in_this_process)["loss"] == last["val_loss"]
    reported = {name.rpartition(":")[2].removesuffix("()") for name in names.get("metrics", ())}
    assert {key for key in last if key.startswith("val_")} == {"val_loss", *(f"val_{name}" for name in reported)}


def test_what_a_given_function_computes_is_what_is_trained(train: Callable[..., dtrain.Run]) -> None:
    plain, twice = train(optimizer_args={"lr": 0.2}), train(loss=my_loss, optimizer_args={"lr": 0.1})
    assert twice.rows[0]["train_loss"] == pytest.approx(2 * plain.rows[0]["train_loss"], rel=1e-6)
    assert twice.rows[-1]["params_sha256"] == plain.rows[-1]["params_sha256"]
    named, given = train(loss=f"{HERE}:my_loss"), train(loss=my_loss)
    assert given.rows[-1]["params_sha256"] == named.rows[-1]["params_sha256"]
    assert (
        train(optimizer="adam").rows[-1]["params_sha256"]
        == (train(optimizer=torch.optim.Adam).rows[-1]["params_sha256"])
    )


def test_an_object_is_left_as_it_is(train: Callable[..., dtrain.Run], in_this_process: Client) -> None:
    loss = Weighted(2.0)
    for name, place in (("serial", "serial"), ("threads", in_this_process)):
        run = train(place, loss=loss, run=name)
        run.evaluate(split="val")
        assert loss.calls == 0
        assert train(place, loss=loss, rounds=3, run=name).rows[-1]["round"] == 3


def test_a_configuration_holds_functions_too(train: Callable[..., dtrain.Run], blobs: Path) -> None:
    tables = {"loss": my_loss, "metrics": [share], "rounds": 2, "local_steps": 3, "batch_size": 16}
    data = {"path": blobs, "inputs": ["x"], "targets": ["y"], "transform": doubled}
    config = TrainConfig(model=build, data=data, train=tables, average={"replicas": 2})
    assert config.functions == {
        "model": build,
        "train.loss": my_loss,
        f"train.metrics.{HERE}:share": share,
        "data.transform": doubled,
    }
    given = dtrain.open_samples(blobs, inputs=["x"], targets=["y"], transform=doubled)
    expected = train(given=given, loss=my_loss, metrics=[share])
    for run in (
        dtrain.train(config=config, cluster="serial", run_dir=expected.directory.parent, progress=False),
        train(given=given, model=None, config=config),
    ):
        assert run.rows[-1]["params_sha256"] == expected.rows[-1]["params_sha256"]
        assert run.rows[-1]["val_share"] == expected.rows[-1]["val_share"]
    shas = [result.params_sha256 for result in dtrain.train_rounds(config=config, cluster="serial")]
    assert shas == [row["params_sha256"] for row in expected.rows]


# Transforms ---------------------------------------------------------------------------------------------------------


def opened(blobs: Path, **data: Any) -> Samples:
    return dtrain.open_samples(blobs, inputs=["x"], targets=["y"], **data)


@pytest.mark.parametrize("place", ["serial", "processes"])
def test_a_transform_is_a_function(
    train: Callable[..., dtrain.Run], blobs: Path, place: str, request: pytest.FixtureRequest
) -> None:
    where = "serial" if place == "serial" else request.getfixturevalue("client")
    named, given = opened(blobs, transform=f"{HERE}:doubled"), opened(blobs, transform=doubled)
    runs = [train(where, samples) for samples in (named, given)]
    assert len({run.rows[-1]["params_sha256"] for run in runs}) == 1
    assert runs[1].config.data.transform == f"{HERE}:doubled"
    plain = next(dtrain.batches(opened(blobs)))
    assert torch.equal(next(dtrain.batches(given)).inputs[0], 2 * plain.inputs[0])
    factor = 5
    scaled = opened(blobs, transform=lambda b, g: dataclasses.replace(b, inputs=tuple(factor * x for x in b.inputs)))
    assert torch.equal(next(dtrain.batches(scaled)).inputs[0], 5 * plain.inputs[0])


def test_a_transform_that_is_given_to_evaluate_is_the_runs(train: Callable[..., dtrain.Run], blobs: Path) -> None:
    given = opened(blobs, transform=lambda batch, generator: doubled(batch, generator))
    run = train(given=given)
    expected = run.evaluate(split="test")
    assert run.evaluate(given, split="test") == run.evaluate(opened(blobs), split="test") == expected
    again = dtrain.load_run(run.directory, model=build)
    assert again.evaluate(given, split="test") == expected
    with pytest.raises(InvalidConfig, match=r"data\.transform = .*<lambda>.* was given in Python"):
        again.evaluate(opened(blobs), split="test")
    changed = opened(blobs, transform=lambda batch, generator: tripled(batch, generator))
    for one in (run, again):
        with pytest.raises(RunConflict, match=r"other code of data\.transform"):
            one.evaluate(changed, split="test")


def test_a_transform_of_the_configuration_must_be_that_of_the_samples(
    train: Callable[..., dtrain.Run], blobs: Path
) -> None:
    config = TrainConfig(train={"loss": my_loss}, data={"transform": tripled})
    with pytest.raises(InvalidConfig, match=r"samples have data\.transform = .*doubled.*, and config has .*tripled"):
        train(given=opened(blobs, transform=doubled), config=config)


# Opened runs --------------------------------------------------------------------------------------------------------


def test_an_opened_run_is_given_its_functions(train: Callable[..., dtrain.Run], blobs: Path) -> None:
    def mine(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return my_loss(outputs, targets)

    def skill(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return share(outputs, targets)

    run = train(
        given=opened(blobs, transform=lambda b, g: doubled(b, g)),
        loss=mine,
        metrics=["accuracy", skill],
        schedule=lambda step, total: falling(step, total),
        optimizer=lambda parameters: Halving(parameters),
    )
    transform = run.functions["data.transform"]  # type: ignore[index]
    expected = run.evaluate(split="test")
    assert set(expected) == {"loss", "accuracy", "skill"}
    given: dict[str, Any] = {"loss": mine, "transform": transform}
    for metrics in ([skill], skill, ["accuracy", skill]):
        again = dtrain.load_run(run.directory, metrics=metrics, **given)  # the model is found by name
        assert again.evaluate(split="test") == expected
        assert torch.equal(again.model.state_dict()["weight"], run.model.state_dict()["weight"])
    with pytest.raises(InvalidConfig, match=r"train\.metrics = .*skill.* was given in Python") as caught:
        dtrain.load_run(run.directory, **given).evaluate()
    assert f'dtrain.load_run("{run.directory}", metrics=[skill])' in caught.value.hint
    everything = dtrain.load_run(
        run.directory,
        metrics=skill,
        schedule=lambda step, total: falling(step, total),
        optimizer=lambda parameters: Halving(parameters),
        **given,
    )
    assert set(everything.config.functions) == set(run.functions or ()) - {"model"}


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"loss": other_loss}, RunConflict, r"other code of train\.loss"),
        ({"model": other_build}, RunConflict, "other code of model"),
        ({"metrics": partial(share, top=2)}, RunConflict, r"other code of train\.metrics"),
        ({"metrics": other_loss}, InvalidConfig, "the run has no metric other_loss"),
        ({"transform": doubled}, InvalidConfig, "transform = .*doubled: the run has no function there"),
        ({"schedule": falling}, InvalidConfig, "schedule = .*falling: the run has no function there"),
        ({"loss": "mse"}, InvalidConfig, "loss = 'mse': a function is needed"),
    ],
)
def test_other_functions_than_the_runs_are_refused(
    train: Callable[..., dtrain.Run],
    given: dict[str, Any],
    error: type[Exception],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("dtrain.project.LOG.error", lambda text, *values: warnings.append(text % values))
    run = train(loss=my_loss, metrics=[share])
    with pytest.raises(error, match=said):
        dtrain.load_run(run.directory, **given).evaluate(split="val")
    if error is RunConflict:
        trusting = dtrain.load_run(run.directory, trust_code=True, **given)
        trusting.evaluate(split="val")
        assert len(warnings) == 1
        assert "is trusted and used" in warnings[0]


def test_a_function_that_the_program_cannot_import_is_asked_for(train: Callable[..., dtrain.Run]) -> None:
    run = train()
    text, plan = (run.directory / "config.toml").read_text(), json.loads((run.directory / "plan.json").read_text())
    for name in ("os:system", "no_such_module:build", "torch.nn:Linear", "__main__:build"):
        (run.directory / "config.toml").write_text(text.replace(f"{HERE}:build", name))
        rewrite(run.directory, plan={**plan, "config": {**plan["config"], "model": name}})
        with pytest.raises(InvalidConfig, match=f'model = "{name}" was') as caught:
            _ = dtrain.load_run(run.directory).model
        assert "load_run(" in caught.value.hint


# Continuing in another process ----------------------------------------------------------------------------------------

SCRIPT = """
    import dataclasses, sys
    from functools import partial
    import torch
    import torch.nn.functional as F
    from torch import nn
    import dtrain
    from dtrain.events import RoundCommitted

    FACTOR = 2.0

    def build():
        return nn.Linear(6, 3)

    def my_loss(outputs, targets):
        return FACTOR * F.cross_entropy(outputs, targets)

    def my_metric(outputs, targets, top):
        return (outputs.topk(top, 1).indices == targets[:, None]).any(1).float().mean()

    class Mine(torch.optim.SGD):
        rate = 0.1

        def __init__(self, parameters):
            super().__init__(parameters, lr=self.rate)

    def scaled(factor):
        def transform(batch, generator):
            return dataclasses.replace(batch, inputs=tuple(factor * x for x in batch.inputs))
        return transform

    def stop(event):
        if isinstance(event, RoundCommitted) and event.round == int(sys.argv[4]):
            sys.exit(3)

    if __name__ == "__main__":
        store, place, name, _ = sys.argv[1:]
        samples = dtrain.open_samples(store, inputs=["x"], targets=["y"], transform=scaled(3))
        table = dict(loss=my_loss, metrics=[partial(my_metric, top=2)], optimizer=Mine, rounds=4)
        config = dtrain.TrainConfig(
            train={**table, "schedule": lambda step, total: 0.5, "local_steps": 3, "batch_size": 16, "eval_every": 1},
            average={"replicas": 2},
            cluster={"workers": 1, "memory": "1GB"},
            run={"commit_every": 1},
        )
        run = dtrain.train(build, samples, config=config, cluster=place, run=name, progress=False, report=stop)
        print(run.rows[-1]["params_sha256"], run.rows[-1]["val_my_metric"])
"""


Script = Callable[..., "subprocess.CompletedProcess[str]"]


def run_script(
    directory: Path, *arguments: Any, old: str = "", new: str = "", seed: str = "1"
) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own, with some of its text replaced."""
    text = textwrap.dedent(SCRIPT)
    assert old in text
    (directory / "script.py").write_text(text.replace(old, new) if old else text)
    command = [sys.executable, "-W", "error", "script.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    return subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=200, env=environment, check=False
    )


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, blobs: Path) -> Path:
    """The directory of a script whose run was ended after two rounds of four."""
    directory = tmp_path_factory.mktemp("script")
    done = run_script(directory, blobs, "serial", "cut", 2)
    assert done.returncode == 3, done.stderr
    return directory


@pytest.fixture
def script(interrupted: Path, tmp_path: Path, blobs: Path) -> Script:
    """A function that runs the script, beside a copy of the run that was ended."""
    shutil.copytree(interrupted, tmp_path / "script")
    return lambda *arguments, **changes: run_script(tmp_path / "script", blobs, *arguments, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["serial", "local"])
def test_a_run_goes_on_in_a_new_process_with_the_same_functions(script: Script, place: str) -> None:
    again, whole = script(place, "cut", 0, seed="2"), script("serial", "whole", 0)
    assert again.returncode == 0, again.stderr
    assert again.stdout == whole.stdout != ""


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("FACTOR = 2.0", "FACTOR = 3.0", "train.loss"),
        ("rate = 0.1", "rate = 0.2", "train.optimizer"),
        ("scaled(3)", "scaled(4)", "data.transform"),
        ("top=2", "top=1", "train.metrics"),
        ("step, total: 0.5", "step, total: 0.25", "train.schedule"),
        ("nn.Linear(6, 3)", "nn.Linear(6, 3, bias=True)", "model"),
    ],
)
def test_changed_functions_are_refused(script: Script, old: str, new: str, key: str) -> None:
    again = script("serial", "cut", 0, old=old, new=new)
    assert again.returncode == 1
    assert f"other code of {key}" in again.stderr


@pytest.mark.slow
def test_what_is_beside_them_changes_nothing(script: Script) -> None:
    again = script("serial", "cut", 0, old="if __name__", new="# a remark\n\nUNUSED = 3\n\nif __name__")
    assert again.returncode == 0, again.stderr


# Identities -----------------------------------------------------------------------------------------------------------


def closing_over(value: Any) -> Any:
    def loss(outputs: Any, targets: Any) -> Any:
        return value

    return loss


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a: Any) -> None:
        self.a = a

    def __call__(self, outputs: Any, targets: Any) -> Any:
        return self.a


def circular(value: Any) -> Any:
    weighted = Weighted(1.0)
    weighted.itself = [weighted, {"value": value}]  # type: ignore[attr-defined]
    return weighted


MAKERS: list[Callable[[Any], Any]] = [
    closing_over,
    Slotted,
    circular,
    lambda value: partial(share, top=value),
    lambda value: partial(partial(share, value), targets=1),
    lambda value: lambda outputs, targets, held=value: held,
    lambda value: Slotted(value).__call__,
    lambda value: closing_over(lambda: value),
    lambda value: nn.CrossEntropyLoss(label_smoothing=0.0 if value is None else 0.1 * len(repr(value))),
]
VALUES: list[Any] = [None, 1, 2.5, "a", (1, 2), {"a": 1}, {1, 2}, torch.ones(2), torch.zeros(2), torch.ones(2).bool()]


@pytest.mark.parametrize("make", MAKERS)
def test_what_functions_hold_tells_them_apart(make: Callable[[Any], Any]) -> None:
    base = Path(__file__).parent
    values = VALUES if make is not MAKERS[-1] else [None, 1, 2.5]
    digests = [source_sha256(make(value), base) for value in values]
    assert len(set(digests)) == len(values)
    assert digests == [source_sha256(make(value), base) for value in values]


def test_lambdas_are_told_apart_by_their_bytecode_and_constants() -> None:
    pair = [lambda s, t: 1.0 * s, lambda s, t: 2.0 * s, lambda s, t: 1.0 + s, lambda s, t: (1, s), lambda s, t: (2, s)]
    digests = {source_sha256(one, Path(__file__).parent) for one in pair}
    assert len(digests) == len(pair)


def test_an_object_that_cannot_be_described_is_known_by_its_class() -> None:
    one, two = closing_over(threading.Lock()), closing_over(threading.Lock())
    assert source_sha256(one, Path()) == source_sha256(two, Path())


# What is refused ----------------------------------------------------------------------------------------------------


class Arc(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs * self.weight, targets)


def frozen() -> nn.Module:
    return Arc().requires_grad_(False)


def same_name() -> Any:
    def share(outputs: Any, targets: Any) -> Any:
        return 0.0

    return share


@pytest.mark.parametrize(
    ("table", "said", "cure"),
    [
        ({"loss": nn.CrossEntropyLoss}, r"train\.loss is the class CrossEntropyLoss", "CrossEntropyLoss(...)"),
        ({"loss": "torch.nn:MSELoss"}, r"train\.loss is the class MSELoss", "MSELoss(...)"),
        ({"loss": Arc()}, r"object of Arc with parameters of its own \(weight\)", "requires_grad_(False)"),
        ({"loss": lambda outputs: 0.0}, r"train\.loss is the function <lambda>\(outputs\)", "(outputs, targets) ->"),
        ({"loss": 3}, r"train\.loss = 3: input should be a valid string", ""),
        ({"loss": object()}, r'train\.loss = "an object of object": input should be', ""),
        ({"metrics": share}, r"train\.metrics is the function share; it is a list", "metrics=[...]"),
        ({"metrics": [lambda o, t: 0.0]}, "a lambda has no name", "metric.__name__"),
        ({"metrics": [share, same_name()]}, "would both be reported as val_share", "__name__"),
        ({"metrics": [share, partial(share, top=2)]}, "would both be reported as val_share", "__name__"),
        ({"metrics": ["accuracy", nn.MSELoss]}, r"train\.metrics is the class MSELoss", "MSELoss(...)"),
        ({"schedule": torch.optim.lr_scheduler.StepLR}, "the class StepLR of torch", "(step, total) ->"),
        ({"schedule": lambda step: 0.5}, r"train\.schedule is the function <lambda>\(step\)", "(step, total) ->"),
        ({"optimizer": torch.optim.LBFGS}, '"lbfgs" evaluates the loss several times', ""),
        ({"optimizer": lambda: None}, r"train\.optimizer is the function <lambda>\(\)", "(parameters) ->"),
        ({"optimizer": torch.optim.SGD([torch.ones(1)], lr=1)}, r'train\.optimizer = "an object of SGD"', ""),
    ],
)
def test_what_cannot_be_called_so_is_refused_before_anything_starts(
    train: Callable[..., dtrain.Run], tmp_path: Path, table: dict[str, Any], said: str, cure: str
) -> None:
    with pytest.raises(InvalidConfig, match=said) as caught:
        train("local", **table)
    assert cure in caught.value.hint
    assert "0x" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_loss_of_frozen_parameters_is_a_loss(train: Callable[..., dtrain.Run]) -> None:
    assert len(train(loss=frozen()).rows) == 2


class Needy(torch.optim.SGD):
    def __init__(self, parameters: Any, lr: float, *, dampening: float) -> None:
        super().__init__(parameters, lr=lr, dampening=dampening)


def test_an_optimizer_gets_its_arguments_from_the_configuration(train: Callable[..., dtrain.Run]) -> None:
    given = {"lr": 0.1, "dampening": 0.0}
    one, other = (train(optimizer=optimizer, optimizer_args=given) for optimizer in (Needy, torch.optim.SGD))
    assert one.rows[-1]["params_sha256"] == other.rows[-1]["params_sha256"]


def test_an_outer_optimizer_of_torch_may_be_its_class(samples: Samples) -> None:
    config = TrainConfig(average={"outer": {"optimizer": torch.optim.Adam}})
    assert config.average.outer is not None
    assert (config.average.outer.optimizer, config.average.outer.args) == ("adam", {})


def test_the_function_that_cannot_be_sent_is_named(train: Callable[..., dtrain.Run], tmp_path: Path) -> None:
    with pytest.raises(UserCodeFailed, match=r"The function given as train\.loss cannot be sent"):
        train(loss=closing_over(threading.Lock()))
    assert not (tmp_path / "runs").exists()
