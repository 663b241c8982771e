"""pt2: a program of torch.export; it needs torch alone, and takes any number of samples at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dtrain.exporting.facts import Facts
from dtrain.exporting.module import ExportedModule

PACKAGES = ("torch",)
EXTRA = ""
SUFFIX = ".pt2"
TOLERANCE = 1e-5


def write(module: ExportedModule, inputs: tuple[torch.Tensor, ...], facts: Facts, path: Path) -> None:
    """Trace a module on some samples and write the program."""
    batch = torch.export.Dim("batch")
    shapes = (tuple({0: batch} for _ in inputs),)
    program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path, extra_files=facts.metadata)


def load(path: Path, facts: Facts, fresh: Callable[[], ExportedModule]) -> Callable[..., Any]:
    """Return the program of the file as a function."""
    module: Callable[..., Any] = torch.export.load(path).module()
    return module


def usage(facts: Facts, file: str) -> str:
    """Return the lines of Python that load the file and call the model with zeros."""
    lines = [
        "import torch",
        "",
        f'model = torch.export.load("{file}").module()',
        *facts.zeros,
        "with torch.no_grad():",
        f"    outputs = model({', '.join(one.argument for one in facts.inputs)})",
    ]
    return "\n".join(lines)
