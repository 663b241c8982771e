"""Run directories: found, named, described, and compared with the job that wants to continue one."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from dtrain.climatefile import write_climate
from dtrain.committed import committed_rounds
from dtrain.config.compare import differences, may_change, without_secrets
from dtrain.config.files import to_toml
from dtrain.config.functions import described
from dtrain.config.schema import TrainConfig
from dtrain.description import read_config_of, read_env, read_resolved, shown_value
from dtrain.errors import DiskFull, RunConflict, RunDamaged, RunNotFound, UsageError, did_you_mean
from dtrain.files import write_text
from dtrain.job import Job
from dtrain.resolve import check_kind, pinned
from dtrain.resolved import Resolved, to_json
from dtrain.runfiles import (
    CONFIG,
    ENV,
    HISTORY,
    PLAN,
    RESTORE,
    sealed,
)
from dtrain.runtime.versions import versions

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
FROM_HERE = {
    "train.rounds",
    "train.schedule",
    "train.warmup_steps",
    "train.optimizer",
    "train.optimizer_args",
    "average.outer.args",
    "average.outer.schedule",
}
"""Keys that change how training goes on: a new run can start from the old one's parameters."""


# Names ----------------------------------------------------------------------------------------------------


def run_directory(job: Job, name: str | os.PathLike[str] | None) -> Path:
    """Return the directory of a named run below ``run.dir``.

    Raises
    ------
    UsageError
        The name cannot be that of a directory.
    """
    if name is None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", job.base.resolve().name).strip(".-") or "run"
    if not isinstance(name, str | os.PathLike):
        raise UsageError(f"run is {described(name)}; a name is needed.", 'Give text, such as run="first".')
    name = os.fspath(name)
    if not NAME.fullmatch(name):
        shown = json.dumps(name, ensure_ascii=False)
        raise UsageError(f'run {shown}: a run\'s name has letters, digits, ".", "_" and "-", at most 64.')
    return Path(job.base, job.config.run.dir).expanduser() / name


def next_run_directory(job: Job, root: Path) -> Path:
    """Return the first ``run-N`` below ``run.dir`` that does not exist."""
    parent = Path(root, job.config.run.dir)
    number = 1
    while (parent / f"run-{number}").exists():
        number += 1
    return parent / f"run-{number}"


def find_run(text: str) -> Path:
    """Return the directory that a path or name means: ``PATH``, ``runs/NAME`` or ``*/runs/NAME``; '' the newest.

    Raises
    ------
    RunNotFound
        There is none.
    """
    here, known = Path.cwd(), _known_runs()
    if not text:
        return newest_run().relative_to(here)
    if (Path(text) / CONFIG).is_file():
        return Path(text)
    named = [p for p in known if p.name == text]
    if len(named) == 1:
        return named[0].relative_to(here)
    if named:
        raise RunNotFound(f"{text} names several runs: {', '.join(str(p.relative_to(here)) for p in named)}.")
    names = [p.name for p in known]
    raise RunNotFound(
        f"{text}: no such run{did_you_mean(text, names)}",
        f"Known here: {', '.join(names) or 'none'}. Name a run, or its directory.",
    )


def newest_run(more: Iterable[Path] = ()) -> Path:
    """Return the run that was written last: of ``runs/*`` and ``*/runs/*`` here, and of `more` directories.

    Raises
    ------
    RunNotFound
        There is none.
    """
    known = [*_known_runs(), *(run for run in more if (run / CONFIG).is_file())]
    if not known:
        raise RunNotFound("There is no run in runs/ or */runs/.", "Name its directory.")
    return max(known, key=_touched)


def _known_runs() -> list[Path]:
    patterns = (f"runs/*/{CONFIG}", f"*/runs/*/{CONFIG}")
    return [path.parent for pattern in patterns for path in sorted(Path.cwd().glob(pattern))]


def _touched(run: Path) -> float:
    files = [run / CONFIG, run / HISTORY]
    return max(file.stat().st_mtime for file in files if file.exists())


