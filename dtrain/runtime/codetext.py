"""The identity of the user's functions: the SHA-256 of their source text, and of the values that they hold.

The bytes of cloudpickle would not do: they differ from process to process.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import sys
import textwrap
import warnings
from collections.abc import Iterator
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from dtrain.algorithm.metrics.torchmetric import is_torchmetric
from dtrain.config.functions import Function
from dtrain.runtime.codestate import is_data, value_text
from dtrain.runtime.modules import file_in, file_of, is_below, is_installed, is_local

CODE_RULES = 1
"""What an identity covers. 0: texts alone; 1: also held values. plan.json says by which rules a run was started."""


def source_sha256(function: Function, base: Path, rules: int = CODE_RULES) -> str:
    """Return the SHA-256 of a function's source text and of the values that it holds.

    Of a function in a module: the module's text, and that of the files below `base` that it imports. Of one in a
    notebook or script: its own text, that of the functions and classes of ``__main__`` that it uses, and of the files
    below `base` that it imports or that define what it uses. Of one without a text, such as a lambda: its bytecode
    and constants.

    To a class of torchmetrics, or an object of one, the version of the package belongs.

    Held values are those of closures and of the arguments of partials, the state of callable objects, and of a
    function in a notebook or script also its defaults and the numbers and tensors of ``__main__`` that it uses.

    Parameters
    ----------
    function : callable
    base : Path
    rules : int
        `CODE_RULES` when the run was started.
    """
    code = _Code(base, rules)
    if rules < 1 or isinstance(function, FunctionType | type):
        code.add(function)
        held = code.held(function)
    else:
        held = value_text(function, code.name)
    package = {"\0package": f"torchmetrics {version('torchmetrics')}"} if is_torchmetric(function) else {}
    texts = {**code.texts, **({"\0held": held} if held else {}), **package}
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(f"{name}\0{texts[name]}\0".encode())
    return digest.hexdigest()


class _Code:
    """Collects the texts of functions and classes, and of all that they use."""

    def __init__(self, base: Path, rules: int) -> None:
        self.texts: dict[str, str] = {}
        self._base = base
        self._rules = rules
        self._looked_up: set[tuple[str | Path, ...]] = set()
        """Names of modules, with the directories in which they were looked up."""
        self._entered: set[int] = set()
        """Functions whose held values are being described; a closure may hold its own function."""

    def name(self, value: Any) -> str:
        """Add the text of a function or class, and return its name and what it holds."""
        self.add(value)
        name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        held = self.held(value)
        return f"{name} [{held}]" if held else name

    def add(self, value: Any) -> None:
        """Add the text of a function or class."""
        module, file = str(getattr(value, "__module__", "")), file_of(value)
        if module == "__main__" or file is None:
            self._add_object(value)
        else:
            self._add_file(module, file)

    # Files --------------------------------------------------------------------------------------------------

    def _add_file(self, name: str, file: Path) -> None:
        if name in self.texts:
            return
        self.texts[name] = text = file.read_text(encoding="utf-8", errors="replace") if file.suffix == ".py" else ""
        if is_below(self._base, file):
            package = name if file.name == "__init__.py" else name.rpartition(".")[0]
            depth = len(package.split(".")) if package else 0
            self._add_imports(text, package, [self._base, file.parents[depth]])

    def _add_imports(self, text: str, package: str, roots: list[Path]) -> None:
        for imported in (package, *_imports(text, package)):
            parts = imported.split(".")
            for name in (".".join(parts[:count]) for count in range(1, len(parts) + 1)):
                if name in self.texts or (name, *roots) in self._looked_up:
                    continue
                self._looked_up.add((name, *roots))
                found = [file_in(root, name) for root in roots if name]
                files = [file for file in found if file and is_below(self._base, file)]
                if files:
                    self._add_file(name, files[0])

    # Notebooks and scripts ------------------------------------------------------------------------------------

    def _add_object(self, value: Any) -> None:
        functions = list(_functions_of(value))
        codes = [code for function in functions for code in _codes_of(function.__code__)]
        name, text = self._named_text(value, codes)
        if name in self.texts:
            return
        self.texts[name] = text
        self._add_imports(textwrap.dedent(text), "", [self._base])
        names = functions[0].__globals__ if functions else {}
        used = [names[n] for code in codes for n in code.co_names if n in names]
        for other in [*used, *(value.__bases__ if isinstance(value, type) else ())]:
            module = other if isinstance(other, ModuleType) else sys.modules.get(str(getattr(other, "__module__", "")))
            if isinstance(other, FunctionType | type) and other.__module__ == "__main__":
                self._add_object(other)
                self._add_held(other)
            elif module is not None and is_local(module, self._base):
                self._add_file(module.__name__, Path(str(module.__file__)))

    def _named_text(self, value: Any, codes: list[CodeType]) -> tuple[str, str]:
        """Return name and text of a function or class; a lambda's text is its bytecode, and names it too."""
        name = getattr(value, "__qualname__", type(value).__qualname__)
        if self._rules >= 1 and _is_lambda(value):
            text = self._bytecode(codes)
            return f"{name} {hashlib.sha256(text.encode()).hexdigest()}", text
        try:
            return name, inspect.getsource(value)
        except (OSError, TypeError):  # typed at a prompt: Python keeps no text
            return name, self._bytecode(codes) + (self._attributes(value) if self._rules >= 1 else "")

    def _bytecode(self, codes: list[CodeType]) -> str:
        if self._rules < 1:
            return "".join(f"{code.co_code.hex()}{code.co_names}{_plain_constants(code)}" for code in codes)
        return "".join(f"{code.co_code.hex()}{code.co_names}{self._constants(code)}" for code in codes)

    def _constants(self, code: CodeType) -> str:
        return value_text([value for value in code.co_consts if not isinstance(value, CodeType)], self.name)

    def _attributes(self, value: Any) -> str:
        """Return the text of the data among the attributes of a class."""
        members = vars(value) if isinstance(value, type) else {}
        data = {name: member for name, member in members.items() if name[:2] != "__" and is_data(member)}
        return value_text(data, self.name) if data else ""

    # Held values ----------------------------------------------------------------------------------------------

    def _add_held(self, value: FunctionType | type) -> None:
        if held := self.held(value):
            self.texts[f"\0held by {value.__qualname__}"] = held

    def held(self, value: Any) -> str:
        """Return the text of the values that a function, or the methods of a class in ``__main__``, hold."""
        if self._rules < 1 or id(value) in self._entered:
            return ""
        if isinstance(value, type) and value.__module__ != "__main__":
            return ""  # they are part of the module's text
        self._entered.add(id(value))
        try:
            texts = [self._held_by(function) for function in _functions_in(value)]
        finally:
            self._entered.discard(id(value))
        return " ".join(filter(None, texts))

    def _held_by(self, function: FunctionType) -> str:
        code, held = function.__code__, dict[str, Any]()
        if is_installed(Path(code.co_filename)):
            return ""  # a decorator of a package
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                held[name] = cell.cell_contents
            except ValueError:  # not assigned yet
                held[name] = None
        held.pop("__class__", None)  # of a method that calls super()
        is_typed = function.__module__ == "__main__"
        if is_typed or "<locals>" in function.__qualname__ or _is_lambda(function):
            held |= {"()": (function.__defaults__, function.__kwdefaults__)} if _has_defaults(function) else {}
        if is_typed:
            held |= self._globals_of(function)
        text = value_text(held, self.name) if held else ""
        return f"{self._bytecode(list(_codes_of(code)))} {text}" if _is_lambda(function) and not is_typed else text

    def _globals_of(self, function: FunctionType) -> dict[str, Any]:
        """Return the values of ``__main__`` that a function uses: data, and callable objects of one's own."""
        steps = (step for code in _codes_of(function.__code__) for step in dis.get_instructions(code))
        loaded = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        used = {name: function.__globals__[name] for name in loaded if name in function.__globals__}
        return {name: value for name, value in used.items() if name[:2] != "__" and (is_data(value) or _is_own(value))}


