"""No row of the val and test splits of given samples has been trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.plan.evaluation import cut_as, plan_evaluation
from dtrain.data.plan.partition import cell_anchors, plan_data, plan_held_out, train_partitions
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Samples
from dtrain.errors import InvalidConfig
from tests.data.helpers import make_samples


def samples_of(rows: int, chunk: int = 4, **config: Any) -> Samples:
    return make_samples(rows, chunk, **{"val": 0.1, "test": 0.2, **config})


def rows_of(plan: DataPlan, split: Any) -> set[int]:
    part = cell_anchors(plan, split)
    return {int(first) + i * plan.stride for first, n in zip(part.first, part.count, strict=True) for i in range(n)}


def trained_on(plan: DataPlan) -> set[int]:
    """The rows that a window of some replica reaches."""
    anchors = {
        int(first) + i * plan.stride
        for part in train_partitions(plan)
        for first, n in zip(part.first, part.count, strict=True)
        for i in range(n)
    }
    return {anchor + offset for anchor in anchors for offset in range(plan.first_offset, plan.last_offset + 1)}


@given(
    rows=st.integers(60, 400),
    chunks=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    replicas=st.integers(1, 5),
    seed=st.integers(0, 99),
    offset=st.integers(0, 2),
    known=st.booleans(),
)
def test_as_many_rows_in_any_chunks_keep_the_splits(
    rows: int, chunks: tuple[int, int], replicas: int, seed: int, offset: int, known: bool
) -> None:
    trained = plan_data(samples_of(rows, chunks[0]), replicas=replicas, seed=seed)
    other = samples_of(rows, chunks[1], target_offsets=offset)
    for name in ("val", "test"):
        plan, cut = plan_evaluation(other, name, (trained,), None, 0 if known else None)  # type: ignore[arg-type]
        assert cut == name
        assert plan.source == other.fingerprint
        found = {anchor + shift for anchor in rows_of(plan, cut) for shift in (0, offset)}
        assert not found & trained_on(trained)
        if not offset:
            assert rows_of(plan, cut) == rows_of(trained, name)


def test_a_run_of_several_stores_has_the_splits_of_each() -> None:
    first, second = samples_of(100, 4), samples_of(120, 4)
    plans = tuple(plan_data(each, replicas=2, seed=3) for each in (first, second))
    for number, samples in enumerate((first, second)):
        for store in (number, None):
            assert plan_evaluation(samples, "test", plans, None, store) == (plans[number], "test")
            assert plan_evaluation(samples, "all", plans, None, store) == (plans[number], "all")


def test_a_copy_of_one_of_several_stores_of_equal_length_must_be_named() -> None:
    stores = samples_of(100, 4), samples_of(100, 10)
    plans = tuple(plan_data(each, replicas=2, seed=3) for each in stores)
    for number, samples in enumerate(stores):  # known by its chunks
        assert plan_evaluation(samples, "test", plans, None, None) == (plans[number], "test")
    with pytest.raises(InvalidConfig, match="as many rows as several stores of the run"):
        plan_evaluation(samples_of(100, 7), "test", plans, None, None)
    assert plan_evaluation(samples_of(100, 7), "test", plans, None, 1)[0].unit_rows == plans[1].unit_rows
    assert plan_evaluation(samples_of(100, 7), "test", plans[:1] * 2, None, None)[1] == "test"  # the same splits


def test_rows_that_the_run_does_not_know_are_evaluated_whole_only() -> None:
    trained = plan_data(samples_of(100), replicas=2, seed=3)
    grown = samples_of(130)
    with pytest.raises(InvalidConfig, match=r"its rows 0 to 99; the samples hold rows 0 to 129\. Their split val may"):
        plan_evaluation(grown, "val", (trained,), None, 0)
    assert plan_evaluation(grown, "all", (trained,), None, 0) == (plan_held_out(grown, trained), "all")
    plan, cut = plan_evaluation(grown, "val", (trained,), None, None)  # another store
    assert (plan, cut) == (plan_data(grown, replicas=1, seed=3), "val")


def test_the_validation_store_is_all_val() -> None:
    trained, samples = plan_data(samples_of(100), replicas=2, seed=3), samples_of(60)
    held_out = plan_held_out(samples, trained)
    for split in ("val", "all"):
        assert plan_evaluation(samples, split, (trained,), held_out, "held_out") == (held_out, "all")  # type: ignore[arg-type]
        plan, cut = plan_evaluation(samples_of(50), split, (trained,), held_out, "held_out")  # type: ignore[arg-type]
        assert cell_anchors(plan, cut).num_samples == 50
    with pytest.raises(InvalidConfig, match="has no test split"):
        plan_evaluation(samples, "test", (trained,), held_out, "held_out")


def test_a_plan_is_its_own_cut() -> None:
    for samples in (samples_of(100), samples_of(100, target_offsets=2, stride=3)):
        plan = plan_data(samples, replicas=2, seed=3)
        assert cut_as(plan, samples) == plan
        assert cut_as(replace(plan, stride=7), samples) == plan
