"""The weight of samples (``data.weight``): a variable, or the cosine of a coordinate, described and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dtrain.config.names import cosine_of
from dtrain.config.schema import DataConfig
from dtrain.data.column import groups_above
from dtrain.data.dataset import NamedArray, find_named, sizes_of
from dtrain.data.encoding import Encoding
from dtrain.data.read.joined import open_reader
from dtrain.data.read.store import ReadStore
from dtrain.data.read.weights import decoded_weights
from dtrain.data.samples import Samples
from dtrain.data.variable import AngleUnit, Variable
from dtrain.errors import InvalidConfig, did_you_mean

RADIANS = ("radian", "radians", "rad")
"""Units of a coordinate in radians; without units it is in degrees, as CF's are."""


# Described ------------------------------------------------------------------------------------------------


def cosine_array(config: DataConfig, store: ReadStore, arrays: Mapping[str, NamedArray]) -> dict[str, NamedArray]:
    """Return, by ``data.weight``, the coordinate of which it is the cosine; nothing for other weights.

    It is looked for in the groups of the targets, the nearest first.

    Parameters
    ----------
    config : DataConfig
    store : ReadStore
    arrays : mapping of str to NamedArray
        By variable.

    Raises
    ------
    InvalidConfig
        There is no such coordinate, or it has other dimensions than the variables.
    NotZarr, UnsuitableVariable
        It cannot be read.
    """
    name = cosine_of(config.weight)
    if not name:
        return {}
    sizes = sizes_of(arrays)
    found = next(
        filter(None, (find_named(store, config.group, path) for path in groups_above(config.targets, name))), None
    )
    text = f'data.weight = "{config.weight}": {store.path}'
    if found is None:
        raise InvalidConfig(
            f"{text} has no coordinate {name}{did_you_mean(name, sizes)}",
            f"Name an array of angles along dimensions of the target: {', '.join(sizes)}.",
        )
    if found.categories is not None or found.array.dtype.kind not in "iuf":
        raise InvalidConfig(f"{text}: {name} holds no angles ({found.array.dtype}).", "Name an array of numbers.")
    odd = [dim for dim, n in zip(found.dims, found.shape, strict=True) if sizes.get(dim) != n]
    if odd:
        raise InvalidConfig(
            f"{text}: {name} lies along {', '.join(found.dims)}, and no variable has {odd[0]} of that length.",
            f"Name an array of angles along dimensions of the target: {', '.join(sizes)}.",
        )
    return {config.weight: found}


def as_cosine(variable: Variable, named: NamedArray) -> Variable:
    """Return the coordinate of which a weight is the cosine as a variable that is decoded in float64."""
    unit: AngleUnit = "radians" if str(named.attributes.get("units", "")).lower() in RADIANS else "degrees"
    return replace(variable, angle=unit, encoding=variable.encoding or Encoding(dtype="float64"))


def check_weight(samples: Samples) -> None:
    """Refuse a weight that does not broadcast to each target.

    Raises
    ------
    InvalidConfig
        It has a dimension that a target lacks, or the cosine is that of a coordinate of samples.
    """
    weight = samples.weight
    if weight is None:
        return
    text = f'data.weight = "{weight.name}"'
    if weight.angle and not weight.is_static:
        raise InvalidConfig(
            f"{text}: {cosine_of(weight.name)} lies along {samples.sample_dim}, the dimension of the samples.",
            "Store the cosine as a variable, and name that.",
        )
    for name in samples.config.targets:
        dims = (samples.sample_dim, *samples.variable(name).row_dims)
        odd = [dim for dim in weight.row_dims if dim not in dims or weight.row_dims.count(dim) > 1]
        if odd:
            raise InvalidConfig(
                f"{text} has the dimension {odd[0]} {'twice' if odd[0] in dims else f'that the target {name} lacks'}; "
                f"allowed are those of the target: {', '.join(dims)}.",
                f"Choose one place of it (data.isel.{odd[0]} = 0), or name another variable.",
            )


# Read -----------------------------------------------------------------------------------------------------


def weight_text(samples: Samples) -> str:
    """Return what `plan` says about the values of the weight; empty without one. A static weight is read.

    Raises
    ------
    NonFiniteData, UnsuitableVariable
        A value is no weight, or all are 0.
    ChunkMissing, ChunkUndecodable
        Names the chunk.
    """
    weight = samples.weight
    if weight is None:
        return ""
    if not weight.is_static:
        return "checked as it is read: finite, not negative"
    members = tuple(replace(one, variables=(one.variable(weight.name),)) for one in samples.members)
    alone = replace(samples, variables=(weight,), members=members)
    weights = decoded_weights(weight, open_reader(alone, samples.config.reader).statics[weight.name])
    return f"{weights.min():.6g} to {weights.max():.6g}"
