"""dtrain doctor."""

from pathlib import Path

import numpy as np
import pytest

from tests.cli.helpers import last, objects


def checks(outcome):
    return {found["name"]: found for found in objects(outcome.out)[:-1]}


def test_a_machine_that_is_fit(cli, project):
    job = project()
    outcome = cli("--json", "doctor", "--scheduler", "serial", "--data", job.dir / "train.zarr")
    assert outcome.code == 0, outcome.out
    found = checks(outcome)
    assert list(found) == ["versions", "machine", "extras", "step", "data", "read", "checksums", "chunks"]
    assert set(found["read"]) == {"event", "name", "status", "text", "cure", "code"}
    assert {check["event"] for check in found.values()} == {"check"}
    assert "dtrain 0.1.0" in found["versions"]["text"]
    assert found["data"]["text"].endswith("train.zarr opens; x is float32[60, 3]")
    assert found["read"]["text"].startswith("one chunk of x, 240 B in ")
    assert found["chunks"]["text"] == "all are stored"
    assert last(outcome) == {"event": "doctor", "code": 0, "errors": [], "warnings": last(outcome)["warnings"]}


def test_in_words(cli, project):
    outcome = cli("doctor", "--scheduler", "serial", "--data", project().dir / "train.zarr")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].startswith("ok       versions     python 3.")
    assert any(line.startswith("ok       step         a local step in this process") for line in lines)
    assert outcome.err.splitlines()[-1].startswith("next: dtrain init my --data ")
    assert not Path("my").exists()


@pytest.mark.parametrize(("path", "words"), [("no.zarr", "no.zarr: no such file or directory."), ("job", "")])
def test_data_that_cannot_be_read_are_exit_code_5(cli, project, path, words):
    project()
    outcome = cli("--json", "doctor", "--scheduler", "serial", "--data", path)
    assert outcome.code == 5
    found = checks(outcome)["data"]
    assert (found["status"], found["code"]) == ("error", 5)
    assert words in found["text"]
    assert last(outcome)["errors"] == ["data"]


def test_chunks_that_are_missing_or_torn(cli, project, chunk_files):
    job = project()
    store = job.dir / "train.zarr"
    names = chunk_files(store, "x")
    (store / names[-1]).unlink()
    outcome = cli("--json", "doctor", "--scheduler", "serial", "--data", store)
    assert outcome.code == 0
    found = checks(outcome)["chunks"]
    assert (found["status"], found["text"]) == ("warning", "not stored: 1 of 3 of x")
    assert "data.missing" in found["cure"]
    (store / names[0]).write_bytes(b"torn")
    outcome = cli("doctor", "--scheduler", "serial", "--data", store)
    assert outcome.code == 5
    assert "error    data" in outcome.out
    assert "1 error" in outcome.out
    assert names[0] in outcome.out


def test_arrays_without_checksums_are_a_warning(cli, tmp_path, write_store):
    arrays = {"x": {"dims": ("n", "f"), "values": np.ones((6, 2), "f4"), "chunks": (2, 2), "compressors": None}}
    write_store(tmp_path / "plain.zarr", arrays)
    outcome = cli("--json", "doctor", "--scheduler", "serial", "--data", tmp_path / "plain.zarr")
    assert outcome.code == 0
    assert checks(outcome)["checksums"]["status"] == "warning"
    assert "checksums" in last(outcome)["warnings"]


def test_volumes_and_sparse_matrices(cli, tmp_path):
    from scipy import sparse

    from tests.data.layouts import fixtures

    rng = np.random.default_rng(0)
    fixtures.write_ome(tmp_path / "image.zarr", rng.integers(0, 9, (2, 3, 32, 32)).astype("u2"), "tcyx")
    matrix = sparse.csr_matrix(rng.poisson(0.3, (120, 9)).astype("f4"))
    fixtures.write_cells(tmp_path / "cells.zarr", matrix)
    for name, words in {"image.zarr": "0 is uint16[2, 3, 32, 32]", "cells.zarr": "X is float32[120, 9]"}.items():
        outcome = cli("--json", "doctor", "--scheduler", "serial", "--data", tmp_path / name)
        assert outcome.code == 0, outcome.out
        assert words in checks(outcome)["data"]["text"]


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [("tcp://127.0.0.1:9", "No Dask scheduler answers"), ("no.json", "no such scheduler file")],
)
def test_a_cluster_that_is_not_there_is_exit_code_6(cli, monkeypatch, scheduler, words):
    from dtrain.runtime import connect

    monkeypatch.setattr(connect, "CONNECT_TIMEOUT", 1.0)
    outcome = cli("--json", "doctor", "--scheduler", scheduler)
    assert outcome.code == 6
    found = checks(outcome)["cluster"]
    assert (found["status"], found["code"]) == ("error", 6)
    assert words in found["text"]
    assert found["cure"]


@pytest.mark.alone
def test_a_local_cluster_is_started_and_closed(script, project):
    job = project()
    outcome = script("--json", "doctor", "--data", job.dir / "train.zarr", timeout=120)
    assert outcome.code == 0, outcome.out
    found = checks(outcome)
    assert [name for name in found if found[name]["status"] == "error"] == []
    assert found["cluster"]["text"].startswith("a local one starts, with ")
    assert {"scheduler", "workers", "machines", "step", "remote read"} <= set(found)
