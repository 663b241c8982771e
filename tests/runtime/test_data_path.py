"""The data path in whole runs: what it keeps, what it computes on the way, where it may read."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client

import dtrain
from dtrain.config.schema import TrainConfig
from dtrain.data.plan.partition import JointPlan, train_partitions
from dtrain.data.plan.splits import split_cells
from dtrain.data.plan.units import cell_bounds
from dtrain.errors import (
    ChunkMissing,
    ClusterUnsuitable,
    DataChanged,
    DtrainError,
    InvalidConfig,
    LengthsDiffer,
    OutOfMemory,
    RunConflict,
    UserCodeFailed,
)
from dtrain.job import job_from_config
from dtrain.runtime.resident import Resident
from dtrain.runtime.tensors import apply_transform
from dtrain.trainer import train_job
from dtrain.types import Cursor
from tests.runtime import models
from tests.training import evaluated, shas


@pytest.fixture
def start(tmp_path: Path, blobs: Path) -> Callable[..., dtrain.Run]:
    """Train on the blobs by a config: start("name", data={...}, train={...}, model="tests.runtime.models:small")."""

    def run(name: str, client: Client | None = None, report: Any = None, **tables: Any) -> dtrain.Run:
        data = {"path": str(blobs), "inputs": ["x"], "targets": ["y"], **tables.pop("data", {})}
        train = {"loss": "cross_entropy", "rounds": 3, "batch_size": 16, **tables.pop("train", {})}
        config = TrainConfig(
            **{
                "model": "tests.runtime.models:small",
                "data": data,
                "train": train,
                "average": {"replicas": 2},
                "cluster": {"scheduler": "serial"},
                **tables,
            }
        )
        return train_job(job_from_config(config, tmp_path), tmp_path / "runs" / name, client=client, report=report)

    return run


def noisy(batch: Any, generator: torch.Generator) -> Any:
    (x,) = batch.inputs
    return dataclasses.replace(batch, inputs=(x + torch.randn(x.shape, generator=generator),))


def raising(batch: Any, generator: torch.Generator) -> Any:
    return {}["nothing"]


def without_inputs(batch: Any, generator: torch.Generator) -> Any:
    return dataclasses.replace(batch, inputs=())


def of_numpy(batch: Any, generator: torch.Generator) -> Any:
    return dataclasses.replace(batch, inputs=tuple(x.numpy() for x in batch.inputs))


def noisy_in_training(batch: Any, generator: torch.Generator) -> Any:
    return noisy(batch, generator) if batch.split == "train" else batch


def unchanged(batch: Any, generator: torch.Generator) -> Any:
    return batch


def forgetful(batch: Any, generator: torch.Generator) -> Any:
    return None


def halving(batch: Any, generator: torch.Generator) -> Any:
    return dataclasses.replace(batch, inputs=tuple(x[::2] for x in batch.inputs))


# Speed changes no bit -----------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "data",
    [{"memory": "2MB"}, {"cache": "0"}, {"cache": "5kB"}, {"reader": "zarr"}, {"reader": "zarrs", "memory": "1GB"}],
)
def test_memory_cache_and_reader_change_no_bit(start: Callable[..., dtrain.Run], data: dict[str, str]) -> None:
    assert shas(start("other", data=data)) == shas(start("plain"))


def test_with_the_least_memory_loaders_take_turns_and_change_no_bit(
    start: Callable[..., dtrain.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutOfMemory) as caught:
        start("none", data={"memory": "2kB"})
    found = re.search(r"one after the other\) \(([\d,]+) bytes\)", caught.value.message)
    assert found is not None
    kinds, kept = [], Resident._kept_loader

    def noted(self: Resident, *arguments: Any) -> Any:
        loader = kept(self, *arguments)
        kinds.append({key[0] for key in self._loaders})
        return loader

    monkeypatch.setattr(Resident, "_kept_loader", noted)
    least = start("least", data={"memory": found[1].replace(",", "") + "B"})
    assert set(map(frozenset, kinds)) == {frozenset({"train"}), frozenset({"val"})}
    monkeypatch.undo()
    assert shas(least) == shas(start("plenty"))


def test_a_continued_run_may_change_them(start: Callable[..., dtrain.Run]) -> None:
    start("cut", train={"rounds": 2})
    run = start("cut", data={"cache": "0", "reader": "zarr", "memory": "3MB"})
    assert shas(run) == shas(start("whole"))


# The loader goes on between rounds ------------------------------------------------------------------------------


def decoded(start: Callable[..., dtrain.Run], rounds: int, client: Client | None = None, **tables: Any) -> list[int]:
    """Units decoded in each round by all replicas, and the units of one pass over all partitions."""
    found: list[int] = []

    def report(event: Any) -> None:
        if type(event).__name__ == "RoundFinished":
            found.append(sum(c.units_decoded for c in event.result.contributions))

    run = start("counted", client, report, train={"rounds": rounds}, **tables)
    return [*found, sum(len(part.units) for part in run.plan.partitions)]


@pytest.mark.parametrize("where", ["serial", "cluster"])
def test_no_unit_is_read_again_at_a_round_boundary(
    start: Callable[..., dtrain.Run], client: Client, where: str
) -> None:
    *found, units = decoded(start, 30, client if where == "cluster" else None, data={"cache": "0"})
    assert (len(found), units) == (30, 12)
    # with batches this small the loaders are some passes ahead; thrown away at each boundary, they would read
    # these passes every round
    assert 30 * units - 12 <= sum(found) <= (30 + 10) * units


def test_with_room_for_all_units_they_are_read_once(start: Callable[..., dtrain.Run], client: Client) -> None:
    *found, units = decoded(start, 5, client)
    assert sum(found) <= units


@pytest.mark.parametrize("where", ["serial", "cluster"])
def test_replicas_take_equal_steps_over_partitions_of_unequal_length(
    start: Callable[..., dtrain.Run], client: Client, where: str
) -> None:
    found: list[list[tuple[int, int]]] = []

    def report(event: Any) -> None:
        if type(event).__name__ == "RoundFinished":
            found.append([(c.steps, c.samples) for c in event.result.contributions])

    run = start(
        "ragged",
        client if where == "cluster" else None,
        report,
        train={"rounds": 9, "local_steps": 5},  # 5 steps of 16 samples: some passes over each partition
        data={"partition": "contiguous"},
        average={"replicas": 4},
    )
    lengths = {part.num_samples for part in run.plan.partitions}
    assert len(lengths) > 1
    assert max(lengths) < 9 * 5 * 16
    assert found == [[(5, 80)] * 4] * 9


# Normalisation ---------------------------------------------------------------------------------------------------


def test_normalize_standardises_by_the_training_rows(
    start: Callable[..., dtrain.Run], client: Client, blobs: Path
) -> None:
    import zarr

    by_feature = {"normalize": {"x": ["f"]}}
    run = start("normal", client, data=by_feature)
    kept = json.loads((run.directory / "plan.json").read_text())["normalize"]
    x = np.asarray(zarr.open_group(blobs, mode="r")["x"][...])  # float64
    rows = np.concatenate([part.part_anchors(i) for part in run.plan.partitions for i in range(len(part.units))])
    assert len(set(rows)) == len(rows) < len(x)
    np.testing.assert_allclose(kept["x"]["mean"], x[rows].mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(kept["x"]["std"], x[rows].std(axis=0), rtol=1e-12)
    assert kept["x"]["axes"] == [0]
    one = start("one mean", client, data={"normalize": ["x"]})
    kept = json.loads((one.directory / "plan.json").read_text())["normalize"]
    np.testing.assert_allclose(kept["x"]["mean"], [x[rows].mean()], rtol=1e-12)
    assert shas(run) == shas(start("serial", data=by_feature))
    assert len({*map(tuple, (shas(run), shas(one), shas(start("plain"))))}) == 3


@pytest.mark.parametrize("normalize", [["x"], {"x": ["f"]}])
def test_a_run_keeps_its_normalisation(
    start: Callable[..., dtrain.Run], monkeypatch: pytest.MonkeyPatch, normalize: Any
) -> None:
    whole = start("whole", data={"normalize": normalize})
    start("cut", data={"normalize": normalize}, train={"rounds": 2})
    monkeypatch.setattr("dtrain.prepare.scalings_of", None)  # a second pass over the data would fail
    assert shas(start("cut", data={"normalize": normalize})) == shas(whole)
    assert dtrain.load_run(whole.directory).resolved.scalings == whole.resolved.scalings
    with pytest.raises(RunConflict, match=r"data.normalize was .*, is \[\]"):
        start("cut")
    assert whole.evaluate(split="test", round="last")["loss"] > 0


# Transforms ------------------------------------------------------------------------------------------------------


def test_a_transform_draws_the_same_numbers_everywhere(start: Callable[..., dtrain.Run], client: Client) -> None:
    data = {"transform": "tests.runtime.test_data_path:noisy_in_training"}
    whole = start("whole", data=data)
    assert shas(whole) == shas(start("cluster", client, data=data)) != shas(start("plain"))
    start("cut", data=data, train={"rounds": 1})
    assert shas(start("cut", data=data)) == shas(whole)


def test_a_transform_sees_evaluated_batches_too_and_knows_them(start: Callable[..., dtrain.Run]) -> None:
    def losses(name: str) -> list[float]:
        run = start(name, data={"transform": f"tests.runtime.test_data_path:{name}"})
        return [row["val_loss"] for row in run.rows]

    assert losses("noisy")[0] != losses("noisy_in_training")[0]
    assert shas(start("same", data={"transform": "tests.runtime.test_data_path:unchanged"})) == shas(start("plain"))


@pytest.mark.parametrize(
    ("name", "said"),
    [("forgetful", "returned NoneType, not a batch"), ("halving", r"returned 8 samples for a batch of 16")],
)
def test_a_transform_returns_a_batch_of_the_same_size(start: Callable[..., dtrain.Run], name: str, said: str) -> None:
    with pytest.raises(UserCodeFailed, match=said) as caught:
        start("bad", data={"transform": f"tests.runtime.test_data_path:{name}"})
    assert caught.value.code == 3


def test_another_transform_is_other_code(start: Callable[..., dtrain.Run]) -> None:
    run = start("one", data={"transform": "tests.runtime.test_data_path:unchanged"})
    assert set(json.loads((run.directory / "plan.json").read_text())["code"]) == {"model", "data.transform"}


# Precision and device ----------------------------------------------------------------------------------------------


def test_bfloat16_keeps_float32_parameters(start: Callable[..., dtrain.Run], client: Client) -> None:
    train = {"precision": "bfloat16"}
    run = start("half", train=train)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert shas(run) == shas(start("cluster", client, train=train)) != shas(start("plain"))
    start("cut", train={**train, "rounds": 1})
    assert shas(start("cut", train=train)) == shas(run)
    assert abs(run.rows[-1]["val_loss"] - start("plain").rows[-1]["val_loss"]) < 0.05


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_cuda_without_a_gpu_is_refused(start: Callable[..., dtrain.Run]) -> None:
    with pytest.raises(ClusterUnsuitable, match="not every worker has a GPU") as caught:
        start("gpu", train={"device": "cuda"})
    assert caught.value.code == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_trains_evaluates_and_resumes(start: Callable[..., dtrain.Run], precision: str) -> None:
    train = {"device": "cuda", "precision": precision, "optimizer": "adamw", "optimizer_args": {"lr": 0.01}}
    whole = start("whole", train=train)
    start("cut", train={**train, "rounds": 1})
    assert shas(start("cut", train=train)) == shas(whole)
    assert whole.evaluate(split="test", round="last")["loss"] > 0
    on_cpu = start("cpu", train={**train, "device": "cpu"})
    assert abs(whole.rows[-1]["val_loss"] - on_cpu.rows[-1]["val_loss"]) < 0.05


# Several stores ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stores(tmp_path: Path, write_store: Callable[..., Path]) -> Callable[..., Path]:
    """A function that writes a store of blobs: stores("a", 300)."""

    def write(name: str, count: int, features: int = 6) -> Path:
        rng = np.random.default_rng(len(name) + count)
        x = rng.normal(size=(count, features))
        y = (x.sum(axis=1) > 0).astype("int32")
        arrays = {
            "x": {"dims": ("n", "f"), "values": x, "chunks": (20, features)},
            "y": {"dims": ("n",), "values": y, "chunks": (20,)},
        }
        path = tmp_path / name / "private.zarr"
        path.parent.mkdir()
        return write_store(path, arrays)

    return write


def test_several_stores_each_with_its_replicas(
    start: Callable[..., dtrain.Run], stores: Callable[..., Path], client: Client
) -> None:
    paths = [{"path": str(stores("a", 300))}, {"path": str(stores("bb", 500)), "replicas": 2}]
    both = {"data": {"path": paths}, "average": {}}
    run = start("serial", **both)
    assert isinstance(run.plan, JointPlan)
    assert (run.plan.replicas, run.plan.stores) == (3, (0, 1, 1))
    assert [len(row["replica_loss"]) for row in run.rows] == [3, 3, 3]
    assert [part.num_samples for part in run.plan.partitions] == [
        part.num_samples for plan in run.plan.plans for part in train_partitions(plan)
    ]
    held_out = sum(piece.num_samples for _, piece in run.plan.pieces("test"))
    assert evaluated(run, None, "test")[2] == held_out == 30 + 50
    assert shas(run) == shas(start("cluster", client, **both))
    start("cut", train={"rounds": 1}, **both)
    assert shas(start("cut", **both)) == shas(run)


@pytest.fixture
def private_stores(stores: Callable[..., Path], own_client: Client) -> tuple[list[Path], list[dict[str, Any]]]:
    """Two workers that each see another directory: the same path is another store to each, and none to the driver."""
    workers = sorted(own_client.nthreads())
    folders = [stores("a", 300).parent, stores("bb", 500).parent]
    for worker, folder in zip(workers, folders, strict=True):
        own_client.run(os.chdir, str(folder), workers=[worker])
    own = "/proc/self/cwd/private.zarr"
    assert not Path(own).exists()
    return folders, [{"path": own, "workers": [worker]} for worker in workers]


def test_parameters_travel_and_data_stay(
    start: Callable[..., dtrain.Run],
    private_stores: tuple[list[Path], list[dict[str, Any]]],
    own_client: Client,
) -> None:
    folders, private = private_stores
    run = start("private", own_client, data={"path": private}, average={})
    open_to_all = [{"path": str(folder / "private.zarr")} for folder in folders]
    assert shas(run) == shas(start("open", data={"path": open_to_all}, average={}))


@pytest.mark.slow
def test_chunks_that_only_a_worker_sees_are_looked_for_before_training(
    start: Callable[..., dtrain.Run],
    private_stores: tuple[list[Path], list[dict[str, Any]]],
    own_client: Client,
) -> None:
    folders, private = private_stores
    (folders[1] / "private.zarr" / "x" / "c" / "7" / "0").unlink()
    events: list[Any] = []
    with pytest.raises(ChunkMissing, match="chunk x/c/7/0 of x is missing"):
        start("stops", own_client, events.append, data={"path": private}, average={})
    assert [type(event).__name__ for event in events] == ["ClusterOpening"]
    run = start("skips", own_client, data={"path": private, "missing": "skip"}, average={})
    assert isinstance(run.plan, JointPlan)
    assert [plan.absent for plan in run.plan.plans] == [(), ((140, 160),)]
    (folders[0] / "private.zarr" / "x" / "c" / "3" / "0").write_bytes(b"other")
    with pytest.raises(DataChanged, match="chunks of x have been modified since the run was started"):
        start("skips", own_client, data={"path": private, "missing": "skip"}, train={"rounds": 5}, average={})


def test_a_worker_that_is_not_there(start: Callable[..., dtrain.Run], blobs: Path, client: Client) -> None:
    path = [{"path": str(blobs), "workers": ["tcp://127.0.0.1:1"]}]
    with pytest.raises(ClusterUnsuitable, match=r"none of its workers \(tcp://127\.0\.0\.1:1\)") as caught:
        start("nowhere", client, data={"path": path}, average={})
    assert client.scheduler is not None
    assert "tcp://127.0.0.1" in caught.value.hint


def test_stores_of_another_kind(start: Callable[..., dtrain.Run], stores: Callable[..., Path]) -> None:
    paths = [{"path": str(stores("a", 100))}, {"path": str(stores("b", 100, features=5))}]
    with pytest.raises(LengthsDiffer, match=r"a row of x is float32\[5\]; in .* it is float32\[6\]"):
        start("mixed", data={"path": paths}, average={})


def test_replicas_that_the_stores_do_not_have(start: Callable[..., dtrain.Run], stores: Callable[..., Path]) -> None:
    paths = [{"path": str(stores("a", 100))}, {"path": str(stores("b", 100))}]
    with pytest.raises(InvalidConfig, match=r"average.replicas = 5, but the stores of data.path have 2 together"):
        start("five", data={"path": paths}, average={"replicas": 5})


# Shapes of samples ---------------------------------------------------------------------------------------------------


def test_patches_selection_and_a_variable_without_samples(
    tmp_path: Path, write_store: Callable[..., Path], client: Client, start: Callable[..., dtrain.Run]
) -> None:
    rng = np.random.default_rng(5)
    field = rng.normal(size=(120, 3, 8, 12))
    arrays = {
        "t": {"dims": ("time", "level", "lat", "lon"), "values": field, "chunks": (6, 3, 8, 12)},
        "mask": {"dims": ("lat", "lon"), "values": rng.normal(size=(8, 12)), "chunks": (8, 12)},
    }
    path = write_store(tmp_path / "field.zarr", arrays)
    tables = {
        "data": {
            "path": str(path),
            "inputs": ["t", "mask"],
            "targets": ["t"],
            "sample_dim": "time",
            "isel": {"level": 1, "time": {"start": 3, "stop": 110}},
            "input_offsets": [-1, 0],
            "target_offsets": 1,
            "patch": {"lat": 4, "lon": 5},
            "normalize": ["t"],
        },
        "train": {"loss": "mse", "rounds": 2, "optimizer_args": {"lr": 0.01}},
        "model": "tests.runtime.models:forecast",
    }
    run = start("serial", **tables)
    plan = run.plan.plans[0]
    assert (plan.patches, plan.first_row, plan.num_samples) == (2 * 3, 3, 110)
    assert sum(row["samples"] for row in run.rows[:1]) == sum(p.num_samples for p in run.plan.partitions)
    starts, stops = cell_bounds(plan, split_cells(plan, "all"))
    assert (int(starts.min()), int(stops.max())) == (3, 110)
    assert shas(run) == shas(start("cluster", client, **tables))


def test_samples_of_missing_chunks_can_be_skipped(
    start: Callable[..., dtrain.Run], stores: Callable[..., Path]
) -> None:
    path = stores("a", 400)
    (path / "x/c/3/0").unlink()
    with pytest.raises(DtrainError) as caught:
        start("error", data={"path": str(path)})
    assert caught.value.code == 5
    run = start("skip", data={"path": str(path), "missing": "skip"})
    assert run.plan.plans[0].absent == ((60, 80),)
    everything = [*run.plan.partitions, *(p for s in ("val", "test") for _, p in run.plan.pieces(s))]
    rows = np.concatenate([part.part_anchors(i) for part in everything for i in range(len(part.units))])
    assert sorted(rows.tolist()) == [*range(60), *range(80, 400)]


def test_samples_of_missing_chunks_of_the_store_for_validation_are_skipped_too(
    start: Callable[..., dtrain.Run], stores: Callable[..., Path]
) -> None:
    path = stores("held", 200)
    (path / "x/c/3/0").unlink()
    run = start("skip", data={"val_path": str(path), "missing": "skip"})
    assert run.resolved.held_out is not None
    assert run.resolved.held_out.absent == ((60, 80),)
    assert evaluated(run, None, "val")[2] == 180


# A loop of one's own -------------------------------------------------------------------------------------------------


def test_batches_hold_each_sample_once_a_pass(blobs: Path) -> None:
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"], split={"val": 0.2, "test": 0.0})
    import zarr

    x = torch.from_numpy(np.asarray(zarr.open_group(blobs, mode="r")["x"][...]).astype("float32"))
    found = [(inputs[0].clone(), targets.clone()) for inputs, targets in dtrain.batches(samples, batch_size=50)]
    assert [len(targets) for _, targets in found[:-1]] == [50] * (len(found) - 1)
    held_out = [inputs[0].clone() for inputs, _ in dtrain.batches(samples, batch_size=50, split="val")]
    rows = torch.cat([*(rows for rows, _ in found), *held_out])
    assert rows.shape == x.shape
    assert torch.equal(rows[rows[:, 0].argsort()], x[x[:, 0].argsort()])


def test_batches_go_on_at_a_cursor(blobs: Path) -> None:
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"])
    whole = [batch.inputs[0].clone() for batch in dtrain.batches(samples, batch_size=32, epochs=2)]
    with dtrain.batches(samples, batch_size=32, epochs=2) as some:
        first = [next(some).inputs[0].clone() for _ in range(7)]
        cursor = some.cursor
    rest = [batch.inputs[0].clone() for batch in dtrain.batches(samples, batch_size=32, epochs=2, cursor=cursor)]
    assert len(first) + len(rest) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip([*first, *rest], whole, strict=True))


def passes(samples: dtrain.Samples, cursor: Any, **options: Any) -> tuple[list[list[int]], Any]:
    """The values of y of each batch from a cursor on, and the cursor afterwards."""
    with dtrain.batches(samples, cursor=cursor, **options) as found:
        return [batch.targets.tolist() for batch in found], found.cursor


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> Path:
    arrays = {name: {"dims": ("n",), "values": np.arange(50), "chunks": (7,)} for name in ("x", "y")}
    return write_store(tmp_path_factory.mktemp("numbers") / "s", arrays)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [8, 10, 37])
def test_epochs_count_from_the_cursor(numbers: Path, split: Any, drop_last: bool, size: int) -> None:
    samples = dtrain.open_samples(numbers, inputs=["x"], targets=["y"], split={"val": 0.8 if split == "val" else 0.0})
    options: dict[str, Any] = {"batch_size": size, "drop_last": drop_last, "split": split, "seed": 3}
    whole, end = passes(samples, None, epochs=3, **options)
    assert end == Cursor(3, 0)
    pass_size = len(passes(samples, None, batch_size=1, split=split)[0])
    per_pass = pass_size // size if drop_last else -(-pass_size // size)
    assert len(whole) == 3 * per_pass > 0
    cursor, found = None, []
    for number in range(3):  # one pass at a time, as a training loop does
        more, cursor = passes(samples, cursor, **options)
        assert (len(more), cursor) == (per_pass, Cursor(number + 1, 0))
        found += more
    assert found == whole
    if split == "train":
        assert whole[:per_pass] != whole[per_pass : 2 * per_pass]  # another pass, another order
    # within a pass the rest of it is the first one
    with dtrain.batches(samples, epochs=2, **options) as some:
        begun = [next(some).targets.tolist() for _ in range(per_pass)]
        within = some.cursor
    assert begun == whole[:per_pass]
    if drop_last or pass_size % size == 0:
        assert within == Cursor(1, 0)  # what is left out is not begun
    with dtrain.batches(samples, **options) as some:
        next(some)
        within = some.cursor
    if per_pass > 1:
        assert passes(samples, within, **options) == (whole[1:per_pass], Cursor(1, 0))
        assert passes(samples, within, epochs=2, **options) == (whole[1 : 2 * per_pass], Cursor(2, 0))


def test_an_endless_stream_goes_on_at_a_cursor(numbers: Path) -> None:
    samples = dtrain.open_samples(numbers, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})
    with dtrain.batches(samples, batch_size=8, epochs=None) as some:
        first = [next(some).targets.tolist() for _ in range(20)]
    with dtrain.batches(samples, batch_size=8, epochs=None) as some:
        for _ in range(9):
            next(some)
        cursor = some.cursor
    with dtrain.batches(samples, batch_size=8, epochs=None, cursor=cursor) as some:
        assert [next(some).targets.tolist() for _ in range(11)] == first[9:]


def test_a_transform_draws_on_at_a_cursor_of_a_later_pass(blobs: Path) -> None:
    samples = dtrain.open_samples(
        blobs, inputs=["x"], targets=["y"], transform="tests.runtime.test_data_path:noisy", split={"val": 0.0}
    )

    def drawn(**options: Any) -> list[torch.Tensor]:
        return [batch.inputs[0].clone() for batch in dtrain.batches(samples, batch_size=100, **options)]

    whole = drawn(epochs=2)
    second = drawn(cursor=Cursor(1, 0))
    assert len(second) * 2 == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(second, whole[len(second) :], strict=True))


def loader_threads() -> set[threading.Thread]:
    """The threads of the loaders that somebody still refers to: an earlier test may have left one in a cycle."""
    gc.collect()
    return {thread for thread in threading.enumerate() if thread.name.startswith("dtrain-")}


def test_batches_end_their_threads(blobs: Path) -> None:
    left, before = loader_threads(), threading.active_count()
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"])
    for _ in dtrain.batches(samples, batch_size=64):
        pass
    endless = dtrain.batches(samples, batch_size=64, epochs=None)
    assert [next(endless).size for _ in range(50)] == [64] * 50
    del endless
    assert loader_threads() <= left
    assert threading.active_count() <= before + 8  # zarr's own threads stay


def test_batches_tell_their_memory_budget(blobs: Path) -> None:
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"])
    with dtrain.batches(samples, batch_size=64, memory="5MB", cache="0") as small, dtrain.batches(samples) as large:
        assert small.memory.limit == 5_000_000
        assert 0 < small.memory.total <= small.memory.limit
        assert small.memory.cached_bytes == 0 < large.memory.cached_bytes


def test_a_transform_that_cannot_be_loaded_leaves_no_thread(blobs: Path) -> None:
    left = loader_threads()
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"], transform="tests.runtime.test_data_path:nothing")
    with pytest.raises(DtrainError):
        dtrain.batches(samples)
    assert loader_threads() <= left


def test_short_batches_can_be_dropped_and_partitions_are_disjoint(blobs: Path) -> None:
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})
    sizes = [batch.size for batch in dtrain.batches(samples, batch_size=100, drop_last=True)]
    assert sizes == [100] * 6
    parts = [
        torch.cat([b.inputs[0][:, 0].clone() for b in dtrain.batches(samples, replica=k, replicas=3)]) for k in range(3)
    ]
    assert sum(map(len, parts)) == 611
    assert len(set(torch.cat(parts).tolist())) == 611


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 2.5}, "batch_size = 2.5"),
        ({"replica": 2}, "replica = 2"),
        ({"cache": "many"}, "many"),
        ({"split": "tset"}, 'split = "tset": allowed are train, val, test, all; did you mean "test"'),
        ({"reader": "zars"}, 'reader = "zars": allowed are auto, numcodecs, zarrs, zarr; did you mean'),
        ({"epochs": 0}, "epochs = 0: a positive integer is needed"),
        ({"seed": "a"}, "seed = 'a': an integer is needed"),
        ({"cursor": 5}, "cursor = 5: a dtrain.Cursor(epoch, position) is needed"),
        ({"split": "val", "cursor": dtrain.Cursor(0, 300)}, "a pass over this split holds"),
    ],
)
def test_arguments_of_batches_are_checked(blobs: Path, wrong: dict[str, Any], said: str) -> None:
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"])
    with pytest.raises(InvalidConfig, match=re.escape(said)):
        dtrain.batches(samples, **wrong)


def test_batches_need_samples(blobs: Path) -> None:
    with pytest.raises(InvalidConfig, match="samples is a str, not what open_samples returns"):
        dtrain.batches(str(blobs))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (raising, r"The function given as data.transform raised KeyError: 'nothing' \(test_data_path.py:\d+\)"),
        (without_inputs, "returned 0 inputs and 1 targets for 1 and 1"),
        (of_numpy, "returned 1 inputs and 1 targets, and among them ndarray instead of tensors"),
    ],
)
def test_a_transform_that_fails_is_named(samples: Any, transform: Any, said: str) -> None:
    batch = next(iter(dtrain.batches(samples, batch_size=8)))
    with pytest.raises(UserCodeFailed, match=said) as caught:
        apply_transform(transform, batch, 1)
    assert caught.value.code == 3


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
def test_integers_are_normalised_as_floats(
    write_store: Callable[..., Path], tmp_path: Path, start: Callable[..., dtrain.Run], dtype: str
) -> None:
    values = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 200, size=(300, 6)).astype(dtype)
    arrays = {
        "x": {"dims": ("n", "f"), "values": values, "chunks": (20, 6)},
        "y": {"dims": ("n",), "values": np.arange(300) % 3, "chunks": (20,)},
    }
    path = write_store(tmp_path / "s", arrays)
    samples = dtrain.open_samples(path, inputs=["x"], targets=["y"], normalize=["x"], split={"val": 0.0, "test": 0.0})
    assert samples.row_bytes == 6 * np.dtype(dtype).itemsize + 8  # kept in memory as stored
    seen = torch.cat([batch.inputs[0].clone() for batch in dtrain.batches(samples, batch_size=64)])
    assert seen.dtype == torch.float32
    assert abs(float(seen.mean())) < 1e-4
    assert abs(float(seen.std(correction=0)) - 1) < 1e-4
    run = start("integers", data={"path": str(path), "normalize": ["x"]})
    assert len(run.rows) == 3


def test_models_used_here_exist() -> None:
    assert models.forecast()
