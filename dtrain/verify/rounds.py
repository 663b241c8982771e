"""A committed round: its manifest, every file, the state that they make up, and that plan and history go with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dtrain.checkpoint import (
    MANIFEST,
    check_round_history,
    check_round_plan,
    number_of,
    read_round_manifest,
    stored_round,
)
from dtrain.errors import RunConflict, RunDamaged, one_line
from dtrain.runfiles import HISTORY, PLAN, check_known
from dtrain.statefiles import check_parts
from dtrain.verify.fault import Fault, Report, tell


@dataclass(frozen=True, slots=True)
class RoundVerified:
    """What has been looked at of a round."""

    number: int
    files: int
    nbytes: int
    is_of_plan: bool = True
    """Whether it was trained with the plan.json of the run."""


def verify_round(run: Path, directory: Path, report: Report) -> RoundVerified | None:
    """Read all of a round; None if it has been pruned meanwhile, which is no fault.

    Parameters
    ----------
    run, directory : path
        Of the run and of its round.
    report : callable
        Called with each fault.

    Raises
    ------
    RunConflict
        Another version of dtrain has written it.
    """
    found: list[Fault] = []
    verified = _look(run, directory, found.append)
    if not os.path.lexists(directory):
        return None
    for fault in found:
        report(fault)
    return verified


def _look(run: Path, directory: Path, report: Report) -> RoundVerified:
    number, nothing = number_of(directory), RoundVerified(0, 0, 0)
    try:
        manifest = read_round_manifest(directory)
        files = manifest["files"].items()
        listed = {str(name): (int(facts["bytes"]), str(facts["sha256"])) for name, facts in files}
    except RunConflict:
        raise
    except RunDamaged as error:
        report(Fault("damaged", "", error.message))
        return nothing
    except FileNotFoundError:
        return nothing
    except Exception as error:  # it has its digest, and says what no version of dtrain writes
        report(Fault("damaged", str(directory / MANIFEST), f"it cannot be read: {one_line(error)}"))
        return nothing
    is_of_plan = tell(lambda fault: None, run / PLAN, lambda: check_round_plan(directory, manifest))
    tell(report, run / HISTORY, lambda: check_round_history(directory, manifest))
    good: dict[str, int] = {}
    for name, (nbytes, digest) in listed.items():
        path = directory / Path(name).name
        if tell(report, path, partial(check_known, path, nbytes, digest)):
            good[name] = nbytes
    for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
        if name not in listed and name != MANIFEST:
            report(Fault("unlisted", str(directory / name), f"{MANIFEST} does not list it: it was put there later"))
    if len(good) == len(listed):
        tell(report, directory, lambda: _check_state(directory, number, manifest))
    return RoundVerified(number, len(good) + 1, sum(good.values()), is_of_plan)


def _check_state(directory: Path, number: int, manifest: Mapping[str, Any]) -> None:
    state, _ = stored_round(directory, manifest)
    check_parts(state)
    if state.round != number:
        raise RunDamaged(f"{directory} holds the state of round {state.round}.")
