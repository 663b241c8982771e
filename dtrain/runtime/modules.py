"""Whose code a module is: the user's, in the directory of the config or elsewhere, or an installed package."""

from __future__ import annotations

import inspect
import os
import sysconfig
from pathlib import Path
from types import ModuleType

from dtrain.config.functions import Function

_PLACES = (Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_INSTALLED = tuple(f"{place}{os.sep}" for place in _PLACES)
_OURS = ("dtrain", "dtrain_cli")


def file_in(base: Path, name: str) -> Path | None:
    """Return the file below `base` that the name of a module means."""
    stem = base.joinpath(*name.split("."))
    return next((file for file in (stem / "__init__.py", stem.with_suffix(".py")) if file.is_file()), None)


def directory_of(function: Function) -> Path:
    """Return the directory of the file that defines a function; the working directory for a notebook's."""
    file = file_of(function)
    return Path.cwd() if file is None else file.parent


def file_of(function: Function) -> Path | None:
    """Return the file that defines a function; None for one typed at a prompt."""
    try:
        file = Path(inspect.getfile(inspect.unwrap(function)))
    except (TypeError, OSError):
        return None
    return file.resolve() if file.is_file() else None


def is_local(module: ModuleType, base: Path) -> bool:
    """Whether a module is the user's and lies below `base`."""
    return _is_users(module) and is_below(base, Path(str(module.__file__)))


def is_shadowed(module: ModuleType, base: Path) -> bool:
    """Whether a module from elsewhere has the name of one in `base`."""
    top = str(getattr(module, "__name__", "")).partition(".")[0]
    return _is_users(module) and file_in(base, top) is not None and not is_below(base, Path(str(module.__file__)))


def _is_users(module: ModuleType) -> bool:
    file, name = getattr(module, "__file__", None), str(getattr(module, "__name__", ""))
    if not file or name == "__main__" or name.partition(".")[0] in _OURS:
        return False
    return not is_installed(file)


def is_below(base: Path, file: Path) -> bool:
    """Whether a file lies below `base`, and not in an environment of packages there."""
    return not is_installed(file) and file.resolve().is_relative_to(base.resolve())


def is_installed(file: str | Path) -> bool:
    """Whether a file belongs to the standard library or an installed package."""
    text = str(file)  # a process has thousands of modules: most need neither a path object nor a look at the disk
    return text.startswith(_INSTALLED) or os.path.realpath(text).startswith(_INSTALLED)
