"""isel, patches, missing = "skip" and variables without the sample dimension: against numpy on the whole arrays."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.load.loader import read_batches
from dtrain.data.plan.partition import eval_partitions, plan_data, train_partitions
from dtrain.data.plan.splits import split_cells
from dtrain.data.plan.summary import describe_plan
from dtrain.data.plan.units import Box, cell_bounds
from dtrain.data.read.open import open_arrays
from dtrain.data.read.presence import absent_chunks, absent_rows, check_presence
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import ChunkMissing, InvalidConfig, LengthsDiffer, NonFiniteData, TooFewSamples
from tests.data.helpers import (
    START,
    WHOLE,
    batches,
    index_of,
    one_pass,
    only_partition,
    reader_of,
    readers,
    vector,
)
from tests.sampling import examples

SPLITS = ("train", "val", "test")


@st.composite
def grids(draw, max_rows=60):
    """Draw (zarr format, arrays): v(n, y, x, k) in any order of dimensions, w(n, y), place(y, x, k), index(n)."""
    rows = draw(st.integers(8, max_rows))
    sizes = {"n": rows, "y": draw(st.integers(1, 5)), "x": draw(st.integers(1, 6)), "k": draw(st.integers(1, 3))}
    zarr_format = draw(st.sampled_from([2, 3]))
    dtype = draw(st.sampled_from(["float32", "float64", "int16", "uint8"]))
    full = np.arange(math.prod(sizes.values())).reshape(*sizes.values()) % 251
    arrays = {}
    for name, dims in {"v": "nyxk", "w": "ny", "place": "yxk", "index": "n"}.items():
        values = full[tuple(slice(None) if dim in dims else 0 for dim in "nyxk")]
        if name == "index":
            values = np.arange(rows)
        if name == "place":
            values = sum(np.arange(sizes[d]).reshape(np.roll([-1, 1, 1], i)) * 10**i for i, d in enumerate("yxk"))
        order = draw(st.permutations(dims)) if name != "index" else ["n"]
        values = np.transpose(values, [dims.index(dim) for dim in order])
        chunks = tuple(draw(st.integers(1, 9 if dim == "n" else sizes[dim])) for dim in order)
        arrays[name] = {
            "dims": tuple(order),
            "values": values.astype(dtype if name in "vw" else "int32"),
            "chunks": chunks,
        }
        if zarr_format == 3 and draw(st.booleans()):
            arrays[name]["shards"] = tuple(size * draw(st.integers(1, 3)) for size in chunks)
    return zarr_format, arrays, sizes


@st.composite
def selections(draw, sizes, rows=True):
    """Draw a table isel: places, negative ones too, and slices; of n a start and a stop."""
    isel = {}
    for dim, size in sizes.items():
        kind = draw(st.sampled_from(["none", "place", "slice"]))
        if dim == "n":
            if rows and kind != "none":
                start = draw(st.integers(-size, size - 4))
                isel[dim] = {"start": start, "stop": draw(st.integers(start % size + 4, size + 5))}
        elif kind == "place":
            isel[dim] = draw(st.integers(-size, size - 1))
        elif kind == "slice":
            start = draw(st.integers(0, size - 1))
            isel[dim] = {
                "start": start,
                "stop": draw(st.integers(start + 1, size + 2)),
                "step": draw(st.integers(1, 4)),
            }
    return isel


def as_numpy(isel, dims):
    """An index of numpy for what isel selects of an array."""
    return tuple(
        slice(s["start"], s["stop"], s.get("step", 1)) if isinstance(s := isel.get(dim, slice(None)), dict) else s
        for dim in dims
    )


def rows_of(described, isel):
    """What is selected of an array by plain numpy: all rows first, and the other dimensions' names."""
    dims, values = list(described["dims"]), described["values"]
    without_n = {dim: part for dim, part in isel.items() if dim != "n"}
    values = values[as_numpy(without_n, dims)]
    dims = [dim for dim in dims if not isinstance(without_n.get(dim), int)]
    if "n" not in dims:
        return values, dims
    return np.moveaxis(values, dims.index("n"), 0), [dim for dim in dims if dim != "n"]


