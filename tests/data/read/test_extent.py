"""What metadata claim: stores of a few kilobytes that would be petabytes are refused at once, and named."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dtrain.data.coordinate import find_gaps
from dtrain.data.genes import genes_of
from dtrain.data.read import presence
from dtrain.data.read.documents import MOST_BYTES
from dtrain.data.read.extent import MOST_CHUNKS, MOST_COLUMN_BYTES, check_grid, check_whole
from dtrain.data.read.inventory import take_inventory
from dtrain.data.source import open_samples
from dtrain.errors import ChunkMissing, ChunkTooLarge, DtrainError, NotZarr, UnsuitableVariable
from tests.data.layouts.fixtures import write_anndata

FORMATS = pytest.mark.parametrize("zarr_format", [2, 3])


# Sizes alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "chunks", "objects", "kind", "said"),
    [
        ((40, 3), (0, 3), (0, 3), UnsuitableVariable, r"chunks of shape \[0, 3\], which hold no values"),
        ((40, 3), (10, 0), (10, 3), UnsuitableVariable, "which hold no values"),
        ((2**62, 3), (2**62, 3), (2**62, 3), UnsuitableVariable, r"would have more than 2\^63 bytes"),
        ((2**64,), (2**40,), (2**40,), UnsuitableVariable, r"would have more than 2\^63 bytes"),
        ((0, 10**30), (1, 1), (1, 1), UnsuitableVariable, r"would have more than 2\^63 bytes"),
        (
            (10**13,),
            (10,),
            (10,),
            UnsuitableVariable,
            "has 1,000,000,000,000 stored objects; at most 100,000,000 can be",
        ),
        ((10**13,), (10,), (10**13,), UnsuitableVariable, "has 1,000,000,000,000 chunks in each shard; at most"),
        (
            (10**13,),
            (10**12,),
            (10**12,),
            ChunkTooLarge,
            r"one chunk of x \(1000000000000,\) decodes to more than 1.1 TB",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_arithmetic(shape, chunks, objects, kind, said):
    with pytest.raises(kind, match=said) as caught:
        check_grid("s.zarr", "x", shape, chunks, objects, 4)
    assert caught.value.code == 3
    assert caught.value.hint


def test_what_can_be_is_not_refused():
    check_grid("s.zarr", "x", (0, 3), (10, 3), (10, 3), 4)
    check_grid("s.zarr", "x", (), (), (), 4)
    check_grid("s.zarr", "x", (10 * MOST_CHUNKS,), (10,), (10,), 8)
    check_grid("s.zarr", "x", (10**12, 3), (10**6, 3), (10**6, 3), 4)
    with pytest.raises(ChunkTooLarge, match=r"decodes to more than 3.0 kB"):
        check_grid("s.zarr", "x", (1000,), (1000,), (1000,), 4, most=3000)


def test_a_column_that_is_read_whole_is_not_endless():
    check_whole("s.zarr", "lat", MOST_COLUMN_BYTES)
    with pytest.raises(UnsuitableVariable, match=r"lat would have 8.0 TB; a column of at most 2.1 GB is read whole"):
        check_whole("s.zarr", "lat", 8 * 10**12)


# Stores ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def claiming(write_store, tmp_path):
    """A function that writes a small store, and changes what the metadata of some arrays say."""

    def write(zarr_format, **changes):
        arrays = {
            "x": {"dims": ("time", "k"), "values": np.ones((40, 3), "float32"), "chunks": (10, 3)},
            "y": {"dims": ("time",), "values": np.ones(40, "int32"), "chunks": (10,)},
            "time": {"dims": ("time",), "values": np.arange(40), "chunks": (40,)},
        }
        path = write_store(tmp_path / "s.zarr", arrays, zarr_format=zarr_format)
        for name, change in changes.items():
            file = document(path, name, zarr_format)
            said = json.loads(file.read_text())
            shape, chunks = change.get("shape"), change.get("chunks")
            if shape:
                said["shape"] = shape
            if chunks and zarr_format == 2:
                said["chunks"] = chunks
            elif chunks:
                said["chunk_grid"]["configuration"]["chunk_shape"] = chunks
            said.update(change.get("more", {}))
            file.write_text(json.dumps(said))
        return path

    return write


def document(path: Path, name: str, zarr_format: int) -> Path:
    return path / name / (".zarray" if zarr_format == 2 else "zarr.json")


def opened(path, **data):
    return open_samples(path, inputs=["x"], targets=["y"], **data)


WINDOWS = {"input_offsets": [-1, 0]}


@FORMATS
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"shape": [10**13, 3]}, UnsuitableVariable),
        ({"shape": [2**62, 3]}, UnsuitableVariable),
        ({"shape": [10**30, 3]}, UnsuitableVariable),
        ({"shape": [10**30, 3], "chunks": [10**30, 3]}, UnsuitableVariable),
        ({"shape": [40, 2**62], "chunks": [40, 2**62]}, UnsuitableVariable),
        ({"chunks": [2**62, 3]}, ChunkTooLarge),
        ({"chunks": [10**400, 3]}, ChunkTooLarge),
        ({"shape": [-1, 3]}, NotZarr),
        ({"chunks": [-1, 3]}, NotZarr),
        ({"shape": [1.5, 3]}, NotZarr),
        ({"shape": ["40", 3]}, NotZarr),
        ({"shape": [float("nan"), 3]}, NotZarr),
        ({"shape": [[40], 3]}, NotZarr),
        ({"chunks": [10]}, NotZarr),
    ],
    ids=str,
)
def test_claims_of_a_variable_are_refused_at_once(claiming, zarr_format, change, kind):
    more = {"y": {"shape": change["shape"][:1]}} if "shape" in change and kind is UnsuitableVariable else {}
    path = claiming(zarr_format, x=change, **more)
    tracemalloc.start()
    with pytest.raises((kind, UnsuitableVariable), match="x") as caught:
        opened(path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert caught.value.code in (3, 5)


@FORMATS
def test_chunks_without_values_are_refused(claiming, zarr_format):
    path = claiming(zarr_format, x={"chunks": [0, 3]})
    with pytest.raises((UnsuitableVariable, ChunkMissing, NotZarr), match="x"):  # zarr 3.4 makes 1 of 0, and warns
        take_inventory(opened(path), full=False, digests=True, presence=True)


@FORMATS
def test_a_coordinate_that_claims_too_much_is_not_read(claiming, zarr_format):
    rows = 10**9
    path = claiming(
        zarr_format,
        x={"shape": [rows, 3], "chunks": [10**6, 3]},
        y={"shape": [rows], "chunks": [10**6]},
        time={"shape": [rows], "chunks": [1]},
    )
    samples = opened(path, **WINDOWS)
    assert samples.coordinate == (
        f"{path}: time of shape [1000000000] has 1,000,000,000 stored objects; at most 100,000,000 can be read. "
        "Write time again with larger chunks."
    )
    assert find_gaps(samples).text.startswith("unchecked: ")


@FORMATS
def test_a_coordinate_of_enormous_texts_is_not_read(claiming, zarr_format):
    dtype = {"dtype": "<U100000000"} if zarr_format == 2 else {}
    dtype = dtype or {"data_type": {"name": "fixed_length_utf32", "configuration": {"length_bytes": 4 * 10**8}}}
    samples = opened(claiming(zarr_format, time={"more": {**dtype, "fill_value": ""}}), **WINDOWS)
    assert "one chunk of time (40,) decodes to more than 2.1 GB, the most that is read" in samples.coordinate


@FORMATS
def test_of_very_many_objects_some_are_looked_for_first(claiming, zarr_format, monkeypatch):
    looked = []
    look_up = presence.look_up
    monkeypatch.setattr(presence, "look_up", lambda samples: looked.append(1) or look_up(samples))
    path = claiming(zarr_format, x={"shape": [10**9, 3]}, y={"shape": [10**9], "chunks": [10**6]})
    samples = opened(path)
    said = "its metadata claim 100,000,000 stored objects, and of 256 that were looked for 255 are missing"
    with pytest.raises(ChunkMissing, match=said) as caught:
        take_inventory(samples, full=False, digests=True, presence=True)
    assert caught.value.code == 5
    assert not looked


@FORMATS
def test_of_a_long_coordinate_some_objects_are_looked_for_first(claiming, zarr_format):
    rows = 10**9
    path = claiming(
        zarr_format,
        x={"shape": [rows, 3], "chunks": [10**6, 3]},
        y={"shape": [rows], "chunks": [10**6]},
        time={"shape": [rows]},
    )
    with pytest.raises(ChunkMissing, match="of time is missing: its metadata claim 25,000,000 stored objects"):
        find_gaps(opened(path, **WINDOWS))


def test_very_many_objects_that_are_there_are_no_fault(claiming, monkeypatch):
    monkeypatch.setattr(presence, "MANY_OBJECTS", 2)
    path = claiming(3)
    take_inventory(opened(path), full=False, digests=True, presence=True)
    (path / "x" / "c" / "3" / "0").unlink()
    with pytest.raises(
        ChunkMissing, match="chunk x/c/3/0 of x is missing: its metadata claim 4 stored objects, and of"
    ):
        take_inventory(opened(path), full=False, digests=True, presence=True)
    take_inventory(opened(path, missing="fill"), full=False, digests=True, presence=True)


def test_names_that_claim_too_much_are_not_read(tmp_path):
    path = write_anndata(tmp_path / "a.zarr", "v2")
    file = path / "obs" / "cell_type" / "categories" / ".zarray"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "dtype": "<U300000000", "filters": None, "fill_value": ""}))
    with pytest.raises(
        ChunkTooLarge, match=r"one chunk of obs/cell_type/categories \(3,\) decodes to more than 2.1 GB"
    ):
        open_samples(path, inputs=["X"], targets=["obs/cell_type"])


# Documents ------------------------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("where", ["x", "time", ""])
def test_a_document_that_is_far_too_large_is_not_read(claiming, zarr_format, where):
    path = claiming(zarr_format)
    file = path / where / ((".zarray" if where else ".zgroup") if zarr_format == 2 else "zarr.json")
    os.truncate(file, MOST_BYTES + 1)  # a file with a hole
    tracemalloc.start()
    if where == "time":
        assert (
            "has 67,108,865 bytes; a metadata document of at most 67,108,864 is read"
            in opened(path, **WINDOWS).coordinate
        )
    else:
        with pytest.raises(NotZarr, match=r"has 67,108,865 bytes; a metadata document of at most 67,108,864") as caught:
            opened(path)
        assert caught.value.code == 5
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@FORMATS
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"shape": [' + "9" * 5000 + "]}"], ids=lambda t: t[:9]
)
def test_a_document_that_is_nested_deeply_is_named(claiming, zarr_format, text):
    path = claiming(zarr_format)
    document(path, "x", zarr_format).write_text(text)
    with pytest.raises(NotZarr, match="the metadata of x cannot be read: "):
        opened(path)


@FORMATS
@pytest.mark.parametrize("where", ["x", "time"])
def test_a_named_pipe_in_place_of_a_document_is_not_waited_for(claiming, zarr_format, where):
    path = claiming(zarr_format)
    file = document(path, where, zarr_format)
    file.unlink()
    os.mkfifo(file)
    if where == "time":
        assert f"{where}/{file.name} is no file" in opened(path, **WINDOWS).coordinate
    else:
        with pytest.raises(NotZarr, match=rf"{where}/{file.name} is no file"):
            opened(path)


def test_a_damaged_group_above_is_named(tmp_path):
    path = write_anndata(tmp_path / "a.zarr", "v2")
    (path / "obs" / ".zattrs").write_text("{")
    with pytest.raises(NotZarr, match="the metadata of obs cannot be read: "):
        open_samples(path, inputs=["X"], targets=["obs/n_counts"])
    with pytest.raises(DtrainError):
        open_samples(path, inputs=["X"], targets=["obs/cell_type"])


@pytest.mark.parametrize(("document", "text"), [("var/_index/.zarray", "{"), ("var/.zattrs", "[" * 100_000)])
def test_damaged_names_of_genes_are_named(tmp_path, document, text):
    path = write_anndata(tmp_path / "a.zarr", "v2")
    samples = open_samples(path, inputs=["X"], targets=["obs/n_counts"])
    (path / document).write_text(text)
    with pytest.raises(NotZarr, match=f"the metadata of {Path(document).parent} cannot be read: "):
        genes_of(samples)
