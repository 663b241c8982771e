"""Functions in a configuration that comes from Python: each is replaced by its name, and kept beside the tables."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

from dtrain.errors import InvalidConfig

Function: TypeAlias = Callable[..., Any]
"""A function, a class, or an object that can be called, of the user's."""
Given: TypeAlias = dict[str, Function]
"""By config key, with the name for metrics (``train.metrics.module:function``): a function or callable object."""

KEYS = ("model", "train.loss", "train.optimizer", "train.schedule", "average.outer.schedule", "data.transform")
"""Keys whose value may be a function."""
METRICS, TRACKERS = "train.metrics", "run.trackers"
LISTS = (METRICS, TRACKERS)
"""Keys whose value is a list that may hold functions."""
OPTIMIZERS = ("train.optimizer", "average.outer.optimizer")
"""Keys whose value may be a class of ``torch.optim``: it stands for its name."""


def take_functions(tables: Mapping[str, Any]) -> tuple[dict[str, Any], Given]:
    """Return nested tables with names in place of functions, and the functions.

    Raises
    ------
    InvalidConfig
        ``train.metrics`` or ``run.trackers`` is a function, not a list.
    """
    named, given = dict(tables), Given()
    for key in OPTIMIZERS:
        value = value_at(named, key)
        if isinstance(value, type) and value.__module__.startswith("torch.optim"):
            named = _with(named, key, value.__name__.lower())
    for key in KEYS:
        if callable(value := value_at(named, key)):
            named, given[key] = _with(named, key, name_of(value)), value
    for key in LISTS:
        values = value_at(named, key)
        if callable(values):
            raise InvalidConfig(
                f"{key} is {described(values)}; it is a list.", f"Write {key.rpartition('.')[2]}=[...]."
            )
        if isinstance(values, list | tuple):
            given |= {f"{key}.{name_of(value)}": value for value in values if callable(value)}
            named = _with(named, key, tuple(name_of(value) if callable(value) else value for value in values))
    return named, given


def name_of(function: Function | str) -> str:
    """Return the name under which a configuration keeps a function.

    ``module:function`` for a function or class, ``module:<lambda>`` for a lambda, and ``module:name()`` for what is
    found under no name: a partial has the name of its function, an object that of its class, and both have the name
    that their attribute ``__name__`` gives.

    >>> name_of(print), name_of(partial(print, 3)), name_of(dict), name_of([].index)
    ('builtins:print', 'builtins:print()', 'builtins:dict', 'builtins:list.index()')
    """
    if isinstance(function, str):
        return function
    inner: Any = function
    while isinstance(inner, partial):
        inner = inner.func
    module, qualified, is_found = _place(inner)
    last = qualified.rpartition(".")[2]
    own = getattr(function, "__name__", last)
    if is_found and inner is function and own == last:
        return f"{module}:{qualified}"
    return f"{module}:{qualified if own == last else own}()"


def _place(function: Any) -> tuple[str, str, bool]:
    """Return the module of a function or an object, its name there, and whether it is found by that name."""
    owner = getattr(function, "__self__", None)
    if isinstance(function, BuiltinFunctionType):
        module, name, is_found = function.__module__, function.__name__, isinstance(owner, ModuleType | type | None)
        if not is_found:
            module, name = type(owner).__module__, function.__qualname__
    elif isinstance(function, MethodType):
        module, name, is_found = function.__module__, function.__qualname__, isinstance(owner, type)
    elif isinstance(function, type | FunctionType) or hasattr(function, "__wrapped__"):
        module, name, is_found = function.__module__, function.__qualname__, True
    else:
        module, name, is_found = type(function).__module__, type(function).__qualname__, False
    return module or "builtins", name.replace("<locals>.", ""), is_found


def takes_weight(function: Function) -> bool:
    """Whether the third argument of a loss or metric is the weight of samples (``data.weight``).

    It must be given, or be named as one. Those of torch have other third arguments, such as weights of classes.

    >>> takes_weight(lambda outputs, targets, weight=None: 0), takes_weight(lambda outputs, targets, eps=1e-6: 0)
    (True, False)
    """
    owner = function if hasattr(function, "__qualname__") else type(function)
    if (getattr(owner, "__module__", None) or "").startswith("torch."):
        return False
    try:
        parameters = inspect.signature(getattr(function, "forward", function)).parameters.values()
    except (TypeError, ValueError):  # of a function written in C
        return False
    third = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][2:3]
    if not third:
        return any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return third[0].default is inspect.Parameter.empty or "weight" in third[0].name


def described(value: Any) -> str:
    """Return what a value is, for a message: without an address."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = getattr(value, "__name__", "")
    return f"the function {name}" if name else f"an object of {type(value).__name__}"


def value_at(tables: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key of nested tables; None if there is none."""
    value: Any = tables
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _with(tables: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {**tables, head: _with(tables[head], rest, value) if rest else value}
