"""Who reads a variable, and why."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import TransposeCodec

from dtrain.data.plan.readers import choose_readers
from dtrain.data.plan.units import Box
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import StoreFacts
from dtrain.data.source import open_samples
from dtrain.data.variable import ChunkFormat
from dtrain.errors import InvalidConfig
from tests.data.helpers import WHOLE, make_samples, open_all, vector


def test_only_a_local_directory_is_read_past_zarr():
    samples = make_samples(100, 10)
    assert choose_readers(samples, "auto")["v0"][0] == "numcodecs"
    for facts in (StoreFacts(is_local=False), StoreFacts(is_local=False, can_list=False, read_ahead=True)):
        elsewhere = replace(samples, store=facts)
        for wanted in ("auto", "zarr"):
            assert choose_readers(elsewhere, wanted)["v0"][0] == "zarr"
        for wanted in ("numcodecs", "zarrs"):
            with pytest.raises(InvalidConfig, match=f'"{wanted}" does not read v0: the store is not a local directory'):
                choose_readers(elsewhere, wanted)


def test_the_reader_follows_from_facts_alone():
    samples = make_samples(100, 10)

    def of(**facts):
        v0 = replace(samples.variables[0], chunk_format=ChunkFormat(**facts))
        return choose_readers(replace(samples, variables=(v0,)), "auto")["v0"]

    assert of(codecs=("bytes", "zstd", "crc32c"), endian=sys.byteorder) == ("numcodecs", USUAL)
    assert of(codecs=("numcodecs.blosc",), has_fill_value=False) == ("numcodecs", USUAL)
    assert of(codecs=("transpose", "bytes")) == ("zarrs", "codec transpose")
    assert of(codecs=("numcodecs.crc32c",)) == ("zarrs", "codec crc32c")
    assert of(codecs=("numcodecs.delta", "numcodecs.zstd")) == ("zarr", "codec delta")
    other = {"little": "big", "big": "little"}[sys.byteorder]
    assert of(codecs=("bytes",), endian=other) == ("zarrs", f"its byte order is {other}")
    assert of(order="F") == ("zarr", "its order is F")
    assert of(has_plain_index=False) == ("zarrs", "the index of its shards is encoded in a rare way")
    assert of(codecs=("transpose",), has_fill_value=False) == ("zarr", "codec transpose")


def two(write_store, folder, zarr_format=3, **options):
    """Write v0 as told, and an index that zarrs reads."""
    index = vector(np.arange(8), 4)
    if zarr_format == 2:
        index["fill_value"] = 0
    v0 = {"dims": ("n", "k"), "values": np.arange(24.0, dtype="float32").reshape(8, 3), "chunks": (4, 2), **options}
    return write_store(Path(folder, "s"), {"v0": v0, "index": index}, zarr_format=zarr_format)


USUAL = "the store is local and its codecs are the usual ones"
ODD = {
    "byte order": (2, {"values": np.zeros((8, 3), ">f4"), "fill_value": 0}, "its byte order is >"),
    "order": (2, {"order": "F", "fill_value": 0}, "its order is F"),
    "fill value": (2, {}, "it has no fill value"),
    "codec": (2, {"compressors": numcodecs.LZ4(), "fill_value": 0}, "codec lz4"),
    "filter": (2, {"filters": [numcodecs.Delta("<f4")], "fill_value": 0}, "codec delta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_what_zarrs_does_not_read_is_read_by_zarr(write_store, tmp_path, kind):
    zarr_format, options, why = ODD[kind]
    path = two(write_store, tmp_path, zarr_format, **options)
    samples = open_all(path, ["v0"])
    readers = choose_readers(samples, "auto")
    assert readers["v0"] == (("numcodecs", USUAL) if kind == "fill value" else ("zarr", why))
    assert readers["index"][0] == "numcodecs"
    stored = zarr.open_group(path, mode="r")["v0"][...]
    np.testing.assert_array_equal(UnitReader(samples).read(Box(0, 8))["v0"][1], stored)
    with pytest.raises(InvalidConfig, match=f'data.reader = "zarrs" does not read v0: {why}') as caught:
        UnitReader(samples, "zarrs")
    assert caught.value.code == 3


def test_a_reader_is_taken_that_is_asked_for_and_reads_the_store(write_store, tmp_path):
    samples = open_all(two(write_store, tmp_path), ["v0"])
    assert set(choose_readers(samples, "auto").values()) == {("numcodecs", USUAL)}
    for asked in ("numcodecs", "zarrs", "zarr"):
        assert set(choose_readers(samples, asked).values()) == {(asked, "asked for")}
    with pytest.raises(InvalidConfig, match='data.reader = "numcodecs" does not read v0: its order is F'):
        UnitReader(open_all(two(write_store, tmp_path / "f", 2, order="F"), ["v0"]), "numcodecs")


def test_what_numcodecs_does_not_read_is_read_by_zarrs(write_store, tmp_path):
    transposed = {"filters": [TransposeCodec(order=(1, 0))], "compressors": None}
    path = two(write_store, tmp_path, 3, **transposed)
    samples = open_all(path, ["v0"])
    assert choose_readers(samples, "auto")["v0"] == ("zarrs", "codec transpose")
    for which in ("auto", "zarr"):
        np.testing.assert_array_equal(UnitReader(samples, which).read(Box(2, 7))["v0"][1], read_zarr(path)[2:7])
    samples = open_all(path, ["v0"], isel={"k": {"start": 0, "stop": 3, "step": 2}})
    assert choose_readers(samples, "auto")["v0"] == ("zarr", "codec transpose")


def read_zarr(path):
    return zarr.open_group(path, mode="r")["v0"][...]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("chunk", "shard", "which"), [(2, 512, "zarrs"), (2, 256, "numcodecs"), (4000, 8000, "numcodecs")]
)
def test_many_small_chunks_in_shards_are_read_by_zarrs(write_store, tmp_path, chunk, shard, which):
    v0 = {"dims": ("n", "k"), "values": np.ones((8000, 3)), "chunks": (chunk, 3), "shards": (shard, 3)}
    path = write_store(tmp_path / "s", {"v0": v0, "index": vector(np.arange(8000), 8000)})
    samples = open_all(path, ["v0"])
    assert choose_readers(samples, "auto")["v0"][0] == which
    assert UnitReader(samples).read(Box(2000, 4000))["v0"][1].sum() == 6000


def test_many_small_chunks_that_zarrs_does_not_read_are_read_by_numcodecs(write_store, tmp_path, monkeypatch):
    v0 = {"dims": ("n", "k"), "values": np.arange(6144.0).reshape(2048, 3), "chunks": (2, 3), "shards": (1024, 3)}
    path = write_store(tmp_path / "s", {"v0": v0, "index": vector(np.arange(2048), 2048)})
    with_step = open_all(path, ["v0"], isel={"k": {"start": 0, "stop": 3, "step": 2}})
    assert choose_readers(with_step, "auto")["v0"] == ("numcodecs", USUAL)
    assert UnitReader(with_step).read(Box(1, 3))["v0"][1].tolist() == [[3, 5], [6, 8]]
    samples = open_all(path, ["v0"])
    assert choose_readers(samples, "auto")["v0"] == ("zarrs", "its shards hold many small chunks")
    monkeypatch.setitem(sys.modules, "zarrs", None)
    assert choose_readers(samples, "auto")["v0"] == ("numcodecs", USUAL)


@pytest.mark.parametrize(
    ("chunk", "width", "count", "which"),
    [
        (1, 4, 256, "zarrs"),
        (1, 4, 255, "numcodecs"),
        (1, 8191, 256, "zarrs"),  # just less than 32 KiB a chunk, and than 8 MiB a shard
        (1, 8192, 256, "numcodecs"),
        (1, 7000, 299, "zarrs"),
        (1, 7000, 300, "numcodecs"),  # more than 8 MiB: parts are read
    ],
)
def test_shards_of_many_small_chunks_are_left_to_zarrs_up_to_8_mib(write_store, tmp_path, chunk, width, count, which):
    root = zarr.create_group(tmp_path / "s")
    for name, row in (("v0", (width,)), ("index", ())):
        shape = (count, *row)
        root.create_array(
            name,
            shape=shape,
            dtype="float32",
            chunks=(chunk, *row) if row else (count,),
            shards=shape if row else None,
            dimension_names=("n", "k")[: len(shape)],
        )
    samples = open_all(tmp_path / "s", ["v0"])
    assert choose_readers(samples, "auto")["v0"][0] == which


def test_a_step_is_not_read_by_zarrs(write_store, tmp_path):
    path = two(write_store, tmp_path)
    samples = open_all(path, ["v0"], isel={"k": {"start": 0, "stop": 3, "step": 2}})
    assert choose_readers(samples, "auto")["v0"] == ("numcodecs", USUAL)
    with pytest.raises(InvalidConfig, match="it is read with a step"):
        choose_readers(samples, "zarrs")
    static = open_samples(path, inputs=["v0"], targets=["index"], sample_dim="n", split=WHOLE)
    assert choose_readers(static, "zarrs")["v0"][0] == "zarrs"


def test_a_small_variable_is_read_by_zarr_although_another_reader_is_asked_for(write_store, tmp_path):
    height = np.arange(6.0, dtype="float32").reshape(2, 3)
    arrays = {
        "v0": vector(np.arange(4.0), 4),
        "height": {"dims": ("y", "x"), "values": height, "chunks": (2, 2)},
        "index": vector(np.arange(4), 4),
    }
    samples = open_all(write_store(tmp_path / "s", arrays), arrays)
    assert choose_readers(samples, "zarrs") == {
        "v0": ("zarrs", "asked for"),
        "height": ("zarr", "it is small"),
        "index": ("zarrs", "asked for"),
    }
    assert choose_readers(samples, "auto")["height"] == ("numcodecs", USUAL)
    for which in ("zarrs", "zarr", "numcodecs", "auto"):
        np.testing.assert_array_equal(UnitReader(samples, which).statics["height"], height)


def test_without_zarrs_zarr_reads(write_store, tmp_path, monkeypatch):
    samples = open_all(two(write_store, tmp_path), ["v0"])
    monkeypatch.setitem(sys.modules, "zarrs", None)
    assert set(choose_readers(samples, "auto").values()) == {("numcodecs", USUAL)}
    with pytest.raises(InvalidConfig, match="zarrs is not installed"):
        UnitReader(samples, "zarrs")


def test_an_array_that_zarrs_refuses_when_it_is_opened_is_read_by_zarr(write_store, tmp_path, monkeypatch):
    from zarrs import pipeline

    transposed = {"filters": [TransposeCodec(order=(1, 0))], "compressors": None}
    samples = open_all(two(write_store, tmp_path, 3, **transposed), ["v0"])
    assert choose_readers(samples, "auto")["v0"][0] == "zarrs"

    def refuse(metadata, store, *, strict):
        raise pipeline.UnsupportedMetadataError("no such\n codec")

    monkeypatch.setattr(pipeline, "get_codec_pipeline_impl", refuse)
    reader = UnitReader(samples)
    assert reader.readers["v0"] == ("zarr", "zarrs refuses it: no such codec")
    np.testing.assert_array_equal(reader.read(Box(2, 7))["v0"][1], read_zarr(samples.path)[2:7])
    with pytest.raises(InvalidConfig, match='data.reader = "zarrs" does not read v0: no such codec'):
        UnitReader(samples, "zarrs")


def test_opening_with_zarrs_leaves_the_settings_of_the_process_alone(write_store, tmp_path):
    before = zarr.config.get("codec_pipeline")
    UnitReader(open_all(two(write_store, tmp_path), ["v0"]), "zarrs").read(Box(0, 8))
    assert zarr.config.get("codec_pipeline") == before
