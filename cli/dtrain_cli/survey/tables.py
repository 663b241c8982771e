"""The tables of a config file: what is read, how it is trained, the arguments of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dtrain.data.plan.footprint import sample_bytes
from dtrain.data.plan.partition import cell_anchors
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Field, Samples
from dtrain.errors import listed
from dtrain_cli.survey.draft import Draft, row_bytes
from dtrain_cli.survey.roles import ArrayFacts, Contents, is_channel, is_level, space_of
from dtrain_cli.survey.values import Values

NEAR_ZERO, LEAST_STD, MOST_STD = 3.0, 0.05, 5.0
"""Inputs are left as they are if their mean is so near to 0 and their standard deviation lies between the others."""
MOST_MEANS = 1000
"""A matrix of at most so many columns has a mean of its own for each of them."""
LEAST_SIDE = 256
"""Large rows are cut down to so many places along a side."""
BATCH_BYTES = 16 << 20
FEWEST_SAMPLES = 8
"""Of a batch, where a sample is small."""
MOST_STEPS = 200
"""A pass of more local steps of a replica is cut: a first try ends in minutes."""
FEWER_STEPS = 50
LARGE_VOCABULARY = 4096
MODELS = {"tabular": "tabular_model.py", "text": "text_model.py", "forecast": "grid_model.py", "image": "grid_model.py"}


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of one table of the config file."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """By key, without the name of the table."""
    why: Mapping[str, str] = field(default_factory=dict)
    """By key, with the name of the table: the comment."""

    def also(self, key: str, value: Any, why: str = "") -> Keys:
        """Return these keys and one more, for example ``data.split``."""
        name = key.rpartition(".")[2]
        return Keys({**self.values, name: value}, {**self.why, **({key: why} if why else {})})

    def __or__(self, other: Keys) -> Keys:
        """Return both; the other's come last and win."""
        return Keys({**self.values, **other.values}, {**self.why, **other.why})


NONE = Keys()


# [data] -----------------------------------------------------------------------------------------------------


def data_keys(draft: Draft, contents: Contents, values: Mapping[str, Values]) -> Keys:
    """Return the table ``[data]``, but for the split and what is missing.

    Parameters
    ----------
    draft : Draft
    contents : Contents
    values : mapping of str to Values
        Of its inputs and target.
    """
    arrays = [contents.arrays[name] for name in dict.fromkeys((*draft.inputs, draft.target))]
    has_windows = bool(draft.input_offsets or draft.target_offsets)
    keys = Keys({"path": contents.path, "inputs": list(draft.inputs), "targets": [draft.target]})
    if contents.group:
        keys = keys.also("data.group", contents.group)
    if has_windows or _first_shared(arrays) != draft.sample_dim:
        keys = keys.also("data.sample_dim", draft.sample_dim)
    if part := _part(draft, arrays):
        keys = keys.also("data.isel", {**draft.isel, **part}, "a first try on a part of each row: whole rows are large")
    elif draft.isel:
        keys = keys.also("data.isel", dict(draft.isel))
    if draft.patch:
        keys = keys.also("data.patch", dict(draft.patch))
    if has_windows:
        keys = keys.also("data.input_offsets", draft.input_offsets).also("data.target_offsets", draft.target_offsets)
    if draft.stride > 1:
        keys = keys.also("data.stride", draft.stride)
    keys = keys | _normalize(draft, arrays, contents, values)
    return keys.also("data.transform", draft.transform) if draft.transform else keys


def _first_shared(arrays: list[ArrayFacts]) -> str:
    """Return the dimension that ``data.sample_dim = "auto"`` takes; empty if the arrays share none."""
    first, *others = arrays
    return next((dim for dim in first.dims if all(dim in other.dims for other in others)), "")