def listed(offsets):
    if isinstance(offsets, int):
        return [offsets]
    return list(range(offsets["start"], offsets["stop"], offsets["step"])) if isinstance(offsets, dict) else offsets


def tiles_of(patch, lengths):
    """[{dim: slice}]: the places of the patches, found by walking along each dimension."""
    found = [{}]
    for dim, size in patch.items():
        starts = []
        for start in range(0, lengths[dim], size):
            starts.append(start if start + size <= lengths[dim] else lengths[dim] - size)
        found = [{**tile, dim: slice(start, start + size)} for tile in found for start in starts]
    return found


def block_of_tile(plan):
    """{number of a tile: the block that holds it}."""
    if not plan.blocks:
        return dict.fromkeys(range(plan.patches), 0)
    counts = plan.grid.tiles_in(np.arange(len(plan.grid))).tolist()
    pairs = [(block, within) for block, count in enumerate(counts) for within in range(count)]
    blocks, within = np.array(pairs).T
    return dict(zip(plan.grid.tile(blocks, within).tolist(), blocks.tolist(), strict=True))


def patch_of(values, dims, tile):
    return values[tuple(tile.get(dim, slice(None)) for dim in dims)]


offsets = st.sampled_from([0, 0, 2, [-1, 0], {"start": 0, "stop": 3, "step": 1}, [0, 3, 1]])


