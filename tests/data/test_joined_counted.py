"""Samples of several stores that are one, left out, kept in part or repeated: those of one store of the same rows."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import assume, given
from hypothesis import strategies as st

import dtrain
from dtrain.data.balance import balanced, count_classes, join_classes
from dtrain.data.given import find_given
from dtrain.data.load.finite import LeftOut, merged, parts_of, pass_over
from dtrain.data.load.statistics import partition_moments
from dtrain.data.plan.labels import Labels
from dtrain.data.plan.multiplicity import anchor_numbers, multiplicity_text
from dtrain.data.plan.partition import cell_anchors, plan_data
from dtrain.data.plan.summary import describe_plan
from dtrain.data.plan.units import DataPlan
from dtrain.data.read.joined import open_reader
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import Samples
from dtrain.errors import InvalidConfig, TooFewSamples, UnsuitableVariable
from tests.data.helpers import WHOLE
from tests.data.layouts.fixtures import write, write_anndata
from tests.sampling import examples

Write = Callable[..., Path]
NAN, INF = np.nan, np.inf


def arrays_of(rows: int, seed: int = 0, share: float = 0.2) -> dict[str, np.ndarray]:
    """Values of all rows: a share of the rows of x and y holds values that are not finite."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(rows, 6)).astype("float32"), rng.normal(size=rows).astype("float32")
    for number, row in enumerate(np.flatnonzero(rng.random(rows) < share)):
        x[row, : 1 + number % 6] = (NAN, INF, -INF)[number % 3]
    y[rng.random(rows) < share / 3] = NAN
    classes = (rng.random(rows) ** 3 * 4).astype("int16")
    return {"x": x, "y": y, "c": classes, "w": rng.random(rows).astype("float32"), "n": np.arange(rows) * 1.0}


def write_cut(
    write: Write, folder: Path, whole: dict[str, np.ndarray], cuts: Sequence[int], chunks: Sequence[int]
) -> list[Path]:
    """Write the rows between neighbouring cuts, each run as a store of its own."""
    folder.mkdir(exist_ok=True)
    return [
        write(
            folder / f"{number}.zarr",
            {
                name: {
                    "dims": ("n", "k")[: values.ndim],
                    "values": values[start:stop],
                    "chunks": (chunk, 6)[: values.ndim],
                }
                for name, values in whole.items()
            },
        )
        for number, ((start, stop), chunk) in enumerate(zip(itertools.pairwise(cuts), chunks, strict=True))
    ]


def opened(paths: Any, **data: Any) -> Samples:
    keys: dict[str, Any] = {"inputs": ["x"], "targets": ["y"], "split": WHOLE, "sample_dim": "n", "gaps": "allow"}
    return dtrain.open_samples(paths, **{**keys, **data})


def counted(samples: Samples, pieces: int = 1, **changes: Any) -> tuple[DataPlan, Labels, LeftOut]:
    """Plan, multiplicities, and what is left out."""
    plan = replace(plan_data(samples, replicas=1, seed=0, given=find_given(samples, 0).splits), **changes)
    whole, reader = cell_anchors(plan, "all"), open_reader(samples)
    values, left_out = merged(samples, whole, [pass_over(reader, whole, parts) for parts in parts_of(whole, pieces)])
    return replace(plan, multiplicity=multiplicity_text(values)), values, left_out


# Store by store ---------------------------------------------------------------------------------------------


