"""A private CA for one TLS cluster, and certificates for its scheduler, workers and clients: ``dtrain certs``.

Dask checks that a certificate is of the CA, and not whose it is: it compares no host names. Whoever has a certificate
of the CA may take part in the cluster, and run code on it. So the CA is a new one, of this cluster alone, and a public
or company-wide CA is no substitute.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import DiskFull, InvalidConfig, OutputExists, UsageError, one_line
from dtrain.packages import is_installed

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

ROLES = ("scheduler", "worker", "client")
LOCAL = ("localhost", "127.0.0.1", "::1")
"""Names of this machine, which certificates have beside those that are given."""
DAYS, MOST_DAYS = 365, 3650
"""How long certificates are valid."""
BEFORE = timedelta(days=1)
"""Certificates are valid from a day ago: the clocks of machines differ."""
HOST = re.compile(r"(?=.{1,253}$)(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*")
DIRECTORY_MODE, KEY_MODE, CERTIFICATE_MODE = 0o700, 0o600, 0o644


@dataclass(frozen=True, slots=True)
class Certificates:
    """The files of a directory that `make_certificates` has written."""

    directory: Path
    hosts: tuple[str, ...]
    until: datetime
    """When they become invalid."""

    @property
    def ca(self) -> Path:
        """The certificate of the CA, which every process of the cluster has."""
        return self.directory / "ca.pem"

    def certificate(self, role: str) -> Path:
        """Return the file of a certificate: of the scheduler, a worker or a client."""
        return self.directory / f"{role}.pem"

    def key(self, role: str) -> Path:
        """Return the file of its private key; "ca" has one too."""
        return self.directory / f"{role}-key.pem"

    @property
    def files(self) -> tuple[Path, ...]:
        """All files."""
        return (self.ca, self.key("ca"), *(one for role in ROLES for one in (self.certificate(role), self.key(role))))


def make_certificates(directory: Path, hosts: Sequence[str] = (), days: int = DAYS) -> Certificates:
    """Write a new private CA, and a certificate and key each for scheduler, workers and clients.

    Parameters
    ----------
    directory : path
        It is made, with access for its owner alone, or is there and empty. Nothing is overwritten.
    hosts : sequence of str
        Names and IP addresses of machines that certificates name, beside this machine's.
    days : int
        How long they are valid.

    Raises
    ------
    InvalidConfig
        The package cryptography is not installed.
    UsageError
        A host or the number of days is none.
    OutputExists
        The directory holds something.
    DiskFull
        It cannot be written.
    """
    if not is_installed("cryptography"):
        raise InvalidConfig(
            "Making certificates needs the package cryptography, which is not installed.",
            'Install it: pip install "dtrain[tls]". Reading them, as training does, needs no package.',
        )
    names = tuple(dict.fromkeys([*hosts, *LOCAL]))
    _check(names, days)
    found = Certificates(directory, names, datetime.now(UTC).replace(microsecond=0) + timedelta(days=days))
    _make_directory(directory)
    _write(found, _contents(found))
    return found


def _check(hosts: Sequence[str], days: int) -> None:
    if not 1 <= days <= MOST_DAYS:
        raise UsageError(f"days = {days}: allowed are 1 to {MOST_DAYS:,}.", f"Leave it out for {DAYS} days.")
    for host in hosts:
        if not _is_ip(host) and not HOST.fullmatch(host):
            raise UsageError(
                f'host "{host}" is neither the name of a machine nor an IP address.',
                "Give names alone, without protocol and port, for example --host node1 --host 10.0.0.1.",
            )


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


# Files ------------------------------------------------------------------------------------------------------


def _make_directory(directory: Path) -> None:
    """Make a directory that its owner alone can enter; one that is there must be empty."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(DIRECTORY_MODE, exist_ok=True)
        held = sorted(path.name for path in directory.iterdir())
        if not held:
            directory.chmod(DIRECTORY_MODE)
    except (FileExistsError, NotADirectoryError):
        raise OutputExists(f"{directory} is there already, and no directory.", "Name another directory.") from None
    except OSError as error:
        raise _cannot_write(directory, error) from error
    if held:
        raise OutputExists(
            f"{directory} is there already and holds {held[0]}: nothing is overwritten.",
            "Name a new directory; each cluster has a CA of its own.",
        )


def _write(certificates: Certificates, contents: dict[Path, bytes]) -> None:
    """Write files that are not there yet; none of them stays if one cannot be written."""
    written: list[Path] = []
    try:
        for path, content in contents.items():
            mode = KEY_MODE if path.stem.endswith("-key") else CERTIFICATE_MODE
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            written.append(path)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise OutputExists(f"{error.filename} is there already: nothing is overwritten.") from None
        raise _cannot_write(certificates.directory, error) from error


def _cannot_write(directory: Path, error: OSError) -> DiskFull:
    return DiskFull(f"{directory} cannot be written: {error.strerror or one_line(error)}.", "Name another directory.")


# Certificates -----------------------------------------------------------------------------------------------


def _contents(certificates: Certificates) -> dict[Path, bytes]:
    """Return the content of each file."""
    from cryptography.hazmat.primitives.asymmetric import ec

    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _ca(ca_key, certificates.until)
    contents = {certificates.ca: _pem(ca), certificates.key("ca"): _key_pem(ca_key)}
    for role in ROLES:
        key = ec.generate_private_key(ec.SECP256R1())
        contents[certificates.certificate(role)] = _pem(_signed(role, key, ca, ca_key, certificates))
        contents[certificates.key(role)] = _key_pem(key)
    return contents


def _ca(key: EllipticCurvePrivateKey, until: datetime) -> x509.Certificate:
    """Return the certificate of a new CA, signed by itself; its name is one of its own, too."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    name = _name(f"dtrain CA {os.urandom(8).hex()}")
    subject = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = _builder(name, name, key, until)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(subject, critical=False)
    return builder.sign(key, hashes.SHA256())


def _signed(
    role: str,
    key: EllipticCurvePrivateKey,
    ca: x509.Certificate,
    ca_key: EllipticCurvePrivateKey,
    certificates: Certificates,
) -> x509.Certificate:
    """Return a certificate of the CA. Workers listen and connect, so that each may serve and be a client."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

    issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
        ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    )
    hosts = [
        x509.IPAddress(ipaddress.ip_address(host)) if _is_ip(host) else x509.DNSName(host)
        for host in certificates.hosts
    ]
    builder = _builder(_name(f"dtrain {role}"), ca.subject, key, certificates.until)
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([Usage.SERVER_AUTH, Usage.CLIENT_AUTH]), False),
        (x509.SubjectAlternativeName(hosts), False),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (issuer, False),
    ):
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(ca_key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, until: datetime
) -> x509.CertificateBuilder:
    from cryptography import x509

    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(datetime.now(UTC) - BEFORE).not_valid_after(until)


def _name(text: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
