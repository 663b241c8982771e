"""Splits that are given by labels of rows and patches hold exactly these, and no window or patch lies in two."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dtrain.data.plan.anchors import count_left_out, count_samples
from dtrain.data.plan.labels import (
    LABELS,
    LEFT_OUT,
    REST,
    TEST,
    VAL,
    GivenSplits,
    Labels,
    as_text,
    count_runs,
    from_text,
    places_of,
    range_labels,
    runs_of,
    same_labels,
    tile_labels,
)
from dtrain.data.plan.partition import cell_anchors, eval_partitions, plan_data, train_partitions
from dtrain.data.plan.splits import SplitName, shares_met
from dtrain.data.plan.summary import dropped_samples
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Samples
from dtrain.data.tiles import Cut
from dtrain.errors import TooFewSamples
from tests.data.helpers import make_samples
from tests.data.plan.helpers import NEXT_BLOCK, joined, samples_of, small_problems

SPLITS = tuple(name for name in get_args(SplitName) if name != "all")


def labels_of(text: str) -> Labels:
    """``"..vv-tt"``: training, validation, left out, test."""
    return np.array([".vt-".index(letter) for letter in text], np.uint8)


def shown(labels: Labels) -> str:
    return "".join(".vt-"[label] for label in labels.tolist())


# By hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranges", "gap", "expected"),
    [
        ({"val": [(9, 13)], "test": [(14, 20)]}, 1, "........-vvvv-tttttt"),
        ({"val": [(9, 13)], "test": [(14, 20)]}, 0, ".........vvvv.tttttt"),
        ({"val": [(9, 13)], "test": [(13, 20)]}, 2, ".......--vv--ttttttt"),
        ({"test": [(0, 3)]}, 4, "ttt----............."),
        ({"val": [(2, 4)], "test": [(5, 6)]}, 9, "-----t---------....."),
        ({"val": [(17, 20)]}, 5, "............-----vvv"),
        ({"val": [(0, 20)]}, 0, "vvvvvvvvvvvvvvvvvvvv"),
        ({"val": [(2, 4), (6, 8)], "test": [(12, 14), (19, 20)]}, 3, "--vv--vv----tt-----t"),
        ({}, 3, "...................."),
    ],
)
def test_a_gap_is_left_out_on_each_side_and_test_comes_first(ranges: Any, gap: int, expected: str) -> None:
    assert shown(range_labels(20, ranges, gap)) == expected


@pytest.mark.parametrize(
    ("length", "size", "places", "expected"),
    [
        (12, 4, "....vvvvtttt", ".vt"),
        (12, 4, "...vvvvvtttt", "-vt"),
        (12, 4, "....vvv-tttt", ".-t"),
        (10, 4, "....vvvvtt", ".v-"),  # the last patch begins at 6: it would reach into validation
        (10, 4, "....tttttt", ".tt"),
        (3, 1, ".v-", ".v-"),
    ],
)
def test_a_patch_belongs_to_the_split_that_holds_it_whole(length: int, size: int, places: str, expected: str) -> None:
    assert shown(tile_labels(labels_of(places), Cut("x", length, size))) == expected


@given(text=st.text(".vt-", min_size=1, max_size=40), ends=st.tuples(st.integers(0, 40), st.integers(0, 40)))
def test_labels_as_text(text: str, ends: tuple[int, int]) -> None:
    labels = labels_of(text)
    packed = as_text(labels)
    assert np.array_equal(from_text(packed), labels)
    assert count_runs(packed) == 1 + sum(a != b for a, b in pairwise(text))
    assert same_labels(packed, as_text(labels.copy()))
    assert not same_labels(packed, "")
    assert not same_labels(packed, as_text(labels_of(text + ".")))
    for label in (REST, VAL, TEST, LEFT_OUT):
        begins, stops = runs_of(packed, label)
        runs = list(zip(begins.tolist(), stops.tolist(), strict=True))
        assert joined(list(range(*run)) for run in runs) == np.flatnonzero(labels == label).tolist()
        assert places_of(packed, label).tolist() == np.flatnonzero(labels == label).tolist()
        assert all(before < start for (_, before), (start, _) in pairwise(runs))
    start, stop = sorted(min(end, len(text)) for end in ends)
    plan = replace(plan_data(make_samples(len(text), 3), replicas=1, seed=0), row_labels=packed)
    for split, label in (("train", REST), ("val", VAL), ("test", TEST)):
        assert plan.is_of(split, start, stop).tolist() == (labels[start:stop] == label).tolist()  # type: ignore[arg-type]


# Plans ------------------------------------------------------------------------------------------------------


def windows_by_hand(plan: DataPlan, labels: Labels, label: int) -> list[int]:
    """The anchors that lie, with all rows of their windows, in one run of rows with a label, without a jump."""
    jumps, lost = set(plan.jump_rows.tolist()), {row for run in plan.absent for row in range(*run)}
    found = []
    for block, anchor in product(range(len(plan.grid)), range(0, plan.num_samples, plan.stride)):
        rows = range(anchor + plan.first_offset, anchor + plan.last_offset + 1)
        between = range(min(anchor, rows[0]), max(anchor, rows[-1]) + 1)
        is_there = plan.first_row <= rows[0] and rows[-1] < plan.num_samples and plan.first_row <= anchor
        is_whole = is_there and between[-1] < plan.num_samples and not jumps.intersection(rows[1:])
        if is_whole and not lost.intersection(between) and all(labels[row] == label for row in between):
            found.append(block * NEXT_BLOCK + anchor)
    return found


def tiles_by_hand(plan: DataPlan, anchors: list[int]) -> int:
    """The samples of some anchors: each has the patches of its block."""
    in_block = plan.grid.tiles_in(np.arange(len(plan.grid))) if plan.blocks else [plan.patches]
    return sum(int(in_block[anchor // NEXT_BLOCK]) for anchor in anchors)


def rows_of(plan: DataPlan, anchors: list[int]) -> set[int]:
    return {a + offset for a in anchors for offset in range(plan.first_offset, plan.last_offset + 1)}


@st.composite
def labelled(draw: Any) -> tuple[DataPlan, Labels]:
    """Draw a plan whose rows have labels, and these; shares are drawn from the rest."""
    samples, replicas, seed, options = draw(small_problems())
    names = draw(st.sampled_from([("val", "test"), ("val",), ("test",)]))
    letters = ".-" + "".join(name[0] for name in names)
    runs = draw(st.lists(st.tuples(st.sampled_from(letters), st.integers(1, 15)), min_size=1, max_size=8))
    text = "".join(letter * count + "." * count for letter, count in runs).ljust(samples.num_samples, ".")[
        : samples.num_samples
    ]
    given = GivenSplits(rows=as_text(labels_of(text)))
    for shares, number in ((dict.fromkeys(names, 0.0), replicas), ({"val": 0.0, "test": 0.0}, 1)):
        split = samples.config.split.model_copy(update=shares)
        without = replace(samples, config=samples.config.model_copy(update={"split": split}))
        try:
            return plan_data(without, replicas=number, seed=seed, given=given, **options), labels_of(text)
        except TooFewSamples:
            continue
    assume(False)
    raise AssertionError


@given(problem=labelled())
def test_given_splits_hold_their_rows_and_no_window_lies_in_two(problem: tuple[DataPlan, Labels]) -> None:
    plan, labels = problem
    anchors = {name: sorted(samples_of(cell_anchors(plan, name))) for name in SPLITS}
    for name, label in LABELS.items():
        if plan.label_of(name) == label:  # type: ignore[arg-type]
            by_hand = windows_by_hand(replace(plan, absent=()), labels, label)
            assert set(anchors[name]) <= set(by_hand)
            assert plan.absent or anchors[name] == by_hand
    rest = joined(anchors[name] for name in SPLITS if plan.label_of(name) == REST)
    assert len(set(rest)) == len(rest)
    assert set(rest) <= set(windows_by_hand(replace(plan, absent=()), labels, REST))
    if plan.first_offset == plan.last_offset == 0 and not plan.absent:
        assert sorted(rest) == windows_by_hand(plan, labels, REST)
    rows = [rows_of(plan, anchors[name]) for name in SPLITS]
    assert sum(map(len, rows)) == len(set().union(*rows))
    assert sorted(joined(samples_of(part) for part in train_partitions(plan))) == anchors["train"]
    for name in ("val", "test"):
        assert sorted(joined(samples_of(part) for part in eval_partitions(plan, name))) == anchors[name]  # type: ignore[arg-type]


@given(problem=labelled())
def test_each_sample_is_in_one_split_or_counted_as_left_out(problem: tuple[DataPlan, Labels]) -> None:
    plan, labels = problem
    counts = {name: count_samples(plan, name).samples for name in SPLITS}
    assert counts == {name: tiles_by_hand(plan, samples_of(cell_anchors(plan, name))) for name in SPLITS}
    dropped = dropped_samples(plan)
    total = len([anchor for anchor in range(0, plan.num_samples, plan.stride) if anchor >= plan.first_row])
    assert sum(counts.values()) + sum(dropped.values()) == total * plan.patches
    assert min(dropped.values()) >= 0
    anchors = [a for a in samples_of(cell_anchors(plan, "all")) if labels[a % NEXT_BLOCK] == LEFT_OUT]
    assert dropped["left_out"] == count_left_out(plan) == tiles_by_hand(plan, anchors)


@given(
    data=st.data(),
    count=st.integers(10, 200),
    rows=st.integers(1, 40),
    gap=st.integers(0, 12),
    offsets=st.sampled_from([0, [-1, 0], [-3, 2], {"start": 1, "stop": 5}]),
    stride=st.sampled_from([1, 1, 3]),
    replicas=st.integers(1, 4),
)
def test_samples_of_different_splits_are_more_than_the_gap_apart(
    data: st.DataObject, count: int, rows: int, gap: int, offsets: Any, stride: int, replicas: int
) -> None:
    ends = sorted(data.draw(st.lists(st.integers(0, count), min_size=4, max_size=4, unique=True)))
    names = data.draw(st.permutations(["val", "test"]))
    ranges = dict(zip(names, [(ends[0], ends[1]), (ends[2], ends[3])], strict=True))
    labels = range_labels(count, {name: [own] for name, own in ranges.items()}, gap)
    samples = make_samples(count, rows, input_offsets=offsets, stride=stride)
    try:
        plan = plan_data(samples, replicas=replicas, seed=1, given=GivenSplits(rows=as_text(labels)))
    except TooFewSamples:
        assume(False)
    found = {name: np.array(sorted(rows_of(plan, samples_of(cell_anchors(plan, name))))) for name in SPLITS}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        distances = np.abs(found[one][:, None] - found[other][None, :])
        assert distances.size == 0 or distances.min() > gap
    for name, (start, stop) in ranges.items():
        assert all(start <= row < stop for row in found[name].tolist())
    outside = [row for row in range(count) if all(not s - gap <= row < e + gap for s, e in ranges.values())]
    assert set(found["train"].tolist()) <= set(outside)
    assert stride > 1 or offsets != 0 or found["train"].tolist() == outside


def test_a_range_that_ends_within_a_unit_ends_there() -> None:
    labels = range_labels(100, {"val": [(37, 41)], "test": [(71, 100)]}, 3)
    plan = plan_data(make_samples(100, 25), replicas=2, seed=0, given=GivenSplits(rows=as_text(labels)))
    assert sorted(samples_of(cell_anchors(plan, "val"))) == [37, 38, 39, 40]
    assert sorted(samples_of(cell_anchors(plan, "test"))) == list(range(71, 100))
    assert sorted(samples_of(cell_anchors(plan, "train"))) == [*range(34), *range(44, 68)]
    assert dropped_samples(plan) == {"split": 0, "gaps": 0, "missing": 0, "left_out": 9}


def test_shares_beside_a_range_are_shares_of_the_rest() -> None:
    labels = range_labels(1000, {"test": [(900, 1000)]}, 0)
    samples = make_samples(1000, 10, val=0.2)
    plan = plan_data(samples, replicas=2, seed=0, given=GivenSplits(rows=as_text(labels)))
    counts = {name: count_samples(plan, name).samples for name in SPLITS}
    assert counts == {"train": 720, "val": 180, "test": 100}
    assert shares_met(plan)
    assert max(samples_of(cell_anchors(plan, "val"))) < 900


def test_a_split_of_which_no_window_is_left_is_refused() -> None:
    labels = range_labels(100, {"test": [(50, 53)]}, 0)
    samples: Samples = make_samples(100, 10, input_offsets=[-3, 0])
    with pytest.raises(TooFewSamples, match=r"of 100 rows holds no sample with its whole window of 4 rows"):
        plan_data(samples, replicas=1, seed=0, given=GivenSplits(rows=as_text(labels)))
