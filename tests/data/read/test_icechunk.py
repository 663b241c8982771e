"""Snapshots of icechunk repositories are read like the directory, and stay the same whatever is committed."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import icechunk
import numpy as np
import pytest
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from dtrain.data.paths import identity
from dtrain.data.plan.units import Box
from dtrain.data.read.codecs import Undecodable
from dtrain.data.read.icechunk import PREFIX, SnapshotStore
from dtrain.data.read.presence import absent_rows, check_presence, content_digest
from dtrain.data.read.units import UnitReader
from dtrain.data.source import describe, open_samples
from dtrain.errors import (
    ChunkMissing,
    ChunkUndecodable,
    ClusterUnsuitable,
    DataNotFound,
    InvalidConfig,
    NotZarr,
    StoreForbidden,
    StoreUnavailable,
)
from tests.data.helpers import batches, one_pass, only_partition, same_bits
from tests.data.servers import S3Server

icechunk.set_logs_filter("off")

ROWS = 48
NEWEST = int(icechunk.__version__.partition(".")[0])
FORMATS = pytest.mark.parametrize("version", range(1, NEWEST + 1))
LAYOUTS = {"chunks": {"chunks": (8, 3)}, "shards": {"chunks": (2, 3), "shards": (8, 3)}}
EVERY = pytest.mark.parametrize("layout", LAYOUTS)
BOXES = (Box(0, ROWS), Box(9, 13), Box(40, 48), Box(3, 30, (("k", 1, 5),)))
X = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("float32")


def arrays_of(layout, factor=1.0):
    """x(n, k), of which chunks are no inline values of manifests, and y(n)."""
    x = np.repeat(X, 40, axis=1)
    options = {name: (rows, columns * 40) for name, (rows, columns) in LAYOUTS[layout].items()}
    return {
        "x": {"dims": ("n", "k"), "values": x * np.float32(factor), "compressors": None, **options},
        "y": {"dims": ("n",), "values": np.arange(ROWS), "chunks": (8,)},
    }


def create(storage, version=1):
    options = {"spec_version": version} if NEWEST > 1 else {}
    return icechunk.Repository.create(storage, **options)


def commit(repository, arrays, without=()):
    """Commit arrays, but for some of their chunks, and return the snapshot."""
    session = repository.writable_session("main")
    group = zarr.open_group(session.store, mode="a")
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, described in arrays.items():
            options = dict(described)
            dims, values = options.pop("dims"), options.pop("values")
            array = group.create_array(
                name, shape=values.shape, dtype=values.dtype, dimension_names=dims, overwrite=True, **options
            )
            array[...] = values
    for key in without:
        sync(session.store.delete(key))
    return session.commit("arrays")


@pytest.fixture
def repository(tmp_path):
    """A function that commits x and y to a new repository, and returns it and its path."""

    def write(layout="chunks", version=1, **options):
        path = tmp_path / "a.icechunk"
        opened = create(icechunk.local_filesystem_storage(str(path)), version)
        commit(opened, arrays_of(layout), **options)
        return opened, path

    return write


@pytest.fixture
def directory(write_store, tmp_path):
    return lambda layout="chunks": write_store(tmp_path / "a.zarr", arrays_of(layout))


def open_xy(path, **data):
    return open_samples(path, inputs=["x"], targets=["y"], **{"split": {"val": 0.0, "test": 0.0}, **data})


def first_of(samples):
    return float(UnitReader(samples).read(Box(0, 1))["x"][1][0, 0])


# Reading ----------------------------------------------------------------------------------------------------


@FORMATS
@EVERY
def test_units_have_the_bits_of_the_directory(repository, directory, layout, version):
    _, path = repository(layout, version)
    here, there = open_xy(path), open_xy(directory(layout))
    assert here.fingerprint == there.fingerprint
    check_presence(here)
    assert content_digest(here) == {}
    plain, read = UnitReader(there, "zarr"), UnitReader(here)
    assert {chosen for chosen, _ in read.readers.values()} == {"zarr"}
    for box in BOXES:
        for name, (first, rows) in plain.read(box).items():
            start, values = read.read(box)[name]
            assert (start, values.tobytes(), values.shape) == (first, rows.tobytes(), rows.shape)


@EVERY
def test_batches_have_the_bits_of_the_directory(repository, directory, layout):
    streams = []
    for path in (directory(layout), repository(layout)[1]):
        samples = open_xy(path)
        _, partition = only_partition(samples)
        streams.append(batches(UnitReader(samples), partition, one_pass(partition)))
    assert len(streams[0]) == 7
    assert same_bits(*streams)


def test_another_process_reads_the_snapshot_of_the_samples(repository):
    opened, path = repository()
    sent = pickle.dumps(open_xy(path))
    commit(opened, arrays_of("chunks", 2))
    code = (
        "import pickle, sys\nfrom dtrain.data.plan.units import Box\nfrom dtrain.data.read.units import UnitReader\n"
        "rows = UnitReader(pickle.load(sys.stdin.buffer)).read(Box(3, 9))['x'][1]\n"
        "sys.stdout.write(rows.tobytes().hex())"  # what icechunk logs would stand before
    )
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert done.stdout.decode() == np.repeat(X[3:9], 40, axis=1).tobytes().hex()


# Versions ---------------------------------------------------------------------------------------------------


@FORMATS
def test_a_branch_a_tag_or_a_snapshot_is_read(repository, version):
    opened, path = repository(version=version)
    old = open_xy(path)
    first = old.store.snapshot
    opened.create_tag("v1", first)
    opened.create_branch("dev", first)
    second = commit(opened, arrays_of("chunks", 2))
    for options, snapshot, said in (
        ({}, second, f"{second}, the newest of branch main"),
        ({"branch": "main"}, second, f"{second}, the newest of branch main"),
        ({"branch": "dev"}, first, f"{first}, the newest of branch dev"),
        ({"tag": "v1"}, first, f"{first}, tag v1"),
        ({"snapshot": first}, first, first),
    ):
        samples = open_xy(path, storage_options=options)
        assert samples.store.snapshot == snapshot
        assert dict(samples.rows())["snapshot"] == said
        assert first_of(samples) == X[0, 0] * (2 if snapshot == second else 1)
    assert first_of(old) == X[0, 0]
    assert describe(open_xy(path).config, Path("/"), first).store.snapshot == first


def test_versions_that_are_not_there(repository):
    _, path = repository()
    with pytest.raises(DataNotFound, match='there is no branch mian; did you mean "main"') as caught:
        open_xy(path, storage_options={"branch": "mian"})
    assert caught.value.hint == "It has main."
    with pytest.raises(DataNotFound, match=r"there is no tag v1\.") as caught:
        open_xy(path, storage_options={"tag": "v1"})
    assert caught.value.hint == "It has none."
    with pytest.raises(DataNotFound, match="snapshot ABC cannot be read: invalid snapshot id"):
        open_xy(path, storage_options={"snapshot": "ABC"})
    with pytest.raises(InvalidConfig, match="branch and tag: one of them chooses what is read"):
        open_xy(path, storage_options={"branch": "main", "tag": "v1"})


def test_versions_of_what_is_no_repository(directory):
    with pytest.raises(InvalidConfig, match=r"a\.zarr is no icechunk repository: data\.storage_options\.tag"):
        open_xy(directory(), storage_options={"tag": "v1"})


def test_a_snapshot_without_a_group(tmp_path):
    create(icechunk.local_filesystem_storage(str(tmp_path / "a")))
    with pytest.raises(NotZarr, match="the snapshot that is read holds no Zarr group"):
        open_xy(tmp_path / "a")


@pytest.mark.skipif(NEWEST > 1, reason="it reads format 2")
def test_a_repository_of_format_2_needs_a_newer_python(tmp_path):
    (tmp_path / "a" / "snapshots").mkdir(parents=True)
    (tmp_path / "a" / "repo").write_bytes(b"ICE\xf0\x9f\xa7\x8aCHUNK")  # as such a repository begins
    with pytest.raises(ClusterUnsuitable, match=r"repository of format 2; icechunk 1\..* reads format 1") as caught:
        open_xy(tmp_path / "a")
    assert caught.value.code == 6
    newer = "Python 3.12 or newer, and there icechunk 2" if sys.version_info < (3, 12) else "icechunk 2"
    assert caught.value.hint == f"It needs {newer}, here and on the workers."


def test_without_the_package(repository, monkeypatch):
    _, path = repository()
    monkeypatch.setitem(sys.modules, "icechunk", None)
    with pytest.raises(InvalidConfig, match="needs a package that is not installed") as caught:
        open_xy(path)
    assert 'pip install "dtrain[icechunk]"' in caught.value.hint


# Faults -----------------------------------------------------------------------------------------------------


@EVERY
def test_a_chunk_that_was_not_committed(repository, layout):
    _, path = repository(layout, without=["x/c/2/0"])
    samples = open_xy(path)
    said = f"{path}: chunk x/c/2/0 of x is missing"
    with pytest.raises(ChunkMissing, match=said):
        check_presence(samples)
    with pytest.raises(ChunkMissing, match=said):
        UnitReader(samples).read(Box(16, 20))
    assert absent_rows(open_xy(path, missing="skip")) == ((16, 24),)
    assert not UnitReader(open_xy(path, missing="fill")).read(Box(16, 24))["x"][1][:, :120].any()


def objects_of_x(path):
    """The files of the repository that hold a chunk or shard of x."""
    return [file for file in (path / "chunks").iterdir() if file.stat().st_size > 1000]


@FORMATS
@EVERY
@pytest.mark.parametrize("missing", ["auto", "fill"])
def test_an_object_that_is_gone_is_named_and_never_filled(repository, layout, version, missing):
    _, path = repository(layout, version)
    for file in objects_of_x(path):
        file.unlink()
    with pytest.raises(ChunkMissing, match=r"x/c/2/[01] is in snapshot \w+, but not in the repository: ") as caught:
        UnitReader(open_xy(path, missing=missing)).read(Box(16, 24))
    assert "\n" not in caught.value.message
    assert caught.value.code == 5


@FORMATS
@EVERY
def test_a_truncated_object_is_named(repository, layout, version):
    _, path = repository(layout, version)
    for file in objects_of_x(path):
        os.truncate(file, 900)
    with pytest.raises(ChunkUndecodable, match=r"chunk x/c/2/[01] of x cannot be decoded: ") as caught:
        UnitReader(open_xy(path)).read(Box(16, 24))
    assert "\n" not in caught.value.message


@FORMATS
@pytest.mark.parametrize("part", ["snapshots", "manifests"])
@pytest.mark.parametrize("damage", [b"", b"\0" * 8, b"\xff" * 5000], ids=["empty", "zeros", "ones"])
def test_a_damaged_file_of_the_repository_is_named(repository, part, damage, version):
    _, path = repository("chunks", version)
    for file in (path / part).iterdir():
        file.write_bytes(damage)
    with pytest.raises((NotZarr, ChunkUndecodable, DataNotFound)) as caught:
        check_presence(open_xy(path))
    assert caught.value.code == 5


def test_a_flipped_bit_is_silent_and_the_samples_say_so(repository):
    _, path = repository()
    for file in objects_of_x(path):
        data = bytearray(file.read_bytes())
        data[500] ^= 1
        file.write_bytes(data)
    samples = open_xy(path)
    assert not np.array_equal(UnitReader(samples).read(Box(0, ROWS))["x"][1], np.repeat(X, 40, axis=1))
    assert not samples.variable("x").checksums
    assert dict(samples.rows())["checksums"].startswith("icechunk verifies none when it reads")


# Servers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3():
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def bucket(s3, monkeypatch):
    """The URL of a repository in a bucket."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3.put("bucket")
    storage = icechunk.s3_storage(
        bucket="bucket",
        prefix="deep/a",
        endpoint_url=s3.url,
        allow_http=True,
        force_path_style=True,
        region="us-east-1",
        access_key_id=s3.key,
        secret_access_key=s3.secret,
    )
    if not icechunk.Repository.exists(storage):
        commit(create(storage), arrays_of("chunks"))
    return "s3://bucket/deep/a"