@examples(50)
@given(st.data())
def test_samples_are_what_numpy_selects(write_store, data):
    draw = data.draw
    zarr_format, arrays, sizes = draw(grids())
    isel = draw(selections(sizes))
    rows = range(sizes["n"])[as_numpy(isel, ["n"])[0]]
    lengths = {d: len(range(n)[as_numpy(isel, [d])[0]]) for d, n in sizes.items() if not isinstance(isel.get(d), int)}
    patched = [dim for dim in ("y", "x", "k") if dim in lengths and draw(st.booleans())]
    patch = {dim: draw(st.integers(1, lengths[dim])) for dim in patched}
    inputs, targets = draw(offsets), draw(offsets)
    stride, replicas, shuffle = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(Path(folder, "s"), arrays, zarr_format=zarr_format)
        samples = open_samples(
            path,
            inputs=["v", "place", "w"],
            targets=["w", "index"],
            sample_dim="n",
            isel=isel,
            patch=patch,
            input_offsets=inputs,
            target_offsets=targets,
            stride=stride,
            split={"val": draw(st.sampled_from([0.0, 0.25])), "test": 0.0},
        )
        assert (samples.first_row, samples.num_samples) == (rows.start, rows.stop)
        try:
            plan = plan_data(samples, replicas=replicas, seed=5)
        except TooFewSamples:
            return
        tiles = tiles_of(patch, lengths)
        assert plan.patches == len(samples.tiles) == len(tiles)
        every = [*listed(inputs), *listed(targets)]
        seen: Counter = Counter()
        reader = reader_of(samples, draw(readers))
        selected = {name: rows_of(described, isel) for name, described in arrays.items()}
        batch = draw(st.integers(1, 40))
        for split in SPLITS:
            parts = train_partitions(plan) if split == "train" else eval_partitions(plan, split)
            assert all(partition.num_samples for partition in parts)  # a loader of nothing would never end
            for replica, partition in enumerate(parts):
                for found in batches(reader, partition, one_pass(partition, batch), replica=replica, shuffle=shuffle):
                    seen.update(check_batch(found, selected, tiles, inputs, targets))
        expected = set()
        splits = np.full((len(plan.grid), rows.stop), "", object)
        for split in SPLITS:
            cells = split_cells(plan, split)
            for cell, start, stop in zip(cells.tolist(), *cell_bounds(plan, cells), strict=True):
                splits[cell // plan.block_step, start:stop] = split
        for (tile, block), anchor in itertools.product(block_of_tile(plan).items(), range(0, rows.stop, stride)):
            window = range(anchor + min(*every, 0), anchor + max(*every, 0) + 1)
            inside = window[0] >= rows.start and window[-1] < rows.stop
            if inside and len(set(splits[block, list(window)])) == 1:
                expected.add((anchor, tile))
        inside = {
            anchor
            for anchor in range(0, rows.stop, stride)
            if anchor in rows and anchor + min(every) >= rows.start and anchor + max(every) < rows.stop
        }
        assert set(seen.values()) <= {1}
        assert {anchor for anchor, _ in seen} <= inside
        assert set(seen) >= expected
        described = describe_plan(samples, plan)
        assert described["patches"] == len(tiles)
        assert described["dropped_samples"] == sum(a % stride == 0 for a in rows) * len(tiles) - len(seen)


def check_batch(batch, selected, tiles, inputs, targets):
    """Compare a batch with what numpy selects, sample by sample, and return [(anchor, number of the tile)]."""
    v, place, w = batch.inputs
    w_target, index = batch.targets
    anchors = (index if isinstance(targets, int) else index[:, 0]) - listed(targets)[0]
    places = [patch_of(*selected["place"], tile) for tile in tiles]
    found = []
    for i, anchor in enumerate(anchors.tolist()):
        number = next(k for k, patch in enumerate(places) if np.array_equal(place[i], patch))
        found.append((anchor, number))
        assert values_match(v[i], *selected["v"], anchor, inputs, tiles[number])
        assert values_match(w[i], *selected["w"], anchor, inputs, tiles[number])
        assert values_match(w_target[i], *selected["w"], anchor, targets, tiles[number])
        assert index[i].tolist() == (
            anchor + targets if isinstance(targets, int) else [anchor + o for o in listed(targets)]
        )
    return found


def values_match(found, rows, dims, anchor, offsets, tile):
    wanted = [patch_of(rows[anchor + offset], dims, tile) for offset in listed(offsets)]
    wanted = wanted[0] if isinstance(offsets, int) else np.stack(wanted)
    return found.shape == wanted.shape and np.array_equal(found, wanted)


# isel ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(write_store, tmp_path):
    values = np.arange(12 * 4 * 5, dtype="float32").reshape(4, 12, 5)
    arrays = {
        "v": {"dims": ("y", "n", "x"), "values": values, "chunks": (2, 3, 2)},
        "mean": {"dims": ("y",), "values": np.arange(4.0), "chunks": (4,)},
        "index": vector(np.arange(12), 5),
    }
    return write_store(tmp_path / "s", arrays)


def open_store(store, inputs=("v", "mean"), **data):
    return open_samples(store, inputs=inputs, targets=["index"], **{"sample_dim": "n", "split": WHOLE, **data})


def test_a_place_drops_its_dimension_and_a_slice_keeps_it(store):
    samples = open_store(store, isel={"y": -1, "x": {"start": 1, "stop": 5, "step": 3}, "n": {"start": 2, "stop": -1}})
    v, mean, _ = samples.variables
    assert (v.row_shape, v.dropped, v.select) == ((2,), (0,), ((3, 4, 1), (2, 11, 1), (1, 5, 3)))
    assert (mean.row_shape, mean.is_static) == ((), True)
    assert (samples.first_row, samples.num_samples) == (2, 11)
    assert "9 along n" in repr(samples)
    reader = UnitReader(samples)
    assert reader.statics["mean"] == 3
    (first, rows) = reader.read(Box(2, 11))["v"]
    stored = zarr.open_group(store, mode="r")["v"][...]
    assert first == 2
    np.testing.assert_array_equal(rows, stored[-1, 2:11, 1:5:3])


def test_only_chunks_that_are_selected_are_read_and_looked_for(store):
    for key in ("v/c/0/0/0", "v/c/1/3/0", "v/c/1/2/2"):
        (store / key).write_bytes(b"")
    samples = open_store(store, isel={"y": {"start": 2, "stop": 4}, "x": {"start": 0, "stop": 4}, "n": {"stop": 9}})
    (store / "v/c/0/1/0").unlink()
    check_presence(samples)
    _, partition = only_partition(samples)
    assert sorted(index_of(batches(UnitReader(samples), partition, [9]))) == list(range(9))
    (store / "v/c/1/2/1").unlink()
    with pytest.raises(ChunkMissing, match="v/c/1/2/1"):
        check_presence(samples)


def test_a_step_skips_chunks_between(write_store, tmp_path):
    v = {"dims": ("n", "x"), "values": np.arange(60.0).reshape(6, 10), "chunks": (6, 1)}
    path = write_store(tmp_path / "s", {"v": v, "index": vector(np.arange(6), 6)})
    for x in (1, 2, 4, 5, 7, 8):
        (path / f"v/c/0/{x}").unlink()
    samples = open_store(path, inputs=["v"], isel={"x": {"start": 0, "stop": 10, "step": 3}})
    check_presence(samples)
    assert UnitReader(samples).read(Box(0, 6))["v"][1][1].tolist() == [10, 13, 16, 19]


BAD_ISEL = [
    ({"z": 0}, r"data.isel.z = 0: no such dimension"),
    ({"xx": 0}, r'no such dimension; did you mean "x"|no such dimension'),
    ({"n": 3}, r"data.isel.n = 3: n is the dimension of the samples"),
    ({"x": 5}, r"data.isel.x = 5: x has 5 places"),
    ({"x": -6}, r"data.isel.x = -6: x has 5 places"),
    ({"x": {"start": 3, "stop": 3}}, r"data.isel.x = .*: selects nothing of the 5 places"),
    ({"n": {"start": 0, "stop": 12, "step": 2}}, r"a step along n is not for isel"),
    ({"n": {"start": 12, "stop": 20}}, r"selects nothing of the 12 places"),
]


@pytest.mark.parametrize(("isel", "said"), BAD_ISEL)
def test_a_selection_that_cannot_be_made_is_refused(store, isel, said):
    with pytest.raises(InvalidConfig, match=said) as caught:
        open_store(store, isel=isel)
    assert caught.value.code == 3


def test_the_selection_is_part_of_the_fingerprint(store):
    prints = {
        open_store(store, isel=isel, patch=patch).fingerprint
        for isel in ({}, {"x": 1}, {"x": {"start": 1, "stop": 2}}, {"n": {"stop": 11}}, {"n": {"start": 1, "stop": 12}})
        for patch in ({}, {"y": 2}, {"y": 4})
    }
    assert len(prints) == 15


def test_rows_before_the_selection_do_not_count_for_the_shares_of_splits(write_store, tmp_path):
    # 100 units of 20 rows are selected: enough for a fifth of whole units, so that no unit is read twice
    v = {"dims": ("n",), "values": np.zeros(20_000, "float32"), "chunks": (20,)}
    path = write_store(tmp_path / "s", {"v": v, "index": vector(np.zeros(20_000), 20)})
    split = {"val": 0.2, "test": 0.0}
    samples = open_store(path, inputs=["v"], isel={"n": {"start": 18_000, "stop": 20_000}}, split=split)
    plan = plan_data(samples, replicas=2, seed=0)
    seen = describe_plan(samples, plan)
    assert (seen["val_samples"], sum(seen["partition_samples"])) == (400, 1600)
    assert seen["decodes_per_unit"] == 1


@pytest.mark.parametrize("which", ["zarr", "zarrs", "auto"])
def test_a_small_variable_that_is_preloaded_is_counted_from_the_first_selected_row(write_store, tmp_path, which):
    arrays = {
        "v": {"dims": ("n", "x"), "values": np.arange(6000.0).reshape(60, 100), "chunks": (5, 100)},
        "index": vector(np.arange(60, dtype="int32"), 60),
    }
    path = write_store(tmp_path / "s", arrays)
    samples = open_store(
        path, inputs=["v"], isel={"n": {"start": 13, "stop": 51}}, input_offsets=[-1, 0], target_offsets=2
    )
    assert [v.name for v in samples.preloaded] == ["index"]
    _, partition = only_partition(samples)
    (batch,) = batches(reader_of(samples, which), partition, [partition.num_samples])
    anchors = batch.targets[0] - 2
    assert sorted(anchors.tolist()) == list(range(14, 49))
    np.testing.assert_array_equal(batch.inputs[0][:, 1, 0], anchors * 100)
    rows = reader_of(samples, which).read(Box(20, 30))["index"]
    assert (rows[0], rows[1].tolist()) == (22, list(range(22, 32)))


# Patches --------------------------------------------------------------------------------------------------------


def test_the_last_patch_begins_earlier_so_that_it_is_whole(store):
    samples = open_store(store, patch={"x": 2, "y": 3})
    assert [tile.ranges for tile in samples.tiles] == [
        (("x", x, x + 2), ("y", y, y + 3)) for x in (0, 2, 3) for y in (0, 1)
    ]
    assert [samples.field_shape(field) for field in samples.fields] == [(3, 2), (3,), ()]
    assert "6 a row, of x 2 x y 3" in repr(samples)


def test_patches_of_one_row_are_samples_of_their_own_and_shuffled(store):
    samples = open_store(store, patch={"x": 2})
    plan, partition = only_partition(samples)
    assert (plan.patches, partition.num_samples) == (3, 36)
    (batch,) = batches(UnitReader(samples), partition, [36])
    anchors = batch.targets[0].tolist()
    assert Counter(anchors) == dict.fromkeys(range(12), 3)
    assert any(a != b for a, b in zip(anchors[::3], anchors[1::3], strict=True))  # not together
    (again,) = read_batches(UnitReader(samples), partition, START, [36], replica=0, shuffle=False)
    assert again.targets[0].tolist() == np.repeat(np.arange(12), 3).tolist()
    stored = zarr.open_group(store, mode="r")["v"][...]
    for i in range(36):
        start = (0, 2, 3)[i % 3]
        np.testing.assert_array_equal(again.inputs[0][i], stored[:, i // 3, start : start + 2])
    assert again.inputs[1].strides[0] == 0  # `mean` has no x, so it is the same for all


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ({"n": 2}, "n is the dimension of the samples"),
        ({"z": 2}, "z is not a dimension of any variable"),
        ({"x": 6}, "data.patch.x = 6: x has 5 places"),
        ({"y": 0}, "data.patch"),
    ],
)
def test_a_patch_that_cannot_be_cut_is_refused(store, patch, said):
    with pytest.raises(InvalidConfig, match=said) as caught:
        open_store(store, patch=patch)
    assert caught.value.code == 3


def test_a_dimension_that_isel_drops_cannot_be_patched(store):
    with pytest.raises(InvalidConfig, match="y is not a dimension of any variable"):
        open_store(store, patch={"y": 2}, isel={"y": 1})
    assert len(open_store(store, patch={"x": 2}, isel={"x": {"start": 1, "stop": 5}}).tiles) == 2


# missing = "skip" -------------------------------------------------------------------------------------------------


@examples(30)
@given(st.data())
def test_samples_of_missing_chunks_are_left_out_and_no_other_value_changes(write_store, chunk_files, data):
    draw = data.draw
    zarr_format, arrays, sizes = draw(grids())
    arrays = {name: arrays[name] for name in ("v", "w", "index")}
    isel = draw(selections(sizes, rows=draw(st.booleans())))
    inputs, targets = draw(st.sampled_from([0, [-1, 0]])), draw(st.sampled_from([0, 1]))
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(Path(folder, "s"), arrays, zarr_format=zarr_format)
        files = chunk_files(path)
        gone = draw(st.lists(st.sampled_from(files), max_size=3, unique=True))
        for key in gone:
            (path / key).unlink()
        samples = open_samples(
            path,
            inputs=["v", "w"],
            targets=["w", "index"],
            sample_dim="n",
            isel=isel,
            missing="skip",
            input_offsets=inputs,
            target_offsets=targets,
            split=WHOLE,
        )
        rows = range(samples.first_row, samples.num_samples)
        absent = absent_rows(samples)
        expected = absent_by_hand(arrays, isel, gone, rows)
        assert {r for start, stop in absent for r in range(start, stop) if r in rows} == expected
        assert all(a < b for a, b in absent)
        assert all(b < c for (_, b), (c, _) in itertools.pairwise(absent))
        try:
            plan = plan_data(samples, replicas=1, seed=1, absent=absent)
        except TooFewSamples:
            return
        (partition,) = train_partitions(plan)
        every = [*listed(inputs), *listed(targets)]
        reader = reader_of(samples, draw(readers), absent=absent)
        selected = {name: rows_of(described, isel) for name, described in arrays.items()}
        sizes_of = [partition.num_samples, partition.num_samples]
        seen = []
        for batch in batches(reader, partition, sizes_of, shuffle=draw(st.booleans())):
            anchors = (batch.targets[1] - targets).tolist()
            for values, name, of in zip(
                (*batch.inputs, batch.targets[0]), "vww", (inputs, inputs, targets), strict=True
            ):
                assert all(values_match(values[i], *selected[name], a, of, {}) for i, a in enumerate(anchors))
            seen.append(sorted(anchors))
        assert seen[0] == seen[1]
        assert len(set(seen[0])) == len(seen[0])
        present = set(rows) - expected
        # no sample touches a row that is absent; all that are left out are near one, by less than a cell
        windows = {a: {a + o for o in (*every, 0)} for a in rows}
        assert all(windows[a] <= present for a in seen[0])
        cells = list(zip(*(b.tolist() for b in cell_bounds(plan, np.arange(plan.num_cells))), strict=True))
        whole = {r for start, stop in cells if set(range(start, stop)) <= present for r in range(start, stop)}
        low, high = min(every), max(every)
        assert set(seen[0]) == {a for a in whole if set(range(a + min(low, 0), a + max(high, 0) + 1)) <= whole}
        assert describe_plan(samples, plan)["absent_rows"] == sum(b - a for a, b in absent)


def absent_by_hand(arrays, isel, gone, rows):
    """The rows of which a chunk that isel touches is gone."""
    found = set()
    for key in gone:
        name, _, rest = key.partition("/")
        place = [int(i) for i in rest.removeprefix("c/").replace(".", "/").split("/")]
        described = arrays[name]
        sizes = described.get("shards") or described["chunks"]
        inside = []
        for dim, index, size, length in zip(described["dims"], place, sizes, described["values"].shape, strict=True):
            part = set(range(index * size, min((index + 1) * size, length)))
            chosen = range(length)[as_numpy(isel, [dim])[0]]
            inside.append(part & ({chosen} if isinstance(chosen, int) else set(chosen)))
        if all(inside):
            found |= inside[described["dims"].index("n")]
    return found & set(rows)


@pytest.mark.parametrize("gone", [(0,), (3,), (4, 5), (0, 9), (2, 4, 6)])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_just_the_rows_of_missing_chunks_are_left_out(write_store, tmp_path, zarr_format, gone):
    arrays = {"v": vector(np.arange(100.0), 10), "index": vector(np.arange(100), 10)}
    path = write_store(tmp_path / "s", arrays, zarr_format=zarr_format)
    for chunk in gone:
        (path / (f"v/{chunk}" if zarr_format == 2 else f"v/c/{chunk}")).unlink()
    samples = open_store(path, inputs=["v"], missing="skip")
    plan = plan_data(samples, replicas=1, seed=0, absent=absent_rows(samples))
    (partition,) = train_partitions(plan)
    expected = [n for n in range(100) if n // 10 not in gone]
    assert sorted(index_of(batches(UnitReader(samples, absent=plan.absent), partition, [len(expected)]))) == expected
    assert describe_plan(samples, plan)["dropped_samples"] == 10 * len(gone)


def test_an_inner_chunk_that_is_missing_is_skipped_alone(write_store, tmp_path):
    values = np.arange(1.0, 101.0)
    values[30:40] = 0  # the fill value: not written
    path = tmp_path / "s"
    write_sparse(path, {"v": vector(values, 10, shards=(50,)), "index": vector(np.arange(1, 101), 10, shards=(50,))})
    samples = open_store(path, inputs=["v"], missing="skip")
    assert absent_rows(samples) == ((30, 40),)
    (absent,) = absent_chunks(samples, *open_arrays(samples), samples.variable("v"), full=True)
    assert (absent.key, absent.inner, absent.start, absent.stop) == ("v/c/0", (3,), 30, 40)
    plan = plan_data(samples, replicas=1, seed=0, absent=absent_rows(samples))
    plan = replace(plan, cell_rows=10)
    (partition,) = train_partitions(plan)
    found = index_of(batches(UnitReader(samples, absent=plan.absent), partition, [90]))
    assert sorted(found) == [n for n in range(1, 101) if not 31 <= n <= 40]


def write_sparse(path, arrays):
    """Write a group without the chunks that hold the fill value alone."""
    with zarr.config.set({"array.write_empty_chunks": False}):
        root = zarr.create_group(path)
        for name, described in arrays.items():
            options = dict(described)
            values, dims = options.pop("values"), options.pop("dims")
            array = root.create_array(
                name, shape=values.shape, dtype=values.dtype, dimension_names=dims, fill_value=0, **options
            )
            array[...] = values


def test_a_chunk_that_goes_missing_after_the_plan_is_not_read_as_the_fill_value(write_store, tmp_path):
    arrays = {"v": vector(np.arange(100.0), 10), "index": vector(np.arange(100), 10)}
    path = write_store(tmp_path / "s", arrays)
    (path / "v/c/3").unlink()
    samples = open_store(path, inputs=["v"], missing="skip")
    plan = plan_data(samples, replicas=1, seed=0, absent=absent_rows(samples))
    (partition,) = train_partitions(plan)
    (path / "v/c/7").unlink()
    with pytest.raises(ChunkMissing, match="v/c/7"):
        batches(UnitReader(samples, absent=plan.absent), partition, [partition.num_samples])


ABSENT = {
    "just the rows of the chunk": (((4, 8),), False, True),
    "more rows": (((3, 9),), False, True),
    "rows of two": (((0, 8),), False, True),
    "after others": (((0, 1), (4, 8), (12, 13)), False, True),
    "the first row is needed": (((5, 8),), False, False),
    "the last row is needed": (((4, 7),), False, False),
    "a row between is needed": (((4, 6), (7, 8)), False, False),
    "other rows": (((8, 12),), False, False),
    "none": ((), False, False),
    "all of the shard": (((0, 8),), True, True),
    "a chunk of the shard": (((4, 8),), True, False),
    "the first chunk of the shard": (((0, 4),), True, False),
}


@pytest.mark.sampled(35)
@pytest.mark.parametrize("which", ["zarr", "zarrs", "auto"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ABSENT)
def test_a_chunk_may_be_missing_whose_rows_nobody_needs(tmp_path, kind, sharded, which):
    absent, whole_shard, harmless = ABSENT[kind]
    values = np.arange(1.0, 15.0, dtype="float32")
    values[0 if whole_shard and sharded else 4 : 8] = 0  # the fill value: not written
    write_sparse(
        tmp_path / "s",
        {
            "v": vector(values, 4, **({"shards": (8,)} if sharded else {})),
            "index": vector(np.arange(1, 15), 14),
        },
    )
    if not sharded and whole_shard:
        return
    samples = open_store(tmp_path / "s", inputs=["v"], missing="skip")
    for first, stop in ((4, 8), (0, 14)):
        reader = reader_of(samples, which, absent=absent)
        if harmless:
            np.testing.assert_array_equal(reader.read(Box(first, stop))["v"][1], values[first:stop])
        else:
            with pytest.raises(ChunkMissing, match=r"of v, in shard v/c/0|chunk v/c/[01] of v"):
                reader.read(Box(first, stop))


@pytest.mark.parametrize("which", ["zarr", "zarrs", "auto"])
def test_the_last_chunk_may_be_missing_although_it_reaches_beyond_the_array(tmp_path, which):
    values = np.arange(1.0, 15.0, dtype="float32")
    values[12:] = 0
    write_sparse(tmp_path / "s", {"v": vector(values, 4), "index": vector(np.arange(1, 15), 14)})
    samples = open_store(tmp_path / "s", inputs=["v"], missing="skip")
    rows = reader_of(samples, which, absent=((12, 14),)).read(Box(10, 14))["v"][1]
    assert rows.tolist() == [11, 12, 0, 0]
    with pytest.raises(ChunkMissing, match="chunk v/c/3 of v"):
        reader_of(samples, which, absent=((12, 13),)).read(Box(10, 14))


@pytest.mark.parametrize("which", ["zarr", "auto"])
@pytest.mark.parametrize("marked", [False, True])
def test_values_that_are_not_finite_matter_where_rows_are_needed(write_store, tmp_path, marked, which):
    values = np.arange(28.0, dtype="float32").reshape(14, 2)
    bad = -99.0 if marked else np.nan
    attributes = {"attributes": {"missing_value": -99.0}} if marked else {}
    height = np.array([bad, 1, bad], "float32")
    for place, said in ((3, r"v\[3, 1\]"), (8, r"v\[8, 1\]"), (13, r"v\[13, 1\]"), (None, "")):
        stored = values.copy()
        stored[4:8] = bad
        if place is not None:
            stored[place, 1] = bad
        arrays = {
            "v": {"dims": ("n", "x"), "values": stored, "chunks": (4, 2), **attributes},
            "height": {"dims": ("y",), "values": height, "chunks": (3,), **attributes},
            "index": vector(np.arange(14), 14),
        }
        path = write_store(tmp_path / str(place), arrays)
        samples = open_store(path, inputs=["v", "height"], missing="skip")
        reader = UnitReader(samples, which, absent=((0, 1), (4, 8)))
        for first, stop in ((0, 14), (2, 14), (6, 14), (0, 6), (5, 7)):
            if place is not None and first <= place < stop:
                with pytest.raises(NonFiniteData, match=said):
                    reader.read(Box(first, stop))
            else:
                np.testing.assert_array_equal(reader.read(Box(first, stop))["v"][1], stored[first:stop])
    with pytest.raises(NonFiniteData, match=r"height\[0\]"):
        UnitReader(samples, which, absent=((0, 8),)).statics  # noqa: B018


@pytest.mark.parametrize("which", ["zarr", "auto"])
@pytest.mark.parametrize("value", [-99.0, np.nan, np.inf])
def test_where_a_number_marks_missing_values_others_that_are_not_finite_are_found_too(
    write_store, tmp_path, value, which
):
    values = np.arange(14.0, dtype="float32")
    values[9] = value
    v = {**vector(values, 4), "attributes": {"missing_value": -99.0}}
    samples = open_store(write_store(tmp_path / "s", {"v": v, "index": vector(np.arange(14), 14)}), inputs=["v"])
    with pytest.raises(NonFiniteData, match=rf"v\[9\] in chunk v/c/2 is {value}") as caught:
        UnitReader(samples, which).read(Box(8, 12))
    assert ("marks a missing value" in caught.value.message) == (value == -99)


def test_a_static_variable_cannot_be_skipped(store):
    (store / "mean/c/0").unlink()
    with pytest.raises(ChunkMissing, match="chunk mean/c/0 of mean is missing"):
        absent_rows(open_store(store, missing="skip"))


def test_a_store_of_which_everything_is_missing_has_too_few_samples(write_store, tmp_path, chunk_files):
    path = write_store(tmp_path / "s", {"v": vector(np.arange(20.0), 10), "index": vector(np.arange(20), 10)})
    for key in chunk_files(path, "v"):
        (path / key).unlink()
    samples = open_store(path, inputs=["v"], missing="skip")
    assert absent_rows(samples) == ((0, 20),)
    with pytest.raises(TooFewSamples):
        plan_data(samples, replicas=1, seed=0, absent=absent_rows(samples))


def test_a_complete_store_has_no_absent_rows(store):
    assert absent_rows(open_store(store, missing="skip")) == ()


# Variables without the sample dimension -----------------------------------------------------------------------------


def test_a_variable_without_the_sample_dimension_needs_it_to_be_named(store):
    with pytest.raises(LengthsDiffer, match=r"share no dimension: v\(y, n, x\), mean\(y\), index\(n\)") as caught:
        open_store(store, sample_dim="auto")
    assert "data.sample_dim" in caught.value.hint
    samples = open_store(store)
    assert [v.is_static for v in samples.variables] == [False, True, False]
    assert (samples.variable("mean").row_bytes, samples.row_bytes) == (0, 4 * 5 * 4 + 8)


def test_a_target_must_have_the_sample_dimension(store):
    with pytest.raises(InvalidConfig, match='data.sample_dim = "n": not a dimension of mean, a target') as caught:
        open_samples(store, inputs=["v"], targets=["mean"], sample_dim="n")
    assert caught.value.code == 3
