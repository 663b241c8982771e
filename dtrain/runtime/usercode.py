"""The user's functions: found by reference, carried to the workers as bytes, identified by their source text.

Modules next to the config file are pickled by value, so that neither scheduler nor workers need the files.
cloudpickle's bytes differ from process to process; the identity of code is therefore the SHA-256 of its text.
"""

from __future__ import annotations

import dis
import hashlib
import importlib
import importlib.util
import inspect
import io
import os
import sys
import sysconfig
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import cloudpickle

from dtrain.errors import DtrainError, InvalidConfig, OutOfMemory, UserCodeFailed, did_you_mean, one_line

Functions = Mapping[str, Callable[..., Any]]
"""By config key (``model``, ``train.loss``, ``train.metrics.NAME`` ...): a function of the user's."""

_PLACES = (Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_INSTALLED = tuple(f"{place}{os.sep}" for place in _PLACES)
_OURS = ("dtrain", "dtrain_cli")
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
    local = _file_in(base, module_name) is not None
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
            if _is_local(sys.modules[new], base):
                file = Path(str(sys.modules[new].__file__))
                _IMPORTED[new] = (base, file, file.read_bytes())


def _forget_others(base: Path, name: str) -> None:
    """Drop modules that would stand for those of `base`: of another base, or whose files have changed since.

    What was imported from `base` and has not changed stays, so that the functions of one config share their classes.
    """
    doomed = {other for other, module in list(sys.modules.items()) if _is_shadowed(module, base)}
    if _file_in(base, name):
        doomed |= {n for n in sys.modules if n.partition(".")[0] == name.partition(".")[0]} - _IMPORTED.keys()
    if any(_is_stale(*imported, base) for imported in _IMPORTED.values()):
        doomed |= _IMPORTED.keys()
    for other in doomed:
        sys.modules.pop(other, None)
        _IMPORTED.pop(other, None)


def _is_stale(imported_from: Path, file: Path, text: bytes, base: Path) -> bool:
    return imported_from != base or not file.is_file() or file.read_bytes() != text


def _file_in(base: Path, name: str) -> Path | None:
    """Return the file below `base` that the name of a module means."""
    stem = base.joinpath(*name.split("."))
    return next((file for file in (stem / "__init__.py", stem.with_suffix(".py")) if file.is_file()), None)


def pickle_functions(functions: Functions, base: Path) -> bytes:
    """Return the functions as cloudpickle bytes, with all modules below `base` by value."""
    known = list(sys.modules.values())
    local = [module for module in known if _is_local(module, base) or _is_shadowed(module, base)]
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
            f"The functions {', '.join(functions)} cannot be sent to the workers: {_one_line(error)}",
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


def directory_of(function: Callable[..., Any]) -> Path:
    """Return the directory of the file that defines a function; the working directory for a notebook's."""
    file = _file_of(function)
    return Path.cwd() if file is None else file.parent


def _file_of(function: Callable[..., Any]) -> Path | None:
    try:
        file = Path(inspect.getfile(inspect.unwrap(function)))
    except (TypeError, OSError):
        return None
    return file.resolve() if file.is_file() else None


# The text of user code -------------------------------------------------------------------------------------


def source_sha256(function: Callable[..., Any], base: Path) -> str:
    """Return the SHA-256 of a function's source text.

    Of a function in a module: the module's text, and that of the files below `base` that it imports. Of one in a
    notebook or script: its own text, that of the functions and classes of ``__main__`` that it uses, and of the files
    below `base` that it imports or that define what it uses.
    """
    texts: dict[str, str] = {}
    module, file = str(getattr(function, "__module__", "")), _file_of(function)
    if module == "__main__" or file is None:
        _add_object(function, base, texts)
    else:
        _add_file(module, file, base, texts)
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(f"{name}\0{texts[name]}\0".encode())
    return digest.hexdigest()


def _add_file(name: str, file: Path, base: Path, texts: dict[str, str]) -> None:
    if name in texts:
        return
    texts[name] = text = file.read_text(encoding="utf-8", errors="replace") if file.suffix == ".py" else ""
    if _is_below(base, file):
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        depth = len(package.split(".")) if package else 0
        _add_imports(text, package, base, [base, file.parents[depth]], texts)


def _add_imports(text: str, package: str, base: Path, roots: list[Path], texts: dict[str, str]) -> None:
    for imported in (package, *_imports(text, package)):
        parts = imported.split(".")
        for name in (".".join(parts[:count]) for count in range(1, len(parts) + 1)):
            found = [file for root in roots if name and (file := _file_in(root, name)) and _is_below(base, file)]
            if found:
                _add_file(name, found[0], base, texts)


def _imports(text: str, package: str) -> Iterator[str]:
    """Yield the full names of all that may be modules in a text's import statements."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # not ast: while other threads format tracebacks it may raise SystemError (Python issue 106905)
            whole = compile(text, "text", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return
    for code in _codes_of(whole):
        steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        for level, names, step in zip(steps, steps[1:], steps[2:], strict=False):
            if step.opname == "IMPORT_NAME":  # comes after the loads of its level and of its list of names
                parents = package.split(".")
                above = parents[: len(parents) + 1 - level.argval] if level.argval else []
                yield from (".".join(filter(None, [*above, step.argval, name])) for name in names.argval or [""])


def _add_object(value: Any, base: Path, texts: dict[str, str]) -> None:
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if name in texts:
        return
    functions = list(_functions_of(value))
    codes = [code for function in functions for code in _codes_of(function.__code__)]
    try:
        texts[name] = inspect.getsource(value)
    except (OSError, TypeError):  # typed at a prompt: no text is kept
        texts[name] = "".join(f"{code.co_code.hex()}{code.co_names}{_plain_constants(code)}" for code in codes)
    _add_imports(textwrap.dedent(texts[name]), "", base, [base], texts)
    names = functions[0].__globals__ if functions else {}
    used = [names[n] for code in codes for n in code.co_names if n in names]
    for other in [*used, *(value.__bases__ if isinstance(value, type) else ())]:
        module = other if isinstance(other, ModuleType) else sys.modules.get(str(getattr(other, "__module__", "")))
        if isinstance(other, FunctionType | type) and other.__module__ == "__main__":
            _add_object(other, base, texts)
        elif module is not None and _is_local(module, base):
            _add_file(module.__name__, Path(str(module.__file__)), base, texts)


def _functions_of(value: Any) -> Iterator[FunctionType]:
    members = vars(value).values() if isinstance(value, type) else [inspect.unwrap(value)]
    for member in members:
        function = getattr(member, "__func__", getattr(member, "fget", member))  # static and class methods, properties
        if isinstance(function, FunctionType):
            yield function


def _codes_of(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:  # functions, lambdas and comprehensions inside it
        if isinstance(inner, CodeType):
            yield from _codes_of(inner)


def _plain_constants(code: CodeType) -> list[Any]:
    return [value for value in code.co_consts if isinstance(value, str | int | float | None)]


# Whose code a module is ------------------------------------------------------------------------------------


def _is_local(module: Any, base: Path) -> bool:
    return _is_users(module) and _is_below(base, Path(module.__file__))


def _is_shadowed(module: Any, base: Path) -> bool:
    """Whether a module from elsewhere has the name of one in `base`."""
    top = str(getattr(module, "__name__", "")).partition(".")[0]
    return _is_users(module) and _file_in(base, top) is not None and not _is_below(base, Path(module.__file__))


def _is_users(module: Any) -> bool:
    file, name = getattr(module, "__file__", None), str(getattr(module, "__name__", ""))
    if not file or name == "__main__" or name.partition(".")[0] in _OURS:
        return False
    return not _is_installed(Path(file))


def _is_below(base: Path, file: Path) -> bool:
    return not _is_installed(file) and file.resolve().is_relative_to(base.resolve())


def _is_installed(file: Path) -> bool:
    if str(file).startswith(_INSTALLED):  # so for most of the many modules, and quickly
        return True
    return str(file.resolve()).startswith(_INSTALLED)


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
        users = [f for f in own if not f.filename.startswith("<frozen ") and not _is_installed(Path(f.filename))]
        where = f" ({Path(users[-1].filename).name}:{users[-1].lineno})" if users else ""
        raise UserCodeFailed(
            f"{doing} raised {type(error).__name__}: {text}{where}", "Run with --debug to see the traceback."
        ) from error


def _one_line(error: BaseException) -> str:
    text = one_line(error)
    return text if len(text) <= 300 else text[:297] + "..."
