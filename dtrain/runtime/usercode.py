"""The user's functions: found by reference, and called so that their errors say where they happened."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from dtrain.algorithm.metrics.torchmetric import torchmetric_of
from dtrain.config.functions import METRICS, Function, described, name_of, takes_weight
from dtrain.config.names import metric_key
from dtrain.errors import (
    DtrainError,
    InvalidConfig,
    OutOfMemory,
    UserCodeFailed,
    did_you_mean,
    listed,
    one_line,
    shortened,
)
from dtrain.runtime.modules import file_in, is_installed, is_local, is_shadowed

MOST_NAMES = 20
"""Names that a message lists."""
_IMPORTED: dict[str, tuple[Path, Path, bytes]] = {}
"""Modules that were imported from next to a config: its directory, the file, and the file's text at that time."""


def load_function(key: str, reference: str, base: Path) -> Function:
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
    if is_unfindable(reference):
        raise unfindable({key: reference})
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
                "installed.",
                'Install it here and on the workers: pip install "dtrain[metrics]".'
                if module_name.partition(".")[0] == "torchmetrics"
                else "",
            )
    with user_code(f'Importing {module_name} for {key} = "{reference}"'):
        module = _import_from(base.resolve(), module_name) if local else importlib.import_module(module_name)
    return _function_in(module, key, reference)


def imported_function(key: str, reference: str) -> Function | None:
    """Return the function that ``module:function`` names, if the program has imported a module of the user's by it.

    Nothing is imported: the name may come from elsewhere. Nor are installed packages looked at, since it could mean any
    of their functions.
    """
    module = sys.modules.get(reference.partition(":")[0])
    file = getattr(module, "__file__", None)
    if module is None or not file or is_installed(Path(file)):
        return None
    try:
        return _function_in(module, key, reference)
    except InvalidConfig:  # it was defined inside another function
        return None


def _function_in(module: ModuleType, key: str, reference: str) -> Function:
    module_name, _, name = reference.partition(":")
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module_name]
        known = own or list(getattr(module, "__all__", ()))  # a package has those of its modules
        raise InvalidConfig(
            f'{METRICS if key.startswith(METRICS) else key} = "{reference}": {module_name} has no function '
            f"{name}{did_you_mean(name, known)}",
            f"It has {listed(known, MOST_NAMES) or 'no functions'}.",
        )
    function: Function = value
    return function


def is_unfindable(reference: str) -> bool:
    """Whether a function was given in Python and is found under no name: of a notebook, a lambda, an object."""
    return reference.startswith("__main__:") or reference.endswith(("()", "<lambda>"))


def unfindable(references: Mapping[str, str], run: str = "path", then: str = "") -> InvalidConfig:
    """Return the error for functions that only the Python program has that they were given in.

    Parameters
    ----------
    references : mapping of str to str
        Their names by config key.
    run : str
        How Python writes the run's path.
    then : str
        What is called on the run.
    """
    named = ", ".join(f'{METRICS if key.startswith(METRICS) else key} = "{name}"' for key, name in references.items())
    typed = all(name.startswith("__main__:") for name in references.values())
    one = len(references) == 1
    return InvalidConfig(
        f"{named} {'was' if one else 'were'} {'defined in a notebook or script' if typed else 'given in Python'}: "
        f"{'it is' if one else 'they are'} not found by name.",
        f"Give {'it' if one else 'them'} again in Python: dtrain.load_run({run}, {_arguments(references)}){then}.",
    )


def _arguments(references: Mapping[str, str]) -> str:
    """Return the arguments of `load_run` that give functions, as a program most likely writes them."""
    single = {key.rpartition(".")[2]: name for key, name in references.items() if not key.startswith(METRICS)}
    arguments = [f"{key}={key if '<' in metric_key(name) else metric_key(name)}" for key, name in single.items()]
    metrics = [metric_key(name) for key, name in references.items() if key.startswith(METRICS)]
    return ", ".join([*arguments, *([f"metrics=[{', '.join(metrics)}]"] if metrics else [])])


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


# What a function must be ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Call:
    """How dtrain calls a function of a key."""

    arguments: tuple[str, ...]
    returns: str

    def __str__(self) -> str:
        return f"({', '.join(self.arguments)}) -> {self.returns}"


