"""Which arrays and groups a store holds, by their documents alone."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from dtrain.data.read.open import open_store
from dtrain.data.read.store import ReadStore
from dtrain.data.read.tree import MOST_NODES, array_paths, kind_at, nodes_in
from tests.data.servers import FileServer

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata is")


@pytest.fixture(params=[2, 3])
def folder(request, tmp_path):
    """A store with arrays x, a/x and a/b/x, a group c, a damaged array d and files that are neither."""
    root = zarr.create_group(tmp_path / "s", zarr_format=request.param)
    for name in ("x", "a/x", "a/b/x", "d"):
        root.create_array(name, data=np.zeros(3))
    root.create_group("c")
    zarr.consolidate_metadata(tmp_path / "s")
    (tmp_path / "s" / "d" / (".zarray" if request.param == 2 else "zarr.json")).write_text("{")
    (tmp_path / "s" / "notes.txt").write_text("nothing")
    (tmp_path / "s" / "files").mkdir()
    return tmp_path / "s"


def test_of_a_directory(folder):
    store = open_store(str(folder))
    assert nodes_in(store, "") == {"x": "array", "a": "group", "c": "group", "d": "array"}
    assert nodes_in(store, "/a/") == {"x": "array", "b": "group"}
    assert nodes_in(store, "nowhere") == nodes_in(store, "c") == {}
    assert array_paths(store) == ["a/b/x", "a/x", "d", "x"]
    assert array_paths(store, "a") == ["a/b/x", "a/x"]
    assert [kind_at(store, path) for path in ("a", "a/b/x", "d", "files", "e")] == [
        "group",
        "array",
        "array",
        None,
        None,
    ]


@pytest.mark.parametrize("pages", [False, True])
def test_of_a_server_consolidated_metadata_say_it(folder, pages):
    server = FileServer(folder, pages=pages)
    try:
        store = open_store(server.url)
        assert nodes_in(store, "") == {"x": "array", "a": "group", "c": "group", "d": "array"}
        assert array_paths(store) == ["a/b/x", "a/x", "d", "x"]
        (folder / ".zmetadata").unlink(missing_ok=True)
        if (folder / ".zgroup").exists():
            assert sorted(nodes_in(open_store(server.url), "")) == (["a", "c", "d", "x"] if pages else [])
    finally:
        server.stop()


def test_a_search_ends_also_where_a_listing_leads_in_a_circle(folder, monkeypatch):
    store = open_store(str(folder))
    monkeypatch.setattr(ReadStore, "names", lambda self, group: ["", "a", "x"])
    assert "x" in array_paths(store)
    monkeypatch.setattr(ReadStore, "names", lambda self, group: [f"n{i}" for i in range(2 * MOST_NODES)])
    assert array_paths(store) == []