@examples(40)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 35)), min_size=2, max_size=5),
    offsets=st.sampled_from([0, 0, [-1, 0], {"start": 1, "stop": 3}]),
    stride=st.sampled_from([1, 1, 2, 5]),
    patch=st.sampled_from([{}, {"k": 2}, {"k": 4}]),
    non_finite=st.sampled_from(["skip", {"min_valid": 0.8}, {"min_valid": 0.3}]),
    split=st.sampled_from([WHOLE, {"patches": True, "val": 0.3, "test": 0.0}]),
    pieces=st.integers(1, 3),
)
def test_what_is_left_out_and_repeated_is_that_of_each_store_alone(
    write_store: Write,
    lengths: list[tuple[int, int]],
    offsets: Any,
    stride: int,
    patch: dict[str, int],
    non_finite: Any,
    split: dict[str, Any],
    pieces: int,
) -> None:
    sizes, chunks = zip(*lengths, strict=True)
    cuts = [0, *np.cumsum(sizes).tolist()]
    keys: dict[str, Any] = {"input_offsets": offsets, "stride": stride, "patch": patch, "non_finite": non_finite}
    keys |= {"split": split if patch else WHOLE, "balance": "c"}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_cut(write_store, Path(folder), arrays_of(cuts[-1], cuts[-1]), cuts, chunks)
        try:
            plan, values, left_out = counted(opened(paths, **keys), pieces)
        except TooFewSamples:
            assume(False)
        numbers, found = anchor_numbers(plan), {"samples": 0, "of": 0}
        by_variable: dict[str, int] = {}
        own_classes, alone = [], []
        for path, before, begin in zip(paths, numbers.before.tolist(), numbers.begins.tolist(), strict=False):
            samples = opened(path, **keys)
            try:
                own_plan, own, own_left = counted(samples)
            except TooFewSamples:  # no window, or too few places, of its own
                continue
            assert values[before : before + len(own)].tolist() == own.tolist()
            assert numbers.of(begin + stride * np.arange(len(own))).tolist() == list(range(before, before + len(own)))
            for key in found:
                found[key] += getattr(own_left, key)
            for name, count in own_left.by_variable.items():
                by_variable[name] = by_variable.get(name, 0) + count
            own_classes.append(count_classes(samples, own_plan))
            alone.append((samples, own_plan, before))
        assert (left_out.samples, left_out.of) == (found["samples"], found["of"])
        assert left_out.by_variable == by_variable
        samples = opened(paths, **keys)
        if keys["split"] == WHOLE:  # else each draws its own places
            assert count_classes(samples, plan) == join_classes(own_classes)
        balance = count_classes(samples, plan)
        together = balanced(samples, plan, balance)
        for one, own_plan, before in alone:
            own = balanced(one, own_plan, balance)
            assert together[before : before + len(own)].tolist() == own.tolist()


# One store of the same rows -----------------------------------------------------------------------------------

KEYS = {
    "skip": {"non_finite": "skip", "normalize": ["x"]},
    "min_valid": {"non_finite": {"min_valid": 0.6}, "normalize": ["x"]},
    "balance": {"non_finite": "skip", "balance": "c"},
    "weight": {"non_finite": "skip", "weight": "w"},
    "all": {"non_finite": {"min_valid": 0.5}, "balance": "c", "weight": "w", "normalize": {"x": ["k"]}},
}
SPLITS = {
    "share": {"val": 0.2, "test": 0.1},
    "coordinate": {"val": {"n": slice(90, 130)}, "test": {"n": slice(250, 270)}, "gap": 3},
}


def weight_of(batch: Any) -> tuple[Any, ...]:
    return () if batch.weight is None else (batch.weight,)


def bits_of(samples: Samples, split: str, epochs: int = 1, **keys: Any) -> list[bytes]:
    stream = dtrain.batches(samples, batch_size=7, split=split, epochs=epochs, **keys)  # type: ignore[arg-type]
    return [
        b"".join(np.ascontiguousarray(v.numpy()).tobytes() for v in (*one.inputs, one.targets, *weight_of(one)))
        for one in stream
    ]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("keys", KEYS)
