"""Splits by group: no group lies in two splits, and shares of rows are met as well as groups allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dtrain
from dtrain.data.given import find_given, found_groups, split_shares
from dtrain.data.groups import Groups, count_groups, deal_groups
from dtrain.data.plan.labels import LABELS, LEFT_OUT, REST, from_text
from dtrain.data.plan.partition import plan_data
from dtrain.data.plan.summary import describe_plan
from dtrain.data.samples import Samples
from dtrain.data.source import open_samples
from dtrain.errors import InvalidConfig, TooFewSamples, UnsuitableVariable
from tests.data.layouts.fixtures import write_anndata

SPLITS = ("train", "val", "test")


def groups_of(*sizes: int, first: int = 0) -> Groups:
    return Groups(np.arange(first, first + len(sizes), dtype=np.uint64), np.array(sizes, np.int64))


# Dealt ------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 50), min_size=3, max_size=60),
    shares=st.sampled_from([{"val": 0.1, "test": 0.1}, {"val": 0.3, "test": 0.2}, {"val": 0.0, "test": 0.4}]),
    seed=st.integers(0, 99),
)
def test_shares_are_met_within_half_a_group(sizes: list[int], shares: Mapping[str, float], seed: int) -> None:
    dealt = deal_groups([groups_of(*sizes)], shares, seed)
    rows = np.array(sizes)
    assert (dealt.labels == REST).any()
    for name, share in shares.items():
        own = rows[dealt.labels == LABELS[name]]
        assert len(own) > 0 or share == 0
        spare = len(sizes) - np.count_nonzero(dealt.labels != REST)
        if share and len(own) > 1 and spare > 1:
            assert abs(own.sum() - share * rows.sum()) <= rows.max() / 2


def test_large_groups_by_hand() -> None:
    # of 100 rows 10 are asked for: a group of 96 never fits, and the smallest is taken where none does
    dealt = deal_groups([groups_of(96, 4)], {"val": 0.0, "test": 0.1}, 0)
    assert dealt.labels.tolist() == [REST, LABELS["test"]]
    dealt = deal_groups([groups_of(50, 30, 20)], {"val": 0.1, "test": 0.1}, 0)
    assert dealt.labels.tolist() == [REST, LABELS["val"], LABELS["test"]]


def test_the_seed_draws_the_groups() -> None:
    labels = [deal_groups([groups_of(*[5] * 100)], {"val": 0.1, "test": 0.2}, seed).labels for seed in (0, 0, 1)]
    assert np.array_equal(labels[0], labels[1])
    assert not np.array_equal(labels[0], labels[2])
    assert [np.count_nonzero(labels[0] == LABELS[name]) for name in ("val", "test")] == [10, 20]


def test_a_group_of_several_stores_lies_in_one_split() -> None:
    stores = [groups_of(*[3] * 40), groups_of(*[7] * 40, first=20)]
    dealt = deal_groups(stores, {"val": 0.2, "test": 0.2}, 5)
    assert len(dealt.keys) == 60
    assert np.array_equal(dealt.of(stores[0].keys)[20:], dealt.of(stores[1].keys)[:20])


@pytest.mark.parametrize(("sizes", "shares"), [((9, 9), {"val": 0.1, "test": 0.1}), ((9,), {"val": 0.0, "test": 0.1})])
def test_each_split_needs_a_group(sizes: tuple[int, ...], shares: Mapping[str, float]) -> None:
    needed = 1 + sum(share > 0 for share in shares.values())
    with pytest.raises(TooFewSamples, match=f"there are {len(sizes)} groups, for {needed} splits"):
        deal_groups([groups_of(*sizes)], shares, 0)


# Read -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cells(write_store: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Write x(cell), the number of each row, and donor(cell)."""

    def write(donors: Any, name: str = "s", **options: Any) -> Path:
        donors = np.asarray(donors)
        x = {"dims": ("cell",), "values": np.arange(len(donors), dtype="float32"), "chunks": (100,)}
        donor = {"dims": ("cell",), "values": donors, "chunks": (70,), **options}
        return write_store(tmp_path / name, {"x": x, "donor": donor})

    return write


def opened(path: Path, **data: Any) -> Samples:
    split = {"by": "donor", "val": 0.2, "test": 0.3, **data.pop("split", {})}
    return open_samples(path, inputs=["x"], targets=["x"], split=split, **data)


def rows_of(samples: Samples, split: Any) -> list[int]:
    seen = [batch.inputs[0].numpy() for batch in dtrain.batches(samples, split=split, batch_size=1000)]
    return sorted(np.concatenate(seen).astype(int).ravel().tolist())


DONORS = {
    "int64": lambda number: number * 10**12 - 5,
    "int8": lambda number: (number % 120 - 60).astype("int8"),
    "uint16": lambda number: number.astype("uint16"),
    "bool": lambda number: number % 2 == 0,
    "texts": lambda number: np.array([f"donor {n}" for n in number.tolist()]),
}


