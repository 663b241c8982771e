from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.algorithm.plan import (
    cursor_after,
    eval_cadence,
    first_position,
    micro_sizes,
    pass_size,
    plan_round,
    position_after,
    samples_a_round,
    smallest_batch,
    step_sizes,
    steps_a_round,
    steps_of_run,
    task_seed,
)
from dtrain.config.schema import TrainTable
from dtrain.types import Cursor

sizes = st.integers(1, 400)
lengths = st.one_of(
    st.fixed_dictionaries({"local_epochs": st.integers(1, 4)}),
    st.fixed_dictionaries({"local_steps": st.integers(1, 9)}, optional={"sync_rounds": st.integers(0, 4)}),
)
tables = st.builds(
    lambda length, batch, micro: TrainTable(**length, batch_size=batch, micro_batch=micro),
    lengths,
    st.one_of(st.integers(1, 150), st.just("full")),
    st.integers(0, 60),
)


def start(replicas=1, **changes):
    return replace(first_position(replicas), **changes)


def task_of(size, table, **changes):
    return replace(plan_round(start(), [size], table).tasks[0], **changes)


# How much a round is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "size", "steps", "samples"),
    [
        ({"batch_size": 100}, 250, 3, 250),  # 100 + 100 + 50
        ({"batch_size": 100}, 200, 2, 200),
        ({"batch_size": 100}, 1, 1, 1),
        ({"batch_size": 100, "local_epochs": 2}, 250, 6, 500),  # the short batch comes twice
        ({"batch_size": 100, "local_steps": 5}, 250, 5, 500),
        ({"batch_size": 100, "local_steps": 5}, 7, 5, 500),  # batches larger than the partition
        ({"batch_size": "full"}, 250, 1, 250),
        ({"batch_size": "full", "local_epochs": 3}, 250, 3, 750),
        ({"batch_size": "full", "local_steps": 4}, 250, 4, 1000),
    ],
)
def test_steps_and_samples_of_a_round(table, size, steps, samples):
    train = TrainTable(**table)
    assert steps_a_round(size, train) == steps
    assert samples_a_round(size, train) == samples


@given(tables, sizes)
def test_the_batches_are_as_many_as_announced(train, size):
    batches = list(step_sizes(task_of(size, train), size, train))
    assert len(batches) == steps_a_round(size, train, 1)
    assert sum(map(sum, batches)) == samples_a_round(size, train, 1)
    most = train.micro_batch or (1024 if train.batch_size == "full" else train.batch_size)
    assert all(0 < micro <= most for batch in batches for micro in batch)


@given(st.integers(1, 4), st.integers(1, 150), sizes)
def test_batches_never_cross_passes(epochs, batch_size, size):
    train = TrainTable(local_epochs=epochs, batch_size=batch_size)
    ends, seen = set(), 0
    for batch in step_sizes(task_of(size, train), size, train):
        assert seen // size == (seen + sum(batch) - 1) // size
        seen += sum(batch)
        ends.add(seen)
    assert {size * (epoch + 1) for epoch in range(epochs)} <= ends


@given(st.integers(1, 9), st.integers(1, 150), sizes)
def test_local_steps_are_full_batches(steps, batch_size, size):
    train = TrainTable(local_steps=steps, batch_size=batch_size)
    assert [sum(b) for b in step_sizes(task_of(size, train), size, train)] == [batch_size] * steps


@given(lengths, sizes, st.integers(0, 60))
def test_full_is_one_step_a_pass(length, size, micro):
    train = TrainTable(**length, batch_size="full", micro_batch=micro)
    passes = length.get("local_epochs") or (1 if length.get("sync_rounds") else length["local_steps"])
    assert [sum(b) for b in step_sizes(task_of(size, train), size, train)] == [size] * passes


def test_the_batches_of_two_passes_by_hand():
    train = TrainTable(local_epochs=2, batch_size=100, micro_batch=40)
    assert list(step_sizes(task_of(230, train), 230, train)) == 2 * [(40, 40, 20), (40, 40, 20), (30,)]
    full = TrainTable(batch_size="full")
    assert list(step_sizes(task_of(2500, full), 2500, full)) == [(1024, 1024, 452)]


@given(st.integers(1, 300), st.integers(0, 300))
def test_micro_batches_make_up_the_batch(batch, micro):
    cut = micro_sizes(batch, micro)
    assert sum(cut) == batch
    assert len(set(cut[:-1])) <= 1
    assert cut[-1] <= cut[0] <= (micro or batch)


# From round to round --------------------------------------------------------------------------------------------


def test_a_cursor_goes_on_in_the_cyclic_stream():
    train = TrainTable(local_steps=3, batch_size=10)
    task = task_of(25, train)
    assert cursor_after(task, 25) == Cursor(1, 5)  # 30 = 1 * 25 + 5
    assert cursor_after(replace(task, cursor=Cursor(4, 20)), 25) == Cursor(6, 0)  # 120 + 30 = 6 * 25
    assert cursor_after(task, 7) == Cursor(4, 2)


