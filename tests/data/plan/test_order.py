from __future__ import annotations

import itertools
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.plan import bins
from dtrain.data.plan.hashing import hash64, permutation
from dtrain.data.plan.order import epoch_order

GOLDEN_FILE = Path(__file__).with_name("golden_order.json")
MASK = 2**64 - 1
PART, ROW = 2, 3  # what a hash is drawn for; written out here because the order hangs on the numbers

sizes = st.lists(st.integers(1, 7), min_size=1, max_size=25)
mixed = st.integers(1, 10)
shuffles = st.booleans()
together = st.sampled_from([1, 5, 20, 8192])
keys = st.fixed_dictionaries({"seed": st.integers(0, 2**63), "replica": st.integers(0, 9), "epoch": st.integers(0, 9)})


def hash_by_hand(*numbers):
    """splitmix64's finaliser in plain Python integers, once a number."""
    state = 0
    for number in numbers:
        state = ((state ^ (number & MASK)) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state = state ^ (state >> 31)
    return state


def pass_by_hand(sizes, mixed_units, seed, replica, epoch):
    """The whole of a shuffled pass as [(part, row)]: place every row, then sort once."""
    name = (seed, replica, epoch)
    parts = sorted(range(len(sizes)), key=lambda part: hash_by_hand(*name, PART, part))
    placed = []
    for rank, part in enumerate(parts):
        # the mixing window around the middle of this part, in half parts, clipped to the pass
        low, high = max(0, 2 * rank + 1 - mixed_units), min(2 * len(sizes), 2 * rank + 1 + mixed_units)
        for row in range(sizes[part]):
            draw = hash_by_hand(*name, ROW, part, row) >> 24
            placed.append(((low << 40) + draw * (high - low), rank, row, part))
    return [(part, row) for _, _, row, part in sorted(placed)]


def walk(sizes, **options):
    return list(epoch_order(np.array(sizes), **options))


def rows_of(runs):
    return [pair for run in runs for pair in zip(run.part.tolist(), run.row.tolist(), strict=True)]


# The hash ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**63 - 1), max_size=5))
def test_the_hash_is_splitmix64_once_a_key(numbers):
    assert int(hash64(*numbers)) == hash_by_hand(*numbers)


def test_the_hash_broadcasts():
    column, row = np.arange(3)[:, None], np.arange(4)[None, :]
    expected = [[hash_by_hand(5, a, b) for b in range(4)] for a in range(3)]
    assert hash64(5, column, row).tolist() == expected
    assert hash64(2**64 - 1).tolist() == hash_by_hand(2**64 - 1)


def test_the_hash_agrees_with_the_published_generator():
    # Steele, Lea, Flood: the first outputs of splitmix64 seeded with 0; its state before output i is i * gamma
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    gamma = 0x9E3779B97F4A7C15
    assert [int(hash64((i * gamma) & MASK)) for i in range(3)] == published


@given(st.integers(0, 200), st.integers(0, 2**63 - 1))
def test_a_permutation_holds_each_index_once(length, key):
    drawn = permutation(length, key)
    assert sorted(drawn.tolist()) == list(range(length))
    assert drawn.tolist() == sorted(range(length), key=lambda i: hash_by_hand(key, i))


# The order --------------------------------------------------------------------------------------------------


def test_the_order_never_changes():
    # A cursor stored by one version of dtrain (or numpy, or on another platform) is read by another, and a run that
    # is continued must see the samples it has not yet seen, each once. So this file must never be written anew: if
    # this test fails, the order has changed and every run that was ever committed would silently resume on wrong
    # samples. Undo the change, or raise the plan's version and keep the old order for old plans.
    golden = json.loads(GOLDEN_FILE.read_text())
    for case in golden["hash64"]:
        assert int(hash64(*case["keys"])) == int(case["hash"], 16)
    for case in golden["orders"]:
        expected = list(zip(case.pop("parts"), case.pop("rows"), strict=True))
        assert rows_of(walk(mixed_units=case.pop("window"), **case)) == expected


def test_the_golden_file_was_not_written_by_what_it_tests():
    golden = json.loads(GOLDEN_FILE.read_text())
    for case in golden["hash64"]:
        assert hash_by_hand(*case["keys"]) == int(case["hash"], 16)
    for case in golden["orders"]:
        expected = list(zip(case.pop("parts"), case.pop("rows"), strict=True))
        assert case.pop("shuffle")
        assert pass_by_hand(mixed_units=case.pop("window"), **case) == expected


@given(sizes, mixed, keys, together)
def test_a_shuffled_pass_is_the_rows_sorted_by_their_places(sizes, mixed_units, keys, together):
    with mock.patch.object(bins, "ORDERED_ROWS", together):
        assert rows_of(walk(sizes, mixed_units=mixed_units, shuffle=True, **keys)) == pass_by_hand(
            sizes, mixed_units, **keys
        )


@given(sizes, mixed, keys)
def test_without_shuffle_parts_and_rows_come_as_stored(sizes, mixed_units, keys):
    expected = [(part, row) for part, size in enumerate(sizes) for row in range(size)]
    assert rows_of(walk(sizes, mixed_units=mixed_units, shuffle=False, **keys)) == expected


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), mixed, shuffles, keys)
def test_each_row_comes_exactly_once_a_pass(sizes, mixed_units, shuffle, keys):
    rows = rows_of(walk(sizes, mixed_units=mixed_units, shuffle=shuffle, **keys))
    assert sorted(rows) == [(part, row) for part, size in enumerate(sizes) for row in range(size)]


