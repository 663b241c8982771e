"""The code of a run that is opened: functions that are given, or that the project's dtrain.toml names.

The files of a run name functions too, but a run may come from elsewhere: no command runs what they name. Code that
differs from that of the run's start is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.algorithm.recipe import Functions
from dtrain.config.files import read_tables
from dtrain.config.functions import METRICS, Function, name_of, value_at
from dtrain.config.names import FUNCTION, metric_key
from dtrain.config.schema import TrainConfig
from dtrain.display import shown
from dtrain.errors import InvalidConfig, RunConflict
from dtrain.job import checked, references_in
from dtrain.resolved import Resolved
from dtrain.runtime.codetext import source_sha256
from dtrain.runtime.modules import directory_of
from dtrain.runtime.usercode import imported_function, is_unfindable, load_function, unfindable

LOG = logging.getLogger("dtrain")
FILES = ("dtrain.toml", "dtrain.yaml", "dtrain.yml", "dtrain.json")
"""Config files of a project."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCode:
    """Where the functions of an opened run come from."""

    run: Path
    """The run's directory."""
    given: Functions
    """By config key of the run."""
    project: Path | None = None
    """Directory of the dtrain.toml that names functions, or the file itself; None: that which holds ``runs/``."""
    trusted: bool = False
    """Changed code is used, with a warning."""
    imported: bool = True
    """Without a dtrain.toml, functions of modules that the program has imported are used. Python only."""
    base: Path = Path()
    """The directory that relative modules were looked up in when the run was started; nothing is imported from it."""

    @property
    def project_file(self) -> Path | None:
        """The project's config file."""
        place = self.run.absolute().parent.parent if self.project is None else self.project
        if place.is_file():
            return place
        return next((place / name for name in FILES if (place / name).is_file()), None)


ARGUMENTS = {"model": "model", "transform": "data.transform", "outer_schedule": "average.outer.schedule"}
"""Arguments whose config key is not ``train.NAME``."""


def given_functions(config: TrainConfig, **arguments: Any) -> Functions:
    """Return functions that are given for a run, by the keys of its configuration.

    Parameters
    ----------
    config : TrainConfig
        The run's.
    **arguments
        ``model``, ``loss``, ``optimizer``, ``schedule``, ``outer_schedule`` and ``transform``: a function or None.
        ``metrics``: a function, several, or None.

    Raises
    ------
    InvalidConfig
        The run has no function in that place.
    """
    references, given = references_in(config), dict[str, Function]()
    metrics = arguments.pop("metrics", None)
    for argument, function in arguments.items():
        key = ARGUMENTS.get(argument, f"train.{argument}")
        if function is not None:
            _check_given(argument, function, references.get(key))
            given[key] = function
    for metric in [metrics] if callable(metrics) else list(metrics or ()):
        if callable(metric):  # a list may be that of the configuration, names among it
            given[_metric_of(metric, references)] = metric
    return given


def _check_given(argument: str, function: Any, reference: str | None) -> None:
    if not callable(function):
        raise InvalidConfig(f"{argument} = {function!r:.80}: a function is needed.")
    if reference is None:
        raise InvalidConfig(
            f"{argument} = {name_of(function)}: the run has no function there.", f"Leave {argument} out."
        )


def _metric_of(metric: Function, references: Mapping[str, str]) -> str:
    """Return the key of the run's metric that a function is: of the same name, else reported with the same name."""
    name = name_of(metric)
    own = {key: reference for key, reference in references.items() if key.startswith(METRICS)}
    if f"{METRICS}.{name}" in own:
        return f"{METRICS}.{name}"
    alike = [key for key, reference in own.items() if metric_key(reference) == metric_key(name)]
    if not alike:
        known = ", ".join(map(metric_key, own.values())) or "none"
        raise InvalidConfig(
            f"metrics: the run has no metric {metric_key(name)}.", f"Its functions among train.metrics: {known}."
        )
    return alike[0]


def load_code(code: RunCode, config: TrainConfig, resolved: Resolved, keys: Sequence[str]) -> Functions:
    """Return the functions of a run that are needed, once they are known to be those of its start.

    Parameters
    ----------
    code : RunCode
    config : TrainConfig
        The run's.
    resolved : Resolved
        The run's.
    keys : sequence of str
        Prefixes of config keys: ``model``, ``train.loss`` ...

    Raises
    ------
    InvalidConfig
        A function is found nowhere.
    RunConflict
        A function differs from that of the run's start.
    """
    wanted = {key: name for key, name in references_in(config).items() if key.startswith(tuple(keys))}
    named = {key: name for key, name in wanted.items() if key not in code.given}
    loaded = _load_named(code, named) if named else {}
    found = {key: code.given[key] if key in code.given else loaded[key] for key in wanted}
    functions = checked(found, config.data.weight)
    changed = [
        key
        for key, function in functions.items()
        if metric_key(name_of(function)) != metric_key(wanted[key]) or not _is_same(code, key, function, resolved)
    ]
    if changed:
        _refuse_changed(code, changed)
    return functions


