"""TrainState <-> a round directory: committed whole or not at all, verified before it is used.

    RUN/ config.toml plan.json env.json LOCK history.jsonl events.jsonl
         rounds/round-000010/ params.safetensors inner-0000.safetensors ... state.json manifest.json

A round is written into a temporary directory, every file is synced, the manifest with their SHA-256 comes last,
then one rename makes it visible. safetensors and JSON only: reading a run executes nothing.

The manifest also has the SHA-256 of plan.json and of the lines of history.jsonl up to its round: a round stands only
together with them.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.errors import RoundNotFound, RunDamaged, one_line
from dtrain.files import disk_errors, remove, remove_directory, write_directory
from dtrain.runfiles import (
    HISTORY,
    PLAN,
    RESTORE,
    ROUNDS,
    SEAL,
    check_seal,
    history_sha256,
    other_version,
    parse_json,
    read_file,
    read_if_there,
    sealed,
    sha256,
)
from dtrain.statefiles import json_bytes, state_files, state_from
from dtrain.types import Parameters, TrainState

FORMAT = 2
MANIFEST = "manifest.json"
MOST_MANIFEST = 2**26
ROUND = re.compile(r"round-([0-9]{6,18})")
NUMBER = re.compile(r"[0-9]{1,18}")
TEMPORARY = re.compile(r"\.(config\.toml|plan\.json|env\.json|history\.jsonl|climatology\.safetensors)-[0-9a-f]{8}")
"""The names of files of a run while they are written (`dtrain.files.write_bytes`)."""


def commit_round(run: Path, state: TrainState, fingerprint: str, plan_sha256: str) -> int:
    """Write a state as a committed round of a run; return the bytes written.

    Parameters
    ----------
    run : path
        The run's directory. Its history.jsonl holds the line of the round.
    state : TrainState
        Held by the driver.
    fingerprint : str
        Of the data plan; the cursors are only valid together with it.
    plan_sha256 : str
        Of the plan.json that the round was trained with.

    Raises
    ------
    DiskFull
        The round could not be written; rounds committed before are as they were.
    RunDamaged
        The history lacks the round.
    """
    check_rounds(run)
    with disk_errors(f"round {state.round}", run):
        digest = history_sha256((run / HISTORY).read_bytes(), state.round)
    if not digest:
        raise RunDamaged(f"{run / HISTORY} does not hold the {state.round} rounds that are trained.", RESTORE)
    listed: dict[str, dict[str, int | str]] = {}
    described = {"format": FORMAT, "round": state.round, "plan": plan_sha256, "history": digest}
    contents = _with_manifest(described, state_files(state, fingerprint, FORMAT), listed)
    write_directory(round_directory(run, state.round), contents, f"round {state.round}")
    return sum(int(facts["bytes"]) for facts in listed.values())


def _with_manifest(
    described: dict[str, Any], files: Iterable[tuple[str, bytes]], listed: dict[str, dict[str, int | str]]
) -> Iterator[tuple[str, bytes]]:
    """Yield files one at a time, and last the manifest; `listed` is filled with their sizes and digests."""
    for name, data in files:
        listed[name] = {"bytes": len(data), "sha256": sha256(data)}
        yield name, data
    yield MANIFEST, json_bytes(sealed({**described, "files": listed}))


def load_round(directory: Path) -> tuple[TrainState, str]:
    """Read and verify a committed round; return its state and the data plan's fingerprint.

    Raises
    ------
    RunDamaged
        A file is missing, or differs from the manifest; also plan.json, and the history up to the round.
    RunConflict
        Another version of dtrain has written it.
    """
    manifest = read_round_manifest(directory)
    run = directory.parents[1]
    if sha256(read_file(run / PLAN)) != manifest.get("plan"):
        raise RunDamaged(f"{run / PLAN} is not the one that round {_number(directory)} was trained with.", RESTORE)
    check_round_history(run, directory, manifest)
    try:
        files = dict(_verified(directory, manifest))
        return state_from(files)
    except RunDamaged:
        raise
    except Exception as error:  # the files are as listed, and hold what no version of dtrain writes
        raise RunDamaged(f"{directory} cannot be read: {one_line(error)}") from error


def read_round_manifest(directory: Path) -> dict[str, Any]:
    """Return what a round's manifest says, which is as it was written.

    Raises
    ------
    RunDamaged
        It cannot be read, or has been modified.
    RunConflict
        Another version of dtrain has written the round.
    FileNotFoundError
        There is no such directory.
    """
    check_directory(directory)
    path = directory / MANIFEST
    manifest = parse_json(path, read_file(path, MOST_MANIFEST))
    written = manifest.get("format")
    is_older = written == 1 and SEAL not in manifest
    if not is_older:
        check_seal(path, manifest)
    if written != FORMAT:
        raise other_version(directory.parents[1], f"its rounds have format {written}, this one reads {FORMAT}")
    return manifest


def check_round_history(run: Path, directory: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a history that is not the one of a round.

    Raises
    ------
    RunDamaged
        Lines are missing or modified.
    """
    history = read_if_there(run / HISTORY) or b""
    if history_sha256(history, _number(directory)) != manifest.get("history"):
        raise RunDamaged(
            f"{run / HISTORY} does not hold the rounds up to {_number(directory)} as they were committed.", RESTORE
        )


