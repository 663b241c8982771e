"""Compare two configurations; tell which keys a continued run may change; hide secrets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtrain.config.names import HARMLESS_OPTIONS, VERSION_OPTIONS
from dtrain.config.schema import TrainConfig
from dtrain.config.values import REDACTED, Plain, flat_values, without_credentials


def without_secrets(config: TrainConfig) -> TrainConfig:
    """Return a configuration that may be stored: of ``data.storage_options`` only what is known to be harmless.

    Other values become ``***``: texts and numbers of keys that `HARMLESS_OPTIONS` does not have, also in lists and
    nested tables, and the user, password and query of URLs.
    """
    kept = {key: _redacted(value, key) for key, value in config.data.storage_options.items()}
    return config.model_copy(update={"data": config.data.model_copy(update={"storage_options": kept})})


def _redacted(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _redacted(own, name) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(own, key) for own in value]
    if value is None or isinstance(value, bool):
        return value
    if key not in HARMLESS_OPTIONS:
        return REDACTED
    return without_credentials(value) if isinstance(value, str) else value


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