@given(sizes, mixed, shuffles, keys, together)
def test_the_order_from_any_position_is_the_rest_of_the_pass(sizes, mixed_units, shuffle, keys, together):
    whole = rows_of(walk(sizes, mixed_units=mixed_units, shuffle=shuffle, **keys))
    for position in range(len(whole) + 3):
        with mock.patch.object(bins, "ORDERED_ROWS", together):
            rest = walk(sizes, mixed_units=mixed_units, shuffle=shuffle, position=position, **keys)
        assert rows_of(rest) == whole[position:]
        seen = set()
        for run in rest:
            new = set(run.part.tolist()) - seen
            assert set(run.opens) == new
            assert len(run.opens) == len(new)
            seen |= new


@given(sizes, mixed, shuffles, keys, st.floats(0, 1))
def test_at_most_mixed_units_parts_are_open_and_closed_ones_stay_closed(sizes, mixed_units, shuffle, keys, share):
    position = int(share * sum(sizes))
    opened, closed = set(), set()
    for run in walk(sizes, mixed_units=mixed_units, shuffle=shuffle, position=position, **keys):
        used = set(run.part.tolist())
        assert not used & closed
        opened |= used
        assert len(opened) <= (mixed_units if shuffle else 1)
        if run.closed >= 0:
            assert run.closed not in closed
            closed.add(run.closed)
            opened.discard(run.closed)


@given(sizes, mixed, keys)
def test_a_row_moves_by_less_than_the_mixing_window(sizes, mixed_units, keys):
    name = (keys["seed"], keys["replica"], keys["epoch"])
    parts = sorted(range(len(sizes)), key=lambda part: hash_by_hand(*name, PART, part))
    rank = {part: i for i, part in enumerate(parts)}
    starts = np.concatenate([[0], np.cumsum([sizes[part] for part in parts])])
    for position, (part, _) in enumerate(rows_of(walk(sizes, mixed_units=mixed_units, shuffle=True, **keys))):
        first, last = max(0, rank[part] + 1 - mixed_units), min(len(sizes), rank[part] + mixed_units)
        assert starts[first] <= position < starts[last]


def test_rows_spread_evenly_over_the_mixing_window():
    sizes, mixed_units = [100] * 50, 9
    rows = rows_of(walk(sizes, mixed_units=mixed_units, shuffle=True, seed=3, replica=0, epoch=0))
    parts = permutation(50, 3, 0, 0, PART).tolist()
    moved = np.array([i / 100 - (parts.index(part) + 0.5) for i, (part, _) in enumerate(rows)])
    inner = moved[1000:-1000]  # uniform over (-4.5, 4.5) away from the ends: variance 81 / 12
    assert abs(inner.mean()) < 0.1
    assert abs(inner.var() - 6.75) < 0.5


@given(
    st.lists(st.integers(0, 3) | st.integers(2**39, 2**40) | st.integers(2**59, 2**62), max_size=9),
    st.integers(-(2**62), 2**61),
)
def test_rows_are_sorted_by_place_and_stay_in_order_where_places_are_the_same(places, low):
    places = np.array(places, np.int64) + low
    indices = bins.stable_order(places)
    assert indices.dtype == np.int64
    assert indices.tolist() == sorted(range(len(places)), key=lambda i: places[i])


