"""The user's functions: found by reference, carried to the workers as bytes, identified by their source text.

Modules next to the config file are pickled by value, so that neither scheduler nor workers need the files.
cloudpickle's bytes differ from process to process; the identity of code is therefore the SHA-256 of its text.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import cloudpickle

from dtrain.errors import DtrainError, InvalidConfig, OutOfMemory, UserCodeFailed, did_you_mean

Functions = Mapping[str, Callable[..., Any]]
"""By config key (``model``, ``train.loss``, ``train.metrics.NAME`` ...): a function of the user's."""

_INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_OURS = ("dtrain", "dtrain_cli")


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
    local = stem.with_suffix(".py").is_file() or (stem / "__init__.py").is_file()
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
        module = _import_fresh(module_name, base) if local else importlib.import_module(module_name)
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


def _import_fresh(name: str, base: Path) -> ModuleType:
    """Import a module from `base`, even if one of that name was imported from elsewhere or has changed since."""
    top = name.partition(".")[0]
    for loaded in [n for n in sys.modules if n == top or n.startswith(f"{top}.")]:
        del sys.modules[loaded]
    importlib.invalidate_caches()
    sys.path.insert(0, str(base))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(base))


def pickle_functions(functions: Functions, base: Path) -> bytes:
    """Return the functions as cloudpickle bytes, with all modules below `base` by value."""
    local = [module for module in list(sys.modules.values()) if _is_local(module, base)]
    registered = []
    try:
        for module in local:
            cloudpickle.register_pickle_by_value(module)
            registered.append(module)
        return bytes(cloudpickle.dumps(dict(functions)))
    except Exception as error:
        raise UserCodeFailed(
            f"The functions {', '.join(functions)} cannot be sent to the workers: {_one_line(error)}",
            "Define what they use inside them or in a module; open files, locks and clients cannot travel.",
        ) from error
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def unpickle_functions(code: bytes) -> dict[str, Callable[..., Any]]:
    """Return the functions; their modules need not be importable here."""
    functions: dict[str, Callable[..., Any]] = cloudpickle.loads(code)
    return functions


def directory_of(function: Callable[..., Any]) -> Path:
    """Return the directory of the file that defines a function; the working directory for a notebook's."""
    try:
        return Path(inspect.getfile(function)).resolve().parent
    except (TypeError, OSError):
        return Path.cwd()


def source_sha256(function: Callable[..., Any], base: Path) -> str:
    """Return the SHA-256 of a function's source text.

    Of a function in a module: the module's text, and that of the modules below `base` that it uses. Of one in a
    notebook or script: its own text, and that of the functions and classes of ``__main__`` that it uses.
    """
    module = inspect.getmodule(function)
    if module is None or module.__name__ == "__main__" or getattr(module, "__file__", None) is None:
        texts = dict(_texts_of_objects(function, {}))
    else:
        texts = dict(_texts_of_modules(module, base, {}))
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(f"{name}\0{texts[name]}\0".encode())
    return digest.hexdigest()


def _texts_of_modules(module: ModuleType, base: Path, found: dict[str, str]) -> dict[str, str]:
    if module.__name__ in found:
        return found
    file = getattr(module, "__file__", None)
    found[module.__name__] = Path(file).read_text(encoding="utf-8") if file and file.endswith(".py") else ""
    for value in list(vars(module).values()):
        other = value if isinstance(value, ModuleType) else sys.modules.get(str(getattr(value, "__module__", "")))
        if other is not None and _is_local(other, base):
            _texts_of_modules(other, base, found)
    return found


def _texts_of_objects(value: Any, found: dict[str, str]) -> dict[str, str]:
    name = getattr(value, "__qualname__", repr(value))
    if name in found:
        return found
    try:
        found[name] = inspect.getsource(value)
    except (OSError, TypeError):  # typed at a prompt: no text is kept
        code = getattr(value, "__code__", None)
        found[name] = f"{code.co_code.hex()}{code.co_names}" if code else name
    functions = [v for v in vars(value).values() if isinstance(v, FunctionType)] if isinstance(value, type) else [value]
    for function in functions:
        code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        for used in code.co_names if code else ():
            other = names.get(used)
            if isinstance(other, FunctionType | type) and other.__module__ == "__main__":
                _texts_of_objects(other, found)
    return found


def _is_local(module: Any, base: Path) -> bool:
    file = getattr(module, "__file__", None)
    name = str(getattr(module, "__name__", ""))
    if not file or name == "__main__" or name.partition(".")[0] in _OURS:
        return False
    path = Path(file).resolve()
    return path.is_relative_to(base.resolve()) and not any(path.is_relative_to(place) for place in _INSTALLED)


@contextmanager
def user_code(doing: str) -> Iterator[None]:
    """Turn an exception of the user's code into `UserCodeFailed` that says where it happened.

    Raises
    ------
    UserCodeFailed, OutOfMemory
    """
    try:
        yield
    except DtrainError:
        raise
    except Exception as error:
        text = _one_line(error)
        if isinstance(error, MemoryError) or "can't allocate memory" in text:
            raise OutOfMemory(
                f"{doing}: out of memory: {text}",
                "Use a smaller train.batch_size or train.micro_batch, or give the workers more memory.",
            ) from error
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if not Path(f.filename).resolve().is_relative_to(Path(__file__).resolve().parents[1])]
        users = [f for f in own if not any(Path(f.filename).resolve().is_relative_to(p) for p in _INSTALLED)]
        where = f" ({Path(users[-1].filename).name}:{users[-1].lineno})" if users else ""
        raise UserCodeFailed(
            f"{doing} raised {type(error).__name__}: {text}{where}", "Run with --debug to see the traceback."
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
