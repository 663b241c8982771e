"""What an evaluation knows of a batch beside its tensors: the labels of groups, and the forecasts of baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from dtrain.algorithm.batch import Targets, TensorBatch
from dtrain.algorithm.evaluate import CLIMATOLOGY, PERSISTENCE, Breakdown, Context, Decode
from dtrain.algorithm.grouped import Labels
from dtrain.config.names import LOSSES
from dtrain.data.by import Grouping, cuts_samples
from dtrain.data.climatology import Periods
from dtrain.data.distinct import newest_input, target_fields
from dtrain.data.load.places import places_of_batches, places_of_tiles
from dtrain.data.plan.hashing import Ints
from dtrain.data.plan.partition import Partition
from dtrain.data.samples import Field, Samples
from dtrain.errors import ShapesDiffer
from dtrain.runtime.spec import Asked, PlannedSource, RunSpec
from dtrain.runtime.tensors import float64_tensor

SHARED = "valid time"
"""The grouping that leaves out the valid times that not all leads share."""


def breakdown_of(spec: RunSpec) -> Breakdown:
    """Return what an evaluation is broken down into."""
    asked, train, samples = spec.asked, spec.config.train, spec.sources[0].samples
    by_target = len(samples.config.targets) > 1 and any(one.kind == "variable" for one in asked.groupings)
    is_whole = not by_target and not cuts_samples(samples, asked.groupings)
    return Breakdown(
        counts=tuple(one.count for one in asked.groupings),
        by_target=by_target,
        has_loss=is_whole or (train.loss in LOSSES),
        class_axis=train.class_axis,
        finite_targets=any(source.samples.config.fills_inputs for source in spec.sources),
    )


def context_maker(
    spec: RunSpec, source: PlannedSource, partition: Partition, sizes: Sequence[int], decode: Decode
) -> Callable[[TensorBatch], Context] | None:
    """Return a function that is called with each batch of a piece, in order; None if nothing is asked for.

    Parameters
    ----------
    spec : RunSpec
    source : PlannedSource
        The store.
    partition : Partition
        The piece.
    sizes : sequence of int
        Samples of each batch.
    decode : callable
        Of the store's targets.
    """
    asked, climate, samples = spec.asked, spec.climate, source.samples
    if asked.is_whole and climate is None:
        return None
    store = next(number for number, one in enumerate([*spec.sources, spec.held_out]) if one is source)
    places, fields = places_of_batches(partition, sizes), target_fields(samples)
    rows = asked.shared[store] if asked.shared else None
    means = [] if climate is None else [_with_none(climate.climatology.means[field.name]) for field in fields]

    def context(batch: TensorBatch) -> Context:
        anchors, tiles = next(places)
        _check_shapes(asked, samples, fields, batch)
        labels, normal = [], []
        for number, field in enumerate(fields):
            own = [_labels(one, samples, field, number, store, anchors, tiles) for one in asked.groupings]
            if rows is not None:
                own.append(_by_row(SHARED, np.where(rows, 0, -1), 1, field, anchors))
            labels.append(tuple(own))
            if climate is not None:
                normal.append(_normal(means[number], climate.periods[store], samples, field, anchors, tiles))
        targets = batch.targets if isinstance(batch.targets, tuple) else (batch.targets,)
        known = tuple(one.to(target.device) for one, target in zip(normal, targets, strict=False))
        forecasts = {}
        if PERSISTENCE in asked.baselines:
            forecasts[PERSISTENCE] = decode(_as_one(_newest(samples, fields, batch, targets)), batch.targets)[0]
        if CLIMATOLOGY in asked.baselines:
            forecasts[CLIMATOLOGY] = _as_one(known)
        return Context(tuple(labels), forecasts, _as_one(known) if known else None)

    return context


def _as_one(tensors: tuple[torch.Tensor, ...]) -> Targets:
    return tensors if len(tensors) > 1 else tensors[0]


def _newest(
    samples: Samples, fields: Sequence[Field], batch: TensorBatch, targets: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return, by target, the newest row of the same variable among the inputs, for each lead."""
    found = []
    for field, target in zip(fields, targets, strict=True):
        number, newest = newest_input(samples, field)
        values = batch.inputs[number]
        if newest is not None:
            values = values[:, newest]
        found.append(values[:, None].expand_as(target) if field.window else values)
    return tuple(found)


def _with_none(means: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return means by period, and NaN for rows that have none, as the last."""
    return np.concatenate([means, np.full((1, *means.shape[1:]), np.nan, np.float32)])


def _normal(
    means: npt.NDArray[np.float32], periods: Periods, samples: Samples, field: Field, anchors: Ints, tiles: Ints
) -> torch.Tensor:
    """Return the climatology of a target at its places and times, float64[sample, (lead,) *row].

    Parameters
    ----------
    means : float32[period + 1, *row]
        Of `_with_none`.
    periods : uint8[row]
        Of the store.
    """
    variable, rows = samples.variable(field.name), anchors[:, None] + np.array(field.offsets)
    number = np.minimum(periods[rows], len(means) - 1)
    found = np.empty((*number.shape, *samples.tiles[0].shape_of(variable)), np.float32)
    if not samples.tiles.cuts_any(variable):
        found[:] = means[number]
    else:
        for tile in np.unique(tiles).tolist():
            own = tiles == tile
            found[own] = means[(slice(None), *samples.tiles[tile].slices(variable))][number[own]]
    return float64_tensor(found if field.window else found[:, 0])


def _labels(
    grouping: Grouping, samples: Samples, field: Field, number: int, store: int, anchors: Ints, tiles: Ints
) -> Labels:
    """Return the labels of a target's values along a grouping."""
    name, count = grouping.name, grouping.count
    match grouping.kind:
        case "variable":
            return Labels(name, 0, np.array([[number]]), count)
        case "lead":
            return Labels(name, int(count > 1), np.arange(count)[None], count)
        case "row":
            return _by_row(name, grouping.labels[store], count, field, anchors)
    variable, own = samples.variable(field.name), grouping.labels[0]
    axis = 1 + field.window + variable.row_dims.index(grouping.dim)
    places = places_of_tiles(samples, grouping.dim, tiles)
    if places is None:
        return Labels(name, axis, own[None], count)
    return Labels(name, axis, own[places], count, differs=True)


def _by_row(name: str, labels: Ints, count: int, field: Field, anchors: Ints) -> Labels:
    """Return the labels of the rows that a target shows."""
    rows = anchors[:, None] + np.array(field.offsets or (0,))
    return Labels(name, int(rows.shape[1] > 1), labels[rows], count, differs=rows.shape[1] > 1)


def _check_shapes(asked: Asked, samples: Samples, fields: Sequence[Field], batch: TensorBatch) -> None:
    """Refuse targets of other shapes than the data's: a transform may have cut them."""
    targets = batch.targets if isinstance(batch.targets, tuple) else (batch.targets,)
    for field, target in zip(fields, targets, strict=True):
        if tuple(target.shape[1:]) != samples.field_shape(field):
            raise ShapesDiffer(
                f"data.transform makes targets of shape {list(target.shape[1:])} of {field.name}, whose samples have "
                f"{list(samples.field_shape(field))}: which value belongs to which {asked.names or 'place'} is not "
                "known.",
                "Evaluate without it, or let the transform keep the shape where batch.split is not train.",
            )
