"""Open runs: by their directory, or the last one. Opening a run runs no code from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain.algorithm.recipe import Functions
from dtrain.committed import check_history
from dtrain.config.compare import keys_not_kept, without_secrets
from dtrain.config.files import with_setting
from dtrain.config.functions import Function, value_at
from dtrain.config.schema import TrainConfig
from dtrain.description import read_config_of, read_env, read_tables_of
from dtrain.directory import newest_run
from dtrain.errors import InvalidConfig
from dtrain.project import RunCode, given_functions
from dtrain.run import Run

EVALUATION_KEYS = ("storage_options", "memory", "cache", "reader", "missing", "non_finite")
"""Keys of ``[data]`` that do not make a run another one."""
VIEW_KEYS = (
    "isel",
    "sel",
    "dims",
    "group",
    "inputs",
    "targets",
    "sample_dim",
    "input_offsets",
    "target_offsets",
    "stride",
    "patch",
)
"""Keys of ``[data]`` that may differ from the run's in samples that are evaluated (`Run.other_samples`)."""


def is_view(setting: str) -> bool:
    """Return True for a ``--set`` of one of `VIEW_KEYS`."""
    return _is_of(setting, [f"data.{key}" for key in VIEW_KEYS])


def _is_of(setting: str, keys: Sequence[str]) -> bool:
    key = setting.partition("=")[0].strip()
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def _with_settings(tables: dict[str, Any], settings: tuple[str, ...]) -> TrainConfig:
    allowed = (*(f"data.{key}" for key in EVALUATION_KEYS), "cluster")
    for setting in settings:
        if not _is_of(setting, allowed) and not _gives_secret(tables, setting):
            raise InvalidConfig(
                f"--set {setting.partition('=')[0].strip()}: of a run that is evaluated it cannot be set.",
                f"Allowed are {', '.join(f'data.{key}' for key in (*EVALUATION_KEYS, *VIEW_KEYS))} and cluster.*.",
            )
        tables = with_setting(tables, setting)
    return TrainConfig(**tables)


def _gives_secret(tables: dict[str, Any], setting: str) -> bool:
    """Return True if a setting is a URL as the run has it, with what the run has not kept."""
    own = TrainConfig(**tables)
    key = setting.partition("=")[0].strip()
    if not any(key == one or key.startswith(f"{one}.") for one in keys_not_kept(own)):
        return False
    given = without_secrets(TrainConfig(**with_setting(tables, setting)))
    before, now = (config.model_dump(exclude={"data": {"storage_options"}}) for config in (own, given))
    if before != now:
        raise InvalidConfig(
            f"--set {key}: it is not what the run has, {json.dumps(value_at(own.model_dump(mode='json'), key))}.",
            "Give the same with what is left out; eval and predict take other data with --data.",
        )
    return True


def load_run(
    path: str | Path,
    *,
    model: Function | None = None,
    loss: Function | None = None,
    metrics: Function | Sequence[Function | str] | None = None,
    optimizer: Function | None = None,
    schedule: Function | None = None,
    outer_schedule: Function | None = None,
    transform: Function | None = None,
    project: str | Path | None = None,
    trust_code: bool = False,
    settings: tuple[str, ...] = (),
) -> Run:
    """Open a run. Nothing is imported before its model is built or evaluated.

    Parameters
    ----------
    path : path
        The run's directory.
    model, loss, metrics, optimizer, schedule, outer_schedule, transform : callable, optional
        Functions of the run that are not found by name, since they were defined in a notebook or script: those that
        it was trained with. `metrics` may be several. The run's model needs `model`; an evaluation also `loss`,
        `metrics` and `transform`. ``dtrain.train(config=run.config, ...)`` continues with all of them.
    project : path, optional
        Directory of the dtrain.toml whose names of functions are used; by default the one that holds ``runs/``.
        Without a dtrain.toml, functions of modules that this program has imported are used.
    trust_code : bool
        Use functions that differ from those that the run was trained with. A warning says so.
    settings : tuple of str
        ``"data.memory=1GB"``: keys of ``[data]`` and ``[cluster]`` that change where and how fast it is evaluated,
        or how faults of the data are met; and what may hold secrets, which a run does not keep:
        ``data.storage_options``, and a URL of which the run has not kept all.

    Raises
    ------
    RunNotFound
        There is no run at the path.
    InvalidConfig
        A setting would make it another run, or the run has no function in the place of one that is given.
    RunConflict
        When a function is used: it is not the one that the run was trained with.

    Examples
    --------
    >>> run = dtrain.load_run("runs/run-1", model=build, loss=my_loss)  # doctest: +SKIP
    >>> run.evaluate(split="test")  # doctest: +SKIP
    """
    schedules = {"schedule": schedule, "outer_schedule": outer_schedule}
    given = {"model": model, "loss": loss, "optimizer": optimizer, **schedules, "transform": transform}
    return open_run(Path(path), {**given, "metrics": metrics}, project=project, trusted=trust_code, settings=settings)


def open_run(
    directory: Path,
    given: Mapping[str, Any] | None = None,
    *,
    project: str | Path | None = None,
    trusted: bool = False,
    settings: tuple[str, ...] = (),
    imported: bool = True,
) -> Run:
    """Open a run as `load_run` does; without `imported`, only a dtrain.toml names functions."""
    config = read_config_of(directory)
    check_history(directory)
    if settings:
        config = _with_settings(read_tables_of(directory), settings)
    base = Path(read_env(directory)["base"])
    functions = given_functions(config, **(given or {}))
    code = RunCode(
        run=directory,
        given=functions,
        project=None if project is None else Path(project),
        trusted=trusted,
        imported=imported,
        base=base,
    )
    return Run(directory, config.with_functions(functions), base, code=code)


_TRAINED: dict[Path, Functions] = {}
"""By directory: the functions of the runs that this process has begun in Python."""


def remember(directory: Path, functions: Functions) -> None:
    """Remember the functions of a run for `last_run`."""
    _TRAINED[directory.absolute()] = functions


def last_run(**arguments: Any) -> Run:
    """Open the run that was written last: of ``runs/*`` and ``*/runs/*`` here, and of those of this process.

    A run that this process has trained, or was interrupted in, still has its functions.

    Parameters
    ----------
    **arguments
        As of `load_run`.

    Raises
    ------
    RunNotFound
        There is none.
    """
    directory = newest_run(_TRAINED)
    if arguments or directory.absolute() not in _TRAINED:
        return load_run(directory, **arguments)
    functions, opened = _TRAINED[directory.absolute()], load_run(directory)
    return replace(opened, config=opened.config.with_functions(functions), functions=functions)
