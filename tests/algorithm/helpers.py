"""Parameters, updates and steps that several tests of the mathematics use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from dtrain.algorithm.average import Update
from dtrain.algorithm.batch import TensorBatch
from dtrain.algorithm.evaluate import Sums, evaluate, values
from dtrain.algorithm.local import LocalResult
from dtrain.algorithm.metrics.state import Metric, State
from dtrain.algorithm.replica import carried, empty_inner_state, pack_inner_state
from dtrain.types import Broadcast, Contribution, Cursor, Entry, Flat, InnerState, Layout, LocalTask, Parameters


def vector(params: Sequence[float], buffers: Sequence[float] = (), wide: Sequence[float] = ()) -> Parameters:
    """Parameters, float32 buffers, and float64 buffers (`Parameters.extra`)."""
    entries = (
        Entry("w", "param", "float32", (len(params),), 0, len(params)),
        Entry("b", "buffer", "float32", (len(buffers),), len(params), len(buffers)),
        Entry("e", "extra", "float64", (len(wide),), 0, 8 * len(wide)),
    )
    flat, extra = np.array([*params, *buffers], np.float32), np.array(wide, np.float64).view(np.uint8)
    return Parameters(Layout(entries, len(params), len(flat), len(extra)), flat, extra)


def contribution(replica: int, samples: int = 1, **more: Any) -> Contribution:
    facts = {"steps": 1, "loss_sum": 0.0, "loss_count": 1.0, "finite": True, **more}
    return Contribution(replica=replica, samples=samples, **facts)


def update(replica: int, samples: int, params: Parameters, **more: Any) -> Update:
    return Update(params, contribution(replica, samples, **more))


def task(replica: int = 0, number: int = 1) -> LocalTask:
    return LocalTask(
        round=number,
        replica=replica,
        cursor=Cursor(0, 0),
        step=0,
        total_steps=100,
        num_steps=1,
        num_samples=1,
        num_epochs=0,
        seed=0,
    )


def result(inner: InnerState | None = None, control: Flat | None = None, **more: Any) -> LocalResult:
    facts = {"loss_sum": 1.0, "loss_count": 1.0, "non_finite": 0, "samples": 1, "steps": 1, **more}
    return LocalResult(inner=inner or empty_inner_state(), control=control, **facts)


def one_batch(size: int = 1) -> list[tuple[int, list[TensorBatch]]]:
    """A local step on inputs of ones."""
    return [(size, [TensorBatch((torch.ones(size, 1),), torch.zeros(size, 1), size)])]


def measured(
    loss: Any, metrics: dict[str, Metric], batches: Any, wanted: Sequence[str], **more: Any
) -> dict[str, float]:
    """The values of an evaluation of a module that returns its input."""
    return values(evaluate(more.pop("module", nn.Identity()), loss, metrics, batches, **more), wanted, metrics)


def means(samples: int, loss: tuple[float, float], **metrics: tuple[float, float]) -> Sums:
    """Sums of means, from the sum and count of each."""
    pairs = {"loss": loss, **metrics}
    states = {name: State((np.array([pair], np.float64),), ("sum",)) for name, pair in pairs.items()}
    return Sums(samples, states, np.array([samples]))


def pair_of(sums: Sums, name: str) -> tuple[float, float]:
    """Sum and count of a mean."""
    total, count = sums.states[name].parts[0][0].tolist()
    return total, count


def read_only(broadcast: Broadcast) -> Broadcast:
    """A copy as Dask gives it: its arrays cannot be written to."""
    params = broadcast.params
    flat, extra = locked(params.flat), locked(params.extra)
    inner = broadcast.inner and InnerState(broadcast.inner.slots, locked(broadcast.inner.data))
    control = None if broadcast.control is None else locked(broadcast.control)
    return Broadcast(replace(params, flat=flat, extra=extra), inner, control)


def locked(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


def state_after(make: Any, options: dict[str, Any], shapes: Sequence[tuple[int, ...]], steps: int = 2) -> InnerState:
    """The state of an optimizer of parameters of some shapes after some steps."""
    generator = torch.Generator().manual_seed(len(shapes))
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = make(params, **options)
    fresh = carried(optimizer)
    for _ in range(steps):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return pack_inner_state(optimizer, params, fresh)
