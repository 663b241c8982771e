"""The user's functions: found by reference, and called so that their errors say where they happened."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from dtrain.errors import DtrainError, InvalidConfig, OutOfMemory, UserCodeFailed, did_you_mean, one_line
from dtrain.runtime.modules import file_in, is_installed, is_local, is_shadowed

_IMPORTED: dict[str, tuple[Path, Path, bytes]] = {}
"""Modules that were imported from next to a config: its directory, the file, and the file's text at that time."""


def load_function(key: str, reference: str, base: Path) -> Callable[..., Any]:
    """Return the function that ``module:function`` names: a file next to the config, or an installed module.

    Raises
    ------
    InvalidConfig
        There is no such module or function.
    UserCodeFailed
        Importing the module raised an exception.
    """
    module_name, colon, name = reference.partition(":")
    if not colon or not name:
        raise InvalidConfig(f'{key} = "{reference}": write it as "module:function".')
    if module_name == "__main__":
        raise InvalidConfig(
            f'{key} = "{reference}" was defined in a notebook or script, and is not there any more.',
            "Give the function again: dtrain.load_run(path, model=build).",
        )
    stem = base.joinpath(*module_name.split("."))
    local = file_in(base, module_name) is not None
    _forget_others(base.resolve(), module_name)
    if not local:
        try:
            found = importlib.util.find_spec(module_name)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise InvalidConfig(
                f'{key} = "{reference}": there is no {stem.with_suffix(".py")}, and no module {module_name} is '
                "installed."
            )
    with user_code(f'Importing {module_name} for {key} = "{reference}"'):
        module = _import_from(base.resolve(), module_name) if local else importlib.import_module(module_name)
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        known = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module_name]
        raise InvalidConfig(
            f'{key} = "{reference}": {module_name} has no function {name}{did_you_mean(name, known)}',
            f"It has {', '.join(known) or 'no functions'}.",
        )
    function: Callable[..., Any] = value
    return function


def _import_from(base: Path, name: str) -> ModuleType:
    before = set(sys.modules)
    importlib.invalidate_caches()
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # it hides a change made within the same second
    sys.path.insert(0, str(base))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(base))
        sys.dont_write_bytecode = writes
        for new in sys.modules.keys() - before:
            if is_local(sys.modules[new], base):
                file = Path(str(sys.modules[new].__file__))
                _IMPORTED[new] = (base, file, file.read_bytes())


def _forget_others(base: Path, name: str) -> None:
    """Drop modules that would be imported in place of those of `base`: from another base, or with changed files.

    Unchanged modules of `base` stay, so that the functions of one config share their classes.
    """
    doomed = {other for other, module in list(sys.modules.items()) if is_shadowed(module, base)}
    if file_in(base, name):
        doomed |= {n for n in sys.modules if n.partition(".")[0] == name.partition(".")[0]} - _IMPORTED.keys()
    if any(_is_stale(*imported, base) for imported in _IMPORTED.values()):
        doomed |= _IMPORTED.keys()
    for other in doomed:
        sys.modules.pop(other, None)
        _IMPORTED.pop(other, None)


def _is_stale(imported_from: Path, file: Path, text: bytes, base: Path) -> bool:
    return imported_from != base or not file.is_file() or file.read_bytes() != text


@contextmanager
def user_code(doing: str, hint: str = "") -> Iterator[None]:
    """Turn an exception of the user's code into `UserCodeFailed` that says where it happened.

    Parameters
    ----------
    doing : str
        Begins the message.
    hint : str
        What the user's code may have overlooked.

    Raises
    ------
    UserCodeFailed, OutOfMemory
    """
    try:
        yield
    except DtrainError:
        raise
    except Exception as error:
        text = short_line(error)
        if isinstance(error, MemoryError) or "can't allocate memory" in text:
            raise OutOfMemory(
                f"{doing}: out of memory: {text}",
                "Use a smaller train.batch_size or train.micro_batch, or give the workers more memory.",
            ) from error
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if not Path(f.filename).resolve().is_relative_to(Path(__file__).resolve().parents[1])]
        users = [f for f in own if not f.filename.startswith("<frozen ") and not is_installed(Path(f.filename))]
        where = f" ({Path(users[-1].filename).name}:{users[-1].lineno})" if users else ""
        raise UserCodeFailed(
            f"{doing} raised {type(error).__name__}: {text}{where}",
            f"{hint} Run with --debug to see the traceback.".lstrip(),
        ) from error


def short_line(error: BaseException) -> str:
    """Return an exception's text in one line of at most 300 characters."""
    text = one_line(error)
    return text if len(text) <= 300 else text[:297] + "..."
