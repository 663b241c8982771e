"""A repository of icechunk: tasks write into forks, and everything becomes visible with one commit."""

from __future__ import annotations

import pickle
from pathlib import Path

import icechunk
import numpy as np
import pytest
import zarr

from dtrain.data.write.documents import ArraySpec, documents, encode
from dtrain.data.write.icechunk import IcechunkSink
from dtrain.errors import OutputExists

SPEC = ArraySpec(name="p", dims=("t",), shape=(12,), chunks=(4,), dtype="f4", fill_value=float("nan"))
VALUES = np.arange(12, dtype="f4")


def opened(path: Path) -> zarr.Group:
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    return zarr.open_group(repository.readonly_session("main").store, mode="r")


def test_tasks_write_into_forks_and_one_commit_shows_all(tmp_path: Path) -> None:
    path = tmp_path / "p.icechunk"
    sink = IcechunkSink(str(path))
    assert not sink.exists()
    with sink.writing("run"):
        sink.create(documents({"title": "p"}, [SPEC], consolidated=sink.consolidated))
        payload = pickle.dumps(sink.writer())  # as Dask sends it
        for start in (8, 0, 4):
            writer = pickle.loads(payload).fresh()
            assert writer.is_reached()
            writer.put(dict(encode(SPEC, (slice(start, start + 4),), VALUES[start : start + 4])))
            sink.settle(pickle.loads(pickle.dumps(writer.receipt())))
        assert not IcechunkSink(str(path)).exists()  # nobody sees a part
        sink.commit("Predictions")
    assert IcechunkSink(str(path)).attributes() == {"title": "p"}
    np.testing.assert_array_equal(opened(path)["p"][:], VALUES)


def test_the_forks_of_one_writer_do_not_see_each_other(tmp_path: Path) -> None:
    sink = IcechunkSink(str(tmp_path / "p.icechunk"))
    with sink.writing("run"):
        sink.create(documents({}, [SPEC], consolidated=False))
        writer = sink.writer()
        first, second = writer.fresh(), writer.fresh()
        first.put(dict(encode(SPEC, (slice(0, 4),), VALUES[:4])))
        second.put(dict(encode(SPEC, (slice(4, 8),), VALUES[4:8])))
        sink.settle(first.receipt())  # the second is lost, as with a killed worker
        sink.commit("Predictions")
    np.testing.assert_array_equal(opened(tmp_path / "p.icechunk")["p"][:8], [*VALUES[:4], *[np.nan] * 4])


def test_a_branch_that_was_moved_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "p.icechunk"
    sink = IcechunkSink(str(path))
    with sink.writing("run"):
        sink.create(documents({}, [SPEC], consolidated=False))
        writer = sink.writer().fresh()
        writer.put(dict(encode(SPEC, (slice(0, 4),), VALUES[:4])))
        sink.settle(writer.receipt())
        repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
        session = repository.writable_session("main")
        zarr.create_group(session.store, attributes={"made": "by another"})
        session.commit("Another")
        with pytest.raises(OutputExists, match="branch main was moved"):
            sink.commit("Predictions")
    assert dict(opened(path).attrs) == {"made": "by another"}
