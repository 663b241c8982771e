"""dtrain config."""

import json

import pytest

from tests.cli.helpers import last, objects

AUTO = "auto: resolved when the run starts"


def origins(outcome):
    assert outcome.code == 0, outcome.err
    return {key: value["origin"] for key, value in last(outcome)["values"].items()}


def test_where_each_value_comes_from(cli, project):
    job = project()
    outcome = cli("--json", "config", "show", job.config, "--set", "train.rounds=5", "--set", "data.split.val=0.2")
    found = origins(outcome)
    assert {key for key, origin in found.items() if origin == "file"} == {
        "model",
        "data.path",
        "data.inputs",
        "data.targets",
        "train.loss",
        "train.metrics",
        "train.batch_size",
        "train.optimizer_args",
        "cluster.scheduler",
        "run.commit_every",
    }
    assert {key for key, origin in found.items() if origin == "--set"} == {"train.rounds", "data.split.val"}
    assert found["data.split.test"] == found["train.seed"] == found["run.keep"] == "default"
    assert found["average.replicas"] == found["data.memory"] == AUTO
    assert set(found.values()) == {"file", "--set", "default", AUTO}
    values = last(outcome)["values"]
    assert values["train.rounds"] == {"value": 5, "origin": "--set"}
    assert values["data.inputs"]["value"] == ["x"]


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("train.optimizer_args.lr=0.5", "train.optimizer_args"),
        ("train.optimizer_args={ lr = 0.5 }", "train.optimizer_args"),
        ("data.split={ val = 0.2, test = 0.2 }", "data.split.test"),
        ("model_args.hidden=3", "model_args"),
        (" train.seed = 4", "train.seed"),
        ("train.seed=0", "train.seed"),
        ("average.replicas=auto", "average.replicas"),
    ],
)
def test_a_setting_is_the_origin_of_all_that_it_touches(cli, project, setting, key):
    found = origins(cli("--json", "config", "show", project().config, "--set", setting))
    assert found[key] == "--set"
    assert found["train.rounds"] == "file"
    assert found["run.keep"] == "default"


def test_a_value_that_the_file_gives_though_it_is_the_default(cli, project):
    assert origins(cli("--json", "config", "show", project({"run": {"keep": 3}}).config))["run.keep"] == "file"


def test_a_table_that_the_file_gives(cli, project):
    found = origins(cli("--json", "config", "show", project({"data": {"split": {"val": 0.2}}}).config))
    assert (found["data.split.val"], found["data.split.test"]) == ("file", "default")


def test_in_words(cli, project):
    outcome = cli("config", "show", project().config, "--set", "train.rounds=5")
    assert outcome.code == 0
    assert outcome.err == ""
    lines = {line.split(" = ")[0]: line for line in outcome.out.splitlines()}
    assert lines["train.rounds"].split("#")[0].strip() == "train.rounds = 5"
    assert lines["train.rounds"].endswith("# --set")
    assert lines["train.loss"].split("#")[0].strip() == 'train.loss = "cross_entropy"'
    assert lines["train.loss"].endswith("# file")
    assert lines["run.keep"].endswith("# default")
    assert lines["average.replicas"].endswith(f"# {AUTO}")
    assert "train.local_steps" not in lines


def test_every_key_of_the_schema_is_there(cli, project):
    from dtrain.config.schema import DEFAULTS
    from dtrain.config.values import flat_values

    found = last(cli("--json", "config", "show", project().config))["values"]
    assert {"train.local_steps", "stop.target", "average.outer", "average.codec"} <= set(found)
    assert {key for key, _ in flat_values(DEFAULTS)} <= set(found)


def test_the_config_of_a_run(cli, project):
    job = project()
    assert cli("-q", "train", job.config, "--set", "train.rounds=1").code == 0
    outcome = cli("--json", "config", "show", "job")
    found = last(outcome)["values"]
    assert found["train.rounds"] == {"value": 1, "origin": "run"}
    assert found["train.seed"] == {"value": 0, "origin": "default"}
    assert last(cli("--json", "config", "show", job.run)) == last(outcome)


def test_the_schema_is_json_and_knows_every_key(cli, project):
    outcome = cli("config", "schema")
    assert outcome.code == 0
    assert outcome.err == ""
    found = json.loads(outcome.out)
    assert found["type"] == "object"
    assert set(found["properties"]) == {"model", "model_args", "data", "train", "average", "stop", "cluster", "run"}
    assert found["additionalProperties"] is False
    assert set(found["$defs"]["SplitConfig"]["properties"]) == {"val", "test"}


def test_the_schema_as_an_object_a_line(cli):
    (found,) = objects(cli("--json", "config", "schema").out)
    assert "properties" in found


def test_secrets_are_not_shown(cli, project):
    job = project()
    options = 'data.storage_options={key="AKIA", client_kwargs={headers={Authorization="Bearer 1234"}}, anon=false}'
    for mode in ((), ("--json",)):
        outcome = cli(*mode, "config", "show", job.config, "--set", options)
        assert outcome.code == 0, outcome.err
        assert "AKIA" not in outcome.out
        assert "1234" not in outcome.out
        assert "***" in outcome.out
