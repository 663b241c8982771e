"""dtrain certs: what it prints can be pasted, and nothing is overwritten."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

import pytest

from dtrain.config.schema import TrainConfig
from tests.cli.helpers import last

pytest.importorskip("cryptography")


def options(line: str) -> dict[str, str]:
    words = shlex.split(line)
    return {name: words[words.index(name) + 1] for name in words if name.startswith("--")}


def test_what_is_printed_can_be_pasted(cli, tmp_path):
    outcome = cli("certs", "my certs", "--host", "node1", "--host", "10.0.0.1")
    assert outcome.code == 0
    lines = [line for line in outcome.out.splitlines() if not line.startswith("#")]
    scheduler, worker, *config = lines
    assert scheduler.startswith("dask scheduler --protocol tls --host node1 --port 8786 ")
    assert worker.startswith("dask worker tls://node1:8786 ")
    for line, role in ((scheduler, "scheduler"), (worker, "worker")):
        named = options(line)
        folder = tmp_path / "my certs"
        assert named["--tls-ca-file"] == str(folder / "ca.pem")
        assert named["--tls-cert"] == str(folder / f"{role}.pem")
        assert named["--tls-key"] == str(folder / f"{role}-key.pem")
        assert named["--dashboard-address"].startswith("127.0.0.1:")
    assert "--host" not in options(worker)  # each worker has a machine of its own
    cluster = TrainConfig(**tomllib.loads("\n".join(config))).cluster
    assert cluster.scheduler == "tls://node1:8786"
    assert Path(cluster.tls.key) == folder / "client-key.pem"
    assert "ca-key.pem" in outcome.err


def test_a_cluster_on_this_machine_listens_on_it_alone(cli):
    found = last(cli("--json", "certs", "certs"))
    assert options(found["scheduler"])["--host"] == options(found["worker"])["--host"] == "127.0.0.1"
    assert 'scheduler = "tls://127.0.0.1:8786"' in found["config"]
    assert found["hosts"] == ["localhost", "127.0.0.1", "::1"]
    assert len(found["files"]) == 8
    assert all(Path(path).is_file() for path in found["files"])


def test_a_machine_with_an_ipv6_address(cli):
    found = last(cli("--json", "certs", "certs", "--host", "fe80::1"))
    assert 'scheduler = "tls://[fe80::1]:8786"' in found["config"]


def test_nothing_is_overwritten(cli):
    assert cli("certs", "certs").code == 0
    outcome = cli("--json", "certs", "certs")
    assert outcome.code == 4
    assert last(outcome)["message"].endswith("nothing is overwritten.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "tcp://node1:1"), 'host "tcp://node1:1"'),
        (("--days", "0"), "allowed are 1 to 3,650"),
        (("--days", "x"), "--days"),
    ],
)
def test_options_that_are_wrong(cli, arguments, words):
    outcome = cli("certs", "certs", *arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert not Path("certs").exists()


def test_without_the_package_its_extra_is_named(cli, monkeypatch):
    monkeypatch.setattr("dtrain.certs.is_installed", lambda package: False)
    outcome = cli("certs", "certs")
    assert outcome.code == 3
    assert 'pip install "dtrain[tls]"' in outcome.err


def test_doctor_takes_the_keys_of_cluster_alone(cli):
    outcome = cli("doctor", "--set", "train.rounds=3")
    assert outcome.code == 2
    assert "keys of cluster alone" in outcome.err
    outcome = cli(
        "doctor", "--scheduler", "tls://127.0.0.1:1", "--set", 'cluster.tls={ ca = "a", cert = "b", key = "c" }'
    )
    assert outcome.code == 6
    assert "cluster.tls.ca: " in " ".join(outcome.out.split())