@pytest.mark.parametrize("bits", [0, 1, 4])
@pytest.mark.parametrize("mixed_units", [3, (1 << 14) - 1, 1 << 14, 1 << 15, 70_000])
def test_each_bin_of_a_wide_mixing_window_emits_the_rows_of_its_own_places(mixed_units, bits):
    count, rank, rows = 80_000, 40_000, 300
    whole = bins.Pass(np.full(count, rows), np.arange(count), mixed_units, hash64(1), bits)
    (part,) = whole.open(rank, rank + 1)
    assert sorted(part.rows.tolist()) == list(range(rows))
    low, high = max(0, 2 * rank + 1 - mixed_units), min(2 * count, 2 * rank + 1 + mixed_units)
    by_hand = [(low << 40) + (hash_by_hand(1, rank, row) >> 24) * (high - low) for row in range(rows)]
    own = range(part.first_bin, part.end_bin)
    assert (own.start, own.stop) == (rank << bits if low else 0, min(whole.num_bins, (rank + mixed_units) << bits))
    for begin, end in itertools.pairwise([*own[:: max(1, len(own) // 20)], own.stop]):
        first, after = (((2 << 40) * number >> bits) + ((1 - mixed_units) << 40) for number in (begin, end))
        expected = [row for row, place in enumerate(by_hand) if first <= place < after]
        assert sorted(part.rows[part.before(begin) : part.before(end)].tolist()) == expected
    assert (part.before(own.start), part.before(own.stop)) == (0, rows)


@pytest.mark.parametrize("rows", [bins.SLICE - 1, bins.SLICE, bins.SLICE + 1, 3 * bins.SLICE - 7])
def test_rows_of_a_large_part_are_sorted_as_those_of_a_small_one(rows):
    drawn = (hash64(np.arange(rows)) % np.uint64(50)).astype(np.uint16)
    sorted_rows, lengths = bins.sorted_by(drawn, 60, np.dtype(np.uint32))
    assert sorted_rows.tolist() == np.argsort(drawn, kind="stable").tolist()
    assert lengths.tolist() == np.bincount(drawn, minlength=60).tolist()


def test_the_order_of_a_partition_of_more_parts_than_places_have_bits_for():
    # 2 ** 23 half parts and 40 bits behind the point do not fit into 63 bits
    count = (1 << 22) + 20
    runs = epoch_order(
        np.ones(count, np.int32), mixed_units=5, shuffle=True, seed=1, replica=0, epoch=0, position=count - 40
    )
    parts = [part for part, _ in rows_of(runs)]
    assert len(set(parts)) == 40
    last = permutation(count, 1, 0, 0, PART)[-50:].tolist()
    assert set(parts[10:]) <= set(last)


def test_passes_differ_between_epochs_replicas_and_seeds():
    sizes = [4] * 12
    names = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 1, 0), (1, 0, 1), (1, 1, 1)]
    passes = {
        tuple(rows_of(walk(sizes, mixed_units=3, shuffle=True, seed=seed, replica=replica, epoch=epoch)))
        for seed, replica, epoch in names
    }
    assert len(passes) == len(names)


@pytest.mark.parametrize("shuffle", [True, False])
def test_seeking_does_not_walk_the_pass(monkeypatch, shuffle):
    placed = []
    opened = bins.OpenPart
    monkeypatch.setattr(bins, "OpenPart", lambda *args: placed.append(args[0]) or opened(*args))
    sizes, mixed_units = np.full(20_000, 5), 8
    runs = epoch_order(sizes, mixed_units=mixed_units, shuffle=shuffle, seed=0, replica=0, epoch=0, position=50_000)
    first = next(run for run in runs if len(run.part))
    assert len(first.part) > 0
    assert len(placed) <= mixed_units + 64
    assert (len(placed) > 0) == shuffle


def test_a_mixing_window_of_one_opens_one_part_after_the_other():
    rows = rows_of(walk([3, 1, 5, 2], mixed_units=1, shuffle=True, seed=7, replica=0, epoch=0))
    parts = [part for part, _ in rows]
    changes = sum(a != b for a, b in itertools.pairwise(parts))
    assert changes == 3


def test_a_mixing_window_beyond_the_pass_shuffles_all_of_it():
    rows = rows_of(walk([50] * 4, mixed_units=10, shuffle=True, seed=1, replica=0, epoch=0))
    assert all({part for part, _ in rows[start : start + 50]} == {0, 1, 2, 3} for start in (0, 50, 100, 150))