def test_a_repository_in_a_bucket_is_found_by_what_lies_there(s3, bucket, directory):
    samples = open_xy(bucket, storage_options=s3.options)
    assert samples.path == PREFIX + bucket
    assert samples.store.read_ahead
    assert identity(samples.path, Path("/")) == identity(bucket, Path("/"))
    assert open_xy(samples.path, storage_options=s3.options).store == samples.store
    check_presence(samples)
    for box in BOXES:
        rows = UnitReader(open_xy(directory())).read(box)["x"][1] if box == BOXES[0] else None
        values = UnitReader(samples).read(box)["x"][1]
        assert rows is None or values.tobytes() == rows.tobytes()
    assert s3.secret not in repr(samples)


SAID = {
    "gone": (
        "dispatch failure",
        "io error\n  |-> tcp connect error\n  `-> Connection refused (os error 111)",
        StoreUnavailable,
    ),
    "failing": ("service error", "unhandled error\n  `-> Error", StoreUnavailable),
    "without credentials": ("dispatch failure", "no providers in chain provided credentials", StoreForbidden),
    "refusing": (
        "service error",
        'unhandled error (AccessDenied)\n  `-> Error { code: "AccessDenied" }',
        StoreForbidden,
    ),
    "cut": ("Generic LocalFileSystem error", "Requested range was invalid", Undecodable),
}


