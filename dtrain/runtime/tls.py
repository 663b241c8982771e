"""The certificates of ``cluster.tls``: looked at before anything is connected, and given to Dask.

Both sides of a TLS cluster show a certificate of its CA (``dtrain certs``). Dask compares no host names: the CA has to
be of this cluster alone.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import stat
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from distributed import Security

from dtrain.config.schema import ClusterConfig
from dtrain.errors import ClusterUnreachable, InvalidConfig, one_line

LOG = logging.getLogger("dtrain")
MAKE = "`dtrain certs DIR` makes a CA and certificates, and prints the lines that use them."
AGAIN = "Make new ones for the whole cluster, `dtrain certs DIR`, and start scheduler and workers with them."
OTHERS = stat.S_IRWXG | stat.S_IRWXO
"""The rights of others than a file's owner."""


def security_for(address: str, config: ClusterConfig, base: Path) -> Security | None:
    """Return the certificates that a scheduler's address needs; None for tcp://.

    Those of ``cluster.tls``, whose paths are relative to `base`; else those of Dask's own configuration.

    Raises
    ------
    InvalidConfig
        There are none, or they cannot be used.
    """
    if not address.startswith("tls://"):
        return None
    if not config.tls.is_given:
        return _configured(address)
    files = {name: Path(base, getattr(config.tls, name)).expanduser() for name in ("ca", "cert", "key")}
    for name, path in files.items():
        _check_readable(f"cluster.tls.{name}", path)
    check_certificates(files["ca"], files["cert"], files["key"])
    _warn_of_readers(files["key"])
    return Security(
        tls_ca_file=str(files["ca"]),
        tls_client_cert=str(files["cert"]),
        tls_client_key=str(files["key"]),
        require_encryption=True,
    )


def _configured(address: str) -> Security:
    """Return the certificates of Dask's own configuration (``distributed.comm.tls``)."""
    security = Security(require_encryption=True)
    if not security.tls_ca_file or not security.tls_client_cert:
        raise InvalidConfig(
            f'The scheduler {address} needs certificates: cluster.tls = {{ ca = "...", cert = "...", key = "..." }}.',
            MAKE,
        )
    for file in (security.tls_ca_file, security.tls_client_cert, security.tls_client_key):
        if file and "\n" not in file:  # it may be the content itself
            _check_readable("distributed.comm.tls of Dask's configuration", Path(file))
    return security


# Files ------------------------------------------------------------------------------------------------------


def _check_readable(key: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{key}: {path} cannot be read: {error.strerror or one_line(error)}.", MAKE) from None


def check_certificates(ca: Path, certificate: Path, key: Path) -> None:
    """Refuse certificates that Dask could not use, or that a cluster of the CA would refuse.

    Raises
    ------
    InvalidConfig
        Names the file, what is wrong with it and what to do.
    """
    listener = _context(ssl.PROTOCOL_TLS_SERVER, certificate, key)
    listener.verify_mode = ssl.CERT_REQUIRED
    try:
        listener.load_verify_locations(ca)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidConfig(f"cluster.tls.ca: {ca} is no certificate in PEM: {one_line(error)}.", MAKE) from None
    client = _context(ssl.PROTOCOL_TLS_CLIENT, certificate, key)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    if fault := _fault_of_handshake(client, listener):
        raise InvalidConfig(f"cluster.tls.cert: {certificate} is refused by cluster.tls.ca, {ca}: {fault}.", AGAIN)


def _context(protocol: int, certificate: Path, key: Path) -> ssl.SSLContext:
    """Return a side of a connection that shows a certificate."""
    context = ssl.SSLContext(protocol)

    def no_password() -> str:
        raise InvalidConfig(
            f"cluster.tls.key: {key} is encrypted; Dask reads keys without a password alone.",
            f"Write it without one: openssl pkey -in {key} -out new-key.pem. Or {MAKE}",
        )

    try:
        context.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            raise InvalidConfig(
                f"cluster.tls: the key {key} is not that of the certificate {certificate}.", "Name the pair of files."
            ) from None
        raise InvalidConfig(
            f"cluster.tls: {certificate} and {key} are no certificate and key in PEM: {one_line(error)}.", MAKE
        ) from None
    return context


def _fault_of_handshake(client: ssl.SSLContext, listener: ssl.SSLContext) -> str:
    """Return why a listener with these certificates refuses a client with them; empty if not. Nothing is sent."""
    to_listener, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(to_client, to_listener), listener.wrap_bio(to_listener, to_client, server_side=True)]
    for _ in range(4):  # each side waits for the other
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return str(error.verify_message)
            except ssl.SSLError as error:
                return one_line(error)
    return ""


@cache
def _warn_of_readers(key: Path) -> None:
    """Say, once in a process, that others can read a key."""
    if os.name == "posix" and key.stat().st_mode & OTHERS:
        LOG.warning(
            "%s can be read by others on this machine, who could then run code on the cluster: chmod 600 %s", key, key
        )


# Connections that fail --------------------------------------------------------------------------------------


def try_tls(address: str, security: Security, seconds: float) -> None:
    """Make an encrypted connection to a scheduler, which greets first; one that is not there yet is left to Dask.

    Dask's own connection says in many ways that it was refused, and leaves a socket open where nothing speaks TLS.

    Raises
    ------
    OSError
        The connection was refused for its certificates, or is not encrypted.
    """
    place, context = urlsplit(address), security.get_connection_args("client")["ssl_context"]
    try:
        plain = socket.create_connection((place.hostname or "", place.port or 0), seconds)
    except OSError:
        return
    with plain, context.wrap_socket(plain) as encrypted:
        encrypted.recv(1)  # with TLS 1.3 a certificate is refused after the handshake


def tls_fault(address: str, error: BaseException) -> ClusterUnreachable | None:
    """Return the error for a connection that failed for its certificates, or for the lack of TLS; None for others."""
    if not address.startswith("tls://"):
        return None
    causes = _causes(error)
    if refused := next((one for one in causes if isinstance(one, ssl.SSLCertVerificationError)), None):
        return ClusterUnreachable(
            f"The scheduler at {address} shows a certificate that cluster.tls.ca refuses: {refused.verify_message}.",
            "It is another cluster's, or has expired: name the ca.pem that the scheduler was started with.",
        )
    fault = next(
        (one for one in causes if isinstance(one, (ssl.SSLError, ConnectionResetError, BrokenPipeError))), None
    )
    reason = getattr(fault, "reason", None)
    if reason in ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL"):
        return ClusterUnreachable(
            f"The scheduler at {address} speaks no TLS.",
            "Start it with --tls-ca-file, --tls-cert and --tls-key. " + MAKE,
        )
    if fault is not None:
        return ClusterUnreachable(
            f"The scheduler at {address} refuses the certificate of cluster.tls: {reason or one_line(fault)}.",
            "Name a certificate of the CA that the scheduler was started with (--tls-ca-file).",
        )
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """Return an exception and all that led to it; Dask and Tornado name causes in three ways."""
    found: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and not any(one is other for other in found):
            found.append(one)
            left += [one.__cause__, one.__context__, getattr(one, "real_error", None)]
    return found
