"""`data.sel` and `data.split`: shares, ranges of a coordinate, groups; and what does not go together."""

from __future__ import annotations

import tomllib
from datetime import UTC, date, datetime

import numpy as np
import pytest

from dtrain.config.compare import differences
from dtrain.config.files import to_toml
from dtrain.config.schema import DataConfig, TrainConfig
from dtrain.config.slices import LabelSlice
from dtrain.errors import InvalidConfig

FROM_2018 = {"time": {"start": "2018"}}


def refused(**data):
    with pytest.raises(InvalidConfig) as caught:
        TrainConfig(data=data)
    return caught.value.message


def data_of(**data) -> DataConfig:
    return TrainConfig(data=data).data


def test_shares_are_the_default():
    split = data_of().split
    assert (split.shares, split.ranges) == ({"val": 0.1, "test": 0.1}, {})
    assert (split.holds_out("val"), data_of(split={"val": 0.0}).split.holds_out("val")) == (True, False)


def test_ranges_of_a_coordinate():
    split = data_of(split={"val": {"time": "2017"}, "test": FROM_2018, "gap": 10}).split
    assert split.ranges == {"val": ("time", "2017"), "test": ("time", LabelSlice(start="2018"))}
    assert (split.shares, split.gap, split.holds_out("val"), split.holds_out("test")) == ({}, 10, True, True)


def test_a_range_beside_a_share():
    split = data_of(split={"test": {"lat": {"start": -30, "stop": 29.5}}}).split
    assert (split.shares, split.ranges) == ({"val": 0.1}, {"test": ("lat", LabelSlice(start=-30, stop=29.5))})


def test_groups():
    split = data_of(split={"by": "obs/donor", "val": 0.2}).split
    assert (split.by, split.shares, split.ranges) == ("obs/donor", {"val": 0.2, "test": 0.1}, {})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2017-06", "2017-06"),
        (850, 850),
        (0.25, 0.25),
        (np.int32(850), 850),
        (np.float64(0.25), 0.25),
        (date(2017, 6, 1), "2017-06-01"),
        (datetime(2017, 6, 1, 12, tzinfo=UTC).replace(tzinfo=None), "2017-06-01T12:00:00"),
        (np.datetime64("2017-06-01"), "2017-06-01T00:00:00"),
        (np.datetime64("2017-06-01T00:00:00.000000001"), "2017-06-01T00:00:00.000000001"),
        ([850, 500], (850, 500)),
        (range(0, 4, 2), (0, 2)),
        (np.array(["2017-06-01"], "M8[s]"), ("2017-06-01T00:00:00",)),
        (slice(1, 5), LabelSlice(start=1, stop=5)),
        (slice("2017", None, 2), LabelSlice(start="2017", step=2)),
        (slice(np.datetime64("2017-06-01T06"), None), LabelSlice(start="2017-06-01T06:00:00")),
        ({"start": date(2017, 6, 1)}, LabelSlice(start="2017-06-01")),
    ],
    ids=str,
)
def test_values_of_a_coordinate_as_python_and_toml_have_them(given, expected):
    config = TrainConfig(data={"sel": {"time": given}})
    assert config.data.sel == {"time": expected}
    assert type(config.data.sel["time"]) is type(expected)
    assert TrainConfig(**tomllib.loads(to_toml(config))) == config


def test_the_table_of_the_readme():
    text = 'split = { val = { time = "2017" }, test = { time = { start = 2018-01-01 } }, gap = 10 }'
    config = TrainConfig(data=tomllib.loads(text))
    assert config.data.split.ranges["test"] == ("time", LabelSlice(start="2018-01-01"))
    assert TrainConfig(**tomllib.loads(to_toml(config))) == config


REFUSED = {
    "a bool": ({"sel": {"time": True}}, "data.sel.time = true: input should be a valid string or a valid integer"),
    "not finite": ({"sel": {"time": float("inf")}}, "data.sel.time = Infinity: input should be"),
    "not a number": ({"sel": {"time": {"start": float("nan")}}}, "data.sel.time.start = NaN: input should be"),
    "a key": ({"sel": {"time": {"stp": 1}}}, 'data.sel.time.stp: no such key; did you mean "stop"?'),
    "no table": ({"sel": "x"}, 'data.sel = "x": input should be a table'),
    "twice": (
        {"sel": {"time": "2017"}, "isel": {"time": 3}},
        "data: time is in sel, by coordinate, and in isel, by index; give one of them",
    ),
    "no share": ({"split": {"val": "2017"}}, 'data.split.val = "2017": input should be a valid number or a table'),
    "a list": ({"split": {"val": {"time": [1, 2]}}}, "data.split.val.time = [1, 2]: input should be"),
    "no dimension": ({"split": {"val": {}}}, "val names 0 dimensions; one is needed, such as { time = ... }"),
    "two dimensions": ({"split": {"val": {"time": "2017", "lat": 3}}}, "val names 2 dimensions; one is needed"),
    "different dimensions": (
        {"split": {"val": {"time": "2017"}, "test": {"lat": 3}}},
        "val and test are ranges of lat and time; both must be of one dimension",
    ),
    "everything": ({"split": {"val": {"time": {}}}}, "val.time has neither start nor stop"),
    "a step": ({"split": {"val": {"time": {"start": 1, "step": 2}}}}, "val.time has a step; all from start to stop"),
    "a gap beside a share": (
        {"split": {"test": FROM_2018, "gap": 10}},
        "gap = 10 leaves out rows beside a range, but none beside a share, and val = 0.1 is one; write it as a range",
    ),
    "a gap without a range": ({"split": {"gap": 3}}, "and neither val nor test is one"),
    "a negative gap": ({"split": {"gap": -3}}, "data.split.gap = -3: input should be greater than or equal to 0"),
    "ranges of groups": (
        {"split": {"by": "donor", "test": FROM_2018}},
        'by = "donor" divides groups by shares; write val and test as shares, or leave by out',
    ),
    "patches of groups": (
        {"patch": {"lat": 8}, "split": {"by": "donor", "patches": True}},
        'by = "donor" holds out rows, and patches = true holds out places; give one of them',
    ),
    "patches of ranges": (
        {"patch": {"lat": 8}, "split": {"val": {"time": "2017"}, "test": FROM_2018, "patches": True}},
        "patches = true is for shares, and val and test are both ranges; leave patches out",
    ),
    "two validation sets": (
        {"val_path": "v.zarr", "split": {"val": {"time": "2017"}}},
        "data: split.val is a range, and val_path a store for validation; give one of them",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_go_together(kind):
    data, said = REFUSED[kind]
    assert said in refused(**data)


def test_another_range_is_another_run():
    one, other = (TrainConfig(data={"split": {"test": {"time": {"start": y}}}}) for y in ("2017", "2018"))
    assert [key for key, _, _ in differences(one, other)] == ["data.split.test"]
