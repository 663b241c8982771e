"""Batches of numpy arrays -> tensors: the user's transform, and the copy to a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dtrain.algorithm.batch import Targets, TensorBatch
from dtrain.algorithm.evaluate import Decode
from dtrain.config.functions import Function
from dtrain.data.encoding import Floats
from dtrain.data.load.gather import Batch
from dtrain.data.plan.hashing import TRANSFORM, hash64
from dtrain.errors import UserCodeFailed
from dtrain.runtime.usercode import user_code


def as_tensors(batches: Iterator[Batch], split: str) -> Iterator[TensorBatch]:
    """Yield batches of numpy arrays as tensors on the same memory."""
    for batch in batches:
        targets = tuple(map(torch.from_numpy, batch.targets))
        weights = tuple(torch.from_numpy(w).expand_as(t) for w, t in zip(batch.weights, targets, strict=False))
        yield TensorBatch(
            inputs=tuple(map(torch.from_numpy, batch.inputs)),
            targets=_as_one(targets),
            size=batch.size,
            split=split,
            weight=_as_one(weights) if weights else None,
        )


def float64_tensor(values: npt.NDArray[np.float32]) -> torch.Tensor:
    """Return an array as a tensor of float64."""
    return torch.from_numpy(values).double()


def transformed(
    batches: Iterator[TensorBatch], transform: Function, seed: int, stream: int, position: int
) -> Iterator[TensorBatch]:
    """Yield transformed batches; the random generator of each depends only on its position in the stream."""
    for batch in batches:
        drawn = int(hash64(seed, TRANSFORM, *batch.split.encode(), stream, position))
        position += batch.size
        yield apply_transform(transform, batch, drawn >> 1)


def apply_transform(transform: Function, batch: TensorBatch, seed: int) -> TensorBatch:
    """Call ``data.transform`` with a batch and a random generator of its own.

    In the batch that it gets and returns, ``inputs``, ``targets`` and, with ``data.weight``, ``weight`` are tuples of
    tensors, however many there are. A single tensor in place of a tuple of one is accepted.

    Raises
    ------
    UserCodeFailed
        It raised, or did not return a batch, or returned one of another size, or weights that do not fit its targets.
    """
    weight = None if batch.weight is None else _as_tuple(batch.weight)
    given = replace(batch, targets=_as_tuple(batch.targets), weight=weight)
    with user_code("The function given as data.transform", "In it, batch.inputs and batch.targets are tuples."):
        result = transform(given, torch.Generator().manual_seed(seed))
    if not isinstance(result, TensorBatch):
        raise UserCodeFailed(
            f"The function given as data.transform returned {type(result).__name__}, not a batch.",
            "Return the batch, or dataclasses.replace(batch, inputs=(...), targets=(...)).",
        )
    result = replace(result, inputs=_as_tuple(result.inputs), targets=_as_tuple(result.targets))
    tensors = (*result.inputs, *result.targets)
    odd = [type(tensor).__name__ for tensor in tensors if not isinstance(tensor, torch.Tensor)]
    counts = len(result.inputs), len(result.targets)
    wanted = len(given.inputs), len(given.targets)
    if odd or counts != wanted:
        raise UserCodeFailed(
            f"The function given as data.transform returned {counts[0]} inputs and {counts[1]} targets"
            + (f", and among them {odd[0]} instead of tensors." if odd else f" for {wanted[0]} and {wanted[1]}."),
            "Return the batch, or dataclasses.replace(batch, inputs=(...), targets=(...)) with as many tensors.",
        )
    wrong = [len(tensor) for tensor in tensors if len(tensor) != batch.size]
    if wrong or result.size != batch.size:
        raise UserCodeFailed(
            f"The function given as data.transform returned {wrong[0] if wrong else result.size} samples for a batch "
            f"of {batch.size}.",
            "A transform keeps the number of samples.",
        )
    if weight is None and result.weight is not None:
        raise UserCodeFailed(
            "The function given as data.transform returned a batch with weights, and data.weight is not set.",
            'Set data.weight = "VARIABLE", or leave batch.weight None.',
        )
    targets = _as_tuple(result.targets)
    weights = None if weight is None else _as_one(_checked_weights(_as_tuple(result.weight), targets))
    return replace(result, targets=_as_one(targets), weight=weights)


def _checked_weights(weights: tuple[Any, ...], targets: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return the weights that a transform returned, in the shapes of its targets."""
    if all(isinstance(w, torch.Tensor) for w in weights) and [w.shape for w in weights] == [t.shape for t in targets]:
        return weights
    shapes = ", ".join(str(list(w.shape) if isinstance(w, torch.Tensor) else w) for w in weights)
    raise UserCodeFailed(
        f"The function given as data.transform returned weights of shapes {shapes} for targets of shapes "
        f"{', '.join(str(list(t.shape)) for t in targets)}.",
        "Change batch.weight as batch.targets: a tuple of tensors, one for each target and of its shape.",
    )


