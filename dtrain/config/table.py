"""What all tables of the configuration share: they are frozen, and their numbers are checked strictly."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict

Int = Annotated[int, Strict()]
Natural = Annotated[int, Strict(), Field(ge=0)]
Positive = Annotated[int, Strict(), Field(ge=1)]
Float = Annotated[float, Strict()]
Finite = Annotated[float, Strict(), Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Strict(), Field(ge=0, lt=1)]
Bool = Annotated[bool, Strict()]

FROZEN = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants", protected_namespaces=())
"""Of every table of the configuration: it is frozen and refuses unknown keys."""


class Table(BaseModel):
    """A table of the configuration: it is frozen and refuses unknown keys."""

    model_config = FROZEN


def without_sgd_defaults(given: Any, key: str) -> Any:
    """Leave the arguments of another optimizer than SGD to torch: the defaults of the schema are those of SGD."""
    if isinstance(given, dict) and key not in given and str(given.get("optimizer", "sgd")).lower() != "sgd":
        return {**given, key: {}}
    return given
