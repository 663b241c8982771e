"""The JSON Schema of config files, for editors: each key with its description, what is allowed, and its default."""

from __future__ import annotations

from typing import Any

from dtrain.config.schema import REQUIRED, TrainConfig

ABOUT = "The configuration of a run of dtrain, which trains PyTorch models on Zarr data by averaging models."
DIALECT = "https://json-schema.org/draft/2020-12/schema"
TABLES = {"data": "DataConfig", "train": "TrainTable"}
"""Classes of the tables that hold required keys."""


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of config files."""
    schema: dict[str, Any] = _described(TrainConfig.model_json_schema())
    tables = {"": schema, **{name: schema["$defs"][kind] for name, kind in TABLES.items()}}
    schema["required"] = [*TABLES]
    for key in REQUIRED:
        table, _, name = key.rpartition(".")
        tables[table].setdefault("required", []).append(name)
        del tables[table]["properties"][name]["default"]
    for table in TABLES:
        del schema["properties"][table]["default"]  # it would lack the required keys
    return {"$schema": DIALECT, **schema, "title": "dtrain", "description": ABOUT}


def _described(schema: Any) -> Any:
    """Return a schema without titles, which repeat the keys, and with descriptions in one line, free of markup."""
    if isinstance(schema, list):
        return [_described(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _described(value) for key, value in schema.items() if key != "title" or not isinstance(value, str)}
    if isinstance(text := schema.get("description"), str):
        kept["description"] = " ".join(text.replace("``", "").split())
    return kept
