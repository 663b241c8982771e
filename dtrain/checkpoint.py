"""TrainState <-> a round directory: committed whole or not at all, verified before it is used.

    RUN/ config.toml plan.json env.json LOCK history.jsonl events.jsonl
         rounds/round-000010/ params.safetensors inner-0000.safetensors ... state.json manifest.json

A round is written into a temporary directory, every file is synced, the manifest with their SHA-256 comes last,
then one rename makes it visible. safetensors and JSON only: reading a run executes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import safetensors

from dtrain.errors import DtrainError, RoundNotFound, RunDamaged, one_line
from dtrain.files import remove_directory, write_directory
from dtrain.statefiles import json_bytes, state_files, state_from
from dtrain.types import Parameters, TrainState

FORMAT = 1
MANIFEST = "manifest.json"
TEMPORARY = re.compile(r"\.(config\.toml|plan\.json|env\.json|history\.jsonl|climatology\.safetensors)-[0-9a-f]{8}")
"""The names of files of a run while they are written (`dtrain.files.write_bytes`)."""
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, safetensors.SafetensorError)
"""The errors that damaged files lead to."""


def commit_round(run: Path, state: TrainState, fingerprint: str) -> int:
    """Write a state as a committed round of a run; return the bytes written.

    Parameters
    ----------
    run : path
        The run's directory.
    state : TrainState
        Held by the driver.
    fingerprint : str
        Of the data plan; the cursors are only valid together with it.

    Raises
    ------
    DiskFull
        The round could not be written; rounds committed before are as they were.
    """
    listed: dict[str, dict[str, int | str]] = {}
    contents = _with_manifest(state.round, state_files(state, fingerprint, FORMAT), listed)
    write_directory(round_directory(run, state.round), contents, f"round {state.round}")
    return sum(int(facts["bytes"]) for facts in listed.values())


def _with_manifest(
    number: int, files: Iterable[tuple[str, bytes]], listed: dict[str, dict[str, int | str]]
) -> Iterator[tuple[str, bytes]]:
    """Yield files one at a time, and last the manifest; `listed` is filled with their sizes and digests."""
    for name, data in files:
        listed[name] = {"bytes": len(data), "sha256": _sha256(data)}
        yield name, data
    yield MANIFEST, json_bytes({"format": FORMAT, "round": number, "files": listed})


def load_round(directory: Path) -> tuple[TrainState, str]:
    """Read and verify a committed round; return its state and the data plan's fingerprint.

    Raises
    ------
    RunDamaged
        A file is missing, or differs from the manifest.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise RunDamaged(f"{directory} has format {manifest['format']}; this version reads format {FORMAT}.")
        files: dict[str, bytes] = {}
        for name, listed in manifest["files"].items():
            data = (directory / Path(name).name).read_bytes()
            if len(data) != listed["bytes"] or _sha256(data) != listed["sha256"]:
                raise RunDamaged(f"{directory / name} is not what was committed.")
            files[name] = data
        return state_from(files)
    except RunDamaged:
        raise
    except (*UNREADABLE, DtrainError) as error:
        raise RunDamaged(f"{directory} cannot be read: {one_line(error)}") from error


def load_params(directory: Path) -> Parameters:
    """Return the parameters of the model of a committed round."""
    return load_round(directory)[0].model


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# The rounds of a run --------------------------------------------------------------------------------------


def committed_rounds(run: Path) -> list[int]:
    """Return the numbers of the rounds that are in place, ascending; they are not verified."""
    found = (run / "rounds").glob("round-*")
    return sorted(int(p.name.removeprefix("round-")) for p in found if p.name.removeprefix("round-").isdigit())


def round_directory(run: Path, number: int) -> Path:
    """Return the directory of a round."""
    return run / "rounds" / f"round-{number:06d}"


def newest_state(run: Path) -> tuple[TrainState | None, str, list[tuple[int, str]]]:
    """Return the newest state that verifies, its fingerprint, and (round, reason) of those that do not.

    Raises
    ------
    RunDamaged
        There are committed rounds, but none of them verifies.
    """
    damaged: list[tuple[int, str]] = []
    for number in reversed(committed_rounds(run)):
        try:
            state, fingerprint = load_round(round_directory(run, number))
            return state, fingerprint, damaged
        except RunDamaged as error:
            damaged.append((number, error.message))
    if damaged:
        raise RunDamaged(
            f"{run}: none of its {len(damaged)} committed rounds can be read; {damaged[0][1]}",
            "Restore the directory from a copy, or start again under another --run NAME.",
        )
    return None, "", []


def prune(run: Path, keep: int, best: int | None) -> None:
    """Delete all committed rounds but the newest `keep` and the best one."""
    numbers = committed_rounds(run)
    for number in numbers[:-keep]:
        if number != best:
            with contextlib.suppress(OSError):  # a round that cannot be deleted does no harm
                remove_directory(round_directory(run, number))


def sweep(run: Path) -> None:
    """Delete temporary files and directories that a killed process left behind. Only under the run's lock."""
    for left in (run / "rounds").glob(".round-*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in run.glob(".*-*"):
        if TEMPORARY.fullmatch(left.name):
            with contextlib.suppress(OSError):  # what stays does no harm
                left.unlink()


def find_round(run: Path, wanted: str, best: int | None) -> int:
    """Return the number of the round that ``best``, ``last`` or a number names.

    Raises
    ------
    RoundNotFound
        The run does not keep it.
    """
    kept = committed_rounds(run)
    if not kept:
        raise RoundNotFound(f"{run} has no committed round yet.")
    if wanted == "last":
        return kept[-1]
    if wanted == "best":
        return best if best in kept else kept[-1]
    if wanted.isdigit() and int(wanted) in kept:
        return int(wanted)
    raise RoundNotFound(f'{run} keeps no round "{wanted}".', f"Kept are best, last and {', '.join(map(str, kept))}.")
