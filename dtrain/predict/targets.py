"""Targets: names, dimensions, units and classes that predictions take over from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.config.names import IGNORED_CLASS
from dtrain.data.categories import categories_of
from dtrain.data.encoding import Floats
from dtrain.data.lead import LEAD
from dtrain.data.outcoords import attributes_in
from dtrain.data.plan.prediction import row_lengths
from dtrain.data.samples import Field, Samples
from dtrain.data.variable import Variable
from dtrain.resolved import Resolved

CODING = ("scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned", "dtype", "coordinates")
"""Attributes that say how values are stored, not what they mean."""
PACKED = ("valid_min", "valid_max", "valid_range")
"""Attributes in the units of stored values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is known of a target."""

    name: str
    """As ``data.targets`` has it."""
    written: str
    """The name of its predictions."""
    dims: tuple[str, ...]
    """Of one sample: the lead, if target offsets are a list, then the dimensions of a row."""
    shape: tuple[int, ...]
    """Of a whole row of the store that is predicted."""
    stored: tuple[str, ...]
    """The dimensions of its predictions as they are written."""
    dtype: str
    """Of its values; an integer one of classes."""
    is_number: bool
    """Whether the model sees floats."""
    missing: int | None
    """The stored value that marks a missing label."""
    scaling: tuple[Floats, Floats] | None
    """Mean and standard deviation; they broadcast against samples."""
    classes: tuple[str, ...]
    """The names of the classes, by code; none are known if it is empty."""
    attributes: Mapping[str, Any]

    def patch_shape(self, patch: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of a sample that is cut to a patch."""
        return tuple(patch.get(dim, n) for dim, n in zip(self.dims, self.shape, strict=True))


def targets_of(known: Samples, inputs: Samples, resolved: Resolved) -> tuple[Target, ...]:
    """Return what is known of the targets.

    Parameters
    ----------
    known : Samples
        With the targets: of the store that is predicted, or of the run's own.
    inputs : Samples
        Of the store that is predicted.
    resolved : Resolved
        Of the run.

    Raises
    ------
    LengthsDiffer
        The run's means do not fit the rows.
    """
    samples = known.standardised_by(resolved.scalings).labelled(resolved.labels)
    lengths = row_lengths(inputs)
    names = written_names(samples.config.targets)
    first = len(samples.config.inputs)
    fields = samples.fields[first : first + len(names)]
    attributes = attributes_in(samples, samples.config.targets)
    return tuple(
        _target(samples, field, lengths, written, attributes.get(field.name, {}), resolved)
        for field, written in zip(fields, names, strict=True)
    )


def _target(
    samples: Samples,
    field: Field,
    lengths: Mapping[str, int],
    written: str,
    attributes: Mapping[str, Any],
    resolved: Resolved,
) -> Target:
    variable = samples.variable(field.name)
    lead = (LEAD,) if field.window else ()
    row_shape = tuple(lengths.get(dim, n) for dim, n in zip(variable.row_dims, variable.row_shape, strict=True))
    scaling = resolved.scalings.get(variable.name)
    standard = None if scaling is None else scaling.against(variable.name, row_shape)
    broadcast = None
    if standard is not None:
        shape = ((1, 1) if field.window else (1,)) + standard.mean.shape
        broadcast = standard.mean.reshape(shape), standard.std.reshape(shape)
    stored = [dim for axis, dim in enumerate(variable.dims) if axis == variable.sample_axis or dim in variable.row_dims]
    at = stored.index(samples.sample_dim) + 1
    known = categories_of(samples) | dict(resolved.categories)
    names = known[variable.name].names if variable.name in known else _flag_names(attributes)
    if variable.name in known and known[variable.name].count > len(names):
        names = ()
    return Target(
        name=variable.name,
        written=written,
        dims=(*lead, *variable.row_dims),
        shape=(*((len(field.offsets),) if field.window else ()), *row_shape),
        stored=(*stored[:at], *lead, *stored[at:]),
        dtype=str(variable.decoded_dtype),
        is_number=variable.model_dtype.kind == "f",
        missing=_mark(variable),
        scaling=broadcast,
        classes=names,
        attributes=_without_coding(attributes, is_packed=variable.encoding is not None and variable.encoding.is_packed),
    )


def _mark(variable: Variable) -> int | None:
    """Return the stored value that marks a missing label; None if there is none."""
    if variable.encoding is None or not variable.encoding.missing or variable.encoding.is_packed:
        return None
    value = variable.encoding.missing[0]
    return int(value) if value == value and value == int(value) and value != IGNORED_CLASS else None


def _without_coding(attributes: Mapping[str, Any], *, is_packed: bool) -> dict[str, Any]:
    left_out = {*CODING, *(PACKED if is_packed else ()), "_ARRAY_DIMENSIONS", "encoding-type", "encoding-version"}
    return {key: value for key, value in attributes.items() if key not in left_out}


def _flag_names(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names that ``flag_meanings`` gives to the classes 0, 1, 2 ...; none if it names others."""
    meanings, values = attributes.get("flag_meanings"), attributes.get("flag_values")
    names = tuple(meanings.split()) if isinstance(meanings, str) else ()
    codes = list(values) if isinstance(values, list | tuple) else [values] if values is not None else None
    return names if codes is None or codes == list(range(len(names))) else ()


def written_names(targets: Sequence[str]) -> list[str]:
    """Return the names of the predictions of targets: the last part of each path, if that tells them apart.

    A level of an image, which is a number, gives the name of its image.

    >>> written_names(["obs/cell_type"]), written_names(["labels/nuclei/0"]), written_names(["a/x", "b/x"])
    (['cell_type'], ['nuclei'], ['a_x', 'b_x'])
    """
    short = [_last_name(target) for target in targets]
    return short if len(set(short)) == len(short) else [target.strip("/").replace("/", "_") for target in targets]


def _last_name(target: str) -> str:
    parts = target.strip("/").split("/")
    named = [part for part in parts if not part.removeprefix("s").isdigit()]
    return named[-1] if named else parts[-1]
