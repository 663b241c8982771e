"""Compare two configurations; tell which keys a continued run may change; hide secrets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from dtrain.config.names import HARMLESS_OPTIONS, VERSION_OPTIONS
from dtrain.config.schema import TrainConfig
from dtrain.config.values import Plain, flat_values
from dtrain.urls import REDACTED, bare_url, is_redacted, redacted_url


def without_secrets(config: TrainConfig) -> TrainConfig:
    """Return a configuration that may be stored and shown.

    Of ``data.storage_options`` it has what is known to be harmless; other values become ``***``: texts and numbers of
    keys that `HARMLESS_OPTIONS` does not have, also in lists and nested tables, and the user, password and query of
    URLs. In all other keys, URLs have ``***`` in place of user, password, query and fragment (`dtrain.urls`).

    A run is compared by what this returns. So a signature that was renewed (``?sig=...``, ``?X-Amz-Signature=...``)
    makes no other run. Nor does a query that names data (``?dataset=a``), since nothing tells it from a secret, and a
    digest of a short secret would give it away: instead, plan.json has a digest of the first bytes that are read
    behind such a URL, and a run does not go on with others (`dtrain.data.read.presence.look_up`).
    """
    options = {key: _without_secret(value, key) for key, value in config.data.storage_options.items()}
    kept = config.model_copy(update={"data": config.data.model_copy(update={"storage_options": {}})})
    shown: TrainConfig = _with_redacted_urls(kept)
    return shown.model_copy(update={"data": shown.data.model_copy(update={"storage_options": options})})


def _without_secret(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_secret(own, name) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secret(own, key) for own in value]
    if value is None or isinstance(value, bool):
        return value
    if key not in HARMLESS_OPTIONS:
        return REDACTED
    return bare_url(value) if isinstance(value, str) else value


def _with_redacted_urls(value: Any) -> Any:
    """Return a value of the configuration with redacted URLs; the same object if it has none."""
    if isinstance(value, str):
        return redacted_url(value)
    if isinstance(value, BaseModel):
        own = {name: getattr(value, name) for name in type(value).model_fields}
        changed = {name: new for name, one in own.items() if (new := _with_redacted_urls(one)) != one}
        return value.model_copy(update=changed) if changed else value
    if isinstance(value, Mapping):
        return {key: _with_redacted_urls(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_redacted_urls(inner) for inner in value)
    return value


def keys_not_kept(config: TrainConfig) -> list[str]:
    """Return the keys of a run's configuration with a URL of which the run has not kept everything."""
    return [key for key, value in flat_values(config) if has_redacted(value)]


def has_redacted(value: Any) -> bool:
    """Return True if a value is or holds, at any depth, a URL of which a run has not kept everything."""
    if isinstance(value, Mapping):
        return any(map(has_redacted, value.values()))
    if isinstance(value, list | tuple):
        return any(map(has_redacted, value))
    return isinstance(value, str) and is_redacted(value)


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
