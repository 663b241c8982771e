from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.runtime.placement import place_replicas

names = st.sampled_from([f"tcp://10.0.0.{n}:1" for n in range(9)])
workers = st.lists(names, min_size=1, max_size=8, unique=True)
replicas = st.integers(1, 20)
before = st.dictionaries(st.integers(0, 25), names, max_size=25)


@given(before, workers, replicas)
def test_every_replica_is_on_a_live_worker_and_no_worker_has_too_many(previous, workers, replicas):
    placed = place_replicas(previous, workers, replicas)
    assert list(placed) == list(range(replicas))
    assert set(placed.values()) <= set(workers)
    assert max(Counter(placed.values()).values()) <= -(-replicas // len(workers))


@given(before, workers, replicas)
def test_nobody_moves_who_need_not(previous, workers, replicas):
    placed = place_replicas(previous, workers, replicas)
    most = -(-replicas // len(workers))
    stayed = Counter(placed[k] for k in placed if previous.get(k) == placed[k])
    wanted = Counter(previous[k] for k in placed if previous.get(k) in workers)
    assert stayed == {worker: min(count, most) for worker, count in wanted.items()}


@given(before, workers, replicas)
def test_placing_again_changes_nothing(previous, workers, replicas):
    placed = place_replicas(previous, workers, replicas)
    assert place_replicas(placed, workers, replicas) == placed


@given(before, workers, replicas, st.randoms())
def test_the_order_of_the_workers_does_not_matter(previous, workers, replicas, random):
    shuffled = list(workers)
    random.shuffle(shuffled)
    assert place_replicas(previous, shuffled, replicas) == place_replicas(previous, workers, replicas)


@given(workers, replicas)
def test_a_first_placement_is_even(workers, replicas):
    loads = Counter(dict.fromkeys(workers, 0))
    loads.update(place_replicas({}, workers, replicas).values())
    assert max(loads.values()) - min(loads.values()) <= 1


@given(workers, replicas, st.data())
def test_when_a_worker_dies_only_its_replicas_move_unless_others_have_too_many(workers, replicas, data):
    placed = place_replicas({}, workers, replicas)
    gone = data.draw(st.sampled_from(workers))
    left = [worker for worker in workers if worker != gone]
    if left:
        after = place_replicas(placed, left, replicas)
        assert all(after[k] == at for k, at in placed.items() if at in left)


@pytest.mark.parametrize(
    ("previous", "workers", "replicas", "expected"),
    [
        ({}, "a", 3, "aaa"),
        ({}, "ab", 4, "abab"),
        ({}, "abc", 2, "ab"),
        ({0: "b", 1: "a"}, "ab", 2, "ba"),
        ({0: "a", 1: "a", 2: "a"}, "ab", 3, "aab"),  # one must move
        ({0: "a", 1: "b", 2: "gone"}, "abc", 3, "abc"),
        ({0: "a", 1: "b", 2: "c"}, "c", 3, "ccc"),
    ],
)
def test_placements_by_hand(previous, workers, replicas, expected):
    assert "".join(place_replicas(previous, list(workers), replicas).values()) == expected
