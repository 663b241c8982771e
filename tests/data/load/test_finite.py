"""Samples that hold values that are not finite: found in one pass, by hand and by walking through all samples."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dtrain
from dtrain.config.schema import TrainConfig
from dtrain.data.load.finite import merged, parts_of, pass_over
from dtrain.data.load.gather import fill_non_finite
from dtrain.data.load.statistics import partition_moments
from dtrain.data.plan.partition import cell_anchors, counted, plan_data
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import InvalidConfig, NonFiniteData, TooFewSamples
from tests.data.helpers import WHOLE, vector
from tests.sampling import examples

NAN, INF = np.nan, np.inf


def found_in(path, pieces=1, **data):
    """(multiplicities, what is left out, plan, spy on the reads) of a store."""
    samples = open_samples(path, **{"split": WHOLE, "non_finite": "skip", "sample_dim": "n", **data})
    plan = plan_data(samples, replicas=1, seed=0)
    whole, reader = cell_anchors(plan, "all"), UnitReader(samples)
    spy = reader.read = mock.Mock(wraps=reader.read)
    seen = [pass_over(reader, whole, parts) for parts in parts_of(whole, pieces)]
    return (*merged(samples, whole, seen), plan, spy)


def table(count=6):
    return np.arange(count * 4, dtype="float32").reshape(count, 4)


@pytest.fixture
def store(write_store, tmp_path):
    """Four values of x and one of y a sample; the shares of finite values are 5, 4, 3, 2, 1 and 5 fifths."""
    x, y = table(), np.arange(6, dtype="float32")
    x[1, 0], x[2, :2], x[3, :3], x[4] = NAN, INF, -INF, NAN
    arrays = {"x": {"dims": ("n", "k"), "values": x, "chunks": (2, 4)}, "y": vector(y, 2)}
    return write_store(tmp_path / "s", arrays)


@pytest.mark.parametrize(
    ("non_finite", "kept"),
    [
        ("skip", [1, 0, 0, 0, 0, 1]),
        ({"min_valid": 1.0}, [1, 0, 0, 0, 0, 1]),
        ({"min_valid": 0.81}, [1, 0, 0, 0, 0, 1]),
        ({"min_valid": 0.8}, [1, 1, 0, 0, 0, 1]),
        ({"min_valid": 0.6}, [1, 1, 1, 0, 0, 1]),
        ({"min_valid": 0.2}, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_samples_are_kept_from_a_share_of_finite_values_on(store, non_finite, kept):
    values, left_out, _, _ = found_in(store, inputs=["x"], targets=["y"], non_finite=non_finite)
    assert values.ravel().tolist() == kept
    assert (left_out.samples, left_out.of) == (kept.count(0), 6)
    assert left_out.by_variable == ({"x": kept.count(0)} if 0 in kept else {})


def test_every_chunk_is_decoded_once_whatever_the_number_of_pieces(store):
    results = [found_in(store, pieces, inputs=["x"], targets=["y"]) for pieces in (1, 2, 3, 9)]
    assert all(np.array_equal(one[0], results[0][0]) and one[1] == results[0][1] for one in results)
    for *_, plan, spy in results:
        boxes = [call.args[0] for call in spy.call_args_list]
        assert len(boxes) == plan.num_units
        assert sorted(row for box in boxes for row in range(box.start, box.stop)) == list(range(6))


def test_several_variables_are_counted_each(write_store, tmp_path):
    x, y = np.arange(8.0), np.arange(8.0)
    x[[1, 2, 3]], y[[3, 4]] = NAN, 1e300  # which float32 cannot hold
    path = write_store(tmp_path / "s", {"x": vector(x, 3), "y": vector(y, 3)})
    values, left_out, _, _ = found_in(path, inputs=["x"], targets=["y"])
    assert values.ravel().tolist() == [1, 0, 0, 0, 0, 1, 1, 1]
    assert left_out.by_variable == {"x": 3, "y": 2}
    assert left_out.named == "x (3), y (2)"


def test_a_window_holds_the_values_of_all_its_rows(write_store, tmp_path):
    x = np.arange(12, dtype="float32")
    x[5] = NAN
    path = write_store(tmp_path / "s", {"x": vector(x, 4)})
    values, left_out, _, _ = found_in(path, inputs=["x"], targets=["x"], input_offsets=[-2, 0], target_offsets=1)
    # anchors 2 to 10 have whole windows; 4, 5 and 7 hold row 5
    assert values.ravel().tolist() == [1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1]
    assert (left_out.samples, left_out.of) == (3, 9)
    strided, *_ = found_in(path, inputs=["x"], targets=["x"], input_offsets=[-2, 0], target_offsets=1, stride=2)
    assert strided.ravel().tolist() == [1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("units", ["rows", "blocks"])
def test_a_patch_holds_its_own_values(write_store, tmp_path, units):
    x = np.zeros((1 if units == "blocks" else 6, 5, 8), "float32")
    x[0, 4, 7] = NAN  # row 4 lies in the last patch along y, which begins earlier to be whole
    x[0, 3, 0] = NAN  # rows 3 and 4 overlap with the patch of rows 2 and 3
    path = write_store(tmp_path / "s", {"x": {"dims": ("n", "y", "x"), "values": x, "chunks": (1, 2, 4)}})
    split = {"patches": True, "val": 0.3, "test": 0.0} if units == "blocks" else WHOLE
    values, left_out, plan, _ = found_in(path, inputs=["x"], targets=["x"], patch={"y": 2, "x": 4}, split=split)
    assert bool(plan.blocks) == (units == "blocks")
    assert values[0].reshape(3, 2).tolist() == [[1, 1], [0, 1], [0, 0]]
    assert values[1:].all()
    assert left_out.samples == 3


@examples(15)
@given(st.data())
def test_what_the_pass_finds_is_what_the_batches_hold(write_store, tmp_path_factory, data):
    draw = data.draw
    count, least = draw(st.integers(8, 30)), draw(st.sampled_from([1.0, 0.9, 0.5, 0.3]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x, y = rng.normal(size=(count, 6)), rng.normal(size=count).astype("float32")
    x[rng.random((count, 6)) < 0.15], y[rng.random(count) < 0.1] = NAN, INF
    arrays = {
        "x": {"dims": ("n", "k"), "values": x, "chunks": (draw(st.integers(1, 9)), draw(st.integers(1, 6)))},
        "y": vector(y, draw(st.integers(1, 40))),
        "mask": {"dims": ("k",), "values": np.array([1, NAN, 1, 1, 1, 1], "float32"), "chunks": (6,)},
    }
    path = write_store(tmp_path_factory.mktemp("s") / "s", arrays)
    table = {
        "inputs": ["x", "mask"] if least < 1 else ["x"],
        "targets": ["y"],
        "split": WHOLE,
        "sample_dim": "n",
        "input_offsets": draw(st.sampled_from([0, [-1, 0], [0, 2]])),
        "patch": draw(st.sampled_from([{}, {"k": 2}, {"k": 4}])),
        "shuffle": False,
    }
    wanted = [
        (*(np.where(np.isfinite(v), v, 0) for v in inputs), target)
        for *inputs, target in each_of(path, non_finite="allow", **table)
        if np.isfinite(np.concatenate([v.ravel() for v in (*inputs, target)])).mean() >= least
    ]
    try:
        kept = each_of(path, non_finite={"min_valid": least}, **table)
    except TooFewSamples:
        kept = []
    assert len(kept) == len(wanted)
    for one, other in zip(kept, wanted, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def each_of(path, **data):
    """The inputs and the target of each sample, in order."""
    found = []
    for batch in dtrain.batches(open_samples(path, **data), batch_size=50):
        arrays = [*(v.numpy() for v in batch.inputs), batch.targets.numpy()]
        found += [tuple(array[i] for array in arrays) for i in range(batch.size)]
    return found


def test_missing_values_of_packed_data_and_labels(write_store, tmp_path):
    packed = vector(np.array([0, -9, 2, 3], "int16"), 2, attributes={"scale_factor": 0.5, "_FillValue": -9})
    label = vector(np.array([0, 1, -1, 1], "int8"), 2, attributes={"_FillValue": -1})
    path = write_store(tmp_path / "s", {"x": packed, "label": label})
    values, left_out, _, _ = found_in(path, inputs=["x"], targets=["label"])
    assert values.ravel().tolist() == [1, 0, 1, 1]  # -100 is a class that is left out, and finite
    assert left_out.by_variable == {"x": 1}


def test_preloaded_and_static_variables_count(write_store, tmp_path):
    x = np.zeros((40, 50), "float32")
    small = np.arange(40, dtype="float32")
    small[3] = NAN
    mask = np.array([1] * 49 + [INF], "float32")
    path = write_store(
        tmp_path / "s",
        {
            "x": {"dims": ("n", "k"), "values": x, "chunks": (4, 50)},
            "small": vector(small, 40),
            "mask": {"dims": ("k",), "values": mask, "chunks": (50,)},
        },
    )
    values, *_ = found_in(path, inputs=["x"], targets=["small"])
    assert np.flatnonzero(values.ravel() == 0).tolist() == [3]
    patched, *_ = found_in(path, inputs=["x", "mask"], targets=["small"], patch={"k": 25})
    assert patched.sum(axis=0).tolist() == [39, 0]  # the second patch of each row holds the infinity
    share, *_ = found_in(path, inputs=["x", "mask"], targets=["small"], non_finite={"min_valid": 0.99})
    assert np.flatnonzero(share.ravel() == 0).tolist() == [3]  # 1 of 101, against 2 of 101
    with pytest.raises(NonFiniteData, match="mask is the same in all samples and holds 1 value") as error:
        found_in(path, inputs=["x", "mask"], targets=["small"])
    assert "min_valid" in error.value.hint


def test_chunks_that_are_not_stored_are_missing_values(write_store, tmp_path):
    x = np.arange(12, dtype="float32")
    path = write_store(tmp_path / "s", {"x": vector(x, 4, fill_value=NAN), "y": vector(x, 4)})
    Path(path, "x", "c", "1").unlink()
    values, *_ = found_in(path, inputs=["x"], targets=["y"])
    assert values.ravel().tolist() == [1] * 4 + [0] * 4 + [1] * 4
    kept = [b.targets.tolist() for b in dtrain.batches(skipping(path), batch_size=4, split="all")]
    assert kept == [[0.0, 1.0, 2.0, 3.0], [8.0, 9.0, 10.0, 11.0]]


def skipping(path, **data):
    return open_samples(path, inputs=["x"], targets=["y"], **{"non_finite": "skip", "split": WHOLE, **data})


def test_nothing_left_is_refused_with_the_arithmetic(write_store, tmp_path):
    x = np.full(10, NAN, "float32")
    path = write_store(tmp_path / "s", {"x": vector(x, 2), "y": vector(x, 2)})
    with pytest.raises(TooFewSamples, match=r"leaves out all of the 10 samples of train.*x \(10\), y \(10\)"):
        next(dtrain.batches(skipping(path), batch_size=2))
    x[:2] = 1.0
    path = write_store(tmp_path / "t", {"x": vector(x, 2), "y": vector(x, 2)})
    samples = skipping(path)
    plan = plan_data(samples, replicas=3, seed=0)
    values = np.isfinite(x).astype(np.uint8)[:, None]
    with pytest.raises(TooFewSamples, match="2 training samples for average.replicas = 3"):
        counted(samples, plan, values, "x (8)")


def test_statistics_are_those_of_finite_values(write_store, tmp_path):
    x = np.array([1.0, NAN, 3.0, INF, 5.0, 1e300])
    path = write_store(tmp_path / "s", {"x": vector(x, 2), "y": vector(np.ones(6), 2)})
    samples = skipping(path, normalize=["x"])
    plan = plan_data(samples, replicas=1, seed=0)
    moments = partition_moments(UnitReader(samples), cell_anchors(plan, "train"), ["x"])["x"]
    assert (float(moments.count[0]), float(moments.mean[0])) == (3.0, 3.0)
    assert float(moments.std[0]) == pytest.approx(np.std([1.0, 3.0, 5.0]))


def test_missing_inputs_are_0_after_normalising_and_targets_stay(write_store, tmp_path):
    x = np.array([1.0, NAN, 3.0, INF, 5.0, 7.0])
    y = np.array([0.0, 1.0, NAN, 3.0, 4.0, 5.0])
    path = write_store(tmp_path / "s", {"x": vector(x, 2), "y": vector(y, 4)})
    samples = skipping(path, non_finite={"min_valid": 0.5}, normalize=["x"], shuffle=False)
    (batch,) = dtrain.batches(samples, batch_size=6)
    std = np.std([1.0, 3.0, 5.0, 7.0])
    np.testing.assert_allclose(batch.inputs[0], np.array([-3.0, 0.0, -1.0, 0.0, 1.0, 3.0]) / std, rtol=1e-6)
    np.testing.assert_array_equal(batch.targets, y.astype("float32"))


def test_filling_changes_only_what_is_not_finite(monkeypatch):
    monkeypatch.setattr("dtrain.data.load.gather.PIECE_BYTES", 8)
    values = np.array([[1, NAN, 3], [INF, -INF, 6e30]], "float32")
    fill_non_finite(values)
    assert values.tolist() == [[1, 0, 3], [0, 0, np.float32(6e30)]]
    both = np.array([[INF, -INF]], "float32")  # their sum is not a number, without a warning
    fill_non_finite(both)
    assert both.tolist() == [[0, 0]]


@pytest.mark.parametrize("share", [0, -0.5, 1.5, "half", NAN])
def test_a_share_lies_above_0_and_up_to_1(share):
    with pytest.raises(InvalidConfig, match="data.non_finite.min_valid"):
        TrainConfig(data={"non_finite": {"min_valid": share}})
    assert TrainConfig(data={"non_finite": {"min_valid": 1}}).data.min_valid == 1.0


def test_unknown_words_are_refused_with_what_is_allowed():
    with pytest.raises(InvalidConfig, match="'skip'.*table") as error:
        TrainConfig(data={"non_finite": "skipp"})
    assert 'did you mean "skip"' in str(error.value)
    with pytest.raises(InvalidConfig, match="min_vaild: no such key"):
        TrainConfig(data={"non_finite": {"min_vaild": 0.5}})
