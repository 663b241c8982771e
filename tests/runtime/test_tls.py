"""TLS clusters: certificates that cannot be used, and a scheduler and workers started by hand with those that can."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client, LocalCluster, Security

import dtrain
from dtrain import certs
from dtrain.certs import Certificates, make_certificates
from dtrain.config.schema import ClusterConfig, TlsConfig
from dtrain.errors import ClusterUnreachable, InvalidConfig
from dtrain.runtime import connect
from dtrain.runtime.connect import open_client, open_cluster
from dtrain.runtime.tls import check_certificates, security_for
from dtrain_cli import main

pytest.importorskip("cryptography")
BIN = Path(sys.executable).parent
ADDRESS = "tls://127.0.0.1:8786"
FILES = 'ca = "certs/ca.pem", cert = "certs/client.pem", key = "certs/client-key.pem"'
"""Relative to the config file."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("made") / "certs")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Those of another cluster."""
    return make_certificates(tmp_path_factory.mktemp("other") / "certs")


Cli = Callable[..., tuple[int, str, str]]


def enter(config: ClusterConfig) -> None:
    with open_client(config, Path()):
        pass


def tls_of(found: Certificates, role: str = "client") -> TlsConfig:
    return TlsConfig(ca=str(found.ca), cert=str(found.certificate(role)), key=str(found.key(role)))


# Files that cannot be used --------------------------------------------------------------------------------------------


def test_certificates_of_one_ca_are_accepted_in_each_role(made: Certificates) -> None:
    for role in certs.ROLES:
        check_certificates(made.ca, made.certificate(role), made.key(role))


def test_a_certificate_of_another_ca(made: Certificates, other: Certificates) -> None:
    with pytest.raises(InvalidConfig, match="is refused by cluster.tls.ca") as caught:
        check_certificates(made.ca, other.certificate("client"), other.key("client"))
    assert str(other.certificate("client")) in caught.value.message
    assert "dtrain certs" in caught.value.hint


def test_a_key_of_another_certificate(made: Certificates) -> None:
    with pytest.raises(InvalidConfig, match=r"worker-key\.pem is not that of the certificate .*client\.pem"):
        check_certificates(made.ca, made.certificate("client"), made.key("worker"))


def test_certificates_that_have_expired(tmp_path: Path) -> None:
    found = Certificates(tmp_path, ("localhost",), datetime.now(UTC) - timedelta(hours=1))
    certs._write(found, certs._contents(found))
    with pytest.raises(InvalidConfig, match="certificate has expired") as caught:
        check_certificates(found.ca, found.certificate("client"), found.key("client"))
    assert "Make new ones for the whole cluster" in caught.value.hint


@pytest.mark.parametrize("name", ["ca", "cert", "key"])
@pytest.mark.parametrize("content", [b"", b"no PEM\n", b"\xff\x00"])
def test_files_that_hold_something_else(made: Certificates, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "file.pem").write_bytes(content)
    config = ClusterConfig(tls=tls_of(made).model_copy(update={name: "file.pem"}))
    with pytest.raises(InvalidConfig, match=r"file\.pem .*in PEM"):
        security_for(ADDRESS, config, tmp_path)


@pytest.mark.parametrize("name", ["ca", "cert", "key"])
def test_files_that_are_not_there(made: Certificates, tmp_path: Path, name: str) -> None:
    config = ClusterConfig(tls=tls_of(made).model_copy(update={name: "gone.pem"}))
    with pytest.raises(
        InvalidConfig, match=rf"cluster.tls.{name}: {tmp_path}/gone.pem cannot be read: No such"
    ) as caught:
        security_for(ADDRESS, config, tmp_path)
    assert caught.value.code == 3
    config = ClusterConfig(tls=tls_of(made).model_copy(update={name: "."}))
    with pytest.raises(InvalidConfig, match="Is a directory"):
        security_for(ADDRESS, config, tmp_path)


def test_a_key_with_a_password_is_refused_without_asking_for_it(made: Certificates, tmp_path: Path) -> None:
    key = tmp_path / "locked.pem"
    command = ["openssl", "pkcs8", "-topk8", "-in", str(made.key("client")), "-out", str(key), "-passout", "pass:x"]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(InvalidConfig, match=r"locked\.pem is encrypted"):
        check_certificates(made.ca, made.certificate("client"), key)


