"""safetensors: the tensors alone, of the model and of its normalisation; the model's source code stays the user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dtrain.exporting.facts import Facts
from dtrain.exporting.module import ExportedModule

PACKAGES = ("safetensors",)
EXTRA = ""
SUFFIX = ""
TOLERANCE = 1e-6


def write(module: ExportedModule, inputs: tuple[torch.Tensor, ...], facts: Facts, path: Path) -> None:
    """Write the state_dict of a module; tied tensors stand under each of their names."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    path.write_bytes(save(tensors, metadata={"format": "pt", **facts.metadata}))  # its own writer makes mode 0600


def load(path: Path, facts: Facts, fresh: Callable[[], ExportedModule]) -> Callable[..., Any]:
    """Return a new module with the tensors of the file."""
    from safetensors.torch import load_file

    module = fresh()
    module.load_state_dict(load_file(path))
    return module


def usage(facts: Facts, file: str) -> str:
    """Return the lines of Python that load the file and call the model with zeros."""
    module, _, builder = facts.model.partition(":")
    imported = f"from {module} import {builder.partition('.')[0]}  # the source code of the model is not in the file"
    if module == "__main__" or not builder.replace(".", "").isidentifier():
        builder, imported = "build", "build = ...  # the function that the run was trained with; it is not in the file"
    arguments = f"**{dict(facts.model_args)!r}" if facts.model_args else ""
    lines = [
        "import torch",
        "from safetensors.torch import load_file",
        "",
        imported,
        "",
        f'tensors = load_file("{file}")',
        f"model = {builder}({arguments})",
        'model.load_state_dict({name[6:]: t for name, t in tensors.items() if name.startswith("model.")})',
        "model.eval()",
        "",
        *facts.zeros,
        *_prepared(facts),
        "with torch.no_grad():",
        f"    outputs = model({', '.join(one.argument for one in facts.inputs)})",
        *_restored(facts),
    ]
    return "\n".join(lines)


def _prepared(facts: Facts) -> list[str]:
    """Return the lines that standardise inputs, as the module does."""
    lines = []
    for number, one in enumerate(facts.inputs):
        if one.is_scaled:
            prefix = f"inputs.{number}.0." if facts.fills else f"inputs.{number}."
            mean, std = f'tensors["{prefix}mean"]', f'tensors["{prefix}std"]'
            lines.append(f"{one.argument} = (({one.argument}.double() - {mean}) / {std}).float()")
        if facts.fills and (one.is_scaled or one.is_float):
            lines.append(f"{one.argument} = torch.where(torch.isfinite({one.argument}), {one.argument}, 0.0)")
    return lines


def _restored(facts: Facts) -> list[str]:
    """Return the line that restores the units of outputs, as the module does."""
    if not any(one.is_scaled for one in facts.outputs):
        return []
    names = ["outputs"] if len(facts.outputs) == 1 else [f"outputs[{number}]" for number in range(len(facts.outputs))]
    each = [
        f'({name}.double() * tensors["outputs.{number}.std"] + tensors["outputs.{number}.mean"]).float()'
        if one.is_scaled
        else name
        for number, (one, name) in enumerate(zip(facts.outputs, names, strict=True))
    ]
    return [f"outputs = {each[0]}" if len(each) == 1 else f"outputs = ({', '.join(each)})"]
