"""dtrain certs: a private CA and certificates for a TLS cluster."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain_cli.arguments import epilog
from dtrain_cli.output import Options, result, say

if TYPE_CHECKING:
    from dtrain.certs import Certificates

ORDER = 70
PORT = 8786
DASHBOARD = "127.0.0.1"
"""Dask's pages have neither encryption nor authentication: they listen on their own machine alone."""
EPILOG = epilog(
    ("dtrain certs certs", "for a cluster on this machine"),
    ("dtrain certs certs --host node1 --host 10.0.0.1", "for one on others"),
    ("dtrain certs certs --days 30 --json", ""),
)
app = typer.Typer()


@app.command("certs", epilog=EPILOG)
def certs(
    ctx: typer.Context,
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A new or empty directory for the files.", show_default=False),
    ],
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="HOST",
            help="Name or IP address of a machine of the cluster, the scheduler's first. Several: --host a --host b.",
            show_default=False,
        ),
    ] = None,
    days: Annotated[int, typer.Option("--days", metavar="N", help="How long the certificates are valid.")] = 365,
) -> None:
    """Make a private CA and certificates for a TLS cluster, and print the lines that use them.

    Dask compares no host names: whoever has a certificate of the CA may run code
    on the cluster. So the CA is new, and of this cluster alone.
    """
    options: Options = ctx.obj
    from dtrain.certs import make_certificates

    made = make_certificates(directory, tuple(host or ()), days)
    lines = _lines(made, host[0] if host else "127.0.0.1")
    record = {
        "event": "certs",
        "directory": str(directory),
        "files": [str(path) for path in made.files],
        "hosts": list(made.hosts),
        "valid_until": made.until.isoformat(),
        **lines,
    }
    text = "\n".join(
        [
            f"# {directory}: certificates valid until {made.until:%Y-%m-%d}; keys are readable by you alone",
            "# where the scheduler runs",
            lines["scheduler"],
            "# where workers run, each with a copy of ca.pem, worker.pem and worker-key.pem",
            lines["worker"],
            "# in dtrain.toml",
            lines["config"],
        ]
    )
    result(options, text, record)
    say(
        options,
        f"Whoever has a key of {directory} may run code on the cluster. Keep ca-key.pem away from it: with that key "
        "anyone can make further certificates.",
    )


def _lines(made: Certificates, host: str) -> dict[str, str]:
    """Return the commands that start a cluster, and the table of a config file that leads to it."""
    from dtrain.certs import LOCAL

    address = f"tls://[{host}]:{PORT}" if ":" in host else f"tls://{host}:{PORT}"
    table = {"ca": made.ca, "cert": made.certificate("client"), "key": made.key("client")}
    tls = ", ".join(f"{name} = {json.dumps(str(path.absolute()), ensure_ascii=False)}" for name, path in table.items())
    listens = (
        "--host 127.0.0.1 " if host in LOCAL else ""
    )  # a worker listens on all interfaces, unless an option names one
    return {
        "scheduler": f"dask scheduler --protocol tls --host {shlex.quote(host)} --port {PORT} "
        f"--dashboard-address {DASHBOARD}:8787 {_files(made, 'scheduler')}",
        "worker": f"dask worker {shlex.quote(address)} {listens}--dashboard-address {DASHBOARD}:0 "
        f"{_files(made, 'worker')}",
        "config": f'[cluster]\nscheduler = "{address}"\ntls = {{ {tls} }}',
    }


def _files(made: Certificates, role: str) -> str:
    """Return the options of Dask's commands that name the files of a role."""
    named = {"--tls-ca-file": made.ca, "--tls-cert": made.certificate(role), "--tls-key": made.key(role)}
    return " ".join(f"{option} {shlex.quote(str(path.absolute()))}" for option, path in named.items())