@pytest.mark.parametrize(("first", "cause", "kind"), SAID.values(), ids=SAID)
def test_what_a_server_does(first, cause, kind):
    """As icechunk says it after its own retries, which take half a minute."""

    class Failing(MemoryStore):
        async def get(self, *request):
            where = "  | context:\n  |    0: icechunk::credentials::open\n  |     at src/repository.rs:403\n"
            raise icechunk.IcechunkError(
                f"  x object store error {first}\n  |\n{where}  |\n  |-> {first}\n  |-> {cause}\n"
            )

    with pytest.raises(kind) as caught:
        sync(SnapshotStore(Failing(), "s3://b/a", "ABC", "", 0).get("x/c/0", default_buffer_prototype()))
    said = str(caught.value).partition("\n")[0]
    assert said.endswith(cause.splitlines()[-1].removeprefix("  `-> "))
    assert "context" not in said
    assert kind is Undecodable or said.startswith("s3://b/a: x/c/0")


def test_options_that_icechunk_does_not_know(bucket, s3):
    with pytest.raises(InvalidConfig, match="unexpected keyword argument 'colour'"):
        open_xy(PREFIX + bucket, storage_options={**s3.options, "colour": "red"})
    with pytest.raises(InvalidConfig, match="reads no repository behind ftp://"):
        open_xy(f"{PREFIX}ftp://host/a")