def _part(draft: Draft, arrays: list[ArrayFacts]) -> dict[str, dict[str, int]]:
    """Return a part of the places of an image or a map, where whole rows are so large that few fit the memory."""
    space = [dim for dim in (draft.space or draft.patch) if dim not in draft.isel]
    whole = {dim: size for array in arrays for dim, size in array.sizes.items() if dim in space}
    part = dict(whole)
    single = dict.fromkeys(draft.isel, 1)
    while part and max(part.values()) > LEAST_SIDE:
        if sum(row_bytes(array, draft.sample_dim, {**part, **single}) for array in arrays) <= draft.largest_row:
            break
        longest = max(part, key=lambda dim: part[dim])
        part[longest] = max(LEAST_SIDE, part[longest] // 2)
    return {dim: {"start": 0, "stop": size} for dim, size in part.items() if size < whole[dim]}


def _normalize(draft: Draft, arrays: list[ArrayFacts], contents: Contents, values: Mapping[str, Values]) -> Keys:
    """Return ``data.normalize`` for the variables that are not near 0 as they are."""
    means = {a.name: _mean_dims(a, draft, contents) for a in arrays if _needs_means(a, values[a.name], draft)}
    if not means:
        return NONE
    apart = [f"one for each index of {', '.join(dims)} of {name}" for name, dims in means.items() if dims]
    why = "standardised: one mean a variable" + (f", {listed(apart, 2)}" if apart else "")
    table = {name: list(dims) for name, dims in means.items()} if apart else list(means)
    return NONE.also("data.normalize", table, why)


def _needs_means(array: ArrayFacts, values: Values, draft: Draft) -> bool:
    """Return True if a variable is to be standardised."""
    is_target = array.name == draft.target
    if draft.no_means and not is_target:
        return False
    if array.kind == "b" or values.infinite or draft.vocabulary or (is_target and draft.classes):
        return False
    is_share = values.minimum >= 0 and values.maximum <= 1
    if draft.sample_dim not in array.dims and (array.is_integer or is_share):
        return False  # a mask
    if draft.always_normalize or not values.count or values.missing:
        return True
    if array.is_integer:
        return not is_share
    if values.std == 0:
        return abs(values.mean) > NEAR_ZERO
    return abs(values.mean) > NEAR_ZERO or not LEAST_STD <= values.std <= MOST_STD


def _mean_dims(array: ArrayFacts, draft: Draft, contents: Contents) -> tuple[str, ...]:
    """Return the dimensions of which each index has a mean of its own: levels, channels, columns of a matrix."""
    row = [dim for dim in array.without(draft.sample_dim, *draft.space) if dim not in draft.isel]
    is_matrix = not draft.space and len(row) == 1 and not space_of(array, contents)
    dims = [dim for dim in row if is_matrix or is_channel(dim) or is_level(dim, contents)]
    dims = [dim for dim in dims if dim not in draft.patch]
    return tuple(dims) if math.prod(array.sizes[dim] for dim in dims) <= MOST_MEANS else ()


# [train] ----------------------------------------------------------------------------------------------------


def train_keys(draft: Draft, samples: Samples, plan: DataPlan, *, skips_target: bool) -> Keys:
    """Return the table ``[train]``.

    Parameters
    ----------
    draft : Draft
    samples : Samples
    plan : DataPlan
    skips_target : bool
        True if values of the target are missing.
    """
    most = 8 if draft.vocabulary > LARGE_VOCABULARY else 100 if draft.template == "tabular" else 32
    count = cell_anchors(plan, "train").num_samples // plan.replicas
    batch = batch_size(most, sample_bytes(samples), count)
    keys = _goal(draft, skips_target=skips_target)
    if (axis := _class_axis(draft, samples)) is not None:
        keys = keys.also("train.class_axis", axis, "both axes of the output could be the classes")
    keys = keys.also("train.rounds", 20)
    if count > MOST_STEPS * batch:
        steps = f"{-(-count // batch):,} steps a replica"
        why = f"a first try; without this line a round is a whole pass: {steps}"
        keys = keys.also("train.local_steps", FEWER_STEPS, why)
    keys = keys.also("train.batch_size", batch).also("train.optimizer", "adam")
    return keys.also("train.optimizer_args", {"lr": 0.001})


def batch_size(most: int, sample_bytes: int, count: int) -> int:
    """Return the samples of a batch: a round has several, and one fits the memory.

    >>> batch_size(100, 400, 10_000), batch_size(100, 400, 100), batch_size(100, 50_000_000, 100)
    (100, 12, 1)
    """
    return max(1, min(most, BATCH_BYTES // max(1, sample_bytes), max(FEWEST_SAMPLES, count // 8)))


def _goal(draft: Draft, *, skips_target: bool) -> Keys:
    """Return loss and metrics."""
    loss, metrics, why = "mse", ["mae"], ""
    if draft.vocabulary:
        loss = draft.loss or "cross_entropy"
        metrics = ["bits_per_byte" if draft.vocabulary == 256 else "perplexity"]
    elif draft.classes:  # of which some are rare, as cells beside their background
        loss, metrics = "cross_entropy", ["accuracy", "iou" if draft.template == "image" else "f1"]
    elif skips_target:
        loss, metrics, why = "model:mse", ["model:mae"], f"mse without the missing values of {draft.target}"
    return NONE.also("train.loss", loss, why).also("train.metrics", metrics)


def _class_axis(draft: Draft, samples: Samples) -> int | None:
    """Return the axis of the classes where two axes of the output fit; None where one does."""
    if not draft.classes or draft.loss:
        return None
    shape = _target_shape(samples)
    if draft.vocabulary:
        return -1 if shape and shape[0] == draft.vocabulary else None
    output = (draft.classes, *shape)
    return 1 if shape and output[:-1] == shape else None


# [model_args] -----------------------------------------------------------------------------------------------


def model_file(draft: Draft) -> str:
    """Return the name of the model's file in ``templates/``."""
    if draft.model:
        return draft.model
    return MODELS[draft.template] if draft.space or draft.vocabulary else MODELS["tabular"]


def model_args(draft: Draft, samples: Samples) -> dict[str, Any]:
    """Return the arguments of the model: shapes of a sample, and the number of classes."""
    target = _target_shape(samples)
    if draft.vocabulary:
        return {"vocabulary": draft.vocabulary, "context": target[-1]}
    if not draft.space:
        features = sum(math.prod(samples.field_shape(item)) for item in samples.fields[:-1])
        outputs = [draft.classes, *target] if draft.classes else list(target)
        return {"features": features, "outputs": outputs, **draft.args}
    axes = [_axes(samples, item) for item in samples.fields]
    return {
        "inputs": axes[:-1],
        "space": list(draft.space),
        "channels": sum(math.prod(_beside_space(samples, item, draft)) for item in samples.fields[:-1]),
        "target": axes[-1],
        "sizes": _beside_space(samples, samples.fields[-1], draft),
        "classes": draft.classes,
    }


def _target_shape(samples: Samples) -> tuple[int, ...]:
    return samples.field_shape(samples.fields[-1])


def _beside_space(samples: Samples, item: Field, draft: Draft) -> list[int]:
    """Return the lengths of a tensor's axes that are not convolved."""
    pairs = zip(_axes(samples, item), samples.field_shape(item), strict=True)
    return [size for axis, size in pairs if axis not in draft.space]


def _axes(samples: Samples, item: Field) -> list[str]:
    """Return the names of a tensor's axes after the sample axis."""
    variable = samples.variable(item.name)
    return [*(["window"] if item.window else []), *(variable.dims[axis] for axis in variable.row_axes)]
