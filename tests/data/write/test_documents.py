"""Arrays that are described and encoded in memory: as zarr writes them, each chunk with a checksum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from dtrain.data.write.documents import ArraySpec, documents, encode, is_whole, keys_of, whole

FLOATS = ArraySpec(name="p", dims=("t", "x"), shape=(10, 6), chunks=(4, 4), dtype="f4", fill_value=float("nan"))
CODES = ArraySpec(
    name="c", dims=("t",), shape=(10,), chunks=(4,), dtype="i1", attributes={"_FillValue": -1}, fill_value=-1
)
NAMES = ArraySpec(name="n", dims=("t",), shape=(10,), chunks=(4,), dtype="str")
SCALAR = ArraySpec(name="s", dims=(), shape=(), chunks=(), dtype="i8")
VALUES: dict[str, Any] = {
    "p": np.random.default_rng(0).normal(size=(10, 6)).astype("f4"),
    "c": np.arange(10, dtype="i1") - 1,
    "n": np.array([f"cell {i}" for i in range(10)], object),
    "s": np.array(7),
}
SPECS = {spec.name: spec for spec in (FLOATS, CODES, NAMES, SCALAR)}


def written(path: Path, *, consolidated: bool) -> Path:
    objects = documents({"made": "by hand"}, list(SPECS.values()), consolidated=consolidated)
    assert next(iter(objects)) == "zarr.json"
    for spec in SPECS.values():
        objects |= dict(encode(spec, whole(spec), VALUES[spec.name]))
    for key, data in objects.items():
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(data)
    return path


@pytest.mark.parametrize("consolidated", [False, True])
def test_zarr_reads_what_is_encoded(tmp_path: Path, consolidated: bool) -> None:
    group = zarr.open_group(written(tmp_path / "s.zarr", consolidated=consolidated), mode="r")
    assert dict(group.attrs) == {"made": "by hand"}
    for name, spec in SPECS.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert array[...].tolist() == VALUES[name].tolist()
        assert (array.shape, array.chunks) == (spec.shape, spec.chunks)
        assert (array.metadata.dimension_names or ()) == spec.dims
    document = json.loads((tmp_path / "s.zarr/zarr.json").read_text())
    inside = document.get("consolidated_metadata", {}).get("metadata", {})
    assert list(inside) == (list(SPECS) if consolidated else [])


@pytest.mark.parametrize("name", SPECS)
def test_every_chunk_is_there_under_its_key_with_a_checksum(name: str) -> None:
    chunks = dict(encode(SPECS[name], whole(SPECS[name]), VALUES[name]))
    assert list(chunks) == keys_of(SPECS[name], whole(SPECS[name]))
    for data in chunks.values():
        assert is_whole(data)
        for damaged in (None, b"", data[:-1], data[1:], data[:3], bytes([data[0] ^ 1]) + data[1:]):
            assert not is_whole(damaged)


def test_chunks_of_nothing_but_the_fill_value_are_written_too() -> None:
    empty = np.full((10, 6), np.nan, "f4")
    assert len(dict(encode(FLOATS, whole(FLOATS), empty))) == 6


def test_parts_give_the_bytes_of_the_whole() -> None:
    region = (slice(4, 8), slice(4, 6))
    assert keys_of(FLOATS, region) == ["p/c/1/1"]
    part = dict(encode(FLOATS, region, VALUES["p"][region]))
    assert part == {"p/c/1/1": dict(encode(FLOATS, whole(FLOATS), VALUES["p"]))["p/c/1/1"]}