def _is_own(value: Any) -> bool:
    return isinstance(value, nn.Module | partial) or (callable(value) and type(value).__module__ == "__main__")


def _is_lambda(value: Any) -> bool:
    return isinstance(value, FunctionType) and value.__code__.co_name == "<lambda>"


def _has_defaults(function: FunctionType) -> bool:
    return bool(function.__defaults__ or function.__kwdefaults__)


def _functions_in(value: Any) -> Iterator[FunctionType]:
    """Yield a function, or the methods of a class, and the functions that they decorate."""
    for member in vars(value).values() if isinstance(value, type) else [value]:
        function, seen = _function_of(member), set[int]()
        while isinstance(function, FunctionType) and id(function) not in seen:
            seen.add(id(function))
            yield function
            function = getattr(function, "__wrapped__", None)


@lru_cache(maxsize=1024)
def _imports(text: str, package: str) -> tuple[str, ...]:
    """Return every full name in a text's import statements that may be a module, each once."""
    return tuple(dict.fromkeys(_imported(text, package)))


def _imported(text: str, package: str) -> Iterator[str]:
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


def _functions_of(value: Any) -> Iterator[FunctionType]:
    members = vars(value).values() if isinstance(value, type) else [inspect.unwrap(value)]
    yield from (function for member in members if isinstance(function := _function_of(member), FunctionType))


def _function_of(member: Any) -> Any:
    return getattr(member, "__func__", getattr(member, "fget", member))  # static and class methods, properties


def _codes_of(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:  # functions, lambdas and comprehensions inside it
        if isinstance(inner, CodeType):
            yield from _codes_of(inner)


def _plain_constants(code: CodeType) -> list[Any]:
    return [value for value in code.co_consts if isinstance(value, str | int | float | None)]