def _as_one(tensors: tuple[torch.Tensor, ...]) -> Targets:
    return tensors if len(tensors) > 1 else tensors[0]


def _as_tuple(values: Any) -> tuple[Any, ...]:
    if isinstance(values, tuple | list):
        return tuple(values)
    return (values,)


def decoder(scalings: Sequence[tuple[Floats, Floats] | None]) -> Decode:
    """Return a function that undoes the normalisation of outputs and targets, in float64.

    An output is decoded as the target of the same place, where both have one shape. Others are left as they are.

    Parameters
    ----------
    scalings : sequence of (mean, std) or None
        By target (`target_scalings`).
    """
    arrays = [scaling and scaling_tensors(scaling) for scaling in scalings]

    def decode(outputs: Any, targets: Any) -> tuple[Any, Any]:
        if isinstance(targets, tuple):
            if not isinstance(outputs, tuple | list) or not len(outputs) == len(targets) == len(arrays):
                return outputs, targets
            pairs = [_decoded(*pair) for pair in zip(outputs, targets, arrays, strict=True)]
            return tuple(output for output, _ in pairs), tuple(target for _, target in pairs)
        return _decoded(outputs, targets, arrays[0]) if len(arrays) == 1 else (outputs, targets)

    return decode


def scaling_tensors(scaling: tuple[Floats, Floats]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation as tensors."""
    mean, std = map(torch.from_numpy, scaling)
    return mean, std


def _decoded(output: Any, target: torch.Tensor, scaling: tuple[torch.Tensor, ...] | None) -> tuple[Any, torch.Tensor]:
    if scaling is None or not isinstance(output, torch.Tensor) or output.shape != target.shape:
        return output, target
    mean, std = (values.to(target.device) for values in scaling)
    return output.double() * std + mean, target.double() * std + mean


def on_device(batches: Iterator[TensorBatch], device: str) -> Iterator[TensorBatch]:
    """Yield batches on a GPU; the next one is copied on a second stream while this one is used.

    A pinned batch is held until its copy is done: the loader reuses its memory once nothing refers to it.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    waiting: tuple[TensorBatch, TensorBatch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            moved = _moved(batch, device)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(side)
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = (batch, moved, done)
    if waiting is not None:
        yield _arrived(*waiting)


def _moved(batch: TensorBatch, device: str) -> TensorBatch:
    def to(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=True)

    def weight_to(tensor: torch.Tensor) -> torch.Tensor:
        # of what is repeated along an axis, one copy is sent
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
        return to(tensor[once]).expand_as(tensor)

    return replace(
        batch,
        inputs=tuple(map(to, batch.inputs)),
        targets=_as_one(tuple(map(to, _as_tuple(batch.targets)))),
        weight=None if batch.weight is None else _as_one(tuple(map(weight_to, _as_tuple(batch.weight)))),
    )


def _arrived(source: TensorBatch, moved: TensorBatch, done: torch.cuda.Event) -> TensorBatch:
    current = torch.cuda.current_stream()
    current.wait_event(done)
    weights = () if moved.weight is None else _as_tuple(moved.weight)
    for tensor in (*moved.inputs, *_as_tuple(moved.targets), *weights):
        tensor.record_stream(current)
    done.synchronize()  # then `source` may go
    return moved
