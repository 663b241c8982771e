"""Keys of the schema whose feature is not built yet: they are refused when they are set, never ignored."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from dtrain.config.values import value_of
from dtrain.errors import NotSupportedYet

NOT_BUILT: dict[str, str] = {
    "cluster.tls": "TLS clusters",
}


def refuse_unbuilt(config: BaseModel, defaults: BaseModel) -> None:
    """Refuse a key that is set and asks for a feature that is not built yet.

    Raises
    ------
    NotSupportedYet
        Names the key and the feature.
    """
    for key, feature in NOT_BUILT.items():
        given, default = value_of(config, key), value_of(defaults, key)
        if given != default:
            raise NotSupportedYet(
                f"{key} = {_toml(given)}: this version does not have {feature} yet.", f"Leave {key} out."
            )


def _toml(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    return json.dumps(value)
