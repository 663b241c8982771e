"""The user's functions as bytes for the workers.

Modules next to the config file are pickled by value, so that neither scheduler nor workers need the files. The process
that sends functions never unpickles them: it uses the functions themselves (`sent`). Its classes and modules stay as
they are, and what the user changes in a notebook is seen by the next run.
"""

from __future__ import annotations

import copy
import importlib
import io
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import cloudpickle

from dtrain.algorithm.recipe import Functions
from dtrain.config.functions import Function
from dtrain.errors import UserCodeFailed
from dtrain.runtime.modules import is_local, is_shadowed
from dtrain.runtime.usercode import short_line


def pickle_functions(functions: Functions, base: Path) -> bytes:
    """Return the functions as cloudpickle bytes, with all modules below `base` by value."""
    known = {id(module): module for module in list(sys.modules.values())}  # one may stand there under two names
    local = [module for module in known.values() if is_local(module, base) or is_shadowed(module, base)]
    before, registered = cloudpickle.list_registry_pickle_by_value(), []
    try:
        for module in local:
            if module.__name__ in before:  # by the user, and not ours to take back
                continue
            cloudpickle.register_pickle_by_value(module)
            registered.append(module)
        return _pickled(dict(functions))
    except Exception as error:
        failing = [key for key, function in functions.items() if not _can_be_sent(function)]
        raise UserCodeFailed(
            f"The function given as {', '.join(failing or functions)} cannot be sent to the workers: "
            f"{short_line(error)}",
            "Define what it uses inside it or in a module; open files, locks and clients cannot be sent.",
        ) from error
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def _pickled(value: object) -> bytes:
    written = io.BytesIO()
    _Pickler(written).dump(value)
    return written.getvalue()


def _can_be_sent(function: Function) -> bool:
    try:
        _pickled(function)
    except Exception:  # whatever its parts raise
        return False
    return True


def _reduce_code(code: CodeType) -> tuple[Any, ...]:
    build, parts = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return build, tuple(code.co_filename if part == "<dynamic-code>" else part for part in parts)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles functions so that runs do not meet in the classes of a process.

    It keeps in which files the code is, which errors name; cloudpickle 3.1.3 and later leave it out. It gives classes
    no identity of cloudpickle's, by which unpickling would find a class that is there already and overwrite it.
    """

    dispatch_table = cloudpickle.Pickler.dispatch_table.new_child({CodeType: _reduce_code})

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ModuleType) and type(obj) is not ModuleType and obj.__name__ in sys.modules:
            return importlib.import_module, (obj.__name__,)  # torch.classes, if an attribute is called so
        reduced = super().reducer_override(obj)
        if isinstance(reduced, tuple) and reduced[0].__name__ in ("_make_skeleton_class", "_make_skeleton_enum"):
            build, (*described, _, extra), *rest = reduced
            return (build, (*described, None, extra), *rest)
        return reduced


def unpickle_functions(code: bytes) -> dict[str, Function]:
    """Return the functions; their modules need not be importable here."""
    live = live_functions(code)
    if live is not None:
        return live
    functions: dict[str, Function] = cloudpickle.loads(code)
    return functions


# In the process that sends them -----------------------------------------------------------------------------

_LIVE: dict[bytes, list[dict[str, Function]]] = {}
"""By their bytes: the functions of this process that are in use; one entry for each use."""
_LOCK = threading.Lock()


@contextmanager
def sent(functions: Functions, base: Path) -> Iterator[bytes]:
    """Give the functions as bytes; in this process `unpickle_functions` returns the functions themselves meanwhile."""
    code = pickle_functions(functions, base)
    live = {key: function if key == "model" else _own_copy(function) for key, function in functions.items()}
    with _LOCK:
        _LIVE.setdefault(code, []).append(live)
    try:
        yield code
    finally:
        with _LOCK:
            _LIVE[code] = [other for other in _LIVE[code] if other is not live]
            if not _LIVE[code]:
                del _LIVE[code]


def _own_copy(function: Function) -> Function:
    """Return a copy of an object that a run calls: what it counts or collects stays out of the user's own one.

    Functions and classes are returned themselves, and so is an object that cannot be copied.
    """
    try:
        return copy.deepcopy(function)
    except Exception:  # whatever its parts raise
        return function


def live_functions(code: bytes) -> dict[str, Function] | None:
    """Return the functions if this process has sent them and still uses them."""
    with _LOCK:
        return _LIVE[code][-1] if code in _LIVE else None
