from __future__ import annotations

import pytest

from dtrain.config.compare import differences, may_change, without_secrets
from dtrain.config.schema import TrainConfig
from dtrain.config.values import flat_values, without_redacted
from dtrain.errors import InvalidConfig
from tests.config.helpers import SMALLEST, merged


def test_differences_name_the_key_and_both_values():
    old = TrainConfig(**SMALLEST)
    new = TrainConfig(**merged(SMALLEST, {"train": {"rounds": 3, "local_steps": 5}, "data": {"inputs": ["a", "c"]}}))
    assert differences(old, new) == [
        ("data.inputs", ["a"], ["a", "c"]),
        ("train.rounds", 20, 3),
        ("train.local_steps", None, 5),
    ]
    assert differences(new, new) == []


def test_a_version_of_a_repository_is_a_key_of_its_own():
    old = TrainConfig(**merged(SMALLEST, {"data": {"storage_options": {"tag": "v1", "key": "a"}}}))
    new = TrainConfig(**merged(SMALLEST, {"data": {"storage_options": {"branch": "dev", "key": "b"}}}))
    changed = {key: (before, after) for key, before, after in differences(old, new)}
    assert changed.pop("data.storage_options")
    assert changed == {"data.storage_options.tag": ("v1", None), "data.storage_options.branch": (None, "dev")}
    assert not any(may_change(key, new) for key in changed)


MAY_CHANGE = {
    "train.rounds",
    "stop.metric",
    "stop.mode",
    "stop.target",
    "stop.patience",
    "stop.min_delta",
    "cluster.scheduler",
    "cluster.workers",
    "cluster.memory",
    "cluster.allow_plain",
    "cluster.slices",
    "cluster.tls.ca",
    "cluster.tls.cert",
    "cluster.tls.key",
    "run.dir",
    "run.commit_every",
    "run.keep",
    "run.trackers",
    "data.memory",
    "data.cache",
    "data.reader",
    "data.storage_options",
}


def test_a_continued_run_may_change_what_the_contract_says():
    config = TrainConfig()
    assert {key for key, _ in flat_values(config) if may_change(key, config)} == MAY_CHANGE


@pytest.mark.parametrize("schedule", ["cosine", "linear", "mine:schedule"])
def test_the_rounds_may_not_change_where_the_rate_depends_on_them(schedule):
    config = TrainConfig(train={"schedule": schedule})
    assert {key for key, _ in flat_values(config) if may_change(key, config)} == MAY_CHANGE - {"train.rounds"}


def test_a_run_keeps_no_secrets():
    options = {"key": "AK", "secret": "xyz", "anon": False, "client_kwargs": {"endpoint_url": "http://h", "token": "t"}}
    headers = without_secrets(TrainConfig(data={"storage_options": {"headers": {"Authorization": "Bearer 1"}}}))
    assert headers.data.storage_options == {"headers": {"Authorization": "***"}}
    config = TrainConfig(data={"path": "s3://b/a.zarr", "storage_options": options})
    kept = without_secrets(config).data.storage_options
    assert kept == {
        "key": "***",
        "secret": "***",
        "anon": False,
        "client_kwargs": {"endpoint_url": "http://h", "token": "***"},
    }
    assert "xyz" not in repr(config)


SHAPES = [
    {"pwd": "hush"}, {"sas": "hush"}, {"jwt": "hush"}, {"bearer": "hush"}, {"pin": 4711}, {"account": "hush"},
    {"s3": {"secret": "hush"}}, {"client_kwargs": {"aws": {"session": "hush"}}}, {"headers": {"X-Api": "hush"}},
    {"headers": [["X-Api", "hush"]]}, {"credentials": ["a", "hush"]}, {"credentials": [{"id": "hush"}]},
    {"token": {"refresh": "hush", "expiry": 4711}}, {"endpoint_url": "https://me:hush@host"},
    {"endpoint_url": "https://host/?sig=hush"}, {"endpoint_url": "https://host/#hush"}, {"KEY": "hush"},
    {"remote_options": {"password": "hush"}}, {"target_options": {"auth": ["me", "hush"]}}, {"cookies": {"id": "hush"}},
]  # fmt: skip


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_whatever_shape_a_secret_has_a_run_does_not_keep_it(options):
    kept = without_secrets(TrainConfig(data={"path": "s3://b/a.zarr", "storage_options": options}))
    assert "hush" not in str(kept.data.storage_options)
    assert "4711" not in str(kept.data.storage_options)
    assert without_redacted(kept.data.storage_options).keys() <= options.keys()


def test_what_names_the_server_is_kept():
    options = {
        "anon": True,
        "endpoint_url": "https://host:9000",
        "branch": "main",
        "client_kwargs": {"region_name": "eu-west-1", "verify": False, "timeout": 3.5},
        "config_kwargs": {"s3": {"addressing_style": "path"}, "retries": {"max_attempts": 2}},
    }
    kept = without_secrets(TrainConfig(data={"path": "s3://b/a.zarr", "storage_options": options}))
    assert kept.data.storage_options == options
    assert without_redacted(kept.data.storage_options) == options


def test_storage_options_that_are_a_text_are_not_shown():
    with pytest.raises(InvalidConfig) as caught:
        TrainConfig(data={"storage_options": "secret"})
    assert "secret" not in caught.value.message
