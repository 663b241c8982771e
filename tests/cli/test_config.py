"""dtrain config."""

import json
import tomllib

import pytest

from tests.cli.helpers import last, merge, objects

ROUNDS = {"train": {"rounds": 6}}
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
    assert outcome.err == "next: dtrain plan job/dtrain.toml\n"
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
    assert "#:schema ./dtrain.schema.json" in outcome.err
    found = json.loads(outcome.out)
    assert found["type"] == "object"
    assert set(found["properties"]) == {"model", "model_args", "data", "train", "average", "stop", "cluster", "run"}
    assert found["additionalProperties"] is False
    assert set(found["$defs"]["SplitConfig"]["properties"]) == {"val", "test", "gap", "by", "patches"}


def test_the_schema_as_an_object_a_line(cli):
    (found,) = objects(cli("--json", "config", "schema").out)
    assert "properties" in found


def test_keys_that_differ_between_two_files(cli, project):
    one, two = project(name="one"), project({"train": {"rounds": 9, "seed": 1, "local_steps": 5}}, name="two")
    outcome = cli("config", "diff", one.config, two.config)
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "train.rounds = 2 -> 9               # a continued run may change it",
        "train.local_steps = not given -> 5  # a new run",
        "train.seed = 0 -> 1                 # a new run",
    ]
    assert outcome.err == "There are 2 keys that a continued run cannot change: train B under another --run NAME.\n"
    found = last(cli("--json", "config", "diff", one.config, two.config))
    assert (found["event"], found["a"], found["b"]) == ("diff", str(one.config), str(two.config))
    assert found["changes"][0] == {"key": "train.rounds", "old": 2, "new": 9, "may_change": True}
    assert [change["may_change"] for change in found["changes"]] == [True, False, False]


def test_no_key_differs_between_a_run_and_its_file(cli, project):
    job = project()
    assert cli("-q", "train", job.config).code == 0
    assert cli("config", "diff", job.config, "job") == (0, "no key differs\n", "")
    assert last(cli("--json", "config", "diff", "job", job.run))["changes"] == []


def test_rounds_of_a_schedule_are_a_new_run(cli, project):
    cosine = {"train": {"rounds": 5, "schedule": "cosine"}}
    files = [project(tables, name=name).config for name, tables in (("a", cosine), ("b", merge(cosine, ROUNDS)))]
    (change,) = last(cli("--json", "config", "diff", *files))["changes"]
    assert (change["key"], change["may_change"]) == ("train.rounds", False)


def test_a_difference_shows_no_secrets(cli, project):
    def options(secret):
        return {"data": {"storage_options": {"secret": secret, "anon": secret == "one"}}}

    files = [project(options(secret), name=secret).config for secret in ("one", "two")]
    outcome = cli("config", "diff", *files)
    assert outcome.code == 0
    assert '"secret": "***"' in outcome.out
    assert "one" not in outcome.out
    assert "two" not in outcome.out


def test_a_file_that_is_not_there_has_no_difference(cli, project):
    outcome = cli("config", "diff", project().config, "no.toml")
    assert outcome.code == 2
    assert "no.toml: no such config file" in outcome.err


def test_secrets_are_not_shown(cli, project):
    job = project()
    options = 'data.storage_options={key="AKIA", client_kwargs={headers={Authorization="Bearer 1234"}}, anon=false}'
    for mode in ((), ("--json",)):
        outcome = cli(*mode, "config", "show", job.config, "--set", options)
        assert outcome.code == 0, outcome.err
        assert "AKIA" not in outcome.out
        assert "1234" not in outcome.out
        assert "***" in outcome.out


# Presets ------------------------------------------------------------------------------------------------------------


def test_presets_are_listed_with_their_sources(cli):
    from dtrain.config.presets import PRESETS

    outcome = cli("config", "presets")
    assert outcome.code == 0, outcome.err
    assert "dtrain config presets NAME" in outcome.err
    names = [line.split()[0] for line in outcome.out.splitlines() if not line.startswith(" ")]
    assert names == list(PRESETS)
    assert "arXiv:2311.08105" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80
    found = last(cli("--json", "config", "presets"))
    assert found["event"] == "presets"
    assert [preset["name"] for preset in found["presets"]] == list(PRESETS)
    assert set(found["presets"][0]) == {"name", "summary", "source"}


def test_a_preset_is_toml_with_comments(cli):
    outcome = cli("config", "presets", "diloco")
    assert (outcome.code, outcome.err) == (0, "")
    comments = [line for line in outcome.out.splitlines() if line.startswith("#")]
    assert comments[0].startswith("# diloco: AdamW for many local steps")
    assert "# Source: Douillard et al. 2023, arXiv:2311.08105" in comments
    assert any(line.startswith("# Adapt: ") for line in comments)
    tables = tomllib.loads(outcome.out)
    assert tables["train"]["local_steps"] == 500
    assert tables["average"]["outer"]["args"] == {"lr": 0.7, "momentum": 0.9, "nesterov": True}
    found = last(cli("--json", "config", "presets", "diloco"))
    assert found["event"] == "presets"
    assert (found["name"], found["tables"], found["toml"]) == ("diloco", tables, outcome.out.rstrip("\n"))
    assert "\n" not in found["about"] + found["adapt"]


def test_a_preset_of_another_name_is_exit_code_2(cli):
    outcome = cli("--json", "config", "presets", "fedavgn")
    assert outcome.code == last(outcome)["code"] == 2
    assert 'fedavgn: no such preset; did you mean "fedavg' in outcome.err


def test_presets_pasted_into_a_config_file(cli, tmp_path):
    from dtrain.config.presets import PRESETS

    head = 'model = "m:f"\ndata = { path = "x.zarr", inputs = ["a"], targets = ["b"] }\n'
    for name, preset in PRESETS.items():
        pasted = cli("config", "presets", name).out.replace("[train]\n", '[train]\nloss = "mse"\n')
        (tmp_path / "dtrain.toml").write_text(head + pasted)
        outcome = cli("--json", "config", "show", tmp_path / "dtrain.toml")
        assert outcome.code == 0, outcome.err
        values = last(outcome)["values"]
        for key, value in preset.tables["train"].items():
            assert values[f"train.{key}"] == {"value": value, "origin": "file"}


def test_a_preset_pasted_below_a_table_that_is_there_says_what_to_do(cli, tmp_path):
    (tmp_path / "dtrain.toml").write_text('[train]\nloss = "mse"\n' + cli("config", "presets", "fedavg").out)
    outcome = cli("config", "show", tmp_path / "dtrain.toml")
    assert outcome.code == 3
    assert "twice" in outcome.err
    assert "put the keys of both tables into it" in " ".join(outcome.err.split())
