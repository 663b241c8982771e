"""train.init in whole runs: fine-tuning from a run or a file, what is said of it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from safetensors.torch import load_file, save_file

import dtrain
from dtrain.algorithm.params import tensors_of
from dtrain.errors import DataChanged, DataNotFound, DtrainError, InvalidConfig, RoundNotFound, RunDamaged
from dtrain.events import ParametersLoaded
from dtrain.runfiles import round_directory
from tests.runtime import models
from tests.training import shas, trained

FREEZE = ["*.weight", "*.bias"]
NEW = ("0.lora_a", "0.lora_b", "3.lora_a", "3.lora_b")
TABLE = {"loss": "cross_entropy", "rounds": 2, "batch_size": 40, "optimizer_args": {"lr": 0.05}}


def train(
    samples: dtrain.Samples, where: Path, model: Any = models.adapted, cluster: Any = "serial", **more: Any
) -> Any:
    return trained(model, samples, where / "runs", TABLE, cluster, **more)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, samples: dtrain.Samples) -> dtrain.Run:
    """A run of the model without adapters."""
    return train(samples, tmp_path_factory.mktemp("base"), models.plain, run="base")


def file_of(run: dtrain.Run) -> Path:
    return round_directory(run.directory, 2) / "params.safetensors"


def table(init: Path, **more: Any) -> dict[str, Any]:
    return {"init": str(init), "freeze": FREEZE, **more}


def plan(samples: dtrain.Samples, model: Any, **given: Any) -> dtrain.Plan:
    return dtrain.plan(model, samples, train={**TABLE, **given}, average={"replicas": 2}, cluster="serial")


# Fine-tuning --------------------------------------------------------------------------------------------------------


def test_adapters_are_trained_on_the_parameters_of_a_run(
    samples: dtrain.Samples, base: dtrain.Run, tmp_path: Path
) -> None:
    told: list[Any] = []
    run = train(samples, tmp_path, train=table(base.directory), report=told.append)
    before, after = load_file(file_of(base)), run.model.state_dict()
    moved = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
    assert moved == {*NEW, "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    (event,) = [event for event in told if isinstance(event, ParametersLoaded)]
    assert (event.tensors, event.new, event.cast) == (9, NEW, ())
    assert event.path.endswith("base/rounds/round-000002/params.safetensors")
    (line,) = [json.loads(text) for text in (run.directory / "events.jsonl").read_text().splitlines() if "new" in text]
    assert (line["event"], line["tensors"], line["new"]) == ("ParametersLoaded", 9, list(NEW))


def test_plan_says_what_is_taken_and_tries_the_parameters_that_the_run_starts_from(
    samples: dtrain.Samples, base: dtrain.Run
) -> None:
    adapted = plan(samples, models.adapted, **table(base.directory))
    again = plan(samples, models.plain, init=str(base.directory))
    assert adapted.record["first_loss"] == again.record["first_loss"]  # new adapters add nothing
    assert adapted.record["first_loss"] != plan(samples, models.adapted).record["first_loss"]
    assert adapted.record["init"]["new"] == NEW
    assert dict(adapted.rows)["init"].startswith("9 tensors of ")
    assert dict(adapted.rows)["init"].endswith("; 4 new: 0.lora_a, 0.lora_b, 3.lora_a, 3.lora_b")
    assert "new" not in dict(again.rows)["init"]
    assert plan(samples, models.plain).record["init"] is None


def test_a_cluster_starts_from_the_same_parameters(
    samples: dtrain.Samples, base: dtrain.Run, tmp_path: Path, client: Client
) -> None:
    given = table(base.directory)
    runs = [train(samples, tmp_path, cluster=cluster, train=given) for cluster in ("serial", client)]
    assert shas(runs[0]) == shas(runs[1])


def test_a_cluster_refuses_with_the_same_sentence(
    samples: dtrain.Samples, base: dtrain.Run, tmp_path: Path, client: Client
) -> None:
    said = []
    for cluster in ("serial", client):
        with pytest.raises(InvalidConfig, match="lacks 4 of the 13 tensors") as caught:
            train(samples, tmp_path, cluster=cluster, train={"init": str(base.directory)})
        said.append((caught.value.message, caught.value.hint))
    assert said[0] == said[1]


def test_a_file_of_half_the_precision_is_cast(samples: dtrain.Samples, base: dtrain.Run, tmp_path: Path) -> None:
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in load_file(file_of(base)).items()}
    save_file(half, tmp_path / "half.safetensors")
    save_file({n: t.float() if t.is_floating_point() else t for n, t in half.items()}, tmp_path / "wide.safetensors")
    runs = [train(samples, tmp_path, train=table(tmp_path / f"{name}.safetensors")) for name in ("half", "wide")]
    assert shas(runs[0]) == shas(runs[1])
    rows = dict(plan(samples, models.adapted, **table(tmp_path / "half.safetensors")).rows)
    assert "half.safetensors (bfloat16 as float32); 4 new: " in rows["init"]


def test_the_loop_alone_starts_from_the_file_too(samples: dtrain.Samples, base: dtrain.Run) -> None:
    given = {**TABLE, **table(base.directory, rounds=1)}
    (result,) = dtrain.train_rounds(models.adapted, samples, train=given, average={"replicas": 2}, cluster="serial")
    assert result.state is not None
    assert torch.equal(tensors_of(result.state.model)["0.weight"], load_file(file_of(base))["0.weight"])


# Continued ----------------------------------------------------------------------------------------------------------


def test_after_the_first_commit_the_file_is_not_needed(
    samples: dtrain.Samples, base: dtrain.Run, tmp_path: Path
) -> None:
    start = tmp_path / "start.safetensors"
    start.write_bytes(file_of(base).read_bytes())
    whole = train(samples, tmp_path, train=table(start, rounds=3))
    train(samples, tmp_path, train=table(start, rounds=1), run="cut")
    start.unlink()
    told: list[Any] = []
    cut = train(samples, tmp_path, train=table(start, rounds=3), run="cut", report=told.append)
    assert shas(cut) == shas(whole)
    assert not [event for event in told if isinstance(event, ParametersLoaded)]


def test_before_the_first_commit_the_file_must_be_the_same(
    samples: dtrain.Samples, base: dtrain.Run, tmp_path: Path
) -> None:
    def killed(event: Any) -> None:
        if isinstance(event, ParametersLoaded):
            raise RuntimeError("as if killed")

    start = tmp_path / "start.safetensors"
    start.write_bytes(file_of(base).read_bytes())
    with pytest.raises(RuntimeError, match="as if killed"):
        train(samples, tmp_path, train=table(start), run="cut", report=killed)
    save_file({n: 2 * t for n, t in load_file(start).items()}, tmp_path / "other.safetensors")
    start.write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(DataChanged, match=r"start.safetensors has changed since the run was started"):
        train(samples, tmp_path, train=table(start), run="cut")
    start.write_bytes(file_of(base).read_bytes())
    assert shas(train(samples, tmp_path, train=table(start), run="cut")) == shas(
        train(samples, tmp_path, train=table(start))
    )


# No start -----------------------------------------------------------------------------------------------------------


def a_pickle(path: Path) -> None:
    torch.save({"0.weight": torch.zeros(12, 6)}, path)


def a_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")


def a_directory_of_files(path: Path) -> None:
    path.mkdir()
    save_file({"0.weight": torch.zeros(12, 6)}, path / "model.safetensors")


@pytest.mark.parametrize(
    ("make", "error", "said", "cure"),
    [
        (lambda path: None, DataNotFound, "there is no such file or directory", "Name a safetensors file"),
        (lambda path: path.mkdir(), RoundNotFound, "no committed round", "Name a safetensors file, or a run's"),
        (a_directory_of_files, RoundNotFound, "no committed round", "Name one of its files: model.safetensors"),
        (a_pickle, RunDamaged, "is a pickle of torch.save, not safetensors", "weights_only=True"),
        (a_pointer, RunDamaged, "is a pointer of Git LFS", "git lfs pull"),
        (lambda path: path.write_bytes(b"nothing"), RunDamaged, "cannot be read as safetensors", "Restore it"),
    ],
    ids=["nothing", "empty directory", "other directory", "pickle", "git lfs", "damaged"],
)
def test_plan_and_train_name_what_is_no_start(
    samples: dtrain.Samples, tmp_path: Path, make: Callable[[Path], Any], error: type[DtrainError], said: str, cure: str
) -> None:
    make(tmp_path / "init")
    for attempt in (
        lambda: train(samples, tmp_path, models.plain, train={"init": str(tmp_path / "init")}),
        lambda: plan(samples, models.plain, init=str(tmp_path / "init")),
    ):
        with pytest.raises(error, match=said) as caught:
            attempt()
        assert cure in caught.value.hint
        assert str(tmp_path / "init") in caught.value.message


def test_a_damaged_round_of_a_run_is_no_start(samples: dtrain.Samples, tmp_path: Path) -> None:
    run = train(samples, tmp_path, models.plain)
    data = bytearray(file_of(run).read_bytes())
    data[-1] ^= 1
    file_of(run).write_bytes(data)
    with pytest.raises(RunDamaged, match="params.safetensors is not what was committed"):
        train(samples, tmp_path, train=table(run.directory))
