from __future__ import annotations

import gc
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import zarr
from zarr.storage import FsspecStore

from dtrain import open_samples
from dtrain.data.load.loader import read_batches
from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.plan.units import Box
from dtrain.data.read import retry
from dtrain.data.read.open import open_store
from dtrain.data.read.presence import check_presence
from dtrain.data.read.remote import open_url
from dtrain.data.read.units import UnitReader
from dtrain.errors import (
    ChunkMissing,
    ChunkUndecodable,
    DataNotFound,
    DtrainError,
    InvalidConfig,
    NotZarr,
    StoreForbidden,
    StoreUnavailable,
    UnknownVariable,
)
from dtrain.types import Cursor
from tests.data.helpers import list_variables
from tests.data.servers import FileServer, S3Server

ROWS, OBJECT = 48, 8
KINDS = {"v2": 2, "v3": 3, "sharded": 3}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
CONSOLIDATED = pytest.mark.parametrize("consolidated", [False, True], ids=["plain", "consolidated"])
ATTEMPTS = retry.ATTEMPTS
SECRETS = (S3Server.key, S3Server.secret, "hunter2")


def arrays_of(kind):
    """x(n, k) and y(n): six objects each; y numbers the rows."""
    options = {"chunks": (OBJECT, 3)} if kind != "sharded" else {"chunks": (2, 3), "shards": (OBJECT, 3)}
    x = {"dims": ("n", "k"), "values": np.arange(3 * ROWS, dtype="float32").reshape(ROWS, 3) + 1, **options}
    return {"x": x, "y": {"dims": ("n",), "values": np.arange(ROWS), "chunks": (OBJECT,)}}


def chunk_key(kind, name, number):
    if kind == "v2":
        return f"{name}/{number}" + (".0" if name == "x" else "")
    return f"{name}/c/{number}" + ("/0" if name == "x" else "")