# Starting and continuing ----------------------------------------------------------------------------------


@contextmanager
def made_directory(run: Path) -> Iterator[None]:
    """Make a run's directory, if it is not there; it goes again where the block raises before the run is described.

    Raises
    ------
    DiskFull
        It cannot be made.
    """
    made = [place for place in (run, *run.parents) if not place.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskFull(
            f"{run} cannot be made: {error.strerror}.", "Set run.dir to a place that you may write to."
        ) from error
    try:
        yield
    except BaseException:
        if not (run / CONFIG).exists():
            with suppress(OSError):  # somebody else has put something there
                for place in made:
                    place.rmdir()
        raise


def read_plan(run: Path, job: Job) -> Resolved | None:
    """Return the plan of a run that was started before, or None; refuse to continue with a changed job.

    Raises
    ------
    RunConflict
        The configuration or the user's code differs.
    DataChanged
        The store is another one.
    """
    if not os.path.lexists(run / CONFIG):
        if not committed_rounds(run):
            return None  # its first start was killed
        raise RunDamaged(f"{run / CONFIG} is missing.", RESTORE)
    old = read_config_of(run)
    if not (run / PLAN).exists():
        return None
    _check_config(run, old, job)
    read_env(run)  # it is not compared, but a run with a damaged file is not continued
    resolved = read_resolved(run)
    changed = [key for key, digest in job.code_by(resolved.code_rules).items() if resolved.code.get(key) != digest]
    if changed:
        raise RunConflict(
            f"{run} was started with other code of {', '.join(changed)}.",
            "Train under another --run NAME, or undo the change.",
        )
    job = pinned(job, resolved.snapshots)
    for source, plan in zip(job.sources, resolved.plan.plans, strict=True):
        if source.samples is not None:
            check_kind(source.samples, plan)
    if job.held_out is not None and resolved.held_out is not None:
        check_kind(job.held_out.described, resolved.held_out)
    return resolved


def _check_config(run: Path, old: TrainConfig, job: Job) -> None:
    new = job.config
    blocked = [d for d in differences(without_secrets(old), without_secrets(new)) if not may_change(d[0], new)]
    if blocked:
        keys = {key for key, _, _ in blocked}
        cure = "Train under another --run NAME, or undo the change."
        if keys <= FROM_HERE:
            cure = (
                f'To go on from its parameters, start a new --run NAME with train.init = "{_from_base(run, job.base)}".'
            )
        if keys == {"train.rounds"}:
            key, schedule = ("train", new.train.schedule)
            if schedule == "constant":
                key, schedule = ("average.outer", new.average.outer_schedule)
            cure = f'The learning rate of {key}.schedule = "{schedule}" depends on the last round. ' + cure
        named = [f"{key} was {shown_value(old)}, is {shown_value(new)}" for key, old, new in blocked[:4]]
        raise RunConflict(
            f"{run} was started with another configuration: {'; '.join(named)}.",
            cure,
        )


def _from_base(run: Path, base: Path) -> str:
    """Return the run's path as a config file in `base` names it."""
    run, base = run.resolve(), base.resolve()
    return str(run.relative_to(base)) if run.is_relative_to(base) else str(run)


def write_run(run: Path, job: Job, resolved: Resolved, *, is_new: bool) -> None:
    """Write what describes a run: at its first start plan.json; env.json; and last config.toml, which makes it a run.

    Raises
    ------
    DiskFull
        It cannot be written.
    """
    if is_new:
        if resolved.climatology is not None:
            digest = write_climate(run, resolved.climatology, resolved.plan.fingerprint)
            resolved = replace(resolved, climatology_sha256=digest)
        write_text(run / PLAN, json.dumps(sealed(to_json(job, resolved)), indent=1) + "\n")
    environment = {
        **versions(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "base": str(job.base.resolve()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_text(run / ENV, json.dumps(sealed(environment), indent=1) + "\n")
    write_text(run / CONFIG, to_toml(without_secrets(job.config)))


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
