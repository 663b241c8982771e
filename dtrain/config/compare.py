"""Compare two configurations; tell which keys a continued run may change; hide secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dtrain.config.names import VERSION_OPTIONS
from dtrain.config.schema import TrainConfig
from dtrain.config.values import REDACTED, Plain, flat_values

SECRET = re.compile(r"key|secret|token|passw|auth|cookie|credential|signature|connection_string", re.IGNORECASE)


def without_secrets(config: TrainConfig) -> TrainConfig:
    """Return a configuration that may be stored: secret values of ``data.storage_options`` are replaced by ``***``."""
    kept = _redacted(config.data.storage_options)
    return config.model_copy(update={"data": config.data.model_copy(update={"storage_options": kept})})


def _redacted(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _redacted(value)
        if isinstance(value, Mapping)
        else REDACTED
        if isinstance(value, str) and SECRET.search(key)
        else value
        for key, value in options.items()
    }


def differences(old: TrainConfig, new: TrainConfig) -> list[tuple[str, Plain, Plain]]:
    """Return ``(key, old value, new value)`` for every key whose value differs.

    The keys of ``data.storage_options`` that choose other data are keys of their own.
    """
    before, after = ({**dict(flat_values(config)), **_versions(config)} for config in (old, new))
    keys = list(dict.fromkeys([*before, *after]))
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _versions(config: TrainConfig) -> dict[str, Plain]:
    options = config.data.storage_options
    return {f"data.storage_options.{key}": options[key] for key in VERSION_OPTIONS if key in options}


def may_change(key: str, config: TrainConfig) -> bool:
    """Return True if a continued run may change a key: it cannot change a bit of any later round."""
    if key == "train.rounds":
        return config.train.schedule == "constant" and config.average.outer_schedule == "constant"
    if key in ("data.memory", "data.cache", "data.reader", "data.storage_options"):
        return True
    return key.startswith(("stop.", "cluster.", "run.")) and key != "cluster.threads"
