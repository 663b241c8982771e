"""The committed rounds of a run: list, check, choose, restore and prune them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dtrain.checkpoint import check_round, check_round_history, other_plan, read_round_manifest
from dtrain.errors import RoundNotFound, RunDamaged
from dtrain.files import remove, remove_directory
from dtrain.runfiles import PLAN, RESTORE, ROUND, ROUNDS, check_rounds, read_file, round_directory, sha256
from dtrain.types import StoredState

NUMBER = re.compile(r"[0-9]{1,18}")
TEMPORARY = re.compile(r"\.(config\.toml|plan\.json|env\.json|history\.jsonl|climatology\.safetensors)-[0-9a-f]{8}")
"""The names of files of a run while they are written (`dtrain.files.write_bytes`)."""


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
    numbers, damaged = committed_rounds(run), ""
    differing: RunDamaged | None = None
    plan = sha256(read_file(run / PLAN)) if numbers else ""
    for number, manifest in _manifests(run, numbers):
        if isinstance(manifest, RunDamaged):
            damaged = damaged or manifest.message
        elif manifest.get("plan") == plan:
            return
        else:
            differing = differing or other_plan(run / PLAN, number)
    if differing is not None:
        raise differing
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
            return check_round_history(round_directory(run, number), manifest)


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


def newest_round(run: Path) -> tuple[StoredState | None, str, list[tuple[int, str]]]:
    """Return the newest state that verifies, its fingerprint, and (round, reason) of those that do not.

    Raises
    ------
    RunDamaged
        There are committed rounds, but none of them verifies.
    """
    damaged: list[tuple[int, str]] = []
    for number in reversed(committed_rounds(run)):
        try:
            state, fingerprint = check_round(round_directory(run, number))
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
