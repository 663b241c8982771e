"""A run: the files that describe it, its history and every round that it keeps. Only its files are read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dtrain.climatefile import CLIMATE, read_climate
from dtrain.committed import TEMPORARY, committed_rounds
from dtrain.description import read_config_of, read_env, read_resolved, read_tables_of
from dtrain.errors import RunDamaged, RunNotFound, listed
from dtrain.lock import holder
from dtrain.runfiles import (
    CONFIG,
    ENV,
    EVENTS,
    HISTORY,
    LOCK,
    PLAN,
    ROUND,
    ROUNDS,
    read_file,
    read_if_there,
    round_directory,
)
from dtrain.verify.fault import Counting, Fault, Report, tell
from dtrain.verify.rounds import RoundVerified, verify_round

OWN = frozenset({CONFIG, PLAN, ENV, HISTORY, EVENTS, LOCK, ROUNDS, CLIMATE})
"""What dtrain keeps in a run's directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunVerified:
    """What has been looked at of a run, or of one of its rounds."""

    path: Path
    rounds: tuple[int, ...]
    files: int
    nbytes: int
    faults: dict[str, int]
    """How many, by what they are."""
    notes: tuple[str, ...]
    """Sentences about what is no fault, and a person should know."""


def verify_run(run: Path, report: Report) -> RunVerified:
    """Read all files of a run, also while it is trained.

    Parameters
    ----------
    run : path
        Its directory.
    report : callable
        Called with each fault.

    Raises
    ------
    RunConflict
        Another version of dtrain has trained it.
    """
    told = _Once(report)
    numbers: list[int] = []
    tell(told, run / ROUNDS, lambda: numbers.extend(committed_rounds(run)))
    tell(told, run / CONFIG, lambda: read_tables_of(run))
    tell(told, run / ENV, lambda: read_env(run))
    is_plan_good = tell(told, run / PLAN, lambda: read_resolved(run))
    notes = [note for name in (HISTORY, EVENTS) for note in _check_lines(run / name, told)]
    training: list[str] = []
    tell(told, run / LOCK, lambda: training.extend(_training(run)))
    notes += [*training, *_others(run, is_trained=bool(training))]
    verified = [one for number in numbers if (one := verify_round(run, round_directory(run, number), told))]
    if is_plan_good and _check_plan_of(run, verified, told):
        tell(told, run / CONFIG, lambda: read_config_of(run))
        tell(told, run / CLIMATE, lambda: _check_climate(run))
    own = [path for name in OWN if (path := run / name).is_file() and not path.is_symlink()]
    return _summary(run, verified, own, told, notes)


def verify_round_of(directory: Path, report: Report) -> RunVerified:
    """Read all of one round.

    Raises
    ------
    RunConflict
        Another version of dtrain has written it.
    RunNotFound
        It is not there any more.
    """
    told = _Once(report)
    verified = verify_round(directory.parents[1], directory, told)
    if verified is None:
        raise RunNotFound(
            f"{directory} is not there any more.", "A run prunes its rounds while it is trained (run.keep)."
        )
    run = directory.parents[1]
    if tell(told, run / PLAN, lambda: read_file(run / PLAN)):
        _check_plan_of(run, [verified], told)
    return _summary(directory, [verified], [], told, [])


def _check_plan_of(run: Path, verified: list[RoundVerified], report: Report) -> bool:
    """Tell which rounds were trained with another plan.json, in one fault; return whether there are none."""
    if others := [str(one.number) for one in verified if not one.is_of_plan]:
        rounds = f"round {others[0]} was" if len(others) == 1 else f"rounds {listed(others, 5)} were"
        report(Fault("damaged", "", f"{run / PLAN} is not the one that {rounds} trained with."))
    return not others


def _summary(path: Path, verified: list[RoundVerified], own: list[Path], told: _Once, notes: list[str]) -> RunVerified:
    sizes = [file.stat().st_size for file in own if file.exists()]
    return RunVerified(
        path=path,
        rounds=tuple(one.number for one in verified if one.number),
        files=len(sizes) + sum(one.files for one in verified),
        nbytes=sum(sizes) + sum(one.nbytes for one in verified),
        faults=dict(told.counts),
        notes=tuple(notes),
    )


class _Once(Counting):
    """Passes each fault on once: several checks read plan.json."""

    def __init__(self, report: Report) -> None:
        super().__init__(report)
        self._told: set[Fault] = set()

    def __call__(self, fault: Fault) -> None:
        if fault not in self._told:
            self._told.add(fault)
            super().__call__(fault)


def _check_climate(run: Path) -> None:
    resolved = read_resolved(run)
    if not resolved.climatology_sha256:
        read_climate(run, resolved.plan.fingerprint)


def _check_lines(path: Path, report: Report) -> Iterator[str]:
    """Look at a file of JSON lines; yield what a killed process has left in it."""
    try:
        data = read_if_there(path)
    except RunDamaged as error:
        report(Fault("damaged", "", error.message))
        return
    *lines, rest = (data or b"").split(b"\n")
    if rest:
        yield f"{path.name} ends in the middle of a line: the process was killed. That does no harm."
    odd = [number for number, line in enumerate(lines, 1) if not _is_object(line)]
    if odd and path.name == EVENTS:
        yield f"{path.name}: line {odd[0]} is no event. Nothing depends on it."
    elif odd:
        report(Fault("damaged", str(path), f"line {odd[0]} is no JSON object"))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _training(run: Path) -> Iterator[str]:
    if process := holder(run):
        yield f"The run is being trained by process {process['pid']} on {process['host']}: it writes meanwhile."


def _others(run: Path, *, is_trained: bool) -> Iterator[str]:
    """Yield what else lies in a run's directory; while it is trained, files are being written."""
    names = {run: OWN, run / ROUNDS: frozenset[str]()}
    for folder, own in names.items():
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            if name in own or (folder != run and ROUND.fullmatch(name)):
                continue
            if TEMPORARY.fullmatch(name) or (folder != run and name.startswith(".round-")):
                if not is_trained:
                    yield f"{name} is left of a process that was killed while it wrote; training removes it."
            else:
                yield f"{folder / name} is no file of dtrain."