def chunk_keys(kind):
    return {chunk_key(kind, name, number) for name in ("x", "y") for number in range(ROWS // OBJECT)}


@pytest.fixture(scope="module")
def local(write_store, tmp_path_factory):
    """The path of a store of a kind; written once, so tests that change it take a copy."""
    found = {}

    def path_of(kind, consolidated=True):
        if (kind, consolidated) not in found:
            path = tmp_path_factory.mktemp("stores") / "a.zarr"
            options = {"zarr_format": KINDS[kind], "consolidated": consolidated}
            found[kind, consolidated] = write(write_store, path, kind, options)
        return found[kind, consolidated]

    return path_of


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def write(write_store, where, kind, options):
    return write_store(where, arrays_of(kind), **options)


@pytest.fixture(scope="module")
def s3():
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def bucket(s3, request):
    """The name of a bucket of its own."""
    name = f"bucket-{abs(hash(request.node.nodeid)):x}"
    s3.put(name)
    return name


@pytest.fixture
def serve():
    """A function that serves a directory over HTTP."""
    servers = []

    def start(root, **options):
        servers.append(FileServer(Path(root), **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(autouse=True)
def _no_credentials_and_no_patience(monkeypatch):
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setattr(retry, "BACKOFF_SECONDS", 0.0005)


@pytest.fixture(autouse=True, scope="module")
def _asyncio_has_nothing_to_complain():
    """Unclosed sessions and exceptions that nobody looked at are logged, also to a user."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("asyncio").addHandler(handler)
    yield
    gc.collect()
    logging.getLogger("asyncio").removeHandler(handler)
    assert [record.getMessage() for record in records] == []


@contextmanager
def told(kind, *words):
    """Expect an error of exactly this kind, which names these words and is fit for a user."""
    with pytest.raises(DtrainError) as caught:
        yield caught
    error = caught.value
    assert type(error) is kind, error
    assert "\n" not in error.message
    assert error.hint
    assert error.__cause__ is None or isinstance(error, ChunkUndecodable)
    for word in words:
        assert word in str(error)
    for secret in SECRETS:
        assert secret not in f"{error!s} {error!r}"


def open_xy(path, **data):
    return open_samples(path, inputs=["x"], targets=["y"], **{"split": {"val": 0.0, "test": 0.0}, **data})


def read_pass(samples, reader=None):
    """Read a pass in shuffled batches; return x in the order of y."""
    (partition,) = train_partitions(plan_data(samples, replicas=1, seed=3))
    reader = reader or UnitReader(samples)
    found = list(read_batches(reader, partition, Cursor(0, 0), [5, 20, 23], replica=0, shuffle=True))
    y = np.concatenate([batch.targets[0] for batch in found])
    assert sorted(y.tolist()) == list(range(ROWS)) != y.tolist()
    return np.concatenate([batch.inputs[0] for batch in found])[np.argsort(y)]


def read_after(samples, log, prefix):
    """Read a pass as `read_pass`; return the values, and the requests that the server saw for it, by key."""
    reader = UnitReader(samples)
    asked, begin = reader.store.requests, len(log)
    values = read_pass(samples, reader)
    requests = log[begin:]
    assert reader.store.requests - asked == len(requests)
    return values, {key.removeprefix(prefix): count for key, count in Counter(r.key for r in requests).items()}


# S3 ---------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@CONSOLIDATED
@EVERY_KIND
@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_a_store_on_s3_reads_like_the_local_one_with_one_request_an_object(
    s3, bucket, local, write_store, kind, consolidated
):
    url = f"s3://{bucket}/deep/a.zarr"
    there = FsspecStore.from_url(url, storage_options=s3.options)
    write(write_store, there, kind, {"zarr_format": KINDS[kind], "consolidated": consolidated})
    samples = open_xy(url, storage_options=s3.options)
    begin = len(s3.log)
    check_presence(samples)
    assert Counter(r.method for r in s3.log[begin:])["LIST"] == 2
    values, asked = read_after(samples, s3.log, f"{bucket}/deep/a.zarr/")
    assert asked == dict.fromkeys(chunk_keys(kind), 1)
    np.testing.assert_array_equal(values, read_pass(open_xy(local(kind))))
    np.testing.assert_array_equal(values, arrays_of(kind)["x"]["values"])
    assert samples.fingerprint == open_xy(local(kind)).fingerprint


def test_a_part_of_a_shard_on_s3_costs_its_index_and_one_request(s3, bucket, local):
    s3.upload(local("sharded"), f"{bucket}/a.zarr")
    samples = open_xy(f"s3://{bucket}/a.zarr", storage_options=s3.options)
    reader = UnitReader(samples)
    begin = len(s3.log)
    values = reader.read(Box(9, 13))["x"][1]  # of the shard 8:16, without its last chunk
    np.testing.assert_array_equal(values, arrays_of("sharded")["x"]["values"][9:13])
    assert [r.status for r in s3.log[begin:] if "/x/" in r.key] == [206, 206]
    begin = len(s3.log)
    reader.read(Box(9, 13))  # the index is kept
    assert len([r for r in s3.log[begin:] if "/x/" in r.key]) == 1


@EVERY_KIND
def test_a_chunk_that_is_missing_on_s3_is_named_until_it_is_repaired(s3, bucket, local, kind):
    key = chunk_key(kind, "x", 2)
    s3.upload(local(kind), f"{bucket}/a.zarr")
    s3.delete(f"{bucket}/a.zarr/{key}")
    samples = open_xy(f"s3://{bucket}/a.zarr", storage_options=s3.options)
    with told(
        ChunkMissing, f"s3://{bucket}/a.zarr: chunk {key} of x is missing (1 of 6)", 'missing = "fill"'
    ) as caught:
        check_presence(samples)
    assert caught.value.code == 5
    with told(ChunkMissing, f"chunk {key} of x is missing"):
        UnitReader(samples).read(Box(16, 24))
    with told(ChunkMissing, f"chunk {key} of x is missing"):
        read_pass(samples)
    s3.put(f"{bucket}/a.zarr/{key}", (local(kind) / key).read_bytes())
    check_presence(samples)
    read_pass(samples)


def test_a_chunk_that_is_missing_in_a_shard_on_s3_is_named(s3, bucket, local):
    s3.upload(local("sharded"), f"{bucket}/a.zarr")
    there = FsspecStore.from_url(f"s3://{bucket}/a.zarr", storage_options=s3.options)
    zarr.open_group(there, mode="a")["x"][18:20] = 0  # the fill value: zarr leaves the chunk out of its shard
    samples = open_xy(f"s3://{bucket}/a.zarr", storage_options=s3.options)
    with told(ChunkMissing, "chunk (9, 0) of x, in shard x/c/2/0, is missing"):
        check_presence(samples)
    with told(ChunkMissing, "chunk (9, 0) of x, in shard x/c/2/0, is missing"):
        UnitReader(samples).read(Box(16, 24))
    UnitReader(samples).read(Box(20, 24))
    filled = open_xy(f"s3://{bucket}/a.zarr", storage_options=s3.options, missing="fill")
    assert not UnitReader(filled).read(Box(16, 24))["x"][1][2:4].any()


@pytest.mark.parametrize("cut", ["empty", "end", "begin"])
@pytest.mark.parametrize("kind", ["v3", "sharded"])
def test_an_object_on_s3_that_was_truncated_is_named(s3, bucket, local, kind, cut):
    key = chunk_key(kind, "x", 2)
    s3.upload(local(kind), f"{bucket}/a.zarr")
    data = (local(kind) / key).read_bytes()
    s3.put(f"{bucket}/a.zarr/{key}", {"empty": b"", "end": data[:-3], "begin": data[-30:]}[cut])
    samples = open_xy(f"s3://{bucket}/a.zarr", storage_options=s3.options)
    check_presence(samples)  # it is there
    with told(ChunkUndecodable, f"chunk {key} of x cannot be decoded") as caught:
        UnitReader(samples).read(Box(16, 24))
    assert caught.value.code == 5
    with told(ChunkUndecodable, f"chunk {key} of x cannot be decoded"):
        UnitReader(samples).read(Box(20, 22))


def test_without_credentials_s3_says_how_to_give_them(s3, bucket, local, monkeypatch):
    s3.upload(local("v3"), f"{bucket}/a.zarr", **{"x-amz-acl": "public-read"})
    endpoint = {"endpoint_url": s3.url}
    with told(StoreForbidden, "Unable to locate credentials", "data.storage_options", "anon = true") as caught:
        open_xy(f"s3://{bucket}/a.zarr", storage_options=endpoint)
    assert caught.value.code == 5
    read_pass(open_xy(f"s3://{bucket}/a.zarr", storage_options={**endpoint, "anon": True}))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
    read_pass(open_xy(f"s3://{bucket}/a.zarr", storage_options=endpoint))  # in the same notebook


def test_s3_refuses_unknown_credentials_and_does_not_repeat_them(s3, bucket, local):
    s3.upload(local("v3"), f"{bucket}/a.zarr")
    samples = open_xy(f"s3://{bucket}/a.zarr", storage_options=s3.options)
    s3.check_credentials(True)
    try:
        begin = len(s3.log)
        with told(StoreForbidden, "access to zarr.json was refused", "data.storage_options") as caught:
            open_xy(f"s3://{bucket}/a.zarr", storage_options=s3.options)
        assert caught.value.code == 5
        assert len(s3.log) == begin + 1  # to ask again would not help
        with told(StoreForbidden, f"s3://{bucket}/a.zarr"):
            check_presence(samples)
        with told(StoreForbidden, f"s3://{bucket}/a.zarr"):
            UnitReader(samples)
        with told(StoreForbidden):
            open_xy(f"s3://{bucket}/a.zarr", storage_options={"endpoint_url": s3.url, "anon": True})
    finally:
        s3.check_credentials(False)


@pytest.mark.parametrize("where", ["no-such-bucket/a.zarr", "{bucket}/b.zarr", "{bucket}", "{bucket}/deep"])
def test_nothing_there_on_s3(s3, bucket, local, where):
    s3.upload(local("v3"), f"{bucket}/deep/a.zarr")
    where = where.format(bucket=bucket)
    with told(DataNotFound, f"s3://{where}: no Zarr group there") as caught:
        open_xy(f"s3://{where}", storage_options=s3.options)
    assert caught.value.code == 5


def test_a_single_array_on_s3_is_not_a_group(s3, bucket, local):
    for kind in ("v2", "v3"):
        s3.upload(local(kind) / "x", f"{bucket}/{kind}.zarr")
        with told(NotZarr, "is a single Zarr array"):
            open_xy(f"s3://{bucket}/{kind}.zarr", storage_options=s3.options)


def test_broken_metadata_on_s3(s3, bucket, local):
    s3.upload(local("v3"), f"{bucket}/a.zarr")
    s3.put(f"{bucket}/a.zarr/zarr.json", b'{"zarr_format": 3, "node')
    with told(NotZarr, f"s3://{bucket}/a.zarr: its Zarr metadata cannot be read"):
        open_xy(f"s3://{bucket}/a.zarr", storage_options=s3.options)


def test_a_variable_that_is_not_on_s3_is_compared_with_those_that_are(s3, bucket, local):
    s3.upload(local("v3", consolidated=False), f"{bucket}/a.zarr")
    with told(UnknownVariable, 'variable "z" not found', "It has x, y."):
        open_samples(f"s3://{bucket}/a.zarr", inputs=["z"], targets=["y"], storage_options=s3.options)


@pytest.mark.parametrize("options", [{"sekret": "hunter2"}, {"client_kwargs": {"sekret": "hunter2"}}])
def test_options_that_s3_does_not_have(s3, bucket, options):
    with told(InvalidConfig, "sekret", "data.storage_options") as caught:
        open_xy(f"s3://{bucket}/a.zarr", storage_options={**s3.options, **options})
    assert caught.value.code == 3


def test_a_bucket_name_that_s3_cannot_have(s3):
    with told(InvalidConfig, "Invalid bucket name", "data.path"):
        open_xy("s3://No bucket!/a.zarr", storage_options=s3.options)


def test_a_store_on_s3_travels_to_another_process(s3, bucket, local):
    s3.upload(local("sharded"), f"{bucket}/a.zarr")
    samples = open_xy(f"s3://{bucket}/a.zarr", storage_options=s3.options)
    code = (
        "import pickle, sys\n"
        "samples = pickle.load(sys.stdin.buffer)\n"
        "from dtrain.data.read.presence import check_presence\n"
        "from dtrain.data.plan.units import Box\n"
        "from dtrain.data.read.units import UnitReader\n"
        "check_presence(samples)\n"
        "found = UnitReader(samples).read(Box(3, 30))\n"
        "pickle.dump((samples.fingerprint, found), sys.stdout.buffer)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=cloudpickle.dumps(samples), capture_output=True, timeout=60, check=False
    )
    assert done.stderr.decode() == ""  # nor a word of sessions that are still open
    fingerprint, found = pickle.loads(done.stdout)
    assert fingerprint == samples.fingerprint
    for name, (first, values) in UnitReader(samples).read(Box(3, 30)).items():
        assert found[name][0] == first
        np.testing.assert_array_equal(found[name][1], values)


@pytest.mark.parametrize("fault", [503, "short"])
def test_requests_to_s3_are_retried_by_one_layer_only(serve, local, fault):
    server = serve(local("v3").parent.parent)  # what moto does with files, but it can fail
    folder = local("v3").parent.name
    options = {"key": S3Server.key, "secret": S3Server.secret, "endpoint_url": server.url}
    samples = open_xy(f"s3://{folder}/a.zarr", storage_options=options)
    server.fail("x/c/2/0$", fault, times=2)
    reader = UnitReader(samples)
    np.testing.assert_array_equal(read_pass(samples, reader), arrays_of("v3")["x"]["values"])
    assert len(server.requests("x/c/2/0$")) == 3
    server.mend()
    server.fail("x/c/2/0$", fault)
    begin = len(server.requests("x/c/2/0$"))
    with told(StoreUnavailable, f"s3://{folder}/a.zarr: x/c/2/0 could not be read in {ATTEMPTS} attempts") as caught:
        reader.read(Box(16, 24))
    assert caught.value.code == 75
    assert len(server.requests("x/c/2/0$")) - begin == ATTEMPTS


@pytest.mark.sampled(3)
@CONSOLIDATED
@EVERY_KIND
def test_a_bucket_that_may_be_read_but_not_listed(serve, local, kind, consolidated):
    path = local(kind, consolidated)
    server = serve(path.parent.parent)
    server.fail("list-type=2", 403)
    options = {"key": S3Server.key, "secret": S3Server.secret, "endpoint_url": server.url}
    samples = open_xy(f"s3://{path.parent.name}/a.zarr", storage_options=options)
    np.testing.assert_array_equal(read_pass(samples), arrays_of(kind)["x"]["values"])


# HTTP -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "whole files"])
@CONSOLIDATED
@EVERY_KIND
def test_a_store_on_an_http_server_reads_like_the_local_one(serve, local, kind, consolidated, ranges):
    server = serve(local(kind, consolidated), ranges=ranges)
    samples = open_xy(server.url)
    if consolidated:
        assert not server.requests("^$")  # no directory was to be listed
    check_presence(samples)
    values, asked = read_after(samples, server.log, "")
    assert asked == dict.fromkeys(chunk_keys(kind), 1)
    np.testing.assert_array_equal(values, arrays_of(kind)["x"]["values"])
    np.testing.assert_array_equal(
        UnitReader(samples).read(Box(9, 13))["x"][1],
        arrays_of(kind)["x"]["values"][9:13],  # a part of a shard
    )


def test_a_store_on_an_http_server_whose_name_has_a_space(serve, local, tmp_path):
    shutil.copytree(local("v3"), tmp_path / "a b.zarr")
    samples = open_xy(f"{serve(tmp_path).url}/a b.zarr")
    check_presence(samples)
    np.testing.assert_array_equal(read_pass(samples), arrays_of("v3")["x"]["values"])


def test_looking_for_chunks_on_an_http_server_does_not_load_them(serve, local):
    server = serve(local("v3"))
    samples = open_xy(server.url)
    begin = len(server.log)
    check_presence(samples)
    assert {(r.method, r.status) for r in server.log[begin:] if "/c/" in r.key} == {("GET", 206)}
    assert len([r for r in server.log[begin:] if "/c/" in r.key]) == 12


@pytest.mark.parametrize("group", ["a", "/a/b/"])
@CONSOLIDATED
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_a_nested_group_on_an_http_server(serve, write_store, tmp_path, zarr_format, group, consolidated):
    options = {"zarr_format": zarr_format, "consolidated": consolidated, "group": group.strip("/")}
    write(write_store, tmp_path / "s", "v3", options)
    samples = open_xy(f"{serve(tmp_path).url}/s/", group=group)
    check_presence(samples)
    np.testing.assert_array_equal(read_pass(samples), arrays_of("v3")["x"]["values"])


@EVERY_KIND
def test_a_variable_that_an_http_server_does_not_have(serve, local, kind):
    ask = {"inputs": ["z"], "targets": ["y"]}
    with told(UnknownVariable, 'variable "z" not found', "It has x, y."):
        open_samples(serve(local(kind)).url, **ask)
    with told(UnknownVariable, 'variable "z" not found', "It has x, y."):  # of a page with links
        open_samples(serve(local(kind, False), pages=True).url, **ask)
    with told(UnknownVariable, 'variable "z" not found'):
        open_samples(serve(local(kind, False)).url, **ask)
    with told(UnknownVariable, 'variable "z" not found', "zarr.consolidate_metadata"):
        open_samples(serve(local(kind, False)).url, inputs=["z"], targets=["w"])


@pytest.mark.parametrize("pages", [False, True])
def test_variables_on_an_http_server_can_be_listed_if_it_says_them(serve, local, pages):
    assert sorted(list_variables(serve(local("v3")).url)) == ["x", "y"]
    found = list_variables(serve(local("v3", False), pages=pages).url)
    assert sorted(found) == (["x", "y"] if pages else [])


@EVERY_KIND
def test_a_directory_that_must_not_be_listed_does_not_matter(serve, local, kind):
    server = serve(local(kind, False))
    server.fail("^$", 403)
    np.testing.assert_array_equal(read_pass(open_xy(server.url)), arrays_of(kind)["x"]["values"])


@EVERY_KIND
def test_a_chunk_that_an_http_server_does_not_have_is_named(serve, local, tmp_path, kind):
    path = shutil.copytree(local(kind), tmp_path / "a.zarr")
    key = chunk_key(kind, "x", 2)
    (path / key).unlink()
    url = serve(path).url
    with told(ChunkMissing, f"{url}: chunk {key} of x is missing (1 of 6)") as caught:
        check_presence(open_xy(url))
    assert caught.value.code == 5
    with told(ChunkMissing, f"chunk {key} of x"):
        read_pass(open_xy(url))
    values = read_pass(open_xy(url, missing="fill"))
    assert np.flatnonzero(~values.any(axis=1)).tolist() == list(range(16, 24))


@pytest.mark.parametrize("cut", ["empty", "end", "begin"])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "whole files"])
@pytest.mark.parametrize("kind", ["v3", "sharded"])
def test_an_object_on_an_http_server_that_was_truncated_is_named(serve, local, tmp_path, kind, ranges, cut):
    path = shutil.copytree(local(kind), tmp_path / "a.zarr")
    key = chunk_key(kind, "x", 2)
    data = (path / key).read_bytes()
    (path / key).write_bytes({"empty": b"", "end": data[:-3], "begin": data[-30:]}[cut])
    samples = open_xy(serve(path, ranges=ranges).url)
    check_presence(samples)
    for rows in ((16, 24), (20, 22)):
        with told(ChunkUndecodable, f"chunk {key} of x cannot be decoded") as caught:
            UnitReader(samples).read(Box(*rows))
        assert caught.value.code == 5


def test_nothing_there_on_an_http_server(serve, local):
    server = serve(local("v3").parent)
    with told(DataNotFound, f"{server.url}/b.zarr: no Zarr group there: it has none of zarr.json") as caught:
        open_xy(f"{server.url}/b.zarr")
    assert caught.value.code == 5
    with told(NotZarr, "is a single Zarr array"):
        open_xy(f"{server.url}/a.zarr/x")


def test_options_that_http_does_not_have(serve, local):
    with told(InvalidConfig, "sekret", "data.storage_options"):
        open_xy(serve(local("v3")).url, storage_options={"sekret": "hunter2"})


def test_headers_are_sent_and_not_shown(serve, local):
    server = serve(local("v3"))
    server.token = "Bearer hunter2"
    headers = {"headers": {"Authorization": "Bearer hunter2"}}
    samples = open_xy(server.url, storage_options=headers)
    np.testing.assert_array_equal(read_pass(samples), arrays_of("v3")["x"]["values"])
    for wrong in ({}, {"headers": {"Authorization": "Bearer hunter22"}}):
        with told(StoreForbidden, "access to zarr.json was refused") as caught:
            open_xy(server.url, storage_options=wrong)
        assert caught.value.code == 5


# Servers that fail ------------------------------------------------------------------------------------------


@pytest.mark.sampled(10)
@pytest.mark.parametrize("fault", [500, 502, 503, 504, 429, 408, "short", "drop"])
@pytest.mark.parametrize("kind", ["v2", "sharded"])
def test_requests_to_a_server_that_fails_twice_an_object_are_retried(serve, local, kind, fault):
    server = serve(local(kind))
    server.fail("(zarr.json|.z[a-z]+|[0-9])$", fault, times=2)
    samples = open_xy(server.url)
    check_presence(samples)
    np.testing.assert_array_equal(read_pass(samples), arrays_of(kind)["x"]["values"])
    asked = Counter(r.key for r in server.log if r.status == (fault if isinstance(fault, int) else 0))
    assert set(asked) >= chunk_keys(kind)
    assert {count for key, count in asked.items() if (server.root / key).is_file()} == {2}


def test_a_request_for_a_part_of_a_shard_is_retried(serve, local):
    server = serve(local("sharded"))
    reader = UnitReader(open_xy(server.url))
    reader.read(Box(8, 10))
    server.fail("x/c/1/0$", 503, times=2)
    begin = len(server.requests("x/c/1/0$"))
    np.testing.assert_array_equal(reader.read(Box(12, 14))["x"][1], arrays_of("sharded")["x"]["values"][12:14])
    assert [r.status for r in server.requests("x/c/1/0$")[begin:]] == [503, 503, 206]
    server.fail("x/c/1/0$", 503)
    with told(StoreUnavailable, f"{server.url}: x/c/1/0 could not be read in {ATTEMPTS} attempts"):
        reader.read(Box(10, 12))


STAGES = {"zarr.json": open_xy, "x/c/2/0": check_presence, "y/c/4": lambda samples: read_pass(samples)}
ALWAYS = {
    503: StoreUnavailable,
    "short": StoreUnavailable,
    "drop": StoreUnavailable,
    403: StoreForbidden,
    401: StoreForbidden,
}


@pytest.mark.parametrize("fault", ALWAYS)
@pytest.mark.parametrize("key", STAGES)
def test_a_server_that_always_fails_is_named_with_the_object(serve, local, key, fault):
    server = serve(local("v3"))
    samples = server.url if key == "zarr.json" else open_xy(server.url)
    server.fail(f"{key}$", fault)
    begin = len(server.log)
    with told(ALWAYS[fault], f"{server.url}: ", key) as caught:
        STAGES[key](samples)
    asked = [r for r in server.log[begin:] if r.key == key]
    if ALWAYS[fault] is StoreForbidden:
        assert caught.value.code == 5
        assert len(asked) == 1
    else:
        assert caught.value.code == 75
        assert f"in {ATTEMPTS} attempts" in caught.value.message
        assert "Run the same command again" in caught.value.hint
        assert len(asked) == ATTEMPTS * (2 if fault == "drop" else 1)  # aiohttp too asks again if it is hung up on


@pytest.mark.parametrize("key", STAGES)
def test_a_server_that_stalls_is_given_up_after_as_many_attempts(serve, local, monkeypatch, key):
    monkeypatch.setattr(retry, "STALL_SECONDS", 0.05)
    server = serve(local("v3"))
    samples = server.url if key == "zarr.json" else open_xy(server.url)
    server.fail(f"{key}$", "stall")
    begin = len(server.log)
    with told(StoreUnavailable, f"{server.url}: {key}", f"in {ATTEMPTS} attempts", "no answer within 0.05 s") as caught:
        STAGES[key](samples)
    requests = [r for r in server.log[begin:] if r.key == key]
    assert 0 < len(requests) <= ATTEMPTS  # an attempt may be over before a busy server has seen it
    assert caught.value.code == 75


def test_a_request_that_stalls_once_is_retried(serve, local, monkeypatch):
    monkeypatch.setattr(retry, "STALL_SECONDS", 0.3)
    server = serve(local("v3"))
    samples = open_xy(server.url)
    server.fail("x/c/2/0$", "stall", times=1)
    np.testing.assert_array_equal(read_pass(samples), arrays_of("v3")["x"]["values"])
    assert len(server.requests("x/c/2/0$")) == 2


@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_a_server_that_is_not_there(serve, local, protocol):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        url, options = f"{address}/a.zarr", {}
        if protocol == "s3":
            url, options = "s3://bucket/a.zarr", {"endpoint_url": address, "key": SECRETS[0], "secret": SECRETS[1]}
        with told(StoreUnavailable, f"{url}: zarr.json could not be read in {ATTEMPTS} attempts") as caught:
            open_xy(url, storage_options=options)
    assert caught.value.code == 75


def test_a_server_that_goes_away(serve, local):
    server = serve(local("sharded"))
    samples = open_xy(server.url)
    reader = UnitReader(samples)
    reader.read(Box(0, 8))
    server.stop()
    for ask in (reader.read, lambda _: check_presence(samples), lambda _: UnitReader(samples)):
        with told(StoreUnavailable, server.url) as caught:
            ask(Box(8, 16))
        assert caught.value.code == 75


def test_a_chunk_that_goes_away_between_the_check_and_the_reading(serve, local):
    server = serve(local("v3"))
    samples = open_xy(server.url)
    check_presence(samples)
    server.fail("x/c/2/0$", 404)
    with told(ChunkMissing, f"{server.url}: chunk x/c/2/0 of x is missing") as caught:
        read_pass(samples)
    assert caught.value.code == 5


def test_a_chunk_that_fails_in_a_reading_of_many_threads_stops_them(serve, local):
    server = serve(local("v3"))
    samples = open_xy(server.url)
    server.fail(r"x/c/[2-5]/0$", 503)
    reader = UnitReader(samples)
    with told(StoreUnavailable, "could not be read in"):
        read_pass(samples, reader)
    server.mend()
    np.testing.assert_array_equal(read_pass(samples, reader), arrays_of("v3")["x"]["values"])


# Other file systems -----------------------------------------------------------------------------------------


@CONSOLIDATED
@EVERY_KIND
@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_a_store_in_the_memory_of_this_process(write_store, request, kind, consolidated):
    url = f"memory://{kind}-{consolidated}.zarr"
    there = FsspecStore.from_url(url)
    request.addfinalizer(lambda: there.fs.sync_fs.rm(there.path, recursive=True))
    write(write_store, there, kind, {"zarr_format": KINDS[kind], "consolidated": consolidated})
    samples = open_xy(url)
    check_presence(samples)
    reader = UnitReader(samples)
    asked = reader.store.requests
    np.testing.assert_array_equal(read_pass(samples, reader), arrays_of(kind)["x"]["values"])
    assert reader.store.requests - asked == 12
    there.fs.sync_fs.rm(f"{there.path}/{chunk_key(kind, 'x', 2)}")
    with told(ChunkMissing, f"{url}: chunk {chunk_key(kind, 'x', 2)} of x is missing (1 of 6)"):
        check_presence(samples)
    with told(ChunkMissing, chunk_key(kind, "x", 2)):
        read_pass(samples)


def test_nothing_in_memory():
    with told(DataNotFound, "memory://nothing.zarr: no Zarr group there"):
        open_xy("memory://nothing.zarr")


@EVERY_KIND
def test_a_file_url_is_the_local_path(local, tmp_path, kind):
    path = shutil.copytree(local(kind), tmp_path / "with a space & 50%.zarr")
    samples = open_xy(path.as_uri())
    assert samples.path == str(path)
    assert UnitReader(samples).readers == UnitReader(open_xy(path)).readers
    check_presence(samples)
    np.testing.assert_array_equal(read_pass(samples), arrays_of(kind)["x"]["values"])
    with told(DataNotFound, "no such file or directory"):
        open_xy((tmp_path / "nothing.zarr").as_uri())


# What cannot be opened --------------------------------------------------------------------------------------


def test_a_package_that_is_not_installed_is_named():
    with told(InvalidConfig, "gs://bucket/a.zarr", "gcsfs", "Install it here and on the workers") as caught:
        open_xy("gs://bucket/a.zarr")
    assert caught.value.code == 3


def test_what_to_install_for_s3(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with told(InvalidConfig, "s3fs", 'pip install "dtrain[s3]"'):
        open_xy("s3://bucket/a.zarr")


def test_a_misspelt_protocol():
    with told(InvalidConfig, "htps", 'did you mean "https"?') as caught:
        open_xy("htps://host/a.zarr")
    assert caught.value.code == 3


def test_a_password_does_not_belong_into_a_url():
    with told(InvalidConfig, "data.path holds a password", "data.storage_options"):
        open_xy("http://user:hunter2@127.0.0.1/a.zarr")


def test_an_archive_that_is_not_there(tmp_path):
    with told(InvalidConfig, "a.zip"):
        open_xy(f"zip::file://{tmp_path}/a.zip")


def test_what_is_printed_of_samples_holds_no_credentials(s3, bucket, local):
    s3.upload(local("v3"), f"{bucket}/a.zarr")
    samples = open_xy(f"s3://{bucket}/a.zarr", storage_options=s3.options)
    shown = f"{samples!r} {samples._repr_html_()} {open_store(samples.path, s3.options)!r}"
    assert not any(secret in shown for secret in SECRETS)


def test_threads_share_a_file_system():
    here = open_url("http://127.0.0.1:1/a", {})._store.fs
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(open_url, "http://127.0.0.1:1/b", {}).result()._store.fs is here
    assert open_url("http://127.0.0.1:1/c", {"block_size": 0})._store.fs is not here
