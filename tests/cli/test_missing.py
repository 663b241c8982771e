"""Chunks that are not stored, on the command line: counted by plan, told by train, left out by eval."""

from __future__ import annotations

import json
import tomllib

import pytest
import yaml

from tests.cli.helpers import blobs, history, last, objects


def label_of_zeros(job, chunk=1):
    """Write 0 into the labels of a chunk, and leave it out as writers do; return the labels."""
    import zarr

    array = zarr.open_group(job.dir / "train.zarr", mode="r+")["label"]
    array[20 * chunk : 20 * (chunk + 1)] = 0
    whole = array[...]
    file = job.dir / "train.zarr/label/c" / str(chunk)
    file.unlink(missing_ok=True)
    return whole


@pytest.mark.sampled(2)
@pytest.mark.parametrize("suffix", ["toml", "yaml", "json"])
def test_labels_that_a_writer_left_out(cli, project, suffix):
    job = project()
    config = job.config.with_suffix(f".{suffix}")
    tables = tomllib.loads(job.config.read_text())
    if suffix != "toml":
        config.write_text(json.dumps(tables) if suffix == "json" else yaml.safe_dump(tables))
    label_of_zeros(job)
    outcome = cli("plan", config)
    assert outcome.code == 0, outcome.err
    assert '1 of 3 chunks of label read as 0 (data.missing = "auto")' in outcome.out
    assert last(cli("--json", "plan", config))["absent_chunks"] == {"label": {"chunks": 1, "of": 3, "missing": "fill"}}
    trained = cli("train", config)
    assert trained.code == 0, trained.err
    assert "1 of 3 chunks of label are not stored and read as 0" in trained.err
    events = objects((job.run / "events.jsonl").read_text())
    assert [(e["variable"], e["chunks"], e["of"]) for e in events if e["event"] == "ChunksFilled"] == [("label", 1, 3)]
    assert cli("eval", job.run, "--split", "all").code == 0


def test_the_same_bits_as_with_the_chunk(cli, project):
    sparse = project(name="sparse")
    label = label_of_zeros(sparse)
    whole = project(name="whole", arrays={"label": {**blobs()["label"], "values": label}})
    for job in (sparse, whole):
        assert cli("-q", "train", job.config).code == 0
    assert [row["params_sha256"] for row in history(sparse.run)] == [row["params_sha256"] for row in history(whole.run)]


@pytest.mark.parametrize(("setting", "code"), [("auto", 0), ("fill", 0), ("skip", 0), ("error", 5)])
def test_what_was_asked_for(cli, project, setting, code):
    job = project()
    label_of_zeros(job)
    for command in ("plan", "train"):
        outcome = cli("-q", command, job.config, "--set", f"data.missing={setting}")
        assert outcome.code == code, outcome.err
        if code:
            assert "chunk label/c/1 of label is missing (1 of 3)" in outcome.err


def test_a_word_that_is_none_of_them(cli, project):
    outcome = cli("plan", project().config, "--set", "data.missing=atuo")
    assert outcome.code == 3
    assert 'did you mean "auto"' in outcome.err


def test_other_data_without_some_chunks(cli, project):
    job, other = project(), project(name="other")
    assert cli("-q", "train", job.config).code == 0
    (other.dir / "train.zarr/x/c/1/0").unlink()
    data = str(other.dir / "train.zarr")
    refused = cli("eval", job.run, "--data", data)
    assert (refused.code, "x/c/1/0" in refused.err) == (5, True)
    skipped = cli("--json", "eval", job.run, "--data", data, "--set", "data.missing=skip")
    assert skipped.code == 0, skipped.err
    assert last(skipped)["samples"] == 40
    (job.dir / "train.zarr/x/c/0/0").unlink()
    for split, most in (("all", 40), ("test", 6), ("val", 6)):
        own = cli("--json", "eval", job.run, "--split", split, "--set", "data.missing=skip")
        assert own.code == 0, own.err
        assert 0 < last(own)["samples"] <= most


def test_a_validation_store_without_some_chunks(cli, project):
    held_out = project(name="held_out")
    job = project({"data": {"val_path": str(held_out.dir / "train.zarr"), "split": {"val": 0.0}}})
    (held_out.dir / "train.zarr/x/c/2/0").unlink()
    assert cli("plan", job.config).code == 5
    for command in ("plan", "train"):
        outcome = cli("--json", command, job.config, "--set", "data.missing=skip")
        assert outcome.code == 0, outcome.err
    assert last(cli("--json", "eval", job.run, "--split", "val"))["samples"] == 40
