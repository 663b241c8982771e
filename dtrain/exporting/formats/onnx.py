"""onnx: a graph that ONNX Runtime and others run without torch; it takes any number of samples at once."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dtrain.exporting.facts import Facts
from dtrain.exporting.module import ExportedModule

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
EXTRA = "onnx"
SUFFIX = ""
TOLERANCE = 1e-4


def write(module: ExportedModule, inputs: tuple[torch.Tensor, ...], facts: Facts, path: Path) -> None:
    """Trace a module on some samples and write the graph; parameters above 2 GB lie in a second file."""
    batch = torch.export.Dim("batch")
    with _quiet():
        program = torch.onnx.export(
            module,
            inputs,
            input_names=[one.argument for one in facts.inputs],
            output_names=[one.argument for one in facts.outputs],
            dynamic_shapes=(tuple({0: batch} for _ in inputs),),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(facts.metadata)
    program.save(str(path), external_data=facts.nbytes > MOST_BYTES)


MOST_BYTES = 1_900_000_000
"""Of the parameters in the file itself; a message of protobuf ends at 2 GiB."""


def load(path: Path, facts: Facts, fresh: Callable[[], ExportedModule]) -> Callable[..., Any]:
    """Return a function that runs the graph of the file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def call(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = {one.argument: values.numpy() for one, values in zip(facts.inputs, inputs, strict=True)}
        return tuple(torch.from_numpy(values) for values in session.run(None, given))

    return call


def usage(facts: Facts, file: str) -> str:
    """Return the lines of Python that load the file and call the model with zeros."""
    given = ", ".join(f'"{one.argument}": {one.argument}' for one in facts.inputs)
    lines = [
        "import numpy as np",
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])',
        *(line.replace("torch.", "np.") for line in facts.zeros),
        f"outputs = session.run(None, {{{given}}})",
        *(["outputs = outputs[0]"] if len(facts.outputs) == 1 else []),
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the narration of the exporter off the terminal; its errors are raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
