"""dtrain export."""

import json
from pathlib import Path

from tests.cli.helpers import last
from tests.training import rewrite


def test_a_file_and_its_card(cli, job):
    outcome = cli("export", "job", "--to", "safetensors", "--out", "m.safetensors")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("file     m.safetensors (")
    assert "run      job/runs/job round 4" in outcome.out
    assert outcome.err.splitlines()[-1] == "next: m.safetensors.md shows how to load and call it"
    assert Path("m.safetensors").is_file()
    assert "from model import build" in Path("m.safetensors.md").read_text()


def test_as_json(cli, job):
    found = last(cli("--json", "export", "job", "--to", "pt2", "--out", "m.pt2", "--round", "2"))
    assert found["event"] == "export"
    assert (found["path"], found["card"], found["run"]) == ("m.pt2", "m.pt2.md", "job/runs/job")
    assert (found["to"], found["round"]) == ("pt2", 2)
    assert found["nbytes"] == Path("m.pt2").stat().st_size
    assert 0 <= found["difference"] < 1e-5


def test_what_is_missing_or_wrong(cli, job):
    Path("there.pt2").touch()
    calls = {
        ("export", "job", "--out", "m"): (2, "--to"),
        ("export", "job", "--to", "pt2"): (2, "--out"),
        ("export", "job", "--to", "pt", "--out", "m"): (2, 'allowed are onnx, pt2, safetensors; did you mean "pt2"?'),
        ("export", "jb", "--to", "pt2", "--out", "m"): (2, 'did you mean "job"?'),
        ("export", "job", "--to", "onnx", "--out", "m", "--round", "9"): (2, 'keeps no round "9"'),
        ("export", "job", "--to", "pt2", "--out", "there.pt2"): (4, "there.pt2 exists."),
        ("export", "job", "--to", "onnx", "--out", "m", "--ema"): (3, "no moving average"),
        ("export", "job", "--to", "onnx", "--out", "m", "--set", "train.rounds=3"): (3, "it cannot be set"),
    }
    for arguments, (code, words) in calls.items():
        outcome = cli(*arguments, "--json")
        assert outcome.code == code, outcome.err
        assert words in " ".join(outcome.err.split())
        assert json.loads(outcome.out.splitlines()[-1])["code"] == code
        assert outcome.err.count("\n") <= 4
    assert not Path("m").exists()


def test_code_that_has_changed(cli, job):
    (job.dir / "model.py").write_text((job.dir / "model.py").read_text().replace("nn.Tanh()", "nn.ReLU()"))
    assert cli("export", "job", "--to", "safetensors", "--out", "m").code == 4
    outcome = cli("export", "job", "--to", "safetensors", "--out", "m", "--trust-code")
    assert outcome.code == 0, outcome.err


def test_another_round_is_the_best(cli, job):
    rows = [json.loads(line) for line in (job.dir / "runs/job/history.jsonl").read_text().splitlines()]
    rows[1]["val_loss"] = 0.0
    rewrite(job.run, rows)
    outcome = cli("export", "job", "--to", "safetensors", "--out", "m")
    assert "round 2 has the best val_loss. --round best exports it." in " ".join(outcome.err.split())
    assert last(cli("--json", "export", "job", "--to", "safetensors", "--out", "b", "--round", "best"))["round"] == 2
