"""Turn the faults that pydantic finds in a configuration into sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, time
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dtrain.config.functions import described
from dtrain.config.values import flat_values
from dtrain.errors import did_you_mean, shortened
from dtrain.urls import REDACTED, redacted_in


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the schema."""

    key: str
    """For example ``data.path[0].workers``."""
    siblings: tuple[str, ...]
    """The keys of its table."""
    annotation: Any
    """The type of its value, as the schema declares it; None outside the schema."""


def sentences(error: ValidationError, schema: type[BaseModel]) -> tuple[str, str]:
    """Return one message that names every fault of a configuration, and a hint.

    Parameters
    ----------
    error : pydantic.ValidationError
    schema : type
        The class that was validated.
    """
    faults = error.errors(include_url=False)
    messages: dict[str, str] = {}
    for fault in faults:
        if _is_other_branch(fault, faults, schema):
            continue
        place = _place(fault["loc"], schema)
        message = _sentence(fault, place, schema)
        # a value that fits no branch of a union has a fault for each branch: together they say what is allowed
        allowed = message.partition(": input should be ")[2]
        if place.key not in messages:
            messages[place.key] = message
        elif allowed and allowed not in messages[place.key]:
            messages[place.key] += f" or {allowed}"
    hint = "" if len(messages) == 1 else f"{len(messages)} keys are wrong."
    return "; ".join(messages.values()), hint


def _is_other_branch(fault: ErrorDetails, faults: Sequence[ErrorDetails], schema: type[BaseModel]) -> bool:
    """Return True if a fault is of one branch of a union, and the value fits another branch but for a part of it."""
    loc = fault["loc"]
    deeper = any(len(f["loc"]) > len(loc) and f["loc"][: len(loc) - 1] == loc[:-1] for f in faults)
    return fault["type"].endswith("_type") and deeper and len(_branches(_place(loc[:-1], schema).annotation)) > 1


def _place(loc: tuple[int | str, ...], schema: type[BaseModel]) -> Place:
    """Return the place that a pydantic location means."""
    place = Place("", (), schema)
    for part in loc:
        branches = _branches(place.annotation)
        if len(branches) > 1:  # this part names a branch of a union; it is no part of the key
            branch = next((b for b in branches if str(part).partition("[")[0] == _origin(b).__name__), None)
            place = Place(place.key, place.siblings, branch)
            continue
        annotation = branches[0]
        origin = _origin(annotation)
        if origin is tuple:
            place = Place(f"{place.key}[{part}]", place.siblings, get_args(annotation)[0])
        elif origin is dict:
            place = Place(f"{place.key}.{part}", place.siblings, get_args(annotation)[1])
        elif isinstance(origin, type) and issubclass(origin, BaseModel):
            field = origin.model_fields.get(str(part))
            place = Place(f"{place.key}.{part}", tuple(origin.model_fields), field.annotation if field else None)
        else:
            break
    return Place(place.key.removeprefix("."), place.siblings, place.annotation)


def _branches(annotation: Any) -> list[Any]:
    """Return the types that a value may have, except None."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    return [branch for part in get_args(annotation) if part is not NoneType for branch in _branches(part)]


def _origin(annotation: Any) -> Any:
    return get_origin(annotation) or annotation


def _sentence(fault: ErrorDetails, place: Place, schema: type[BaseModel]) -> str:
    kind, given = fault["type"], fault["input"]
    text = fault["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return _unknown_key(place, schema)
    if kind == "missing":
        return f"{place.key} is missing"
    if kind == "value_error":
        return f"{place.key}: {text}" if place.key else text
    guess = ""
    if kind == "literal_error" and isinstance(given, str):
        guess = did_you_mean(given, re.findall(r"'([^']+)'", text))
    text = re.sub(r"a valid dictionary( or instance of \w+)?", "a table", text).replace("a valid tuple", "a list")
    value = REDACTED if place.key.startswith("data.storage_options") else given
    return f"{place.key} = {_short(value)}: {text[0].lower()}{text[1:]}{guess}"


def _unknown_key(place: Place, schema: type[BaseModel]) -> str:
    table, _, name = place.key.rpartition(".")
    elsewhere = [key for key, _ in flat_values(schema.model_construct()) if key.rpartition(".")[2] == name]
    guess = f'; did you mean "{elsewhere[0]}"?' if elsewhere else did_you_mean(name, place.siblings)
    known = f"; {f'[{table}]' if table else 'the config'} has {', '.join(place.siblings)}"
    return f"{place.key}: no such key{guess or known}"


def _short(value: Any) -> str:
    return shortened(json.dumps(redacted_in(value), default=_shown), 60)  # before a part of a URL is left out


def _shown(value: Any) -> str:
    """Return a value that JSON cannot hold as text, without an address."""
    return str(value) if isinstance(value, date | time) else described(value)
