"""TrainState <-> a round directory: committed whole or not at all, verified before it is used.

    RUN/ config.toml plan.json env.json LOCK history.jsonl events.jsonl
         rounds/round-000010/ params.safetensors inner-0000.safetensors ... state.json manifest.json

A round is written into a temporary directory, every file is synced, the manifest with their SHA-256 comes last,
then one rename makes it visible. safetensors and JSON only: reading a run executes nothing.

The manifest also has the SHA-256 of plan.json and of the lines of history.jsonl up to its round: a round stands only
together with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtrain.errors import RoundNotFound, RunDamaged, one_line
from dtrain.files import disk_errors, hidden, remove, write_directory
from dtrain.runfiles import (
    HISTORY,
    PLAN,
    RESTORE,
    SEAL,
    check_directory,
    check_rounds,
    check_seal,
    history_sha256,
    lines_of,
    other_version,
    parse_json,
    read_file,
    read_known,
    round_directory,
    sealed,
    sha256,
)
from dtrain.statefiles import STATE, check_parts, held_state, json_bytes, read_params, state_files, stored_state
from dtrain.types import Parameters, StateFile, StoredState, TrainState

FORMAT = 2
MANIFEST = "manifest.json"
MOST_MANIFEST = 2**26


def commit_round(run: Path, state: TrainState | StoredState, fingerprint: str, plan_sha256: str) -> int:
    """Write a state as a committed round of a run; return its bytes.

    Parameters
    ----------
    run : path
        The run's directory. Its history.jsonl holds the line of the round.
    state : TrainState or StoredState
        Held by the driver, or files of `uncommitted` that are written and synced already: they are moved.
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
    with disk_errors(f"round {state.round}", run), (run / HISTORY).open("rb") as lines:
        digest = history_sha256(lines, state.round)
    if not digest:
        raise RunDamaged(f"{run / HISTORY} does not hold the {state.round} rounds that are trained.", RESTORE)
    listed: dict[str, dict[str, int | str]] = {}
    described = {"format": FORMAT, "round": state.round, "plan": plan_sha256, "history": digest}
    contents = _with_manifest(described, state_files(state, fingerprint, FORMAT), listed)
    write_directory(round_directory(run, state.round), contents, f"round {state.round}")
    if isinstance(state, StoredState):
        remove(state.vectors[0].path.parent)  # the directory that the files have left
    return sum(int(facts["bytes"]) for facts in listed.values())


@contextmanager
def uncommitted(run: Path) -> Iterator[Callable[[int], Path]]:
    """Give a function that makes a new directory for the files of a round until it is committed.

    There is one at a time. The last one is removed at the end.
    """
    made: list[Path] = []

    def new(number: int) -> Path:
        while made:
            remove(made.pop())
        check_rounds(run)
        directory = hidden(round_directory(run, number).absolute())  # workers have other working directories
        with disk_errors(f"round {number}", run):
            directory.parent.mkdir(exist_ok=True)
            directory.mkdir()
        made.append(directory)
        return directory

    try:
        yield new
    finally:
        while made:
            remove(made.pop())


def _with_manifest(
    described: dict[str, Any], files: Iterable[tuple[str, bytes | StateFile]], listed: dict[str, dict[str, int | str]]
) -> Iterator[tuple[str, bytes | Path]]:
    """Yield files one at a time, and last the manifest; `listed` is filled with their sizes and digests."""
    for name, file in files:
        if isinstance(file, StateFile):
            listed[name] = {"bytes": file.nbytes, "sha256": file.sha256}
            yield name, file.path
        else:
            listed[name] = {"bytes": len(file), "sha256": sha256(file)}
            yield name, file
    yield MANIFEST, json_bytes(sealed({**described, "files": listed}))


def open_round(directory: Path) -> tuple[StoredState, str]:
    """Return the state of a committed round as files, and the data plan's fingerprint; no other file is read yet.

    Raises
    ------
    RunDamaged
        The manifest or state.json is missing or modified; also plan.json, and the history up to the round.
    RunConflict
        Another version of dtrain has written it.
    RoundNotFound
        It has been pruned.
    """
    try:
        manifest = read_round_manifest(directory)
    except FileNotFoundError as error:
        raise RoundNotFound(
            f"{directory} is not there any more: a run prunes its rounds while it is trained."
        ) from error
    check_round_plan(directory, manifest)
    check_round_history(directory, manifest)
    with _readable(directory):
        return stored_round(directory, manifest)


def stored_round(directory: Path, manifest: Mapping[str, Any]) -> tuple[StoredState, str]:
    """Return the state that the files of a round make up, and the fingerprint."""
    files = {
        str(name): StateFile(directory / Path(name).name, int(facts["bytes"]), str(facts["sha256"]))
        for name, facts in manifest["files"].items()
    }
    described = files[STATE]
    data = read_known(described.path, described.nbytes, described.sha256)
    return stored_state(json.loads(data), files)


def check_round(directory: Path) -> tuple[StoredState, str]:
    """Read all of a committed round, one file after the other; return as `open_round`, with its errors.

    Raises
    ------
    RunDamaged
        A file is missing, or differs from the manifest.
    """
    state, fingerprint = open_round(directory)
    with _readable(directory):
        check_parts(state)
    return state, fingerprint


def load_round(directory: Path) -> tuple[TrainState, str]:
    """Read and verify a committed round; return its state and the data plan's fingerprint.

    Raises
    ------
    RunDamaged, RunConflict, RoundNotFound
        As `check_round`.
    """
    state, fingerprint = open_round(directory)
    with _readable(directory):
        return held_state(state), fingerprint


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Name a round whose files are as they are listed, and hold what no version of dtrain writes."""
    try:
        yield
    except RunDamaged:
        raise
    except Exception as error:
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


def check_round_plan(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a plan.json that is not the one of a round.

    Raises
    ------
    RunDamaged
        It is missing or modified.
    """
    plan = directory.parents[1] / PLAN
    if sha256(read_file(plan)) != manifest.get("plan"):
        raise other_plan(plan, number_of(directory))


def other_plan(plan: Path, number: int) -> RunDamaged:
    """Return the error for a plan.json that a round was not trained with."""
    return RunDamaged(f"{plan} is not the one that round {number} was trained with.", RESTORE)


def check_round_history(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a history that is not the one of a round.

    Raises
    ------
    RunDamaged
        Lines are missing or modified.
    """
    history, number = directory.parents[1] / HISTORY, number_of(directory)
    if history_sha256(lines_of(history), number) != manifest.get("history"):
        raise RunDamaged(f"{history} does not hold the rounds up to {number} as they were committed.", RESTORE)


def load_params(directory: Path) -> Parameters:
    """Return the parameters of the model of a committed round; all of it is verified, as by `check_round`."""
    state, _ = check_round(directory)
    return read_params(state.vectors[0], state.layout)


def load_ema(directory: Path) -> Parameters | None:
    """Return the moving average of models of a committed round, likewise; None if it has none."""
    state, _ = check_round(directory)
    return None if state.ema is None else read_params(state.ema, state.layout)


def number_of(directory: Path) -> int:
    """Return the number of the round that a directory is named after."""
    return int(directory.name.removeprefix("round-"))
