"""The user's functions as bytes for the workers.

Modules next to the config file are pickled by value, so that neither scheduler nor workers need the files.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import cloudpickle

from dtrain.algorithm.recipe import Functions
from dtrain.errors import UserCodeFailed
from dtrain.runtime.modules import is_local, is_shadowed
from dtrain.runtime.usercode import short_line


def pickle_functions(functions: Functions, base: Path) -> bytes:
    """Return the functions as cloudpickle bytes, with all modules below `base` by value."""
    known = list(sys.modules.values())
    local = [module for module in known if is_local(module, base) or is_shadowed(module, base)]
    before, registered = cloudpickle.list_registry_pickle_by_value(), []
    try:
        for module in local:
            if module.__name__ in before:  # by the user, and not ours to take back
                continue
            cloudpickle.register_pickle_by_value(module)
            registered.append(module)
        written = io.BytesIO()
        _Pickler(written).dump(dict(functions))
        return written.getvalue()
    except Exception as error:
        raise UserCodeFailed(
            f"The functions {', '.join(functions)} cannot be sent to the workers: {short_line(error)}",
            "Define what they use inside them or in a module; open files, locks and clients cannot travel.",
        ) from error
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def _reduce_code(code: CodeType) -> tuple[Any, ...]:
    build, parts = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return build, tuple(code.co_filename if part == "<dynamic-code>" else part for part in parts)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Keeps in which files the code is, which errors name; cloudpickle 3.1.3 and later leave it out."""

    dispatch_table = cloudpickle.Pickler.dispatch_table.new_child({CodeType: _reduce_code})


def unpickle_functions(code: bytes) -> dict[str, Callable[..., Any]]:
    """Return the functions; their modules need not be importable here."""
    functions: dict[str, Callable[..., Any]] = cloudpickle.loads(code)
    return functions
