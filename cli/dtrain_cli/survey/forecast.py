"""Forecasts: fields or series over time, and a model that predicts the next step of one of them."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.errors import listed
from dtrain_cli.survey.draft import Draft, OffsetsTable, patches, row_bytes, unused
from dtrain_cli.survey.roles import ArrayFacts, Contents, has_word, is_earth, is_level, is_time, space_of, words
from dtrain_cli.survey.values import Look

USUAL = ("t2m", "2m", "tas", "temperature", "temp", "air", "t", "sst", "tos", "tp", "pr", "z500", "z", "msl")
"""Words of variables that people forecast, first ones first."""
FLAGS = {"flag", "flags", "mask", "qc", "quality", "status"}

WINDOW = 2
"""Steps of time that the model of a map sees."""
SERIES_WINDOW = 8
"""Steps of time that the model of a series sees."""
FEWEST = 6
"""Steps of time that an array has at least."""
MANY = 30
"""Maps of fewer steps have no window: each split needs rows for the windows of its samples."""
LARGE_ROW = 32 << 20
"""Further inputs are taken as long as a row of all has at most so many bytes."""
MOST_INPUTS = 8


@dataclass(frozen=True, slots=True)
class Field:
    """An array over time and places."""

    array: ArrayFacts
    time: str
    space: tuple[str, ...]


def forecast(contents: Contents, look: Look) -> Draft | None:
    """Return a draft for maps over time, else for series; None if there is neither."""
    return maps(contents, look) or maps(contents, look, any_places=True) or series(contents, look)


def maps(contents: Contents, look: Look, *, any_places: bool = False) -> Draft | None:
    """Return a draft for fields over time and places of the earth; None if there are none.

    Parameters
    ----------
    contents : Contents
    look : Look
    any_places : bool
        Take images over time too.
    """
    arrays = [array for array in contents.arrays.values() if not array.is_coordinate]
    fields = [_field(array, contents, any_places=any_places) for array in arrays]
    target = _usual([field.array for field in fields if field is not None])
    chosen = next((field for field in fields if field is not None and field.array is target), None)
    if chosen is None or target is None:
        return None
    time, space = chosen.time, chosen.space
    isel = _one_level(target, time, contents)
    inputs = _inputs(target, time, space, dict.fromkeys(isel, 1), contents)
    window = WINDOW if target.sizes[time] >= MANY else 1
    others = [field.array.name for field in fields if field is not None and field is not chosen]
    return Draft(
        template="forecast",
        title=f"A forecast: {target.name} one step of {time} ahead, from {listed(inputs, 3)}.",
        inputs=inputs,
        target=target.name,
        sample_dim=time,
        space=space,
        input_offsets=list(range(1 - window, 1)) if window > 1 else 0,
        target_offsets=1,
        isel=isel,
        patch=patches(target, space),
        always_normalize=True,
        others=unused(contents, *inputs, target.name),
        notes=_map_notes(chosen, window, others),
    )


def _map_notes(field: Field, window: int, others: list[str]) -> dict[str, str]:
    """Return the comments of the config file, by key."""
    time, sizes = field.time, [str(field.array.sizes[dim]) for dim in field.space]
    return {
        "data.target_offsets": f"the target is one step of {time} later",
        "data.input_offsets": f"the model sees this step of {time} and the one before" if window > 1 else "",
        "data.isel": "all levels make rows too large for a first try",
        "data.patch": f"maps of {' x '.join(sizes)} are cut into patches",
        "data.targets": _beside("or another field", others),
    }


def series(contents: Contents, look: Look) -> Draft | None:
    """Return a draft for numbers over time; None if there are none."""
    numbers = [a for a in contents.arrays.values() if not a.is_coordinate and not _is_flag(a)]
    by_time: dict[str, list[ArrayFacts]] = {}
    for array in numbers:
        if time := time_of(array, contents):
            by_time.setdefault(time, []).append(array)
    if not by_time:
        return None
    time, arrays = max(by_time.items(), key=lambda pair: (pair[0] in contents.time_dims, len(pair[1])))
    target = _usual(arrays)
    if target is None or target.sizes[time] < FEWEST:
        return None
    total, inputs = 0, []
    for array in sorted(arrays, key=lambda a: (a is not target, row_bytes(a, time))):
        total += row_bytes(array, time)
        if array is target or total <= LARGE_ROW // SERIES_WINDOW:
            inputs.append(array.name)
    window = max(1, min(SERIES_WINDOW, target.sizes[time] // 10))
    offsets: OffsetsTable = {"start": 1 - window, "stop": 1} if window > 1 else 0
    others = [array.name for array in arrays if array.name != target.name]
    return Draft(
        template="forecast",
        title=f"A forecast: {target.name} one step of {time} ahead, from {listed(inputs, 3)}.",
        inputs=tuple(inputs),
        target=target.name,
        sample_dim=time,
        input_offsets=offsets,
        target_offsets=1,
        others=unused(contents, *inputs, target.name),
        notes={
            "data.targets": _beside("or another series", others) or "the only series",
            "data.input_offsets": f"the model sees {window} steps of {time}",
            "data.target_offsets": f"the target is one step of {time} later",
        },
    )


def time_of(array: ArrayFacts, contents: Contents) -> str:
    """Return the dimension of time of an array, one of dates if there are several; empty for none."""
    times = [dim for dim in array.dims if is_time(dim, contents)]
    return next((dim for dim in times if dim in contents.time_dims), times[0] if times else "")


def _field(array: ArrayFacts, contents: Contents, *, any_places: bool) -> Field | None:
    """Return an array as a field over time and the earth, or any places; None if it is none."""
    time, space = time_of(array, contents), space_of(array, contents)
    if not space:  # an unstructured grid
        space = tuple(dim for dim in array.dims if words(dim)[-1:] in (["cell"], ["ncells"], ["values"], ["node"]))[:1]
    is_map = any(is_earth(dim, contents) for dim in space) or (time in contents.time_dims and array.kind == "f")
    if not time or not space or not (is_map or any_places) or _is_flag(array) or array.sizes[time] < FEWEST:
        return None
    return Field(array, time, space)


def _is_flag(array: ArrayFacts) -> bool:
    """Return True if values are marks rather than numbers."""
    has_meanings = "flag_values" in array.attributes or "flag_meanings" in array.attributes
    return array.kind == "b" or has_meanings or (array.is_integer and has_word(array.name, FLAGS))


def _usual(arrays: list[ArrayFacts]) -> ArrayFacts | None:
    """Return the array that people would forecast, else the first of numbers with fractions, else the first."""
    for usual in USUAL:
        for array in arrays:
            if usual in (array.name.lower(), *words(array.name)) or usual in words(_standard_name(array)):
                return array
    return next((array for array in arrays if array.kind == "f"), arrays[0] if arrays else None)


def _standard_name(array: ArrayFacts) -> str:
    return str(array.attributes.get("standard_name", ""))


def _one_level(target: ArrayFacts, time: str, contents: Contents) -> dict[str, int]:
    """Return the middle of the levels, if rows of all of them are too large."""
    levels = [dim for dim in target.dims if dim != time and is_level(dim, contents)]
    if row_bytes(target, time) * (WINDOW + 1) <= LARGE_ROW:
        return {}
    return {dim: target.sizes[dim] // 2 for dim in levels}


def _inputs(
    target: ArrayFacts, time: str, space: tuple[str, ...], part: dict[str, int], contents: Contents
) -> tuple[str, ...]:
    """Return the inputs: the target, static maps, and other fields as long as rows stay small."""
    arrays = [array for array in contents.arrays.values() if array is not target and not array.is_coordinate]
    static = [array.name for array in arrays if set(array.dims) == set(space)]
    fields = [a for a in arrays if time in a.dims and set(a.without(time)) >= set(space) and not _is_flag(a)]
    inputs, total = [target.name, *static], row_bytes(target, time, part)
    for field in sorted(fields, key=lambda a: row_bytes(a, time, part)):
        total += row_bytes(field, time, part)
        if total <= LARGE_ROW and len(inputs) < MOST_INPUTS:
            inputs.append(field.name)
    return tuple(inputs)


def _beside(what: str, names: list[str]) -> str:
    return f"{what}: {listed(names)}" if names else ""
