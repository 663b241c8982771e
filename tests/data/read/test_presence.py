"""Which stored objects there are, looked up before training, and the digest of their sizes."""

from __future__ import annotations

import itertools
import shutil
import stat
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.plan.missing import AbsentChunks
from dtrain.data.plan.units import Box
from dtrain.data.read import local
from dtrain.data.read.inventory import take_inventory
from dtrain.data.read.local import facts_of
from dtrain.data.read.open import open_arrays
from dtrain.data.read.presence import absent_rows, check_presence, content_digest
from dtrain.data.read.store import names_of, objects_of
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import ChunkMissing, DataNotFound, NonFiniteData
from tests.data.helpers import variable
from tests.data.servers import FileServer

FORMATS = pytest.mark.parametrize("zarr_format", [2, 3])


@pytest.fixture
def small(write_store, tmp_path):
    """Write x(n, k) and y(n) of 10 samples, or other arrays, and return the path."""
    x = {"dims": ("n", "k"), "values": np.arange(20.0).reshape(10, 2), "chunks": (4, 2)}
    y = {"dims": ("n",), "values": np.arange(10, dtype="int32"), "chunks": (3,)}

    def write(zarr_format=3, name="store.zarr", group="", consolidated=False, **arrays):
        arrays = {"x": x, "y": y, **arrays}
        options = {"zarr_format": zarr_format, "group": group, "consolidated": consolidated}
        return write_store(tmp_path / name, arrays, **options)

    return write


def open_xy(path, **data):
    return open_samples(path, **{"inputs": ["x"], "targets": ["y"], **data})


# Which chunks are stored ------------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    """Draw (shape, chunks, shards or None, sample axis, zarr format)."""
    dims = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 9)) for _ in range(dims))
    chunks = tuple(draw(st.integers(1, length)) for length in shape)
    sharded = draw(st.booleans())
    shards = tuple(size * draw(st.integers(1, 3)) for size in chunks) if sharded else None
    return shape, chunks, shards, draw(st.integers(0, dims - 1)), 3 if sharded else draw(st.sampled_from([2, 3]))