@given(tables, st.lists(sizes, min_size=1, max_size=4), st.integers(1, 5))
def test_rounds_follow_each_other_without_gap(table, partitions, rounds):
    train = table.model_copy(update={"rounds": rounds})
    position, numbers = start(len(partitions)), range(1, rounds + 1)
    for number in numbers:
        plan = plan_round(position, partitions, train)
        assert plan.round == number
        assert [(t.round, t.replica) for t in plan.tasks] == [(number, k) for k in range(len(partitions))]
        assert [t.step for t in plan.tasks] == [
            sum(steps_a_round(size, train, before) for before in range(1, number)) for size in partitions
        ]
        assert [t.total_steps for t in plan.tasks] == [steps_of_run(size, train) for size in partitions]
        position = position_after(plan, partitions)
        assert position.round == number
    assert position.steps == tuple(steps_of_run(size, train) for size in partitions)
    consumed = [
        cursor.epoch * size + cursor.position for cursor, size in zip(position.cursors, partitions, strict=True)
    ]
    assert consumed == [sum(samples_a_round(size, train, number) for number in numbers) for size in partitions]
    if not train.local_steps:
        assert position.cursors == (Cursor(rounds * train.local_epochs, 0),) * len(partitions)


def test_a_task_knows_the_length_of_the_run_and_its_passes():
    train = TrainTable(local_epochs=2, batch_size=100, rounds=7)
    first, second = plan_round(start(2), [250, 90], train).tasks
    assert (first.num_steps, first.total_steps, first.num_samples, first.num_epochs) == (6, 42, 500, 2)
    assert (second.num_steps, second.total_steps, second.num_samples, second.num_epochs) == (2, 14, 180, 2)
    counted = plan_round(start(), [250], TrainTable(local_steps=5, rounds=7)).tasks[0]
    assert (counted.num_epochs, counted.num_steps, counted.total_steps) == (0, 5, 35)


def test_the_first_rounds_are_one_step_each():
    train = TrainTable(local_steps=4, sync_rounds=2, batch_size=10, rounds=5)
    position, seen = start(), []
    for _ in range(5):
        plan = plan_round(position, [25], train)
        (task,) = plan.tasks
        seen.append((task.num_steps, task.num_samples, task.step, task.cursor.epoch * 25 + task.cursor.position))
        assert (task.total_steps, task.num_epochs) == (14, 0)  # 1 + 1 + 4 + 4 + 4
        position = position_after(plan, [25])
    assert seen == [(1, 10, 0, 0), (1, 10, 1, 10), (4, 40, 2, 20), (4, 40, 6, 60), (4, 40, 10, 100)]
    assert (position.steps, position.cursors) == ((14,), (Cursor(5, 15),))


def test_one_step_of_the_whole_partition():
    train = TrainTable(local_steps=4, sync_rounds=1, batch_size="full", rounds=3)
    assert [samples_a_round(25, train, number) for number in (1, 2, None)] == [25, 100, 100]
    assert steps_of_run(25, train) == 9


def test_more_short_rounds_than_rounds():
    train = TrainTable(local_steps=4, sync_rounds=9, rounds=3)
    assert steps_of_run(25, train) == 3
    assert [plan_round(start(round=n), [25], train).tasks[0].total_steps for n in range(3)] == [3, 3, 3]


def test_the_cadence_of_evaluations_is_that_of_the_rounds_after_the_short_ones():
    train = TrainTable(local_steps=4, sync_rounds=9, batch_size=10)
    assert eval_cadence(120, samples_a_round(25, train), train) == 10
    assert eval_cadence(120, samples_a_round(25, train), train.model_copy(update={"sync_rounds": 0})) == 10


# Seeds ----------------------------------------------------------------------------------------------------------


def test_no_two_tasks_share_a_seed():
    seeds = {task_seed(seed, number, k) for seed in range(5) for number in range(1, 60) for k in range(40)}
    assert len(seeds) == 5 * 59 * 40
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_numbers_that_run_together_give_other_seeds():
    assert task_seed(1, 11, 1) != task_seed(11, 1, 1)
    assert task_seed(0, 1, 12) != task_seed(0, 11, 2)


def test_a_seed_is_the_same_in_every_process():
    # printf 0/1/0/local | sha256sum  ->  6508758779e56ee3...; as little-endian 0xe36ee57987750865, halved
    assert task_seed(0, 1, 0) == 0xE36EE57987750865 // 2
    assert plan_round(start(), [10], TrainTable(seed=0)).tasks[0].seed == 8194144202087105586


# Passes without their last batch ------------------------------------------------------------------------------------


def test_a_pass_without_its_last_batch():
    train = TrainTable(batch_size=10, drop_last=True)
    assert [pass_size(size, train) for size in (9, 10, 11, 29, 30)] == [0, 10, 10, 20, 30]
    assert pass_size(29, TrainTable(batch_size=10)) == 29
    assert pass_size(29, TrainTable(batch_size=10, drop_last=True, local_steps=3)) == 29  # no batch is short
    assert pass_size(29, TrainTable(batch_size="full", drop_last=True)) == 29


@pytest.mark.parametrize(
    ("sizes", "table", "expected"),
    [
        ((100, 64), {"batch_size": 32}, (4, 0)),
        ((96, 64), {"batch_size": 32}, (32, 0)),
        ((96, 65), {"batch_size": 32}, (1, 1)),
        ((96, 65), {"batch_size": 32, "local_steps": 4}, (32, 0)),
        ((96, 65), {"batch_size": 32, "local_steps": 4, "micro_batch": 31}, (1, 0)),
        ((20, 7), {"batch_size": 32}, (7, 1)),
        ((20, 7), {"batch_size": "full"}, (7, 1)),
        ((2000, 1025), {"batch_size": "full"}, (1, 1)),
        ((64, 64), {"batch_size": 32, "micro_batch": 10}, (2, 0)),
    ],
)
def test_the_smallest_batch_of_a_run(sizes, table, expected):
    assert smallest_batch(sizes, TrainTable(**table)) == expected
