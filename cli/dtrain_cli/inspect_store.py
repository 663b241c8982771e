"""Inspect a store and choose inputs, target and loss from the names, shapes and dtypes of its variables."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtrain.errors import ChunkUndecodable, TooFewSamples, UsageError, one_line

TARGET_NAMES = ("label", "labels", "target", "targets", "class", "classes", "y")


@dataclass(frozen=True, slots=True)
class Choice:
    """Variables of a store, and a model and a loss that fit them."""

    inputs: list[str]
    target: str
    features: int
    """Numbers of all inputs of one sample."""
    outputs: list[int]
    """Shape of the model's output for one sample."""
    loss: str


TABULAR = Choice(inputs=["features"], target="target", features=16, outputs=[], loss="mse")
"""The variables of the template's own store, `dtrain_cli.datasets.tabular`."""


def choose(path: str) -> Choice:
    """Return a choice of variables that share their first dimension.

    Parameters
    ----------
    path : str
        Path or URL of a Zarr store.

    Raises
    ------
    UsageError
        No two variables share their first dimension.
    TooFewSamples
        That dimension is empty.
    ChunkUndecodable
        A chunk of an integer target cannot be decoded.
    """
    import numpy as np

    from dtrain.data.source import list_variables, open_samples

    known = {name: dims for name, dims in sorted(list_variables(path).items()) if dims}
    if len(known) < 2:
        raise UsageError(f"{path}: needs two variables, an input and a target; it has {', '.join(known) or 'none'}.")
    target = next((name for name in TARGET_NAMES if name in known), list(known)[-1])
    inputs = [name for name, dims in known.items() if name != target and dims[0] == known[target][0]]
    if not inputs:
        raise UsageError(f"{path}: no variable shares the first dimension of {target}, {known[target][0]}.")
    samples = open_samples(path, inputs=inputs, targets=[target])
    if not samples.num_samples:
        raise TooFewSamples(f"{path} holds no samples along {samples.sample_dim}.")
    variable = samples.variable(target)
    classes = count_classes(path, target) if np.dtype(variable.dtype).kind in "iub" else 0
    return Choice(
        inputs=inputs,
        target=target,
        features=sum(math.prod(samples.variable(name).row_shape) for name in inputs),
        outputs=[classes, *variable.row_shape] if classes else list(variable.row_shape),
        loss="cross_entropy" if classes else "mse",
    )


def count_classes(path: str, target: str) -> int:
    """Return the largest class + 1, reading the target chunk by chunk; 0 if a value is negative, so no class."""
    import numpy as np
    import zarr

    from dtrain.data.read.open import open_group

    array = open_group(path, "")[target]
    assert isinstance(array, zarr.Array)
    rows, largest = array.chunks[0], 0
    for start in range(0, array.shape[0], rows):
        try:
            values = np.asarray(array[start : start + rows])
        except Exception as error:
            raise ChunkUndecodable(
                f"{path}: {target}[{start}:{start + rows}] cannot be decoded: {one_line(error)}",
                "Restore it from a copy of the store.",
            ) from error
        if int(values.min()) < 0:
            return 0
        largest = max(largest, int(values.max()))
    return largest + 1
