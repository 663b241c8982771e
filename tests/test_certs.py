"""A private CA and certificates, as OpenSSL and Python see them."""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dtrain import certs
from dtrain.certs import ROLES, make_certificates
from dtrain.errors import DiskFull, InvalidConfig, OutputExists, UsageError

x509 = pytest.importorskip("cryptography.x509")


@pytest.fixture(params=[0o022, 0o000, 0o077])
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.usefixtures("_umask")
def test_the_owner_alone_reads_keys_and_enters_the_directory(tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "new/certs")
    assert mode(made.directory) == 0o700
    assert {path.name for path in made.directory.iterdir()} == {path.name for path in made.files}
    keys = [path for path in made.files if path.name.endswith("-key.pem")]
    assert len(keys) == 4
    assert {mode(path) for path in keys} == {0o600}
    assert all(b"PRIVATE KEY" in path.read_bytes() for path in keys)
    assert not any(b"PRIVATE" in path.read_bytes() for path in made.files if path not in keys)


def test_an_empty_directory_is_taken_and_closed_to_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert mode(make_certificates(tmp_path).directory) == 0o700


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "certs")
    before = {path: path.read_bytes() for path in made.files}
    with pytest.raises(OutputExists, match=r"holds ca-key\.pem: nothing is overwritten") as caught:
        make_certificates(made.directory)
    assert caught.value.code == 4
    assert {path: path.read_bytes() for path in made.files} == before
    other = tmp_path / "other"
    other.mkdir(0o755)
    (other / "notes.txt").touch()
    with pytest.raises(OutputExists, match=r"holds notes\.txt"):
        make_certificates(other)
    assert mode(other) == 0o755
    with pytest.raises(OutputExists, match="no directory"):
        make_certificates(other / "notes.txt")
    with pytest.raises((OutputExists, DiskFull)):
        make_certificates(other / "notes.txt/below")


def test_no_file_stays_where_one_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def full(path: Path, *rest: int) -> int:
        if Path(path).name == "worker-key.pem":
            raise OSError(28, "No space left on device")
        return opened(path, *rest)

    monkeypatch.setattr(certs.os, "open", full)
    with pytest.raises(DiskFull, match="No space left"):
        make_certificates(tmp_path / "certs")
    assert list((tmp_path / "certs").iterdir()) == []


def test_certificates_name_the_hosts_and_are_valid_for_the_days(tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "certs", ("node1", "10.0.0.1", "fe80::1", "node1"), days=30)
    assert made.hosts == ("node1", "10.0.0.1", "fe80::1", "localhost", "127.0.0.1", "::1")
    for role in ROLES:
        found = x509.load_pem_x509_certificate(made.certificate(role).read_bytes())
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["node1", "localhost"]
        assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == [
            *("10.0.0.1", "fe80::1", "127.0.0.1", "::1")
        ]
        assert timedelta(days=29, hours=23) < found.not_valid_after_utc - datetime.now(UTC) <= timedelta(days=30)
        assert found.not_valid_before_utc < datetime.now(UTC) - timedelta(hours=23)


def test_each_is_of_the_ca_by_the_strictest_rules_and_of_no_other(tmp_path: Path) -> None:
    one, other = make_certificates(tmp_path / "one"), make_certificates(tmp_path / "other")

    def verified(ca: Path, certificate: Path, purpose: str) -> bool:
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", str(ca), str(certificate)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    for role in ROLES:
        assert verified(one.ca, one.certificate(role), "sslserver")
        assert verified(one.ca, one.certificate(role), "sslclient")
        assert not verified(other.ca, one.certificate(role), "sslserver")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(one.certificate(role), one.key(role))
    assert not verified(one.certificate("worker"), one.certificate("client"), "sslclient")  # it may sign nothing


@pytest.mark.parametrize("host", ["", "tls://node1", "node1:8786", "a b", "-a", "a..b", "*", "ä" * 3, "a" * 254])
def test_hosts_that_are_none(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError, match="neither the name of a machine nor an IP address"):
        make_certificates(tmp_path / "certs", [host])
    assert not (tmp_path / "certs").exists()


@pytest.mark.parametrize("days", [0, -1, 3651])
def test_days_that_are_none(tmp_path: Path, days: int) -> None:
    with pytest.raises(UsageError, match="allowed are 1 to 3,650"):
        make_certificates(tmp_path / "certs", days=days)


def test_without_the_package_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certs, "is_installed", lambda package: False)
    with pytest.raises(InvalidConfig, match="cryptography") as caught:
        make_certificates(tmp_path / "certs")
    assert "dtrain[tls]" in caught.value.hint
    assert not (tmp_path / "certs").exists()