@given(layouts(), st.data())
def test_the_keys_of_a_selection_are_the_files_that_hold_its_rows(write_store, chunk_files, layout, data):
    shape, chunks, shards, axis, zarr_format = layout
    start = data.draw(st.integers(0, shape[axis] - 1))
    stop = data.draw(st.integers(start + 1, shape[axis]))
    dims = tuple("n" if dim == axis else f"d{dim}" for dim in range(len(shape)))
    described = {"dims": dims, "values": np.zeros(shape), "chunks": chunks, "shards": shards}
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(Path(folder, "s"), {"x": described}, zarr_format=zarr_format, group="g")
        samples = open_samples(path, inputs=["x"], targets=["x"], group="g", sample_dim="n")
        (variable,), (_, arrays) = samples.variables, open_arrays(samples)
        objects = shards or chunks

        def keys(first, after):
            return [key for _, key in objects_of(arrays["x"], variable, variable.selection(first, after))]

        assert sorted(keys(0, shape[axis])) == chunk_files(path)
        touched = {int(i) // objects[axis] for i in range(start, stop)}
        places = itertools.product(
            *(sorted({i // size for i in range(n)}) for n, size in zip(shape, objects, strict=True))
        )
        dot = "." if zarr_format == 2 else "/"
        head = "g/x/" if zarr_format == 2 else "g/x/c/"
        expected = [head + dot.join(map(str, place)) for place in places if place[axis] in touched]
        assert keys(start, stop) == expected


LAYOUTS = {
    "v2": (2, {"chunks": (4, 2)}, "x/2.1", 8),
    "v3": (3, {"chunks": (4, 2)}, "x/c/2/1", 8),
    "sharded": (3, {"chunks": (2, 1), "shards": (4, 2)}, "x/c/2/1", 8),
    "other axis": (3, {"chunks": (3, 5)}, "x/c/3/0", 4),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_missing_chunk_is_named(small, kind):
    zarr_format, chunking, key, objects = LAYOUTS[kind]
    values = np.ones((10, 4)) if kind == "other axis" else np.ones((13, 4))
    x = {"dims": ("n", "k"), "values": values, **chunking}
    y = {"dims": ("n",), "values": np.zeros(len(values)), "chunks": (5,)}
    path = small(zarr_format, x=x, y=y)
    samples = open_xy(path)
    check_presence(samples)
    assert samples.variable("x").num_objects == objects
    (path / key).unlink()
    with pytest.raises(ChunkMissing) as caught:
        check_presence(samples)
    assert caught.value.code == 5
    assert f"chunk {key} of x is missing (1 of {objects})" in caught.value.message
    assert 'missing = "fill"' in caught.value.hint


@FORMATS
def test_several_missing_chunks_are_counted_and_the_first_is_named(small, grid_keys, zarr_format):
    path = small(zarr_format, group="g")
    for key in grid_keys("g/y", (4,), zarr_format)[1:]:
        (path / key).unlink()
    first = grid_keys("g/y", (4,), zarr_format)[1]
    with pytest.raises(ChunkMissing, match=rf"chunk {first} of y is missing \(3 of 4 are\)"):
        check_presence(open_xy(path, group="g", missing="error"))


def test_chunks_of_variables_that_are_not_used_may_be_missing(small):
    path = small(z={"dims": ("n",), "values": np.zeros(10), "chunks": (5,)})
    shutil.rmtree(path / "z" / "c")
    check_presence(open_xy(path))


def test_a_variable_is_not_taken_for_one_whose_name_it_begins(small):
    longer = {"dims": ("n", "k"), "values": np.zeros((10, 2)), "chunks": (4, 2)}
    path = small(x2=longer)
    shutil.rmtree(path / "x" / "c")
    with pytest.raises(ChunkMissing, match=r"chunk x/c/0/0 of x is missing \(3 of 3 are\)"):
        check_presence(open_xy(path))


@FORMATS
def test_the_digest_of_a_store_follows_what_is_stored_not_where_or_when(small, tmp_path, zarr_format):
    path = small(zarr_format, z={"dims": ("n",), "values": np.zeros(10), "chunks": (5,)})
    first = content_digest(open_xy(path))  # says nothing about missing ones
    assert set(first) == {"x", "y"}
    shutil.copytree(path, tmp_path / "copy")
    assert content_digest(open_xy(tmp_path / "copy")) == first
    key = "x/2.0" if zarr_format == 2 else "x/c/2/0"
    shutil.rmtree(path / "z")
    assert content_digest(open_xy(path)) == first  # it is not used
    stored = (path / key).read_bytes()
    digests = {first["x"]}
    for damage in (stored + b"1", stored[:-1], None):
        if damage is None:
            (path / key).unlink()
        else:
            (path / key).write_bytes(damage)
        found = content_digest(open_xy(path))
        assert found["y"] == first["y"]
        digests.add(found["x"])
    assert len(digests) == 4
    without = open_xy(path, isel={"n": {"start": 0, "stop": 8}})  # the last object is not selected
    assert content_digest(without)["x"] == content_digest(open_xy(tmp_path / "copy", isel=without.config.isel))["x"]


# Many objects -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [-1.0, 1e9])
def test_facts_of_files_come_in_order_however_long_a_look_up_takes(tmp_path, monkeypatch, slow):
    monkeypatch.setattr(local, "SLOW_LOOKUP", slow)
    monkeypatch.setattr(local, "TOGETHER", 50)
    for number in range(0, 300, 3):
        (tmp_path / str(number)).write_bytes(b"x" * number)
    (tmp_path / "folder").mkdir()
    names = [*map(str, range(300)), "folder", "folder/none", "0/1"]
    seen = list(facts_of(str(tmp_path), iter(names)))
    assert [facts and facts.st_size for facts in seen[:300]] == [n if n % 3 == 0 else None for n in range(300)]
    assert stat.S_ISDIR(seen[300].st_mode)
    assert seen[301:] == [None, None]
    assert list(facts_of(str(tmp_path / "nowhere"), ["1"])) == [None]
    assert list(facts_of(str(tmp_path), [])) == []


@given(layouts(), st.sampled_from(["default/", "default.", "v2.", "v2/"]), st.data())
def test_names_of_objects_are_those_that_zarr_writes(layout, encoding, data):
    shape, chunks, shards, _, zarr_format = layout
    name, separator = encoding[:-1], encoding[-1]
    keys = {"chunk_key_encoding": {"name": name, "separator": separator}} if zarr_format == 3 else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = zarr.create_array({}, name="a", shape=shape, chunks=chunks, shards=shards, dtype="f4", **keys)
    described = variable("a", shape[0], 1, row=shape[1:])
    start = data.draw(st.integers(0, shape[0] - 1))
    described = replace(described, chunks=chunks, objects=shards or chunks)
    select = described.selection(start, shape[0])
    names = [f"a/{name}" for name in names_of(array, described, select)]
    assert names == [key for _, key in objects_of(array, described, select)]


def test_a_directory_in_the_place_of_a_chunk_is_no_chunk(small):
    path = small()
    (path / "y/c/1").unlink()
    (path / "y/c/1").mkdir()
    with pytest.raises(ChunkMissing, match=r"chunk y/c/1 of y is missing \(1 of 4\)"):
        check_presence(open_xy(path, missing="error"))
    with pytest.raises(ChunkMissing, match=r"chunk y/c/1 of y is missing \(1 of 4\)"):
        take_inventory(open_xy(path, missing="error"), full=False, digests=True, presence=True)


# What becomes of missing chunks -----------------------------------------------------------------------------


def test_missing_chunks_that_are_no_fault_are_counted(small):
    mask = {"dims": ("n", "m"), "values": np.ones((10, 4), bool), "chunks": (4, 2)}
    path = small(mask=mask)
    for key in ("mask/c/0/0", "mask/c/2/1", "y/c/1"):
        (path / key).unlink()
    samples = open_xy(path, inputs=["x", "mask"])
    assert check_presence(samples) == {"mask": AbsentChunks(2, 6), "y": AbsentChunks(1, 4)}
    some = open_xy(path, inputs=["x", "mask"], isel={"n": {"start": 0, "stop": 8}, "m": {"start": 0, "stop": 2}})
    assert check_presence(some) == {"mask": AbsentChunks(1, 2), "y": AbsentChunks(1, 3)}
    assert check_presence(open_xy(path, inputs=["x"], targets=["x"])) == {}


def test_integers_that_older_xarray_wrote_for_bools_are_judged_as_bools(small):
    mask = {"dims": ("n", "m"), "values": np.ones((10, 4), "int8"), "chunks": (4, 2)}
    for attributes in ({"dtype": "bool"}, {"dtype": "int8"}, {}):
        path = small(name=f"{len(attributes)}{attributes.get('dtype')}", mask={**mask, "attributes": attributes})
        (path / "mask/c/0/0").unlink()
        samples = open_xy(path, inputs=["x", "mask"])
        if attributes == {"dtype": "bool"}:
            assert check_presence(samples) == {"mask": AbsentChunks(1, 6)}
        else:
            with pytest.raises(ChunkMissing):
                check_presence(samples)


def test_chunks_of_a_missing_shard_are_counted_one_by_one(small):
    mask = {"dims": ("n", "m"), "values": np.ones((20, 4), bool), "chunks": (2, 2), "shards": (6, 4)}
    y = {"dims": ("n",), "values": np.zeros(20), "chunks": (5,)}
    x = {"dims": ("n", "k"), "values": np.zeros((20, 2)), "chunks": (4, 2)}
    path = small(mask=mask, x=x, y=y)
    (path / "mask/c/3/0").unlink()  # rows 18 and 19
    (path / "mask/c/0/0").unlink()  # rows 0 to 5
    samples = open_xy(path, inputs=["x", "mask"])
    assert check_presence(samples) == {"mask": AbsentChunks(2 * (1 + 3), 2 * 10)}
    some = open_xy(path, inputs=["x", "mask"], isel={"n": {"start": 3, "stop": 20}}, sample_dim="n")
    assert check_presence(some) == {"mask": AbsentChunks(2 * (1 + 2), 2 * 9)}


def test_a_missing_chunk_says_what_would_be_read_and_only_ways_that_work(small):
    packed = {"dims": ("n", "k"), "values": np.ones((10, 2), "int16"), "chunks": (4, 2)}
    packed["attributes"] = {"scale_factor": 0.5, "add_offset": 280.0}
    path = small(packed=packed, place={"dims": ("k",), "values": np.ones(2), "chunks": (1,)})
    (path / "packed/c/1/0").unlink()
    with pytest.raises(ChunkMissing, match="Zarr would read it as the fill value, which means 280[.]") as caught:
        check_presence(open_xy(path, inputs=["packed"]))
    assert 'data.missing = "fill"; to leave out their samples: data.missing = "skip".' in caught.value.hint
    for way in ("fill", "skip"):
        assert (
            absent_rows(open_xy(path, inputs=["packed"], missing=way)) == ((4, 8),) * (way == "skip") or way == "fill"
        )
    (path / "place/c/1").unlink()
    with pytest.raises(ChunkMissing, match="chunk place/c/1 of place is missing .* fill value, 0[.]") as caught:
        check_presence(open_xy(path, inputs=["x", "place"], sample_dim="n"))
    assert "skip" not in caught.value.hint


@pytest.mark.parametrize("missing", ["auto", "error"])
def test_a_missing_chunk_of_nan_says_what_lets_it_through(small, missing):
    x = {"dims": ("n", "k"), "values": np.ones((10, 2)), "chunks": (4, 2), "fill_value": np.nan}
    path = small(x=x)
    (path / "x/c/1/0").unlink()
    with pytest.raises((NonFiniteData, ChunkMissing), match="chunk x/c/1/0 of x is missing") as caught:
        check_presence(open_xy(path, missing=missing))
    assert ('data.missing = "auto" and data.non_finite = "allow"' in caught.value.hint) == (missing == "error")
    assert 'data.non_finite = "allow"' in caught.value.hint
    assert check_presence(open_xy(path, non_finite="allow")) == {"x": AbsentChunks(1, 3)}


@FORMATS
def test_an_array_that_has_gone_although_consolidated_metadata_list_it(small, zarr_format):
    path = small(zarr_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(path)
    shutil.rmtree(path / "y")
    server = FileServer(path)
    try:
        with pytest.raises(DataNotFound, match="y is not there any more"):
            check_presence(open_xy(server.url))
    finally:
        server.stop()


def test_a_chunk_that_reads_as_nan_is_named_where_it_is_read(small):
    sharded = {"dims": ("n", "k"), "values": np.ones((10, 2)), "chunks": (2, 2), "shards": (4, 2), "fill_value": np.nan}
    for name, options, key in (("plain", {"chunks": (4, 2)}, "x/c/1/0"), ("shards", sharded, "x/c/1/0")):
        x = {"dims": ("n", "k"), "values": np.ones((10, 2)), "fill_value": np.nan, **options}
        path = small(name=name, x=x)
        (path / key).unlink()
        for reader in ("auto", "zarr"):
            with pytest.raises(
                NonFiniteData, match=rf"x\[4, 0\] in chunk {key} is nan: the chunk is not stored"
            ) as caught:
                UnitReader(open_xy(path, reader=reader), reader).read(Box(0, 10))
            assert 'data.missing = "skip"' in caught.value.hint
