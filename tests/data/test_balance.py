"""Classes that are balanced: counted over the training split, and repeated in it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import dtrain
from dtrain.data.balance import Balance, balanced, count_classes, join_classes
from dtrain.data.plan.labels import REST, TEST, VAL, GivenSplits, as_text
from dtrain.data.plan.multiplicity import multiplicity_text
from dtrain.data.plan.partition import cell_anchors, plan_data
from dtrain.data.source import open_samples
from dtrain.errors import InvalidConfig, UnsuitableVariable
from tests.data.helpers import WHOLE, vector


def store_of(write_store, path, classes, **options):
    x = np.arange(len(classes), dtype="float32")
    return write_store(path, {"x": vector(x, 4), "c": vector(np.asarray(classes), 5, **options)})


def opened(path, **data):
    return open_samples(path, **{"inputs": ["x"], "targets": ["x"], "balance": "c", "split": WHOLE, **data})


def counted(path, given=None, **data):
    """(classes, multiplicities by row) of a store."""
    samples = opened(path, **data)
    plan = plan_data(samples, replicas=1, seed=0, **({} if given is None else {"given": given}))
    balance = count_classes(samples, plan)
    return balance, balanced(samples, plan, balance)


def test_samples_repeat_by_the_rounded_ratio_to_the_largest_class(write_store, tmp_path):
    classes = [0] * 10 + [1] * 4 + [2] * 3 + [3]
    balance, values = counted(store_of(write_store, tmp_path / "s", classes))
    assert balance.counts == {0: 10, 1: 4, 2: 3, 3: 1}
    assert balance.factors == {0: 1, 1: 2, 2: 3, 3: 10}  # 2.5 is rounded to the even number, as round() does
    assert values.ravel().tolist() == [1] * 10 + [2] * 4 + [3] * 3 + [10]
    assert str(balance) == "by c: 0: 10 x 1, 1: 4 x 2, 2: 3 x 3, 3: 1 x 10"


def test_a_sample_comes_at_most_255_times(write_store, tmp_path):
    balance, values = counted(store_of(write_store, tmp_path / "s", [7] * 999 + [8]))
    assert values.max() == 255
    assert str(balance) == "by c: 7: 999 x 1, 8: 1 x 255 (a sample comes at most 255 times)"


def test_classes_are_counted_in_the_training_split(write_store, tmp_path):
    classes = np.repeat([0, 1, 1, 0], [4, 2, 8, 6])
    labels = as_text(np.repeat([REST, VAL, TEST], [6, 8, 6]).astype(np.uint8))
    path = store_of(write_store, tmp_path / "s", classes)
    balance, values = counted(path, GivenSplits(rows=labels), split={"val": 0.0, "test": 0.0})
    assert balance.counts == {0: 4, 1: 2}
    samples = opened(path)
    plan = plan_data(samples, replicas=1, seed=0, given=GivenSplits(rows=labels))
    plan = replace(plan, multiplicity=multiplicity_text(values))
    assert cell_anchors(plan, "train").num_samples == 4 + 2 * 2
    assert cell_anchors(plan, "val").num_samples == 8


def test_samples_that_are_left_out_are_not_counted(write_store, tmp_path):
    classes, x = np.array([0] * 8 + [1] * 4), np.arange(12, dtype="float32")
    x[[0, 1, 9, 10, 11]] = np.nan
    path = write_store(tmp_path / "s", {"x": vector(x, 4), "c": vector(classes, 5)})
    seen = Counter()
    for batch in dtrain.batches(opened(path, non_finite="skip"), batch_size=5):
        seen.update(batch.targets.tolist())
    assert seen == {**dict.fromkeys(map(float, range(2, 8)), 1), 8.0: 6}


@pytest.mark.parametrize("patch", [{}, {"k": 2}])
def test_windows_strides_and_patches(write_store, tmp_path, patch):
    classes = np.arange(20) % 4 == 0
    x = np.arange(80, dtype="float32").reshape(20, 4)
    path = write_store(
        tmp_path / "s", {"x": {"dims": ("n", "k"), "values": x, "chunks": (4, 4)}, "c": vector(classes, 3)}
    )
    balance, values = counted(path, patch=patch, stride=2, input_offsets=[-1, 0])
    tiles = 2 if patch else 1
    # anchors 2, 4, ... 18, of which 4, 8, 12 and 16 are of the class
    assert balance.counts == {0: 5 * tiles, 1: 4 * tiles}
    assert values.shape == (10, tiles)
    balance, values = counted(path, targets=["c"], patch=patch, stride=2, target_offsets=2)
    assert balance.counts == {0: 5 * tiles, 1: 4 * tiles}  # of anchors 0 to 16, the rows 2 to 18 are shown
    assert balance.factors == {0: 1, 1: 1}


def test_units_as_blocks(write_store, tmp_path):
    x = np.zeros((3, 8), "float32")
    path = write_store(
        tmp_path / "s",
        {"x": {"dims": ("n", "k"), "values": x, "chunks": (1, 2)}, "c": vector(np.array([1, 0, 0]), 3)},
    )
    samples = opened(path, patch={"k": 2}, split={"patches": True, "val": 0.25, "test": 0.0})
    plan = plan_data(samples, replicas=1, seed=0)
    assert plan.blocks
    balance = count_classes(samples, plan)
    assert balance.counts == {1: 3, 0: 6}  # a place of the four is held out in all rows
    plan = replace(plan, multiplicity=multiplicity_text(balanced(samples, plan, balance)))
    assert cell_anchors(plan, "train").num_samples == 12
    assert count_classes(samples, replace(plan, multiplicity="")) == balance


def test_missing_classes_come_once(write_store, tmp_path):
    path = store_of(write_store, tmp_path / "s", np.array([5, 5, -1, 6, 5, 5, -1]), attributes={"_FillValue": -1})
    balance, values = counted(path, targets=["c"])
    assert (balance.counts, balance.missing) == ({5: 4, 6: 1}, 2)
    assert values.ravel().tolist() == [1, 1, 1, 4, 1, 1, 1]
    assert "without a class: 2 x 1" in str(balance)


def test_classes_of_several_stores_are_counted_together():
    joined = join_classes([Balance("c", {0: 10, 1: 2}, 1), Balance("c", {1: 8, 2: 5}, 0)])
    assert joined == Balance("c", {0: 10, 1: 10, 2: 5}, 1)
    assert joined.factors == {0: 1, 1: 1, 2: 2}


@pytest.mark.parametrize(
    ("by", "text"),
    [
        ("cc", r"data.balance = \"cc\".*did you mean \"c\""),
        ("f", "has dtype float32; classes are integers, bools or codes of categories"),
        ("p", "has dtype int16, packed; classes are"),
        ("w", "it has the dimensions n, k"),
    ],
)
def test_what_holds_no_classes_is_refused(write_store, tmp_path, by, text):
    x = np.arange(6, dtype="float32")
    arrays = {
        "x": vector(x, 4),
        "c": vector(np.arange(6), 5),
        "f": vector(x, 5),
        "p": vector(np.arange(6, dtype="int16"), 5, attributes={"scale_factor": 2.0}),
        "w": {"dims": ("n", "k"), "values": np.zeros((6, 2), "int16"), "chunks": (6, 2)},
    }
    path = write_store(tmp_path / "s", arrays)
    with pytest.raises((InvalidConfig, UnsuitableVariable), match=text) as error:
        counted(path, balance=by)
    assert error.value.hint


def test_too_many_classes_are_refused(write_store, tmp_path, monkeypatch):
    monkeypatch.setattr("dtrain.data.balance.MOST_CLASSES", 5)
    with pytest.raises(UnsuitableVariable, match="more than 5 classes"):
        counted(store_of(write_store, tmp_path / "s", np.arange(6)))


def test_repeats_of_a_pass_are_spread_and_resume_exactly(write_store, tmp_path):
    path = store_of(write_store, tmp_path / "s", [0] * 60 + [1] * 6)
    samples = opened(path)
    whole = [batch.targets.tolist() for batch in dtrain.batches(samples, batch_size=7, epochs=2)]
    seen = Counter(value for batch in whole for value in batch)
    assert seen == {**dict.fromkeys(map(float, range(60)), 2), **dict.fromkeys(map(float, range(60, 66)), 20)}
    with dtrain.batches(samples, batch_size=7, epochs=2) as stream:
        for _ in range(5):
            next(stream)
        cursor = stream.cursor
    rest = [batch.targets.tolist() for batch in dtrain.batches(samples, batch_size=7, epochs=1, cursor=cursor)]
    assert rest == whole[5 : 5 + len(rest)]
    places = [i for i, value in enumerate(v for batch in whole[: len(whole) // 2] for v in batch) if value == 60.0]
    assert max(np.diff(places)) > 1