# Names ----------------------------------------------------------------------------------------------------------


def _load_named(code: RunCode, wanted: Mapping[str, str]) -> Functions:
    """Return functions by the names of the project's config file; in Python also those that the program has."""
    if typed := {key: name for key, name in wanted.items() if is_unfindable(name)}:
        raise _not_here(code, typed)
    file = code.project_file
    if file is None and not code.imported:
        place = code.project or shown(code.run.absolute().parent.parent)
        raise InvalidConfig(
            f"{place} has no dtrain.toml, which names the functions of {shown(code.run)}.",
            "Name its directory, or the config file: --project DIR. A run of a Python program is opened there: "
            + _call(code, wanted),
        )
    names = {} if file is None else references_in_file(file)
    differing = {key: name for key, name in wanted.items() if names.get(key, "") != name}
    if code.imported:
        own = {key: _imported(code, key, name) for key, name in differing.items()}
    else:
        own = {}
        refused = {key: name for key, name in differing.items() if not (code.trusted and _is_function(names, key))}
        if refused:
            raise _other_names(code, file, refused, names)
    base = Path.cwd() if file is None else file.absolute().parent
    return {key: own[key] if key in own else load_function(key, names[key], base) for key in wanted}


def _is_function(names: Mapping[str, str], key: str) -> bool:
    return bool(FUNCTION.match(names.get(key, "")))


def references_in_file(file: Path) -> dict[str, str]:
    """Return the names of functions in a config file by key; nothing else of it is looked at."""
    tables = read_tables(file)
    names = {key: _text(tables, key) for key in ("model", "train.loss", "data.transform")}
    metrics = value_at(tables, METRICS)
    listed = [name for name in metrics if isinstance(name, str)] if isinstance(metrics, list) else []
    return {**names, **{f"{METRICS}.{name}": name for name in listed}}


def _text(tables: Mapping[str, Any], key: str) -> str:
    value = value_at(tables, key)
    return value if isinstance(value, str) else ""


def _imported(code: RunCode, key: str, reference: str) -> Function:
    function = imported_function(key, reference)
    if function is None:
        raise _not_here(code, {key: reference})
    return function


def _other_names(
    code: RunCode, file: Path | None, differing: Mapping[str, str], names: Mapping[str, str]
) -> RunConflict:
    has = "; ".join(
        f'{_plain_key(key)} was "{name}", and there it is "{names.get(key, "")}"'
        if not key.startswith(METRICS)
        else f'train.metrics had "{name}", which is not there'
        for key, name in list(differing.items())[:3]
    )
    return RunConflict(
        f"{shown(code.run)} was started with other functions than {shown(file or Path())} names: {has}.",
        "Name them there, or name another project: --project DIR. --trust-code takes functions that are named there.",
    )


def _not_here(code: RunCode, references: Mapping[str, str]) -> InvalidConfig:
    return unfindable(references, f'"{shown(code.run)}"', "" if code.imported else ".evaluate()")


def _call(code: RunCode, wanted: Mapping[str, str]) -> str:
    return _not_here(code, wanted).hint.rpartition("Python: ")[2]


# Changed code -----------------------------------------------------------------------------------------------------


def _is_same(code: RunCode, key: str, function: Function, resolved: Resolved) -> bool:
    """Whether a function is that of the run's start; imports are looked up where the function may lie now."""
    file, before = code.project_file, resolved.code.get(key)
    places = (code.base, Path.cwd() if file is None else file.absolute().parent, directory_of(function))
    bases = {place.resolve() for place in places}
    return any(source_sha256(function, base, resolved.code_rules) == before for base in bases)


def _refuse_changed(code: RunCode, changed: Sequence[str]) -> None:
    text = f"{shown(code.run)} was started with other code of {', '.join(map(_plain_key, changed))}."
    if not code.trusted:
        raise RunConflict(
            text,
            "Undo the change, or take the code as it is now: --trust-code, in Python load_run(..., trust_code=True).",
        )
    LOG.error("%s The code of now is trusted and used: the values may not be those of the run.", text)


def _plain_key(key: str) -> str:
    return METRICS if key.startswith(METRICS) else key
