"""The identity of the user's functions: the SHA-256 of their source text.

The bytes of cloudpickle would not do: they differ from process to process.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from dtrain.runtime.modules import file_in, file_of, is_below, is_local


def source_sha256(function: Callable[..., Any], base: Path) -> str:
    """Return the SHA-256 of a function's source text.

    Of a function in a module: the module's text, and that of the files below `base` that it imports. Of one in a
    notebook or script: its own text, that of the functions and classes of ``__main__`` that it uses, and of the files
    below `base` that it imports or that define what it uses.
    """
    texts: dict[str, str] = {}
    module, file = str(getattr(function, "__module__", "")), file_of(function)
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
    if is_below(base, file):
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        depth = len(package.split(".")) if package else 0
        _add_imports(text, package, base, [base, file.parents[depth]], texts)


def _add_imports(text: str, package: str, base: Path, roots: list[Path], texts: dict[str, str]) -> None:
    for imported in (package, *_imports(text, package)):
        parts = imported.split(".")
        for name in (".".join(parts[:count]) for count in range(1, len(parts) + 1)):
            files = [file for root in roots if name and (file := file_in(root, name)) and is_below(base, file)]
            if files:
                _add_file(name, files[0], base, texts)


def _imports(text: str, package: str) -> Iterator[str]:
    """Yield every full name in a text's import statements that may be a module."""
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
    except (OSError, TypeError):  # typed at a prompt: Python keeps no text
        texts[name] = "".join(f"{code.co_code.hex()}{code.co_names}{_plain_constants(code)}" for code in codes)
    _add_imports(textwrap.dedent(texts[name]), "", base, [base], texts)
    names = functions[0].__globals__ if functions else {}
    used = [names[n] for code in codes for n in code.co_names if n in names]
    for other in [*used, *(value.__bases__ if isinstance(value, type) else ())]:
        module = other if isinstance(other, ModuleType) else sys.modules.get(str(getattr(other, "__module__", "")))
        if isinstance(other, FunctionType | type) and other.__module__ == "__main__":
            _add_object(other, base, texts)
        elif module is not None and is_local(module, base):
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
