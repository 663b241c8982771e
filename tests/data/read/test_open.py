"""Opening: the kinds of stores, and metadata that are requested once in a process and never believed blindly."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import zarr

from dtrain.data.plan.units import Box
from dtrain.data.read import open as module
from dtrain.data.read.documents import NAMES, REMEMBERED_STORES
from dtrain.data.read.local import DirectoryStore
from dtrain.data.read.open import KINDS, kind_of, open_arrays, register_kind
from dtrain.data.read.presence import absent_rows, check_presence, content_digest
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import DataNotFound, NotZarr, StoreForbidden, StoreUnavailable
from tests.data.servers import FileServer

# Kinds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "facts"),
    [
        ("/data/a.zarr", (True, True, False)),
        ("relative.zarr", (True, True, False)),
        ("file:///data/a.zarr", (True, True, False)),
        ("s3://bucket/a.zarr", (False, True, True)),
        ("memory://a.zarr", (False, True, True)),
        ("zip::file:///data/a.zip", (False, True, True)),
        ("http://host/a.zarr", (False, False, True)),
        ("https://host/a.zarr", (False, False, True)),
    ],
)
def test_the_kind_of_a_path_says_what_the_store_allows(path, facts):
    found = kind_of(path).facts
    assert (found.is_local, found.can_list, found.read_ahead) == facts


def test_the_kind_that_was_registered_last_comes_first():
    kinds = list(KINDS)
    register_kind(KINDS[-1])
    assert [KINDS[-1], *kinds] == KINDS
    del KINDS[0]


# Metadata ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(module, "_REMEMBERED", type(module._REMEMBERED)())


@pytest.fixture
def store(write_store, tmp_path):
    """A function that writes x(n, k) and y(n), and returns the path."""
    arrays = {
        "x": {"dims": ("n", "k"), "values": np.ones((48, 3), "float32"), "chunks": (8, 3)},
        "y": {"dims": ("n",), "values": np.arange(48), "chunks": (8,)},
    }

    def write(**options):
        return write_store(tmp_path / "s", arrays, **options)

    return write


@pytest.fixture
def serve():
    servers = []

    def start(root):
        servers.append(FileServer(root))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def files_read(monkeypatch):
    """Counts the metadata documents that are read from a local store."""
    counts = Counter()
    get = DirectoryStore.get

    async def counted(self, key, prototype=None, byte_range=None):
        counts[key] += key.rpartition("/")[2] in NAMES
        return await get(self, key, prototype, byte_range)

    monkeypatch.setattr(DirectoryStore, "get", counted)
    return counts


def open_xy(path, **data):
    return open_samples(path, inputs=["x"], targets=["y"], **{"split": {"val": 0.0, "test": 0.0}, **data})


STORES = [
    pytest.param(
        {"zarr_format": zarr_format, "consolidated": consolidated, "group": group}, id=f"v{zarr_format} {name}"
    )
    for zarr_format in (2, 3)
    for name, consolidated, group in (("plain", False, ""), ("consolidated", True, ""), ("nested", False, "a/b"))
]


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("options", STORES)
@pytest.mark.parametrize("which", ["zarr", "zarrs", "numcodecs"])
def test_a_document_of_a_local_store_is_read_once_until_the_first_unit(store, files_read, options, which):
    path = store(**options)
    if which == "zarrs" and options["zarr_format"] == 2:
        which = "auto"  # without a fill value
    samples = open_xy(path, group=options["group"])
    described = Counter(files_read)
    check_presence(samples)
    content_digest(samples)
    absent_rows(samples)
    UnitReader(samples, which).read(Box(0, 8))
    assert sum(described.values()) > 0
    assert set(files_read.values()) <= {0, 1}
    assert +files_read == +described


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("options", STORES)
def test_a_document_on_a_server_is_requested_once_and_the_root_once_more_at_each_opening(store, serve, options):
    server = serve(store(**options))
    samples = open_xy(server.url, group=options["group"])

    def documents():
        return Counter(r.key for r in server.log if r.key.rpartition("/")[2] in NAMES)

    described = documents()
    assert set(described.values()) == {1}
    check_presence(samples)
    UnitReader(samples).read(Box(0, 8))
    (again,) = (documents() - described).items()
    root = ".zmetadata" if options["consolidated"] else ".zgroup"
    assert again == (root if options["zarr_format"] == 2 else "zarr.json", 2)


def test_a_process_that_is_given_samples_opens_them_once(store, files_read):
    # as a worker: it has not described them
    samples = pickle.loads(pickle.dumps(open_xy(store())))
    module._REMEMBERED.clear()
    files_read.clear()
    check_presence(samples)
    opened = Counter(files_read)
    assert set(opened) >= {"zarr.json", "x/zarr.json", "y/zarr.json"}
    UnitReader(samples)
    content_digest(samples)
    assert set(files_read.values()) <= {0, 1}
    assert +files_read == +opened


def test_only_the_documents_that_readers_need_are_remembered(write_store, tmp_path):
    arrays = {f"v{i}": {"dims": ("n",), "values": np.arange(4), "chunks": (2,)} for i in range(20)}
    path = write_store(tmp_path / "s", arrays, group="a")
    open_samples(path, inputs=["v3"], targets=["v7"], group="a")
    ((_, documents),) = module._REMEMBERED.items()
    assert {key.rpartition("/")[0] for key in documents._answers} == {"", "a", "a/v3", "a/v7"}


def test_a_few_stores_are_remembered(write_store, tmp_path):
    for number in range(REMEMBERED_STORES + 3):
        arrays = {"x": {"dims": ("n",), "values": np.arange(4), "chunks": (2,)}}
        open_samples(write_store(tmp_path / str(number), arrays), inputs=["x"], targets=["x"])
    assert [path for path, _ in module._REMEMBERED] == [
        str(tmp_path / str(number)) for number in range(3, REMEMBERED_STORES + 3)
    ]


# Modified meanwhile -----------------------------------------------------------------------------------------

OPENERS = {
    "presence": check_presence,
    "digest": content_digest,
    "reader": UnitReader,
    "absent rows": absent_rows,
}
EVERY = pytest.mark.parametrize("opener", OPENERS)


def rewrite(path, **changes):
    """Change a document, and let it look younger."""
    described = {**json.loads(path.read_text()), **changes}
    status = path.stat()
    path.write_text(json.dumps(described))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


@EVERY
def test_a_store_that_has_gone_is_not_there(store, opener):
    path = store()
    samples = open_xy(path)
    shutil.rmtree(path)
    with pytest.raises(DataNotFound, match="no Zarr group there any more"):
        OPENERS[opener](samples)


@EVERY
def test_an_array_that_has_gone_is_not_there(store, opener):
    path = store()
    samples = open_xy(path)
    shutil.rmtree(path / "x")
    with pytest.raises(DataNotFound, match="x is not there any more"):
        OPENERS[opener](samples)


@EVERY
def test_metadata_that_have_been_damaged_are_named(store, opener):
    path = store()
    samples = open_xy(path)
    (path / "x/zarr.json").write_text("{bad")
    with pytest.raises(NotZarr, match="the metadata of x cannot be read"):
        OPENERS[opener](samples)
    (path / "zarr.json").write_text("{bad")
    with pytest.raises(NotZarr, match="its Zarr metadata cannot be read"):
        OPENERS[opener](samples)


def test_metadata_that_have_been_modified_are_read_anew(store):
    path = store()
    samples = open_xy(path)
    assert open_arrays(samples)[1]["x"].attrs.asdict() == {}
    rewrite(path / "x/zarr.json", attributes={"units": "K"})
    assert open_arrays(samples)[1]["x"].attrs.asdict() == {"units": "K"}
    (path / "x/zarr.json").unlink()
    with pytest.raises(DataNotFound):
        open_arrays(samples)


def test_a_document_that_was_not_there_is_looked_for_again(store):
    path = store(zarr_format=2)
    samples = open_xy(path)
    open_arrays(samples)
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')  # as if x had gone
    (path / ".zgroup").unlink()
    with pytest.raises(DataNotFound, match="x is not there any more"):
        open_arrays(samples)


def test_describing_a_store_again_believes_nothing(store):
    path = store()
    first = open_xy(path)
    zarr.open_group(path, mode="r+")["y"].resize((40,))
    zarr.open_group(path, mode="r+")["x"].resize((40, 3))
    assert (first.num_samples, open_xy(path).num_samples) == (48, 40)


@EVERY
def test_a_server_that_has_nothing_any_more_says_so(store, serve, opener):
    path = store()
    samples = open_xy(serve(path).url)
    for file in ("zarr.json", "x/zarr.json", "y/zarr.json"):
        (path / file).unlink()
    if opener == "digest":
        assert content_digest(samples) == {}  # of what is remote there is none
        return
    with pytest.raises(DataNotFound, match="no Zarr group there any more"):
        OPENERS[opener](samples)


def test_a_server_that_has_another_store_by_now_is_opened_anew(store, serve):
    path = store(consolidated=False)
    server = serve(path)
    samples = open_xy(server.url)
    rewrite(path / "x/zarr.json", attributes={"units": "K"})
    rewrite(path / "zarr.json", attributes={"title": "another"})
    assert open_arrays(samples)[1]["x"].attrs.asdict() == {"units": "K"}


@pytest.mark.parametrize(("fault", "kind"), [(403, StoreForbidden), (503, StoreUnavailable)])
@pytest.mark.parametrize("opener", ["presence", "reader"])
def test_a_server_that_refuses_or_fails_by_now_says_so(store, serve, monkeypatch, opener, fault, kind):
    monkeypatch.setattr("dtrain.data.read.retry.BACKOFF_SECONDS", 0.0)
    server = serve(store())
    samples = open_xy(server.url)
    server.fail("zarr.json$", fault)
    with pytest.raises(kind, match="zarr.json"):
        OPENERS[opener](samples)
    server.mend()
    OPENERS[opener](samples)


def test_other_options_are_another_store(store, serve):
    server = serve(store())
    server.token = "let me in"
    samples = open_xy(server.url, storage_options={"headers": {"Authorization": "let me in"}})
    other = open_xy(server.url, storage_options={"headers": {"Authorization": "let me in"}}, isel={"k": 0})
    assert len(module._REMEMBERED) == 1
    open_arrays(samples)
    without = replace(other, config=other.config.model_copy(update={"storage_options": {}}))
    with pytest.raises(StoreForbidden):
        open_arrays(without)