@pytest.mark.filterwarnings("ignore")  # zarr's own, of strings that version 3 does not specify
@pytest.mark.parametrize("kind", DONORS)
def test_every_row_is_in_the_split_of_its_group(cells: Callable[..., Path], kind: str) -> None:
    donors = DONORS[kind](np.random.default_rng(0).integers(0, 60, 1000))
    samples = opened(cells(donors), split={"val": 0.0} if kind == "bool" else {})
    names = SPLITS if kind != "bool" else ("train", "test")
    rows = {name: rows_of(samples, name) for name in names}
    assert sorted(row for own in rows.values() for row in own) == list(range(1000))
    groups = {name: set(donors[own].tolist()) for name, own in rows.items()}
    assert sum(map(len, groups.values())) == len(set(donors.tolist()))
    found = find_given(samples, 0)
    assert {name: held.groups for name, held in found.held.items()} == {n: len(own) for n, own in groups.items()}
    assert {name: held.places for name, held in found.held.items()} == {n: len(own) for n, own in rows.items()}
    assert kind == "bool" or (abs(len(rows["val"]) - 200) <= 15 and abs(len(rows["test"]) - 300) <= 15)


def test_very_many_groups(cells: Callable[..., Path]) -> None:
    donors = np.random.default_rng(0).integers(0, 90_000, 300_000)
    samples = opened(cells(donors, chunks=(300_000,)))
    found = find_given(samples, 0)
    labels = from_text(found.splits.rows)
    assert len(set(donors.tolist())) > 65_536
    table = np.full(90_000, 255, np.uint8)
    table[donors] = labels
    assert np.array_equal(table[donors], labels)  # one label a group
    assert abs(np.count_nonzero(labels == LABELS["test"]) - 90_000) <= 10
    assert abs(np.count_nonzero(labels == LABELS["val"]) - 60_000) <= 10


def test_windows_lie_in_one_split(cells: Callable[..., Path]) -> None:
    donors = np.repeat(np.arange(20), 50)
    samples = opened(cells(donors), input_offsets=[-3, 0])
    given_splits = find_given(samples, 0).splits
    plan = plan_data(samples, replicas=3, seed=0, given=given_splits)
    runs = 1 + np.count_nonzero(np.diff(from_text(given_splits.rows)))
    assert describe_plan(samples, plan)["dropped"] == {"split": 3 * runs, "gaps": 0, "missing": 0, "left_out": 0}


def test_a_group_of_rows_that_are_not_used_is_left_out(cells: Callable[..., Path]) -> None:
    donors = np.repeat(np.arange(30), 10)
    samples = opened(cells(donors))
    absent = ((280, 300), (0, 10))
    own = count_groups(samples, absent)
    assert own.keys.tolist() == list(range(1, 28))
    found = found_groups(samples, deal_groups([own], split_shares(samples), 0), own)
    labels = from_text(found.splits.rows)
    assert (labels == LEFT_OUT).tolist() == [donor in (0, 28, 29) for donor in donors.tolist()]
    assert sum(held.places for held in found.held.values()) == 270


def test_chunks_of_groups_that_are_not_stored_are_said(cells: Callable[..., Path]) -> None:
    path = cells(np.repeat(np.arange(30), 10))
    (path / "donor/c/1").unlink()
    assert find_given(opened(path), 0).note == "1 chunk of donor not stored: the fill value is a group"


@pytest.mark.filterwarnings("ignore")
def test_a_category_is_known_by_its_name_in_every_store(tmp_path: Path) -> None:
    def of(name: str, names: list[str]) -> Samples:
        codes = np.where(np.arange(30) == 7, -1, np.arange(30) % len(names)).astype("int8")
        path = write_anndata(tmp_path / name, codes=codes, names=names)
        split = {"by": "obs/cell_type", "val": 0.2, "test": 0.2}
        return open_samples(path, inputs=["X"], targets=["obs/age"], split=split)

    here, there = of("a", ["d", "a", "b", "c"]), of("b", ["b", "e", "a", "f", "g"])
    own = [count_groups(samples) for samples in (here, there)]
    assert [len(groups.keys) for groups in own] == [5, 6]  # and the rows without a category
    assert len(set(own[0].keys.tolist()) & set(own[1].keys.tolist())) == 3  # a, b and none
    dealt = deal_groups(own, split_shares(here), 0)
    labels = [
        from_text(found_groups(s, dealt, groups).splits.rows) for s, groups in zip((here, there), own, strict=True)
    ]
    assert labels[0][1] == labels[1][2]  # a
    assert labels[0][2] == labels[1][0]  # b
    assert labels[0][7] == labels[1][7]  # none


def test_codes_of_too_many_categories_are_of_one_store_only() -> None:
    groups = Groups(np.arange(9, dtype=np.uint64), np.ones(9, np.int64), are_codes=True)
    assert len(deal_groups([groups], {"val": 0.1, "test": 0.1}, 0).keys) == 9
    with pytest.raises(UnsuitableVariable, match="one code may stand for different groups"):
        deal_groups([groups, groups], {"val": 0.1, "test": 0.1}, 0)


@pytest.mark.parametrize(
    ("donors", "by", "error", "said"),
    [
        (np.arange(30) // 5, "donr", InvalidConfig, 'data.split.by = "donr": '),
        (np.arange(30) // 5, "donr", InvalidConfig, 'did you mean "donor"?'),
        (np.zeros((30, 2), int), "donor", InvalidConfig, "it has the dimensions cell, k of lengths [30, 2]"),
        (np.arange(30) / 5, "donor", UnsuitableVariable, "has dtype float64; groups are integers, bools or texts"),
    ],
)
def test_what_is_no_group(cells: Callable[..., Path], donors: Any, by: str, error: type[Exception], said: str) -> None:
    options = {"dims": ("cell", "k"), "chunks": (30, 2)} if donors.ndim == 2 else {}
    with pytest.raises(error) as refused:
        find_given(opened(cells(donors, **options), split={"by": by}), 0)
    assert said in str(refused.value)
    assert str(refused.value).count("/s: ") <= 1
