"""The JSON Schema of config files says what the loader says, and explains each key."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest

from dtrain.config.jsonschema import json_schema
from dtrain.config.names import LOSSES, METRICS
from dtrain.config.schema import TrainConfig
from dtrain.config.values import flat_values
from tests.config.helpers import REQUIRED, RICH, SMALLEST, merged
from tests.config.test_schema import CONTRACT

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / "cli/dtrain_cli/templates").glob("*.toml"))
EXAMPLES = sorted((ROOT / "examples").rglob("dtrain.toml"))
# each is allowed by the loader
VALUES = [
    {"data": {"path": ["a.zarr", "b.zarr"]}},
    {"data": {"path": [{"path": "a.zarr", "workers": ["tcp://h:1"], "replicas": 2}]}},
    {"data": {"isel": {"level": 3, "lat": {"start": 0, "stop": 64}, "time": [0, 1, 2]}}},
    {"data": {"sel": {"time": {"start": "2000", "stop": "2017-12-31"}, "level": [850, 500.0]}}},
    {"data": {"input_offsets": [-1, 0], "target_offsets": {"start": 1, "stop": 129}}},
    {"data": {"memory": 10_000_000, "cache": "1GB"}},
    {"data": {"split": {"val": {"time": "2017"}, "test": {"time": {"start": "2018"}}, "gap": 10}}},
    {"data": {"normalize": {"a": ["band"]}, "non_finite": {"min_valid": 0.5}}},
    {"train": {"batch_size": "full", "loss": "model:loss", "metrics": ["accuracy", "model:skill"]}},
    {"average": {"outer": {"optimizer": "adam", "schedule": "model:factor"}, "codec": {"name": "int4"}}},
    {"run": {"trackers": ["tensorboard", "model:track"]}},
]
# each is refused by the loader
REFUSED = [
    {"train": {"roudns": 3}},
    {"train": {"rounds": 0}},
    {"train": {"loss": "msee"}},
    {"data": {"missing": "ignore"}},
    {"average": {"mix": {"topology": "star"}}},
    {"cluster": {"threads": "four"}},
]


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def places(schema):
    """Every key of every table, with what the schema says of it."""
    for table, described in {"": schema, **schema["$defs"]}.items():
        for key, said in described.get("properties", {}).items():
            yield f"{table}.{key}", said


def test_every_key_has_a_description():
    found = dict(places(json_schema()))
    assert len(found) > 100
    for key, said in found.items():
        text = said.get("description", "")
        assert text.endswith("."), key
        assert "\n" not in text, key
        assert "``" not in text, key


def test_every_key_of_the_configuration_is_there():
    schema, keys = json_schema(), [key for key, _ in flat_values(TrainConfig(average={"outer": {}, "codec": {}}))]
    for key in keys:
        node = schema
        for part in key.split("."):
            assert part in node["properties"], key
            said = node["properties"][part]
            refs = [branch["$ref"] for branch in (said, *said.get("anyOf", ())) if "$ref" in branch]
            node = schema["$defs"][refs[0].rpartition("/")[2]] if refs else said
    assert len(keys) > 80


def test_required_keys_are_those_of_the_loader(validator):
    schema = validator.schema
    found = {key for key in schema["required"] if key not in ("data", "train")}
    found |= {f"data.{key}" for key in schema["$defs"]["DataConfig"]["required"]}
    found |= {f"train.{key}" for key in schema["$defs"]["TrainTable"]["required"]}
    assert found == set(REQUIRED)
    assert not validator.is_valid({"model": "m:f"})
    assert validator.is_valid(SMALLEST)


@pytest.mark.parametrize("tables", VALUES, ids=str)
def test_what_the_loader_allows(validator, tables):
    tables = merged(SMALLEST, tables)
    TrainConfig(**tables)
    validator.validate(json.loads(json.dumps(tables)))


@pytest.mark.parametrize("tables", REFUSED, ids=str)
def test_what_the_loader_refuses(validator, tables):
    tables = merged(SMALLEST, tables)
    with pytest.raises(ValueError, match=r".+"):
        TrainConfig(**tables)
    assert not validator.is_valid(tables)


@pytest.mark.parametrize("path", [*TEMPLATES, *EXAMPLES], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_files_of_the_project(validator, path):
    validator.validate(tomllib.loads(path.read_text(encoding="utf-8")))


def test_the_contract_and_a_rich_configuration(validator):
    validator.validate(tomllib.loads(CONTRACT))
    validator.validate(RICH)


def test_names_are_offered(validator):
    table = validator.schema["$defs"]["TrainTable"]["properties"]
    assert table["loss"]["anyOf"][0]["enum"] == list(LOSSES)
    assert set(table["metrics"]["items"]["anyOf"][0]["enum"]) == set(METRICS)


def test_values_of_descriptions_are_allowed_ones():
    """Words in quotes that look like values of a key are values of it."""
    for key, said in places(json_schema()):
        if "enum" in said:
            quoted = set(re.findall(r'"([a-z0-9]+)"', said["description"]))
            assert quoted <= set(map(str, said["enum"])), key
