"""``train.init``: find and read the safetensors file that a run starts from."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from dtrain.checkpoint import check_round
from dtrain.committed import committed_rounds
from dtrain.display import shown
from dtrain.errors import DataChanged, DataNotFound, RoundNotFound, RunDamaged, listed, one_line
from dtrain.job import Job
from dtrain.resolved import Resolved
from dtrain.runfiles import round_directory
from dtrain.statefiles import PARAMS
from dtrain.types import InitFile

OTHER_FORMATS = {
    b"version https://git-lfs": ("is a pointer of Git LFS, not the file itself", "Get it: git lfs pull."),
    b"PK\x03\x04": (
        "is a pickle of torch.save, not safetensors; reading a pickle can run code",
        "Convert it where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
        '"start.safetensors").',
    ),
}
"""By the first bytes of a file that is no safetensors file: what it is, and what to do."""


def init_path(job: Job) -> Path | None:
    """Return the safetensors file of ``train.init``: itself, or that of a run's newest committed round.

    Raises
    ------
    DataNotFound, RoundNotFound
        There is nothing at the path, or the directory has no committed round.
    RunDamaged
        The round differs from its manifest.
    """
    if not job.config.train.init:
        return None
    path = Path(job.base, job.config.train.init).expanduser()
    if not path.exists():
        raise DataNotFound(
            f"train.init = {shown(path)}: there is no such file or directory.",
            "Name a safetensors file, or a run's directory.",
        )
    if not path.is_dir():
        return path
    rounds = committed_rounds(path)
    if not rounds:
        files = [file.name for file in sorted(path.glob("*.safetensors"))]
        names = f"one of its files: {listed(files, 3)}" if files else "a safetensors file, or a run's directory"
        raise RoundNotFound(
            f"train.init = {shown(path)}: the directory has no committed round.",
            f"Name {names}.",
        )
    directory = round_directory(path, rounds[-1])
    check_round(directory)
    return directory / PARAMS


def read_init(path: Path) -> InitFile:
    """Read a safetensors file; its contents are looked at where the model is built.

    Raises
    ------
    RunDamaged
        It cannot be read, or is of another format.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise RunDamaged(f"train.init = {shown(path)} cannot be read: {one_line(error)}") from error
    for first, (what, cure) in OTHER_FORMATS.items():
        if data[: len(first)].tobytes() == first:
            raise RunDamaged(f"train.init = {shown(path)} {what}.", cure)
    return InitFile(shown(path), data)


def with_init(resolved: Resolved, init: InitFile) -> Resolved:
    """Return what decides bits with the digest of the file; a run that goes on from round 0 must find the same one.

    Raises
    ------
    DataChanged
        It is not the file of the run's first start.
    """
    digest = hashlib.sha256(init.data.data).hexdigest()
    if resolved.init not in ("", digest):
        raise DataChanged(
            f"train.init = {init.name} has changed since the run was started, and no round is committed yet.",
            "Restore the file, or train under another --run NAME.",
        )
    return replace(resolved, init=digest)
