"""climatology.safetensors in a run's directory: the means of the training rows, kept so that they are computed once."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

from dtrain.data.climatology import Climatology
from dtrain.errors import RunDamaged, one_line
from dtrain.files import write_bytes
from dtrain.runfiles import RESTORE, check_seal, read_if_there, sealed, sha256

CLIMATE = "climatology.safetensors"
MOST_BYTES = 2**40
"""A larger file is not read."""


def climate_bytes(climatology: Climatology, fingerprint: str) -> bytes:
    """Return the content of the file; `fingerprint` is that of the plan whose training rows it is of."""
    facts = {"plan": fingerprint, "text": climatology.text, "places": dict(climatology.places)}
    facts = sealed({**facts, "means": sha256(save(dict(climatology.means)))})
    data: bytes = save(dict(climatology.means), {"dtrain": json.dumps(facts, sort_keys=True)})  # keys have no order
    return data


def write_climate(run: Path, climatology: Climatology, fingerprint: str) -> str:
    """Write the file; return its SHA-256.

    Raises
    ------
    DiskFull
        It cannot be written.
    """
    data = climate_bytes(climatology, fingerprint)
    write_bytes(run / CLIMATE, data)
    return sha256(data)


def read_climate(run: Path, fingerprint: str, digest: str = "") -> Climatology | None:
    """Read the file; None if there is none, or it is of other training rows.

    Parameters
    ----------
    run : path
    fingerprint : str
        Of the run's plan.
    digest : str
        The SHA-256 that plan.json has of it; empty if the run was trained without it.

    Raises
    ------
    RunDamaged
        It is not the file that the run was trained with, or cannot be read.
    """
    path = run / CLIMATE
    data = read_if_there(path, MOST_BYTES)
    if data is None:
        if digest:
            raise RunDamaged(f"{path} is missing.", RESTORE)
        return None
    if digest and sha256(data) != digest:
        raise RunDamaged(f"{path} has been modified since the run was started.", RESTORE)
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts, means = json.loads(header["__metadata__"]["dtrain"]), load(data)
        check_seal(path, facts)
        if sha256(save(means)) != facts["means"]:
            raise RunDamaged(f"{path} has been modified.")
        if facts["plan"] != fingerprint:
            return None
        return Climatology(means, facts["places"], facts["text"])
    except (SafetensorError, LookupError, TypeError, ValueError, RecursionError, RunDamaged) as error:
        raise RunDamaged(f"{path} cannot be read: {one_line(error)}", "Remove it: it is computed anew.") from error