def test_a_key_that_others_can_read_is_warned_of_once(
    made: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = tmp_path / "open.pem"
    key.write_bytes(made.key("client").read_bytes())
    key.chmod(0o640)
    config = ClusterConfig(tls=tls_of(made).model_copy(update={"key": str(key)}))
    with caplog.at_level(logging.WARNING, logger="dtrain"):
        assert security_for(ADDRESS, config, tmp_path) is not None
        security_for(ADDRESS, config, tmp_path)
    (record,) = caplog.records
    assert f"chmod 600 {key}" in record.getMessage()


def test_addresses_without_tls_need_no_certificates_and_those_with_do(tmp_path: Path) -> None:
    assert (
        security_for("tcp://127.0.0.1:8786", ClusterConfig(tls=TlsConfig(ca="a", cert="b", key="c")), tmp_path) is None
    )
    with pytest.raises(InvalidConfig, match="tls://127.0.0.1:8786 needs certificates: cluster.tls"):
        security_for(ADDRESS, ClusterConfig(), tmp_path)


def test_certificates_of_dasks_own_configuration(made: Certificates, tmp_path: Path) -> None:
    import dask

    base = "distributed.comm.tls"
    own = tls_of(made)
    files = {f"{base}.ca-file": own.ca, f"{base}.client.cert": own.cert, f"{base}.client.key": own.key}
    with dask.config.set(files):
        found = security_for(ADDRESS, ClusterConfig(), tmp_path)
        assert found is not None
        assert found.require_encryption
    with (
        dask.config.set({**files, f"{base}.ca-file": "/gone.pem"}),
        pytest.raises(InvalidConfig, match=r"/gone\.pem cannot be read"),
    ):
        security_for(ADDRESS, ClusterConfig(), tmp_path)


# A cluster ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    address: str
    folder: Path
    processes: tuple[psutil.Process, ...]


@pytest.fixture(scope="module")
def started(made: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """A scheduler and a worker by the lines that `dtrain certs` prints, but for the port."""
    from dtrain_cli.commands.certs import _lines

    folder, lines = tmp_path_factory.mktemp("started"), _lines(made, "127.0.0.1")
    file, running = folder / "scheduler.json", []

    def start(line: str, *more: str) -> None:
        command, *words = shlex.split(line)
        assert command == "dask"
        with (folder / f"log{len(running)}").open("wb") as log:
            running.append(subprocess.Popen([BIN / "dask", *words, *more], cwd=folder, stdout=log, stderr=log))

    start(lines["scheduler"].replace("8786", "0").replace("8787", "0"), "--scheduler-file", str(file))
    try:
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text().strip():
            assert time.monotonic() < deadline, (folder / "log0").read_text()
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        assert address.startswith("tls://127.0.0.1:")
        start(lines["worker"].replace("tls://127.0.0.1:8786", address), "--nthreads", "2", "--memory-limit", "2GB")
        yield Started(address, folder, tuple(psutil.Process(process.pid) for process in running))
    finally:
        for process in reversed(running):  # the worker first: without its scheduler it would look for it
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        return main.run([str(argument) for argument in arguments]), *capsys.readouterr()

    return call


@pytest.fixture
def config_file(tmp_path: Path, blobs: Path, made: Certificates, started: Started) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(made.directory, folder / "certs")  # with their rights
    (folder / "model.py").write_text("from torch import nn\n\n\ndef build():\n    return nn.Linear(6, 3)\n")
    (folder / "dtrain.toml").write_text(
        f"""model = "model:build"
data = {{ path = "{blobs}", inputs = ["x"], targets = ["y"] }}
train = {{ loss = "cross_entropy", rounds = 2, batch_size = 16 }}
average = {{ replicas = 2 }}
cluster = {{ scheduler = "{started.address}", tls = {{ {FILES} }} }}
"""
    )
    return folder / "dtrain.toml"


def test_every_command_works_on_a_tls_cluster(
    cli: Cli, config_file: Path, started: Started, made: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config_file.parents[1])
    for arguments in (
        ["plan", config_file],
        ["train", config_file, "--run", "tls"],
        [
            "train",
            config_file,
            "--run",
            "tls",
            "--set",
            "train.rounds=3",
            "--scheduler",
            started.folder / "scheduler.json",
        ],
        ["eval", "tls"],
        ["predict", "tls", "--out", "predicted.zarr"],
    ):
        code, _, err = cli(*arguments)
        assert code == 0, (arguments, err)
    settings = [f"cluster.tls.{name}={os.path.relpath(path)}" for name, path in tls_of(made).model_dump().items()]
    options = [word for setting in settings for word in ("--set", setting)]
    code, out, err = cli("doctor", "--scheduler", started.address, *options)
    assert code == 0, out + err
    assert "both sides show a certificate" in " ".join(out.split())
    assert cli("eval", "tls", "--scheduler", started.address, *options)[0] == 0


def test_python_takes_an_address_with_a_config_and_a_client(
    started: Started, made: Certificates, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    monkeypatch.chdir(made.directory.parent)
    train = {"loss": "cross_entropy", "rounds": 1, "batch_size": 16}
    tls = {name: os.path.relpath(path) for name, path in tls_of(made).model_dump().items()}
    samples = dtrain.open_samples(str(blobs), inputs=["x"], targets=["y"])
    config = dtrain.TrainConfig(train=train, cluster={"tls": tls}, run={"dir": str(tmp_path)})

    def build() -> nn.Module:
        return nn.Linear(6, 3)

    run = dtrain.train(build, samples, config=config, cluster=started.address, progress=False)
    assert run.config.cluster.tls.ca == str(made.ca)
    assert run.evaluate(cluster=started.address)["loss"] > 0
    security = Security(
        tls_ca_file=str(made.ca),
        tls_client_cert=str(made.certificate("client")),
        tls_client_key=str(made.key("client")),
        require_encryption=True,
    )
    with Client(started.address, security=security, set_as_default=False) as client:
        again = dtrain.train(build, samples, train=train, cluster=client, run_dir=tmp_path / "client", progress=False)
    assert again.rows[-1]["params_sha256"] == run.rows[-1]["params_sha256"]


def test_a_cluster_object_with_security(tmp_path: Path, blobs: Path) -> None:
    from torch import nn

    samples = dtrain.open_samples(str(blobs), inputs=["x"], targets=["y"])
    with LocalCluster(
        n_workers=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", security=Security.temporary(), silence_logs=50
    ) as cluster:
        train = {"loss": "cross_entropy", "rounds": 1}
        run = dtrain.train(
            lambda: nn.Linear(6, 3), samples, train=train, cluster=cluster, run_dir=tmp_path, progress=False
        )
    assert len(run.rows) == 1


def test_another_clusters_certificates_are_refused(
    started: Started, made: Certificates, other: Certificates, cli: Cli, config_file: Path
) -> None:
    config = ClusterConfig(scheduler=started.address, tls=tls_of(other))
    with (
        pytest.raises(ClusterUnreachable, match="shows a certificate that cluster.tls.ca refuses") as caught,
        open_client(config, Path()),
    ):
        pass
    assert caught.value.code == 6
    shutil.rmtree(config_file.parent / "certs")
    shutil.copytree(other.directory, config_file.parent / "certs")
    code, _, err = cli("train", config_file)
    assert code == 6, err
    assert "shows a certificate that cluster.tls.ca refuses" in err
    assert err.count("error:") == 1
    assert len(err[err.index("error:") :].splitlines()) <= 4


def test_a_client_that_the_scheduler_does_not_know_is_refused(
    started: Started, made: Certificates, other: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trusts the scheduler, and shows a certificate of another CA, or none."""
    for arguments in (
        {"tls_client_cert": str(other.certificate("client")), "tls_client_key": str(other.key("client"))},
        {},
    ):
        security = Security(tls_ca_file=str(made.ca), require_encryption=True, **arguments)
        context = ssl.create_default_context(cafile=made.ca)
        context.check_hostname = False
        if not arguments:
            monkeypatch.setattr(Security, "get_connection_args", lambda self, role, c=context: {"ssl_context": c})
        monkeypatch.setattr(connect, "security_for", lambda *_, s=security: s)
        with pytest.raises(ClusterUnreachable, match="refuses the certificate of cluster.tls"):
            enter(ClusterConfig(scheduler=started.address))


def test_plain_and_encrypted_do_not_mix(
    started: Started, made: Certificates, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "CONNECT_TIMEOUT", 5.0)
    plain = started.address.replace("tls://", "tcp://")
    with pytest.raises(ClusterUnreachable, match="No Dask scheduler answers") as caught:
        enter(ClusterConfig(scheduler=plain))
    assert "reached by tls://" in caught.value.hint
    encrypted = client.scheduler.address.replace("tcp://", "tls://")
    with pytest.raises(ClusterUnreachable, match="speaks no TLS"):
        enter(ClusterConfig(scheduler=encrypted, tls=tls_of(made)))


def test_off_loopback_nothing_listens_that_is_not_encrypted(started: Started, made: Certificates) -> None:
    config = ClusterConfig(scheduler=started.address, tls=tls_of(made))
    with open_cluster(config, Path()) as connection:
        assert connection.num_workers == 1
        family = [one for process in started.processes for one in (process, *process.children(recursive=True))]
        listening = {
            c.laddr.ip for process in family for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN
        }
    assert listening == {"127.0.0.1"}
