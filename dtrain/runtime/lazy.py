"""Predictions as dask arrays: a task a unit, and the parameters as one key of the graph.

They are computed by whatever scheduler Dask uses: threads, one thread, or the current client of a notebook. A unit is
the same pure function as when it is written, so that the bits are the same.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.data.encoding import Array
from dtrain.data.plan.heads import OutputArray
from dtrain.data.plan.prediction import PredictionPlan
from dtrain.data.read.sweep import SweepReader
from dtrain.runtime.predictor import PredictionSpec, Work, predictor_of
from dtrain.types import Parameters

if TYPE_CHECKING:
    import dask.array


@dataclass(frozen=True, slots=True)
class LazyPayload:
    """What every task needs."""

    spec: PredictionSpec
    params: Parameters
    work: Work

    def __dask_tokenize__(self) -> str:
        return self.spec.run_id


def predict_unit(payload: LazyPayload, number: int) -> dict[str, Array]:
    """Return the predictions of a unit, by array, as they are written."""
    predictor, work = predictor_of(payload.spec, payload.params), payload.work
    unit = work.plan.unit(number)
    values, _ = predictor.predict(work, unit, SweepReader(predictor.reader, work.plan).read(unit))
    arrays = {array.name: array for head in work.heads for array in head.arrays}
    return {name: _as_stored(arrays[name], own) for name, own in values.items()}


def _as_stored(array: OutputArray, values: Array) -> Array:
    return np.ascontiguousarray(values.transpose([array.computed.index(dim) for dim in array.dims]))


def lazy_arrays(payload: LazyPayload) -> Mapping[str, dask.array.Array]:
    """Return the arrays of predictions; nothing is computed."""
    import dask.array
    from dask._task_spec import DataNode, Task, TaskRef
    from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

    run_id, plan = payload.spec.run_id, payload.work.plan
    source, units = f"dtrain-model-{run_id}", f"dtrain-unit-{run_id}"
    graph: dict[Any, Any] = {source: DataNode(source, payload)}
    for number in range(plan.num_units):
        graph[(units, number)] = Task((units, number), predict_unit, TaskRef(source), number)
    layers = {units: MaterializedLayer(graph)}
    arrays = {}
    for array in (array for head in payload.work.heads for array in head.arrays):
        name = f"predict-{array.name}-{run_id}"
        own: dict[Any, Any] = {}
        for at in np.ndindex(plan.counts):
            key = (name, *_place(plan, array, at))
            own[key] = Task(key, operator.getitem, TaskRef((units, plan.number(at))), array.name)
        whole = HighLevelGraph({**layers, name: MaterializedLayer(own)}, {units: set(), name: {units}})
        arrays[array.name] = dask.array.Array(whole, name, _chunks(plan, array), dtype=array.numpy_dtype)
    return arrays


def _place(plan: PredictionPlan, array: OutputArray, at: tuple[int, ...]) -> list[int]:
    """Return the place of a unit in the grid of an array's dask chunks."""
    along = {plan.sample_dim: at[0], **{axis.dim: k for axis, k in zip(plan.axes, at[1:], strict=True)}}
    return [along.get(dim, 0) for dim in array.dims]


def _chunks(plan: PredictionPlan, array: OutputArray) -> tuple[tuple[int, ...], ...]:
    """Return the lengths of an array's dask chunks along each dimension: those of units."""
    steps = {plan.sample_dim: plan.rows, **{axis.dim: axis.extent for axis in plan.axes}}
    return tuple(
        tuple(min(step, n - start) for start in range(0, n, step))
        for dim, n in array.lengths.items()
        for step in (steps.get(dim, max(1, n)),)
    )