def _verified(directory: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file of a round."""
    for name, listed in manifest["files"].items():
        yield name, read_listed(directory, name, listed)


def read_listed(directory: Path, name: str, listed: Mapping[str, Any]) -> bytes:
    """Return the content of a file of a round, of which the manifest has size and digest.

    Raises
    ------
    RunDamaged
        It is missing, or not what was committed.
    """
    path = directory / Path(name).name
    data = read_file(path, int(listed["bytes"]))
    if len(data) != listed["bytes"] or sha256(data) != listed["sha256"]:
        raise RunDamaged(f"{path} is not what was committed.")
    return data


def load_params(directory: Path) -> Parameters:
    """Return the parameters of the model of a committed round."""
    return load_round(directory)[0].model


def check_plan(run: Path) -> None:
    """Refuse a run whose plan.json is not the one that its rounds were trained with.

    Only manifests are read. One that says otherwise than the others is taken for damaged.

    Raises
    ------
    RunDamaged
        plan.json is missing or modified, or no manifest can be read.
    RunConflict
        Another version of dtrain has trained the run.
    """
    numbers, damaged, differing = committed_rounds(run), "", ""
    plan = sha256(read_file(run / PLAN)) if numbers else ""
    for number, manifest in _manifests(run, numbers):
        if isinstance(manifest, RunDamaged):
            damaged = damaged or manifest.message
        elif manifest.get("plan") == plan:
            return
        else:
            differing = differing or f"{run / PLAN} is not the one that round {number} was trained with."
    if differing:
        raise RunDamaged(differing, RESTORE)
    if damaged:
        raise _none_readable(run, len(numbers), damaged)


def check_history(run: Path) -> None:
    """Refuse a run whose history is not the one of its newest round.

    Raises
    ------
    RunDamaged
        Lines are missing or modified.
    """
    for number, manifest in _manifests(run, committed_rounds(run)):
        if not isinstance(manifest, RunDamaged):
            return check_round_history(run, round_directory(run, number), manifest)


def _manifests(run: Path, numbers: Sequence[int]) -> Iterator[tuple[int, dict[str, Any] | RunDamaged]]:
    """Yield rounds and their manifests, the newest first, or why one cannot be read."""
    for number in reversed(numbers):
        try:
            yield number, read_round_manifest(round_directory(run, number))
        except FileNotFoundError:
            continue  # it has been pruned meanwhile
        except RunDamaged as error:
            if round_directory(run, number).exists():  # else the same
                yield number, error


# The rounds of a run --------------------------------------------------------------------------------------


def check_rounds(run: Path) -> None:
    """Refuse a run whose ``rounds`` is no directory of its own.

    Raises
    ------
    RunDamaged
        It is a link, a file or anything else.
    """
    with contextlib.suppress(FileNotFoundError):
        check_directory(run / ROUNDS)


def check_directory(path: Path) -> None:
    """Refuse what lies at a path and is no directory.

    Raises
    ------
    RunDamaged
        It is a link or a file, or cannot be looked at.
    FileNotFoundError
        There is nothing.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunDamaged(f"{path} cannot be read: {error.strerror}.", RESTORE) from error
    if not stat.S_ISDIR(mode):
        raise RunDamaged(f"{path} is {'a link' if stat.S_ISLNK(mode) else 'a file'}, not a directory.", RESTORE)


def committed_rounds(run: Path) -> list[int]:
    """Return the numbers of the rounds that are in place, ascending; they are not verified.

    Raises
    ------
    RunDamaged
        ``rounds`` is no directory, or cannot be read.
    """
    check_rounds(run)
    try:
        names = os.listdir(run / ROUNDS)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDamaged(f"{run / ROUNDS} cannot be read: {error.strerror}.", RESTORE) from error
    numbers = [(int(found[1]), name) for name in names if (found := ROUND.fullmatch(name))]
    return sorted(number for number, name in numbers if round_directory(run, number).name == name)


def round_directory(run: Path, number: int) -> Path:
    """Return the directory of a round."""
    return run / ROUNDS / f"round-{number:06d}"


def _number(directory: Path) -> int:
    return int(directory.name.removeprefix("round-"))


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
        raise _none_readable(run, len(damaged), damaged[0][1])
    return None, "", []


def _none_readable(run: Path, count: int, why: str) -> RunDamaged:
    return RunDamaged(f"{run}: none of its {count} committed rounds can be read; {why}", RESTORE)


def prune(run: Path, keep: int, best: int | None) -> None:
    """Delete all committed rounds but the newest `keep` and the best one."""
    numbers = committed_rounds(run)
    for number in numbers[:-keep]:
        if number != best:
            with contextlib.suppress(OSError):  # a round that cannot be deleted does no harm
                remove_directory(round_directory(run, number))


def sweep(run: Path) -> None:
    """Delete temporary files and directories that a killed process left behind. Only under the run's lock."""
    check_rounds(run)
    for left in (run / ROUNDS).glob(".round-*"):
        remove(left)
    for left in run.glob(".*-*"):
        if TEMPORARY.fullmatch(left.name):
            remove(left)


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
    if NUMBER.fullmatch(wanted) and int(wanted) in kept:
        return int(wanted)
    raise RoundNotFound(f'{run} keeps no round "{wanted}".', f"Kept are best, last and {', '.join(map(str, kept))}.")
