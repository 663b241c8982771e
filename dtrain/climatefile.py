"""climatology.safetensors in a run's directory: the means of the training rows, kept so that they are computed once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dtrain.data.climatology import Climatology
from dtrain.errors import RunDamaged, one_line
from dtrain.files import write_bytes

CLIMATE = "climatology.safetensors"


def climate_bytes(climatology: Climatology, fingerprint: str) -> bytes:
    """Return the content of the file; `fingerprint` is that of the plan whose training rows it is of."""
    facts = {"plan": fingerprint, "text": climatology.text, "places": dict(climatology.places)}
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
    return hashlib.sha256(data).hexdigest()


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
    if not path.is_file():
        if digest:
            raise RunDamaged(f"{path} is missing.", RESTORE)
        return None
    if digest and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise RunDamaged(f"{path} has been modified since the run was started.", RESTORE)
    try:
        with safe_open(path, framework="np") as file:
            facts = json.loads((file.metadata() or {})["dtrain"])
            means = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts["plan"] != fingerprint:
            return None
        return Climatology(means, facts["places"], facts["text"])
    except (SafetensorError, LookupError, ValueError, OSError) as error:
        raise RunDamaged(f"{path} cannot be read: {one_line(error)}", "Remove it: it is computed anew.") from error


RESTORE = "Restore it from a copy of the run, or train under another --run NAME."
