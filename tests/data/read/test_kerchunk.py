"""Reference files are read like the store that they make up, and say whose bytes are missing."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dtrain.data.plan.units import Box
from dtrain.data.read import retry
from dtrain.data.read.presence import absent_rows, check_presence, content_digest
from dtrain.data.read.references import JsonReferences
from dtrain.data.read.targets import options_of
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import (
    ChunkMissing,
    ChunkUndecodable,
    DataNotFound,
    InvalidConfig,
    NotZarr,
    StoreForbidden,
    StoreUnavailable,
)
from tests.data.helpers import batches, one_pass, only_partition, same_bits
from tests.data.servers import FileServer, S3Server

ROWS = 48
LAYOUTS = {
    "v2": (2, {"chunks": (8, 3)}),
    "v3": (3, {"chunks": (8, 3)}),
    "sharded": (3, {"chunks": (2, 3), "shards": (8, 3)}),
}
EVERY = pytest.mark.parametrize("layout", LAYOUTS)
BOXES = (Box(0, ROWS), Box(9, 13), Box(40, 48), Box(3, 30, (("k", 1, 5),)))
DOCUMENTS = ("zarr.json", ".zgroup", ".zarray", ".zattrs")


@pytest.fixture
def folder(write_store, tmp_path):
    """A function that writes x(n, k) and y(n) into a directory."""

    def write(layout):
        zarr_format, options = LAYOUTS[layout]
        x = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("float32")
        arrays = {
            "x": {"dims": ("n", "k"), "values": x, **options},
            "y": {"dims": ("n",), "values": np.arange(ROWS), "chunks": (8,)},
        }
        return write_store(tmp_path / "a.zarr", arrays, zarr_format=zarr_format)

    return write


def chunk(layout, number):
    return f"x/{number}.0" if layout == "v2" else f"x/c/{number}/0"


def references_to(store, data, url=None, inline=()):
    """Copy all chunks of a store into one file, and return the references to them."""
    refs, at = {}, 7
    with open(data, "wb") as file:
        file.write(b"\xff" * at)
        for path in sorted(store.rglob("*")):
            key, content = path.relative_to(store).as_posix(), path.read_bytes() if path.is_file() else b""
            if path.name in DOCUMENTS:
                refs[key] = content.decode()
            elif key in inline:
                refs[key] = f"base64:{base64.b64encode(content).decode()}"
            elif path.is_file():
                file.write(content)
                refs[key] = [url or str(data), at, len(content)]
                at += len(content)
    return refs


def write_json(path, refs, **others):
    path.write_text(json.dumps({"version": 1, "refs": refs, **others}))
    return path


def open_xy(path, **data):
    return open_samples(path, inputs=["x"], targets=["y"], **{"split": {"val": 0.0, "test": 0.0}, **data})


@pytest.fixture
def referred(folder, tmp_path):
    """A function that returns the directory of a store, and a reference file to a copy of its chunks."""

    def write(layout="v2", without=(), **options):
        store = folder(layout)
        refs = references_to(store, tmp_path / "data.bin", **options)
        for key in without:
            del refs[key]
        return store, write_json(tmp_path / "refs.json", refs)

    return write


# Reading ----------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("inline", [False, True])
def test_units_have_the_bits_of_the_directory(referred, layout, inline):
    store, path = referred(layout, inline=[chunk(layout, 2)] if inline else ())
    here = open_xy(path)
    assert here.fingerprint == open_xy(store).fingerprint
    check_presence(here)
    there, read = UnitReader(open_xy(store), "zarr"), UnitReader(here)
    assert {chosen for chosen, _ in read.readers.values()} == {"zarr"}
    for box in BOXES:
        for name, (first, rows) in there.read(box).items():
            start, values = read.read(box)[name]
            assert (start, values.tobytes(), values.shape) == (first, rows.tobytes(), rows.shape)


@EVERY
def test_batches_have_the_bits_of_the_directory(referred, layout):
    streams = []
    for path in referred(layout):
        samples = open_xy(path)
        _, partition = only_partition(samples)
        streams.append(batches(UnitReader(samples), partition, one_pass(partition)))
    assert len(streams[0]) == 7
    assert same_bits(*streams)


def test_files_that_are_chunks_as_they_are(folder, tmp_path):
    store = folder("v3")
    refs = {
        key: path.read_text() if path.name in DOCUMENTS else [str(path)]
        for path in store.rglob("*")
        if path.is_file() and (key := path.relative_to(store).as_posix())
    }
    samples = open_xy(write_json(tmp_path / "refs.json", refs))
    check_presence(samples)
    np.testing.assert_array_equal(UnitReader(samples).read(Box(0, ROWS))["y"][1], np.arange(ROWS))


def test_paths_relative_to_the_reference_file_and_templates(folder, tmp_path, monkeypatch):
    store = folder("v2")
    refs = references_to(store, tmp_path / "data.bin", url="{{u}}/data.bin")
    (tmp_path / "refs").mkdir()
    path = write_json(tmp_path / "refs" / "a.json", refs, templates={"u": ".."})
    monkeypatch.chdir("/")
    samples = open_xy(path)
    assert samples.store.notes == (("refers to", f"{tmp_path} (1 file)"),)
    np.testing.assert_array_equal(UnitReader(samples).read(Box(0, ROWS))["y"][1], np.arange(ROWS))


def test_another_process_reads_the_samples(referred):
    store, path = referred("v2")
    sent = pickle.dumps(open_xy(path))
    assert len(sent) < len(pickle.dumps(open_xy(store))) + 500
    code = (
        "import pickle, sys\nfrom dtrain.data.plan.units import Box\nfrom dtrain.data.read.units import UnitReader\n"
        "rows = UnitReader(pickle.load(sys.stdin.buffer)).read(Box(3, 9))['x'][1]\n"
        "sys.stdout.write(rows.tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert done.stdout.decode() == UnitReader(open_xy(store)).read(Box(3, 9))["x"][1].tobytes().hex()


# Faults -----------------------------------------------------------------------------------------------------


@EVERY
def test_a_chunk_without_a_reference(referred, layout):
    key = chunk(layout, 2)
    _, path = referred(layout, without=[key])
    samples = open_xy(path)
    said = f"{path}: chunk {key} of x is missing"
    with pytest.raises(ChunkMissing, match=said):
        check_presence(samples)
    with pytest.raises(ChunkMissing, match=said):
        UnitReader(samples).read(Box(16, 20))
    assert absent_rows(open_xy(path, missing="skip")) == ((16, 24),)
    assert not UnitReader(open_xy(path, missing="fill")).read(Box(16, 24))["x"][1][:, :3].any()


@EVERY
@pytest.mark.parametrize("missing", ["auto", "fill"])
def test_a_file_that_is_not_there_is_named_and_never_filled(referred, tmp_path, layout, missing):
    _, path = referred(layout)
    samples = open_xy(path, missing=missing)
    os.remove(tmp_path / "data.bin")
    said = rf"refs\.json: chunk {chunk(layout, 2)[:-1]}[01] lies in {tmp_path}/data\.bin, which is not there"
    with pytest.raises(ChunkMissing, match=r"lies in .*data\.bin, which is not there"):
        check_presence(samples)
    with pytest.raises(ChunkMissing, match=said) as caught:
        UnitReader(samples).read(Box(16, 20))
    assert caught.value.code == 5
    assert caught.value.hint


@EVERY
def test_a_file_that_ends_too_soon_is_named(referred, tmp_path, layout):
    _, path = referred(layout)
    refs = json.loads(path.read_text())["refs"]
    key = chunk(layout, 2)
    url, start, size = refs[key]
    samples = open_xy(path)
    os.truncate(url, start + size - 1)
    for look in (lambda: check_presence(samples), lambda: UnitReader(samples).read(Box(16, 24))):
        with pytest.raises(ChunkUndecodable, match=rf"chunk x/.* is the bytes \d+ to \d+ of {url}, which is truncated"):
            look()


def test_a_continued_run_compares_references(referred, tmp_path):
    _, path = referred("v2")
    before = content_digest(open_xy(path))
    table = json.loads(path.read_text())
    os.rename(tmp_path / "data.bin", tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "data.bin")
    assert content_digest(open_xy(path)) == before
    table["refs"]["x/2.0"], table["refs"]["x/3.0"] = table["refs"]["x/3.0"], table["refs"]["x/2.0"]
    after = content_digest(open_xy(write_json(path, table["refs"])))
    assert (after["x"] != before["x"], after["y"]) == (True, before["y"])


NO_REFERENCES = {
    "text": "no json",
    "a list": "[1]",
    "without refs": '{"version": 1}',
    "a number": '{"refs": {"x/0": 1}}',
    "two numbers": '{"refs": {"x/0": ["a", 1]}}',
    "a negative offset": '{"refs": {"x/0": ["a", -1, 5]}}',
    "no file": '{"refs": {"x/0": [null, 1, 5]}}',
    "an unknown template": '{"refs": {"x/0": ["{{u}}/a", 1, 5]}}',
    "a place beyond all numbers": '{"refs": {"x/0": ["a", Infinity, 5]}}',
    "a place that is no number": '{"refs": {"x/0": ["a", NaN, 5]}}',
    "lists in lists": '{"refs": ' + "[" * 100_000,
    "tables in tables": '{"refs":' * 50_000,
    "a template that makes gigabytes": json.dumps(
        {"templates": {"u": "x" * 100_000}, "refs": {"x/0": ["{{u}}" * 100_000, 1, 5]}}
    ),
}


@pytest.mark.parametrize("text", NO_REFERENCES.values(), ids=NO_REFERENCES)
def test_what_holds_no_references(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(NotZarr, match=r"a\.json holds no kerchunk references") as caught:
        open_xy(tmp_path / "a.json")
    assert caught.value.hint


@pytest.mark.parametrize("more", [{"gen": [{"key": "x"}]}, {"templates": {"f": "{{c}}/a"}}])
def test_references_that_would_have_to_be_computed(tmp_path, more):
    with pytest.raises(NotZarr, match="its references are computed"):
        open_xy(write_json(tmp_path / "a.json", {}, **more))


def test_references_to_no_group(tmp_path):
    with pytest.raises(NotZarr, match="holds references, but none to a Zarr group"):
        open_xy(write_json(tmp_path / "a.json", {"x": "1"}))
    with pytest.raises(DataNotFound, match=r"b\.json: no such file"):
        open_xy(tmp_path / "b.json")


def test_how_references_are_written():
    refs = {"a": "text", "b": "base64:AQI=", "c": {"d": 1}, "e": ["f"], "g": ["h", 3, 4]}
    read = JsonReferences("a.json", json.dumps({"refs": refs}).encode())
    assert [read.find(key) for key in "abceg"] == [b"text", b"\1\2", b'{"d": 1}', ("f", 0, None), ("h", 3, 7)]
    assert read.find("z") is None
    assert read.urls() == {"f", "h"}


def test_the_memory_of_references(tmp_path):
    refs = {
        f"x/{number}.0.0": [f"s3://bucket/era5/data/file-{number // 100:05}.nc", number, 9] for number in range(9000)
    }
    text = json.dumps({"refs": refs}).encode()
    tracemalloc.start()
    try:
        read = JsonReferences("a.json", text)
        peak = tracemalloc.get_traced_memory()[1] + len(text)
    finally:
        tracemalloc.stop()
    assert 0.7 * read.nbytes < peak < 1.05 * read.nbytes


# Where they lead --------------------------------------------------------------------------------------------

LEADING_ASTRAY = {
    "another protocol": "ftp://host/a",
    "a chain": "simplecache::s3://bucket/a",
    "a chain behind": "s3://bucket/a::b",
    "memory": "memory://a",
    "credentials": "https://user:secret@host/a",
}


@pytest.mark.parametrize("url", LEADING_ASTRAY.values(), ids=LEADING_ASTRAY)
def test_protocols_that_are_not_followed(folder, tmp_path, url):
    refs = references_to(folder("v2"), tmp_path / "data.bin", url=url)
    with pytest.raises(InvalidConfig, match="references may lead to") as caught:
        open_xy(write_json(tmp_path / "a.json", refs))
    assert "trust" in caught.value.hint
    assert "secret" not in str(caught.value)


def test_hosts_and_folders_are_said(folder, tmp_path):
    refs = references_to(folder("v2"), tmp_path / "data.bin")
    for number, key in enumerate(key for key, value in refs.items() if isinstance(value, list) and key[0] == "x"):
        refs[key][0] = f"https://example.org/a/{number % 7}/{number}.nc?sig=secret/of/mine"
    samples = open_xy(write_json(tmp_path / "a.json", refs))
    assert dict(samples.rows())["refers to"] == f"{tmp_path} (1 file); https://example.org/a (12 files)"
    assert samples.store.read_ahead
    few = {
        key: value
        for key, value in refs.items()
        if key in (".zgroup", "x/.zarray", "x/.zattrs", "y/.zarray", "y/.zattrs", "x/0.0")
    }
    samples = open_xy(write_json(tmp_path / "b.json", few))
    assert dict(samples.rows())["refers to"] == "https://example.org/a/0 (1 file)"


def test_references_alone_need_no_other_file(folder, tmp_path):
    store = folder("v2")
    keys = [path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()]
    samples = open_xy(write_json(tmp_path / "a.json", references_to(store, tmp_path / "data.bin", inline=keys)))
    assert samples.store.notes == (("refers to", "no other file"),)
    check_presence(samples)


def test_the_protocol_reference_is_refused_with_the_cure():
    with pytest.raises(InvalidConfig, match="references are read by the path of their file"):
        open_xy("reference://a.json")


def test_options_by_protocol():
    options = {"s3": {"anon": True}, "timeout": 3}
    assert options_of("s3://bucket", options) == {"anon": True}
    assert options_of("https://host", options) == {"timeout": 3}


# Servers ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(retry, "BACKOFF_SECONDS", 0.0005)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    served = FileServer(tmp_path / "www")
    yield served
    served.stop()


@EVERY
def test_files_and_references_on_a_server(folder, tmp_path, server, layout):
    store = folder(layout)
    refs = references_to(store, server.root / "data.bin", url="data.bin")
    write_json(server.root / "refs.json", refs)
    samples = open_xy(f"{server.url}/refs.json")
    assert samples.store.notes == (("refers to", f"{server.url} (1 file)"),)
    check_presence(samples)
    units = UnitReader(samples)
    for box in BOXES:
        np.testing.assert_array_equal(units.read(box)["x"][1], UnitReader(open_xy(store)).read(box)["x"][1])


def test_a_server_that_refuses_or_fails_is_named_with_the_chunk(folder, tmp_path, server):
    refs = references_to(folder("v2"), server.root / "data.bin", url=f"{server.url}/data.bin")
    path = write_json(tmp_path / "refs.json", refs)
    samples = open_xy(path)
    for fault, kind in ((403, StoreForbidden), (500, StoreUnavailable)):
        server.fail("data.bin", fault)
        with pytest.raises(kind, match=rf"refs\.json: chunk x/2\.\d: {server.url}"):
            UnitReader(samples).read(Box(16, 20))
    server.fail("data.bin", 404)
    with pytest.raises(ChunkMissing, match=r"chunk x/2\.\d lies in http://.*/data\.bin, which is not there"):
        UnitReader(samples).read(Box(16, 20))
    server.mend()
    os.truncate(server.root / "data.bin", 100)
    with pytest.raises(ChunkUndecodable, match=r"chunk x/2\.\d is the bytes .* which is truncated"):
        UnitReader(samples).read(Box(16, 20))


def test_a_reference_file_on_a_server_reads_no_file_of_this_machine(folder, tmp_path, server):
    write_json(server.root / "refs.json", references_to(folder("v2"), tmp_path / "data.bin"))
    with pytest.raises(InvalidConfig, match="a reference file on a server may not refer to files of this machine"):
        open_xy(f"{server.url}/refs.json")


def test_files_in_a_bucket(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3 = S3Server()
    try:
        s3.put("bucket")
        store = folder("v2")
        refs = references_to(store, tmp_path / "data.bin", url="s3://bucket/deep/data.bin")
        s3.put("bucket/deep/data.bin", (tmp_path / "data.bin").read_bytes())
        samples = open_xy(write_json(tmp_path / "refs.json", refs), storage_options={"s3": s3.options})
        assert samples.store.notes == (("refers to", "s3://bucket/deep (1 file)"),)
        check_presence(samples)
        for box in BOXES:
            values = UnitReader(samples).read(box)["x"][1]
            np.testing.assert_array_equal(values, UnitReader(open_xy(store)).read(box)["x"][1])
    finally:
        s3.stop()


# Parquet ----------------------------------------------------------------------------------------------------


def write_parquet(path, refs, record=4):
    """Write references as kerchunk does: a file for each run of chunks."""
    import pandas as pd

    documents = {key: json.loads(value) for key, value in refs.items() if Path(key).name in DOCUMENTS}
    for name, described in ((key[:-8], value) for key, value in documents.items() if key.endswith("/.zarray")):
        grid = [-(-n // size) for n, size in zip(described["shape"], described["chunks"], strict=True)]
        rows = [refs.get(f"{name}/{'.'.join(map(str, place))}") for place in np.ndindex(*grid)]
        rows += [None] * (-len(rows) % record)
        (path / name).mkdir(parents=True)
        for number in range(len(rows) // record):
            part = rows[number * record :][:record]
            if any(part):
                table = pd.DataFrame({"path": [row[0] if isinstance(row, list) else None for row in part]})
                for column, at in (("offset", 1), ("size", 2)):
                    table[column] = [row[at] if isinstance(row, list) and len(row) > 1 else 0 for row in part]
                table["raw"] = [base64.b64decode(row[7:]) if isinstance(row, str) else None for row in part]
                table.to_parquet(path / name / f"refs.{number}.parq")
    (path / ".zmetadata").write_text(json.dumps({"metadata": documents, "record_size": record}))
    return path


@pytest.mark.parametrize("suffix", [".parq", ".parquet", ".parquet/"])
def test_parquet_has_the_bits_of_the_directory(folder, tmp_path, suffix):
    store = folder("v2")
    refs = references_to(store, tmp_path / "data.bin", inline=["x/2.0"])
    write_parquet(tmp_path / f"refs{suffix.rstrip('/')}", refs)
    samples = open_xy(f"{tmp_path}/refs{suffix}")
    assert samples.fingerprint == open_xy(store).fingerprint
    assert samples.store.notes == (("refers to", f"{tmp_path} (1 file)"),)
    check_presence(samples)
    units = UnitReader(samples)
    for box in BOXES:
        np.testing.assert_array_equal(units.read(box)["x"][1], UnitReader(open_xy(store)).read(box)["x"][1])


def test_faults_of_parquet(folder, tmp_path):
    refs = references_to(folder("v2"), tmp_path / "data.bin")
    for key in [key for key in refs if key.startswith("x/") and key[2] in "23"]:
        del refs[key]  # all of one file of references
    path = write_parquet(tmp_path / "refs.parq", refs)
    samples = open_xy(path)
    with pytest.raises(ChunkMissing, match=r"refs\.parq: chunk x/2\.0 of x is missing"):
        check_presence(samples)
    with pytest.raises(ChunkMissing, match=r"refs\.parq: chunk x/3\.0 of x is missing"):
        UnitReader(samples).read(Box(24, 26))
    os.remove(tmp_path / "data.bin")
    with pytest.raises(ChunkMissing, match=r"chunk x/5\.[01] lies in .*data\.bin, which is not there"):
        UnitReader(samples).read(Box(40, 42))
    (path / "x" / "refs.0.parq").write_bytes(b"PAR1")
    with pytest.raises(NotZarr, match=r"x/refs\.0\.parq cannot be read"):
        open_xy(path)
    (path / ".zmetadata").unlink()
    with pytest.raises(NotZarr, match="is no directory of kerchunk references"):
        open_xy(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": [10**13, 6]}, "an array of 2,500,000,000,000 chunks; at most 80,000 can be read"),
        ({"shape": [2**62, 6], "chunks": [1, 1]}, "an array of .* chunks; at most 80,000"),
        ({"chunks": [0, 3]}, "an array of shape .* in chunks of"),
        ({"shape": [1e400, 6]}, "an array of shape .* in chunks of"),
        ({"shape": ["48", 6]}, "an array of shape .* in chunks of"),
        ({"shape": [-48, 6]}, "an array of shape .* in chunks of"),
        ({"shape": None}, "cannot be read"),
    ],
    ids=str,
)
def test_parquet_that_claims_what_cannot_be(folder, tmp_path, changes, said):
    path = write_parquet(tmp_path / "refs.parq", references_to(folder("v2"), tmp_path / "data.bin"))
    table = json.loads((path / ".zmetadata").read_text())
    table["metadata"]["x/.zarray"].update(changes)
    (path / ".zmetadata").write_text(json.dumps(table))
    with pytest.raises(NotZarr, match=said):
        open_xy(path)


@pytest.mark.parametrize("record", [0, -1, None, "a", 1e400, [4]], ids=str)
def test_parquet_with_a_strange_number_of_references_a_file(folder, tmp_path, record):
    path = write_parquet(tmp_path / "refs.parq", references_to(folder("v2"), tmp_path / "data.bin"))
    table = json.loads((path / ".zmetadata").read_text())
    (path / ".zmetadata").write_text(json.dumps({**table, "record_size": record}))
    with pytest.raises(NotZarr, match=r"its \.zmetadata cannot be read"):
        open_xy(path)


def test_parquet_with_columns_of_something_else(folder, tmp_path):
    import pandas as pd

    path = write_parquet(tmp_path / "refs.parq", references_to(folder("v2"), tmp_path / "data.bin"))
    file = path / "x" / "refs.0.parq"
    table = pd.read_parquet(file)
    for wrong in (table.drop(columns=["offset"]), table.assign(offset=["a"] * len(table))):
        wrong.to_parquet(file)
        with pytest.raises(NotZarr, match=r"refs\.parq: the references of x cannot be read: "):
            open_xy(path)


def test_a_named_pipe_is_not_waited_for(referred, tmp_path):
    _, path = referred()
    os.mkfifo(tmp_path / "pipe")
    table = json.loads(path.read_text())
    table["refs"]["x/1.0"] = [str(tmp_path / "pipe")]
    samples = open_xy(write_json(path, table["refs"]))
    with pytest.raises(ChunkMissing, match=r"chunk x/1\.0 lies in .*pipe, which is not there"):
        UnitReader(samples).read(Box(8, 10))


def test_parquet_without_its_package(folder, tmp_path, monkeypatch):
    import pandas as pd

    def lacking(*args, **options):
        raise ImportError("Unable to find a usable engine")

    path = write_parquet(tmp_path / "refs.parq", references_to(folder("v2"), tmp_path / "data.bin"))
    monkeypatch.setattr(pd, "read_parquet", lacking)
    with pytest.raises(InvalidConfig, match="needs a package that is not installed") as caught:
        open_xy(path)
    assert 'pip install "dtrain[kerchunk]"' in caught.value.hint
