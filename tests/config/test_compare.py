from __future__ import annotations

import pytest

from dtrain.config.compare import differences, may_change, without_secrets
from dtrain.config.schema import TrainConfig
from dtrain.config.values import flat_values
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
    "cluster.tls",
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
    with pytest.raises(InvalidConfig) as caught:
        TrainConfig(data={"storage_options": "secret"})
    assert "secret" not in caught.value.message