CALLS = {
    "train.loss": _Call(("outputs", "targets"), "the mean over the batch"),
    METRICS: _Call(("outputs", "targets"), "the mean over the batch"),
    "train.schedule": _Call(("step", "total"), "factor on the learning rate"),
    "average.outer.schedule": _Call(("round", "rounds"), "factor on the outer learning rate"),
    "train.optimizer": _Call(("parameters",), "torch.optim.Optimizer"),
    "data.transform": _Call(("batch", "generator"), "batch"),
}
"""By config key."""
COMPARING = ("train.loss", METRICS)
"""Keys of functions that compare outputs with targets."""


def checked_function(key: str, function: Function, *, weighted: bool = False) -> Function:
    """Return a function if it can be called as dtrain calls that of a key.

    With `weighted` samples have a weight: losses get it as third argument, and metrics that take one.

    Raises
    ------
    InvalidConfig
        It is a class in place of an object, a schedule of torch, or takes other arguments.
    """
    key = METRICS if key.startswith(METRICS) else key
    call = CALLS.get(key)
    if key == METRICS and _is_metric_object(function):
        return function
    if call is None:
        return function
    if weighted and key in COMPARING and takes_weight(function):
        call = replace(call, arguments=(*call.arguments, "weight"))
    if _is_of(function, "torch.optim.lr_scheduler"):
        raise InvalidConfig(
            f"{key} is {described(function)} of torch, which counts its own steps.",
            f"Write a function {call}, for example lambda step, total: 0.99**step.",
        )
    if isinstance(function, type) and key != "train.optimizer":
        raise InvalidConfig(
            f"{key} is {described(function)}; a function {call} is needed, or an object that is called so.",
            f"Make the object: {function.__name__}(...).",
        )
    try:
        signature = inspect.signature(getattr(function, "forward", function))
    except (TypeError, ValueError):  # of a function written in C
        return function
    bind = signature.bind_partial if key == "train.optimizer" else signature.bind  # it also gets train.optimizer_args
    try:
        bind(*call.arguments)
    except TypeError as error:
        raise InvalidConfig(
            f"{key} is {described(function)}{signature}, which cannot be called with {len(call.arguments)} "
            f"{'argument' if len(call.arguments) == 1 else 'arguments'}: {error}.",
            f"It is called as {call}." + _lacks_weight(key, weighted, function),
        ) from None
    return function


def _is_metric_object(function: Function) -> bool:
    """Whether a function given as a metric is a class of torchmetrics, an object, or makes one; refuses unfit ones."""
    with user_code(f"The metric {metric_key(name_of(function))}"):
        return torchmetric_of(function) is not None


def _lacks_weight(key: str, weighted: bool, function: Function) -> str:
    is_left_out = key in COMPARING and not weighted and takes_weight(function)
    return ' With data.weight = "VARIABLE" a third argument is the weight.' if is_left_out else ""


def _is_of(value: Any, module: str) -> bool:
    kind = value if isinstance(value, type) else type(value)
    return any(base.__module__.startswith(module) for base in kind.__mro__)


def _is_stale(imported_from: Path, file: Path, text: bytes, base: Path) -> bool:
    return imported_from != base or not file.is_file() or file.read_bytes() != text


@contextmanager
def user_code(doing: str, hint: str = "") -> Iterator[None]:
    """Turn an exception of the user's code into `UserCodeFailed` that says where it happened.

    Also one that would end the process, such as SystemExit; but not Ctrl-C or SIGTERM, which come to the main thread.

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
    except BaseException as error:
        if isinstance(error, DtrainError) or _is_signal(error):
            raise
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


def _is_signal(error: BaseException) -> bool:
    """Whether an exception stands for a signal, or is dtrain's own."""
    is_main = threading.current_thread() is threading.main_thread()
    own = type(error).__module__.partition(".")[0] in ("dtrain", "dtrain_cli")
    return own or (is_main and isinstance(error, KeyboardInterrupt))


def short_line(error: BaseException) -> str:
    """Return an exception's text in one line of at most 300 characters."""
    return shortened(one_line(error), 300)