def test_batches_are_those_of_one_store_in_the_same_order(
    write_store: Write, tmp_path: Path, keys: str, split: str
) -> None:
    """Stores end where units end, so that cells and their draws are the same."""
    whole, cuts = arrays_of(293), (0, 120, 160, 293)
    table = {**KEYS[keys], "split": SPLITS[split]}
    joined = opened(write_cut(write_store, tmp_path / "parts", whole, cuts, (20, 20, 20)), **table)
    alone = opened(write_cut(write_store, tmp_path / "one", whole, (0, 293), (20,)), **table)
    assert (joined.begins, joined.num_samples) == ((0, 120, 160), 293)
    for name in ("train", "val", "test"):
        found, wanted = (bits_of(one, name, epochs=2) for one in (joined, alone))
        assert found == wanted
    shares = [bits_of(joined, "train", replicas=2, replica=k) for k in range(2)]
    assert shares == [bits_of(alone, "train", replicas=2, replica=k) for k in range(2)]
    with dtrain.batches(joined, batch_size=7, epochs=2) as stream:
        for _ in range(9):
            next(stream)
        cursor = stream.cursor
    rest = bits_of(joined, "train", cursor=cursor)
    assert rest == bits_of(alone, "train", epochs=2)[9 : 9 + len(rest)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("keys", [{**KEYS[name], "normalize": []} for name in KEYS], ids=KEYS)
def test_padding_between_stores_is_no_sample(write_store: Write, tmp_path: Path, keys: dict[str, Any]) -> None:
    """Units of any rows: the same samples follow each other in stored order."""
    whole, cuts = arrays_of(293), (0, 97, 101, 293)
    table = {**keys, "split": SPLITS["coordinate"], "shuffle": False}
    joined = opened(write_cut(write_store, tmp_path / "parts", whole, cuts, (20, 4, 33)), **table)
    alone = opened(write_cut(write_store, tmp_path / "one", whole, (0, 293), (20,)), **table)
    assert joined.num_samples > 293
    for name in ("train", "val", "test"):
        assert bits_of(joined, name) == bits_of(alone, name)


@pytest.mark.parametrize("non_finite", ["skip", {"min_valid": 0.5}])
@pytest.mark.parametrize("split", [WHOLE, {"val": {"n": slice(9, 13)}, "test": 0.0}], ids=["whole", "coordinate"])
def test_means_are_of_the_finite_values_of_all_stores(
    write_store: Write, tmp_path: Path, non_finite: Any, split: Any
) -> None:
    whole = arrays_of(24, share=0.0)
    whole["x"][1, 0], whole["x"][8, 3], whole["x"][20] = NAN, INF, NAN
    paths = write_cut(write_store, tmp_path, whole, (0, 7, 10, 24), (4, 4, 4))
    samples = opened(paths, non_finite=non_finite, normalize={"x": ["k"]}, split=split)
    assert samples.begins == (0, 8, 12)
    plan, values, _ = counted(samples, unit_rows=4, cell_rows=4)
    assert np.flatnonzero(values == 0).tolist() == ([1, 9, 22] if non_finite == "skip" else [22])
    moments = partition_moments(open_reader(samples), cell_anchors(plan, "train"), ["x"])["x"]
    own = np.where(np.isfinite(whole["x"]), whole["x"], NAN)[slice(None) if split == WHOLE else np.r_[:9, 14:24]]
    assert np.ravel(moments.count).tolist() == np.isfinite(own).sum(0).tolist()
    np.testing.assert_allclose(np.ravel(moments.mean), np.nanmean(own.astype(float), 0))
    np.testing.assert_allclose(np.ravel(moments.std), np.nanstd(own.astype(float), 0))


# Numbers, classes, faults -------------------------------------------------------------------------------------


def test_the_stride_begins_anew_in_each_store(write_store: Write, tmp_path: Path) -> None:
    whole = arrays_of(11, share=0.0)
    whole["x"][[3, 7, 9]] = NAN
    samples = opened(write_cut(write_store, tmp_path, whole, (0, 4, 11), (4, 4)), non_finite="skip", stride=3)
    plan, values, left_out = counted(samples)
    # rows 0 and 3 of the first store; rows 0, 3 and 6 of the second one are 4, 7 and 10 of the whole
    assert values.ravel().tolist() == [1, 0, 1, 0, 1]
    assert anchor_numbers(plan).of(np.array([0, 3, 4, 7, 10])).tolist() == [0, 1, 2, 3, 4]
    assert (left_out.samples, left_out.of, left_out.by_variable) == (2, 5, {"x": 2})
    assert left_out.path.endswith("0.zarr and 1 more store")
    assert describe_plan(samples, plan)["dropped"]["non_finite"] == 2


def test_values_that_stores_pack_in_other_ways_are_seen_as_the_model_sees_them(
    write_store: Write, tmp_path: Path
) -> None:
    packed = {"scale_factor": 0.5, "_FillValue": -9}
    stores = [
        {"values": np.array([0, -9, 2, 3], "int16"), "attributes": packed},
        {"values": np.array([0.0, 1.0, -9.0, NAN, 1e300]), "attributes": {}},
    ]
    paths = [
        write_store(tmp_path / f"{number}.zarr", {"x": {"dims": ("n",), "chunks": (2,), **own}})
        for number, own in enumerate(stores)
    ]
    _, values, left_out = counted(opened(paths, targets=["x"], non_finite="skip"))
    assert values.ravel().tolist() == [1, 0, 1, 1, 1, 1, 1, 0, 0]
    assert left_out.by_variable == {"x": 3}


def test_each_chunk_is_decoded_once_for_it(write_store: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = opened(write_cut(write_store, tmp_path, arrays_of(60), (0, 25, 30, 60), (10, 5, 10)), non_finite="skip")
    read: list[tuple[str, int, int]] = []
    fill = UnitReader.fill

    def noted(reader: UnitReader, variable: Any, box: Any, out: Any) -> int:
        read.append((f"{Path(reader.samples.path).name} {variable.name}", box.start, box.stop))
        return fill(reader, variable, box, out)

    monkeypatch.setattr(UnitReader, "fill", noted)
    counted(samples, pieces=3)
    rows = {
        name: sorted(r for own, start, stop in read if own == name for r in range(start, stop)) for name, _, _ in read
    }
    wanted = {f"{number}.zarr {name}": list(range(n)) for number, n in enumerate((25, 5, 30)) for name in ("x", "y")}
    assert rows == wanted


def test_classes_of_one_name_are_one_whatever_their_code(tmp_path: Path) -> None:
    """The code that stands for a class differs by store; obs/cell_type is no variable of the samples."""
    codes = [np.array([0] * 20 + [1] * 5 + [-1] * 5, "int8"), np.array([0] * 2 + [1] * 8 + [2] * 20, "int16")]
    names = (["B", "T"], ["NK", "T", "B"])
    paths = [
        write_anndata(tmp_path / f"{number}.zarr", codes=own, names=known)
        for number, (own, known) in enumerate(zip(codes, names, strict=True))
    ]
    keys: dict[str, Any] = {"inputs": ["X"], "targets": ["obs/age"], "split": WHOLE, "balance": "obs/cell_type"}
    samples = dtrain.open_samples(paths, **keys)
    plan = plan_data(samples, replicas=1, seed=0)
    balance = count_classes(samples, plan)
    assert (balance.counts, balance.missing) == ({"B": 40, "T": 13, "NK": 2}, 5)
    factors = [1] * 20 + [3] * 5 + [1] * 5 + [20] * 2 + [3] * 8 + [1] * 20
    numbers = anchor_numbers(plan)
    rows = np.r_[:30, samples.begins[1] : samples.begins[1] + 30]
    assert balanced(samples, plan, balance)[numbers.of(rows), 0].tolist() == factors


def test_classes_that_do_not_mean_the_same_are_refused(write_store: Write, tmp_path: Path) -> None:
    paths = []
    for number, own in enumerate([{"values": np.arange(6) % 2}, {"values": np.arange(6) / 2}]):
        x = {"dims": ("n",), "values": np.arange(6.0), "chunks": (3,)}
        paths.append(write_store(tmp_path / f"{number}.zarr", {"x": x, "c": {"dims": ("n",), "chunks": (3,), **own}}))
    samples = opened(paths, targets=["x"], balance="c")
    with pytest.raises(UnsuitableVariable, match=r'balance = "c": .*1\.zarr: it has dtype float64; classes are'):
        count_classes(samples, plan_data(samples, replicas=1, seed=0))
    samples = opened([paths[0], write_store(tmp_path / "2.zarr", {"x": x})], targets=["x"], balance="c")
    with pytest.raises(InvalidConfig, match=r'balance = "c": .*2\.zarr: .*c'):
        count_classes(samples, plan_data(samples, replicas=1, seed=0))


def test_classes_by_name_in_one_store_and_by_number_in_another_are_refused(tmp_path: Path) -> None:
    paths = [write_anndata(tmp_path / f"{number}.zarr") for number in range(2)]
    obs: Any = zarr.open_group(paths[1], path="obs", mode="r+")
    del obs["cell_type"]
    write(obs, "cell_type", np.zeros(obs["age"].shape, "int8"), (12,))
    samples = dtrain.open_samples(paths, inputs=["X"], targets=["obs/age"], split=WHOLE, balance="obs/cell_type")
    with pytest.raises(UnsuitableVariable, match=r"1\.zarr: obs/cell_type holds numbers; in .*0\.zarr.* categories"):
        count_classes(samples, plan_data(samples, replicas=1, seed=0))
