"""What all tables of the configuration share: they are frozen, and their numbers are checked strictly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, WithJsonSchema
from pydantic.fields import FieldInfo

from dtrain.urls import redacted_in

Int = Annotated[int, Strict()]
Natural = Annotated[int, Strict(), Field(ge=0)]
Positive = Annotated[int, Strict(), Field(ge=1)]
Float = Annotated[float, Strict()]
Finite = Annotated[float, Strict(), Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Strict(), Field(ge=0, lt=1)]
Bool = Annotated[bool, Strict()]
Size = Annotated[
    str,
    BeforeValidator(lambda given: str(given) if type(given) is int else given),
    WithJsonSchema({"type": ["string", "integer"]}),
]
"""``auto``, or bytes such as ``512MB``; a number counts bytes."""

FROZEN = ConfigDict(
    extra="forbid",
    frozen=True,
    ser_json_inf_nan="constants",
    protected_namespaces=(),
    use_attribute_docstrings=True,  # they are the descriptions of the JSON Schema
)
"""Of every table of the configuration: it is frozen and refuses unknown keys."""


class Table(BaseModel):
    """A table of the configuration: it is frozen and refuses unknown keys."""

    model_config = FROZEN

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yield what is printed of the table: URLs are redacted."""
        for name, value in super().__repr_args__():
            yield name, redacted_in(value)


def function_or(*names: str) -> FieldInfo:
    """Return what the JSON Schema says of a text that is one of some names, or names a function of the user's."""
    info: FieldInfo = Field(json_schema_extra={"anyOf": [{"enum": [*names]}, {"pattern": "^[^:]+:[^:]+$"}]})
    return info


def without_sgd_defaults(given: Any, key: str) -> Any:
    """Leave the arguments of another optimizer than SGD to torch: the defaults of the schema are those of SGD."""
    if isinstance(given, dict) and key not in given and str(given.get("optimizer", "sgd")).lower() != "sgd":
        return {**given, key: {}}
    return given
