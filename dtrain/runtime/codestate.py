"""The text of a value: equal values have the same text in every process.

The bytes of pickle would not do: they differ from process to process, and so do texts that hold an address.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch

Code: TypeAlias = Callable[[Any], str]
"""Returns the text of a function or a class."""

PLAIN = (type(None), bool, int, float, complex, str, bytes)


def value_text(value: Any, code: Code) -> str:
    """Return the text of a value: of its class and of its state, whatever it holds.

    Parameters
    ----------
    value : object
        Numbers, texts, tensors, arrays, containers, functions, modules of torch, and objects that can be pickled.
        Of others the text names the class.
    code : callable
        Returns the text of a function or a class.
    """
    return _Values(code).text(value)


def is_data(value: Any) -> bool:
    """Whether a value is numbers, texts, tensors, arrays, or lists and tables of them."""
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_data, value))
    if isinstance(value, dict):
        return all(is_data(part) for pair in value.items() for part in pair)
    return isinstance(value, (*PLAIN, torch.Tensor, np.ndarray, np.generic))


class _Values:
    """The walk through one value; it knows what it has met, so that circles end."""

    def __init__(self, code: Code) -> None:
        self._code = code
        self._seen: dict[int, tuple[int, Any]] = {}
        """By id: a number, and the value itself, so that its id is not used again."""

    def text(self, value: Any) -> str:
        if type(value) in PLAIN:
            return repr(value)
        if isinstance(value, type | FunctionType | BuiltinFunctionType):
            return self._code(value)
        if isinstance(value, ModuleType):
            return f"module {value.__name__}"
        if id(value) in self._seen:
            return f"<{self._seen[id(value)][0]}>"
        self._seen[id(value)] = (len(self._seen), value)
        return f"{type(value).__name__}({self._inside(value)})"

    def _inside(self, value: Any) -> str:
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized:
            whole = value.detach().cpu().contiguous()
            return f"{whole.dtype}{list(whole.shape)} {_sha256(whole.reshape(-1).view(torch.uint8).numpy())}"
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return f"{value.dtype.str}{list(value.shape)} {_sha256(np.ascontiguousarray(value))}"
        if isinstance(value, dict):
            return ", ".join(sorted(f"{self.text(key)}: {self.text(inner)}" for key, inner in value.items()))
        if isinstance(value, set | frozenset):
            return ", ".join(sorted(map(self.text, value)))
        if isinstance(value, list | tuple):
            return self._listed(value)
        if isinstance(value, MethodType):
            return self._listed((value.__func__, value.__self__))
        if isinstance(value, partial):
            return self._listed((value.func, value.args, value.keywords))
        if hasattr(value, "__wrapped__"):
            return self.text(value.__wrapped__)
        return self._reduced(value)

    def _listed(self, values: Iterable[Any]) -> str:
        return ", ".join(map(self.text, values))

    def _reduced(self, value: Any) -> str:
        """Return the text of what pickle would write."""
        try:
            reduced = value.__reduce_ex__(4)
            parts = (reduced,) if isinstance(reduced, str) else tuple(reduced)
            whole = [list(part) if index in (3, 4) and part is not None else part for index, part in enumerate(parts)]
        except Exception:  # whatever its class raises: it cannot be pickled
            return self.text(type(value))
        return f"{self.text(type(value))}, {self._listed(whole)}"


def _sha256(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
