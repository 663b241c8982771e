"""The memory budget, worked out by hand, and kept by what loaders allocate."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.load.loader import Loader
from dtrain.data.plan import memory
from dtrain.data.plan.footprint import (
    index_bytes,
    most_chunks,
    sample_bytes,
    scratch_bytes,
    slot_bytes,
    slot_shape,
    tables_bytes,
)
from dtrain.data.plan.memory import Limits, Reading, bundles_of, plan_memory
from dtrain.data.plan.partition import eval_partitions, plan_data, train_partitions
from dtrain.data.samples import StoreFacts
from dtrain.data.source import open_samples
from dtrain.errors import ChunkTooLarge, OutOfMemory
from tests.data.helpers import START, WHOLE, make_samples, remembering, vector


def reading(samples, *, loaders=3, batch_size=50, shuffle=True, units=None, **plan):
    planned = replace(plan_data(samples, replicas=1, seed=0), **{"unit_rows": 10, "cell_rows": 10, "window": 8, **plan})
    units = units or max(len(part.units) for part in train_partitions(planned))
    return Reading(samples=samples, plan=planned, loaders=loaders, units=units, batch_size=batch_size, shuffle=shuffle)


def read_by(reader, samples):
    return replace(samples, config=samples.config.model_copy(update={"reader": reader}))


def sharded(rows, chunk, shard):
    samples = make_samples(rows, chunk, row=(25,), split=WHOLE)
    (v0,) = samples.variables
    return replace(samples, variables=(replace(v0, objects=(shard, 25)),))


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch):
    monkeypatch.setattr(memory, "THREADS", 2)


# One variable v0 of 1000 rows of 25 float32 (100 bytes) in chunks of 10, input and target: a sample has 200 bytes.
HUNDRED = make_samples(1000, 10, row=(25,))
# By units ahead: 8 parts are mixed, and 4 of the next pass. Each keeps a byte a row, 10 bins and some objects. Then
# 10 bins are drawn of 640 rows and 1000 rows sorted, and there are tables of 100 units.
ORDER = {
    ahead: (8 + 4 + ahead + 2) * (10 * 1 + 9 * 8 + 1_000) + 2 * 10 + 80 * 640 + 120 * 1_000 + 48 * 100
    for ahead in (1, 2, 3)
}
STORED = 80 * 10 + 24 * 100
LEAST = 6_471_000 + 3 * ORDER[3] + 2 * STORED


def test_the_terms_of_the_budget_by_hand():
    budget = reading(HUNDRED).budget(kept=3, ahead=3, threads=2)
    assert sample_bytes(HUNDRED) == 200
    assert budget.unit == slot_bytes(HUNDRED, reading(HUNDRED).plan) == 1_000
    assert (budget.kept, budget.open, budget.units, budget.limits) == (
        3,
        8,
        100,
        Limits(ahead=3, cached=0, threads=2, buffers=4),
    )
    assert budget.moving == 8 + 3
    assert budget.buffers == 4 * 32 * 50 * 200  # 32 batches of 10 kB are less than 4 MiB
    assert budget.scratch == 2 * 1_000  # chunks one after the other, stored and decoded
    assert budget.order == ORDER[3]
    assert budget.total == 3 * (11 * 1_000 + 1_280_000 + 3 * 2_000 + ORDER[3])  # two threads, and the assembler
    assert budget.cached_bytes == 0
    whole = plan_memory(reading(HUNDRED), reading(HUNDRED, loaders=2, shuffle=False), 10_000_000, "the limit", cache=0)
    assert whole.train == budget
    assert (whole.evaluate.open, whole.evaluate.moving) == (1, 4)  # in order, one unit is open
    assert whole.total == budget.total + 2 * (4 * 1_000 + 1_280_000 + 6_000 + STORED) == LEAST
    terms = "11 units (8 open, 3 ahead) of 1.0 kB + batches 1.3 MB + decoding 3 x 2.0 kB + order 194.4 kB"
    assert f"train 3 x ({terms})" in whole.sentence()
    assert whole.sentence().endswith("= 7.1 MB")


def test_groups_of_batches_by_hand():
    def budget(batch_size):
        return reading(HUNDRED, batch_size=batch_size).budget(kept=1, ahead=3, threads=2)

    assert budget(1).buffers == 4 * 32 * 200
    assert budget(1_000).buffers == 4 * ((4 << 20) + 200_000)  # as many batches as make 4 MiB, and less than one more
    assert budget(10_000).buffers == 4 * ((4 << 20) + 2_000_000)
    assert budget(200_000).buffers == 2 * ((4 << 20) + 40_000_000)  # large ones have two buffers
    assert budget(200_000).limits.buffers == 2


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 32), (100, 32), (655, 32), (656, 32), (800, 27), (20_000, 2), (20_971, 2), (20_972, 1)]
)
def test_as_many_batches_are_assembled_together_as_make_4_mib(size, expected):
    # 27 * 800 * 200 bytes are the first that are at least 4 MiB
    endless = bundles_of(itertools.repeat(size), HUNDRED)
    assert [next(endless) for _ in range(2)] == [(size,) * expected] * 2
    assert list(bundles_of([size] * (expected + 1), HUNDRED)) == [(size,) * expected, (size,)]
    assert list(bundles_of([size], HUNDRED)) == [(size,)]
    assert list(bundles_of([], HUNDRED)) == []


def test_windows_widen_units_and_samples():
    samples = make_samples(1000, 10, row=(25,), input_offsets=[-3, 0], target_offsets=2, split=WHOLE)
    of = reading(samples)
    assert sample_bytes(samples) == 300
    assert slot_shape(samples, of.plan, samples.variable("v0")) == (10 + 5, 25)
    assert slot_bytes(samples, of.plan) == 1_500
    assert scratch_bytes(samples, of.plan) == 2 * 1_000
    assert scratch_bytes(read_by("zarrs", samples), of.plan) == 2 * (3 + 1) * 1_000  # from row 7 on


def test_chunks_of_other_dimensions_count_as_far_as_they_are_selected():
    samples = make_samples(1000, 10, row=(25,), split=WHOLE)
    (v0,) = samples.variables
    v0 = replace(v0, chunks=(10, 4), objects=(10, 4), select=((0, 1000, 1), (7, 18, 2)))
    samples = replace(samples, variables=(v0,))
    of = reading(samples)
    assert slot_bytes(samples, of.plan) == 10 * 6 * 4  # places 7, 9, 11, 13, 15 and 17
    assert scratch_bytes(read_by("zarr", samples), of.plan) == 4 * (4 + 1) * (10 * 4 * 4)  # chunks 1 to 4
    sharded = replace(samples, variables=(replace(v0, objects=(10, 28)),))
    assert scratch_bytes(sharded, of.plan) == (1 + 2 * 4) * (10 * 4 * 4)  # read with as much as is between them


@given(rows=st.integers(1, 30), interval=st.integers(1, 12), offset=st.integers(-9, 9), size=st.integers(1, 12))
def test_the_most_chunks_that_a_run_of_rows_touches(rows, interval, offset, size):
    starts = [number * interval + offset for number in range(10, 10 + size)]
    assert most_chunks(rows, interval, offset, size) == max(
        (start + rows - 1) // size - start // size + 1 for start in starts
    )


def test_large_inner_chunks_and_small_units_need_a_chunk_each():
    samples = make_samples(1000, 10, row=(25,), chunk_rows=10, split=WHOLE)
    of = reading(samples, unit_rows=3, cell_rows=3)
    assert slot_bytes(samples, of.plan) == 300
    assert scratch_bytes(read_by("zarr", samples), of.plan) == 4 * (2 + 1) * 1_000


@pytest.mark.parametrize(
    ("reader", "chunks"), [("auto", 1 + 4), ("numcodecs", 1 + 4), ("zarrs", 2 * 5), ("zarr", 2 * 5 + 2 * 5)]
)
def test_of_a_shard_what_is_stored_is_read_at_once(reader, chunks):
    samples = read_by(reader, sharded(1000, 10, 40))
    of = reading(samples, unit_rows=40, cell_rows=40)
    assert scratch_bytes(samples, of.plan) == chunks * 1_000
    assert index_bytes(samples) == 25 * (4 * 16 + 500)
    budget = plan_memory(of, None, 10**9, "the limit")
    assert budget.total == budget.train.total + budget.indices
    assert budget.indices == index_bytes(samples)
    assert "indices of shards 14.1 kB = " in budget.sentence()


def test_zarr_decodes_ten_chunks_at_once():
    samples = read_by("zarr", make_samples(1000, 10, row=(25,), split=WHOLE))
    of = reading(samples, unit_rows=300, cell_rows=300)
    assert scratch_bytes(samples, of.plan) == 4 * 10 * 1_000
    assert scratch_bytes(read_by("zarrs", samples), of.plan) == 2 * 31 * 1_000


def test_shards_of_many_small_chunks_may_be_read_by_zarrs():
    samples = sharded(1000, 1, 500)
    of = reading(samples, unit_rows=500, cell_rows=500)
    assert scratch_bytes(samples, of.plan) == 2 * (500 + 1) * 100


def test_indices_are_kept_up_to_a_limit():
    assert index_bytes(sharded(10_000_000, 1, 20)) == 64 << 20
    assert index_bytes(HUNDRED) == 0


# What fits --------------------------------------------------------------------------------------------------------


def plan_for(limit, cache=None, loaders=3, pieces=2, **options):
    train, evaluate = reading(HUNDRED, loaders=loaders, **options), reading(HUNDRED, loaders=pieces, shuffle=False)
    return plan_memory(train, evaluate, limit, "the limit", cache)


def test_what_is_left_is_shared_by_the_caches():
    least = plan_for(10**9, cache=0).total
    assert least == LEAST
    wanted = (3 + 2) * 100 * 1_000
    for share in (0.0, 0.01, 0.25, 0.5, 0.999, 1.0, 7.0):
        room = int(share * wanted)
        for budget in (plan_for(least + room), plan_for(10**9, cache=room)):
            units = min(100, int(100 * share))
            assert (budget.train.limits.cached, budget.evaluate.limits.cached) == (units, units)
            assert budget.cached_bytes == 5 * units * 1_000
            assert budget.total <= max(least + room, least)
            moving = min(11, 2 * (100 - units)), min(4, 2 * (100 - units))
            assert (budget.train.moving, budget.evaluate.moving) == moving  # what is kept need not be read ahead
    assert "cache 250.0 kB" in plan_for(least + wanted // 2).sentence()
    assert plan_for(least + 1_000_000, cache=100_000).train.limits.cached == 20  # the lesser of both
    assert plan_for(least + 100_000, cache=1_000_000).train.limits.cached == 20


def test_without_an_evaluation_training_has_all():
    budget = plan_memory(reading(HUNDRED), None, 10**7, "the limit")
    assert budget.evaluate is None
    assert budget.train.limits.cached == 100
    assert budget.total == budget.train.total
    assert "evaluate" not in budget.sentence()


@pytest.mark.parametrize(
    ("short_by", "kept", "evaluate", "ahead", "threads"),
    [
        (0, 3, 2, 3, 2),
        (1, 3, 0, 3, 2),  # one loader of an evaluation at a time
        (1_290_001 + STORED, 2, 0, 3, 2),  # a train loader less
        (1_290_001 + STORED + 1_297_000 + ORDER[3], 1, 0, 3, 2),
        (1_290_001 + STORED + 2 * (1_297_000 + ORDER[3]), 1, 0, 2, 2),  # two units of less
        (1_290_001 + STORED + 2 * (1_297_000 + ORDER[3]) + 2_000 + ORDER[3] - ORDER[2], 1, 0, 1, 1),
    ],
)
def test_short_memory_means_fewer_loaders_then_less_ahead(short_by, kept, evaluate, ahead, threads):
    budget = plan_for(LEAST - short_by)
    assert (budget.train.kept, budget.evaluate.kept) == (kept, evaluate)
    assert (budget.train.limits.ahead, budget.train.limits.threads) == (ahead, threads)
    assert (budget.evaluate.limits.ahead, budget.evaluate.limits.threads) == (ahead, threads)
    assert budget.total <= LEAST - short_by


def test_too_little_memory_is_refused_with_the_arithmetic():
    least = 9 * 1_000 + 640_000 + 4_000 + ORDER[1]  # loaders of the evaluation, which need less, come after it
    budget = plan_for(least)
    assert (budget.total, budget.in_turn) == (least, True)
    assert (budget.train.limits.cached, budget.evaluate.limits.cached) == (0, 0)
    with pytest.raises(OutOfMemory) as caught:
        plan_for(least - 1)
    error = caught.value
    assert error.code == 8
    assert (
        "p.zarr: the data path needs train 1 x (9 units (8 open, 1 ahead) of 1.0 kB + batches 640.0 kB + "
        "decoding 2 x 2.0 kB + order 192.2 kB) + evaluate 1 x (2 units (1 open, 1 ahead) of 1.0 kB + "
        "batches 640.0 kB + decoding 2 x 2.0 kB + order 3.2 kB) = 845.2 kB (train and evaluate one after the other) "
        f"({least:,} bytes); the limit is 845.2 kB ({least - 1:,} bytes)."
    ) in error.message
    assert "cluster.memory" in error.hint


def test_loaders_are_kept_beside_each_other_where_memory_allows():
    both = (9 * 1_000 + 640_000 + 4_000 + ORDER[1]) + (2 * 1_000 + 640_000 + 4_000 + STORED)
    assert (plan_for(both).in_turn, plan_for(both).total) == (False, both)
    assert plan_for(both - 1).in_turn


def test_a_chunk_larger_than_memory_is_refused_by_name():
    samples = make_samples(1000, 500, row=(25,))
    with pytest.raises(ChunkTooLarge) as caught:
        plan_memory(reading(samples), None, 49_999, "cluster.memory")
    assert caught.value.code == 3
    assert "one chunk of v0 (500, 25) decodes to 50.0 kB; cluster.memory is 50.0 kB" in caught.value.message
    with pytest.raises(OutOfMemory):  # it fits, but nothing else
        plan_memory(reading(samples), None, 50_000, "cluster.memory")
    with pytest.raises(ChunkTooLarge):
        plan_memory(reading(HUNDRED), reading(samples), 49_999, "cluster.memory")


def test_a_store_whose_requests_take_long_is_read_further_ahead_by_more_threads():
    samples = replace(HUNDRED, store=StoreFacts(is_local=False, read_ahead=True))
    budget = plan_memory(reading(samples), None, 10**9, "the limit")
    assert (budget.train.limits.ahead, budget.train.limits.threads) == (8, 8)


def test_a_plan_of_few_units_counts_each_at_most_twice():
    budget = reading(HUNDRED, units=3).budget(kept=1, ahead=9, threads=1)
    assert (budget.open, budget.moving) == (3, 6)


def test_a_static_variable_that_patches_cut_is_a_part_of_every_sample(write_store, tmp_path):
    arrays = {
        "v0": {"dims": ("n", "y", "x"), "values": np.zeros((20, 5, 3), "float32"), "chunks": (4, 5, 3)},
        "height": {"dims": ("y", "x"), "values": np.zeros((5, 3)), "chunks": (5, 3)},
        "label": vector(np.zeros(20, "int32"), 4),
    }
    path = write_store(tmp_path / "s", arrays)
    names = {"inputs": ["v0", "height"], "targets": ["label"], "sample_dim": "n"}
    assert sample_bytes(open_samples(path, **names)) == 5 * 3 * 4 + 8
    assert sample_bytes(open_samples(path, patch={"y": 2}, **names)) == 2 * (2 * 3 * 4) + 8


# What loaders allocate --------------------------------------------------------------------------------------------


KINDS = {
    "plain": {},
    "windows": {"input_offsets": [-4, 0], "target_offsets": 3},
    "patches": {"patch": {"y": 2}},
    "selected": {"isel": {"x": 1, "n": {"start": 20, "stop": 180}}},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("cached", [0, 3, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_allocates_no_more_than_the_budget_says(write_store, tmp_path, kind, cached, shuffle):
    arrays = {
        "v0": {"dims": ("n", "y", "x"), "values": np.zeros((200, 5, 3), "float32"), "chunks": (4, 5, 3)},
        "raw": {"dims": ("n", "y"), "values": np.zeros((200, 5), "uint8"), "chunks": (4, 5)},
        "height": {"dims": ("y", "x"), "values": np.zeros((5, 3)), "chunks": (5, 3)},
        "label": vector(np.zeros(200, "int32"), 4),
    }
    samples = open_samples(
        write_store(tmp_path / "s", arrays),
        inputs=["v0", "height", "raw"],
        targets=["label"],
        sample_dim="n",
        split=WHOLE,
        **KINDS[kind],
    )
    plan = replace(plan_data(samples, replicas=1, seed=0), unit_rows=4, cell_rows=4, window=6)
    (part,) = train_partitions(plan) if shuffle else eval_partitions(plan, "train")
    reader = remembering(samples)
    for batch in (30, 5000):
        of = Reading(samples=samples, plan=plan, loaders=1, units=len(part.units), batch_size=batch, shuffle=shuffle)
        budget = of.budget(kept=1, ahead=2, threads=2)
        limits = replace(budget.limits, cached=min(cached, len(part.units)))
        budget = replace(budget, limits=limits)
        made = []

        def allocate(shape, dtype, made=made):
            made.append(int(np.prod(shape)) * dtype.itemsize)
            return np.empty(shape, dtype)

        loader = Loader(
            reader,
            part,
            START,
            itertools.repeat(batch),
            replica=0,
            shuffle=shuffle,
            limits=limits,
            allocate=allocate,
        )
        for _ in range(150 if batch < 5000 else 4):
            loader.take()
        arenas = sum(arena.nbytes for arena in loader._threads.arena.values())
        loader.close()
        assert arenas <= (budget.moving + limits.cached) * budget.unit
        padding = 4 * limits.buffers * 33 * 64  # for each batch of each field, to an aligned address
        assert sum(made) <= budget.buffers + padding


# Rows of a few bytes: what grows with rows and units counts ---------------------------------------------------------


class NothingToRead:
    """Stands for a reader: a unit is there as soon as it is asked for."""

    statics: ClassVar[dict[str, object]] = {}

    def __init__(self, samples):
        self.samples = samples

    def read_into(self, box, out):
        return 0


NARROW = {
    "whole units": ({"num_samples": 800_000, "unit": 40_000}, {}),
    "cells of units": ({"num_samples": 800_000, "unit": 40_000, "cell": 7_000}, {}),
    "long units": ({"num_samples": 900_000, "unit": 150_000, "window": 4}, {}),
    "one unit": ({"num_samples": 300_000, "unit": 300_000}, {}),
    "windows": (
        {"num_samples": 400_000, "unit": 40_000, "cell": 9_000, "jumps": " ".join(map(str, range(9, 400_000, 97)))},
        {"input_offsets": [-2, 0], "target_offsets": 1},
    ),
    "strides": ({"num_samples": 2_000_000, "unit": 200_000, "cell": 30_000}, {"stride": 5}),
    "many units": ({"num_samples": 200_000, "unit": 2, "batch": 256, "batches": 3}, {}),
}


@pytest.mark.sampled(7)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", NARROW)
def test_what_a_loader_of_narrow_rows_takes_is_in_the_budget(kind, shuffle):
    layout, options = NARROW[kind]
    samples = make_samples(layout["num_samples"], layout["unit"], layout["unit"], split=WHOLE, **options)
    cuts = {"unit_rows": layout["unit"], "cell_rows": layout.get("cell", layout["unit"]), "group": 1}
    plan = replace(plan_data(samples, replicas=1, seed=0), **cuts, jumps=layout.get("jumps", ""))
    plan, batch = replace(plan, window=layout.get("window", 16)), layout.get("batch", 4096)
    tracemalloc.start()
    try:
        (part,) = train_partitions(plan) if shuffle else eval_partitions(plan, "train")
        tables = tables_bytes(samples, plan, part.nbytes)
        of = Reading(
            samples=samples,
            plan=plan,
            loaders=1,
            units=len(part.units),
            batch_size=4096,
            shuffle=shuffle,
            tables=tables,
        )
        budget = plan_memory(of, None, 10**9, "the limit", cache=0)
        limits = budget.train.limits
        loader = Loader(
            NothingToRead(samples), part, START, itertools.repeat(batch), replica=0, shuffle=shuffle, limits=limits
        )
        for _ in range(layout.get("batches", int(1.2 * part.num_samples / batch))):  # over the end of a pass
            loader.take()
        loader.close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    scratch = (limits.threads + 1) * budget.train.scratch  # nothing is decoded
    assert peak <= 1.1 * (budget.total - scratch)
    assert budget.train.order + budget.tables <= 3 * peak  # and is not said to take much more


def test_the_order_of_narrow_rows_takes_less_than_the_rows():
    samples = make_samples(30_000_000, 1_000_000, 1_000_000, split=WHOLE)  # 8 bytes a row
    budget = reading(samples, unit_rows=1_000_000, cell_rows=1_000_000).budget(kept=1, ahead=3, threads=2)
    assert budget.order <= budget.moving * budget.unit


def test_what_a_store_keeps_of_its_objects_is_in_the_budget():
    plan = plan_data(HUNDRED, replicas=1, seed=0)
    zipped = replace(HUNDRED, store=StoreFacts(is_local=False, kept_bytes=12_345))
    assert tables_bytes(zipped, plan, 0) - tables_bytes(HUNDRED, plan, 0) == 12_345
