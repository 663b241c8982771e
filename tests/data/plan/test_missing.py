"""What a chunk that is not stored stands for: by data.missing and the metadata of its array alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.config.schema import TrainConfig
from dtrain.data.encoding import Encoding
from dtrain.data.plan.missing import absence_of, stands_for
from dtrain.data.samples import Samples
from tests.data.helpers import DTYPES, variable

PACKED = Encoding(dtype="float32", scale=0.01, offset=280.0, missing=(-32768,))
MARKED = Encoding(dtype="float32", missing=(-1,))
ROLES = {
    "input": (["v"], ["w"]),
    "target": (["w"], ["v"]),
    "both": (["v", "w"], ["v"]),
}


def samples_of(v, role="input", static=False, **data):
    """Describe samples of two variables, of which v is an input, a target or both."""
    inputs, targets = ROLES[role]
    if static:
        v = replace(v, dims=("k",), sample_axis=-1)
    config = TrainConfig(data={"path": "p", "inputs": inputs, "targets": targets, **data}).data
    return Samples(path="p", config=config, sample_dim="n", num_samples=12, variables=(v, variable("w", 12, 4)))


def judged(v, role="input", static=False, **data):
    samples = samples_of(v, role, static, **data)
    return absence_of(samples, samples.variable("v"))


@pytest.mark.parametrize(
    ("dtype", "facts", "expected"),
    [
        # dtype, facts, what stands for a chunk of an input, a target, both, and an input without the sample dimension
        ("float32", {"fill_value": None}, ["nan", "nan", "nan", "nan"]),
        ("float32", {"fill_value": 0.0}, ["error", "error", "error", "error"]),
        ("float64", {"fill_value": math.inf}, ["error", "error", "error", "error"]),
        ("float32", {"fill_value": -1.0, "encoding": MARKED}, ["nan", "nan", "nan", "nan"]),
        ("int16", {"fill_value": -32768, "encoding": PACKED}, ["nan", "nan", "nan", "nan"]),
        ("int16", {"fill_value": 0, "encoding": PACKED}, ["error", "error", "error", "error"]),
        ("uint8", {"fill_value": 0, "encoding": Encoding(dtype="int64", scale=2.0)}, ["error"] * 4),
        ("bool", {"fill_value": False}, ["fill", "fill", "fill", "fill"]),
        ("bool", {"fill_value": True}, ["fill", "fill", "fill", "fill"]),
        ("int8", {"fill_value": 0, "means_bool": True}, ["fill", "fill", "fill", "fill"]),
        ("int8", {"fill_value": 0, "means_bool": True, "encoding": PACKED}, ["error", "error", "error", "error"]),
        ("uint8", {"fill_value": 0}, ["error", "fill", "error", "fill"]),
        ("int64", {"fill_value": -1}, ["error", "fill", "error", "fill"]),
        (
            "int8",
            {"fill_value": 3, "encoding": Encoding(dtype="uint8", unsigned="uint8")},
            ["error", "fill", "error", "fill"],
        ),
        ("int8", {"fill_value": -1, "encoding": MARKED}, ["nan", "nan", "nan", "nan"]),
    ],
)
def test_auto_judges_by_what_a_missing_chunk_decodes_to(dtype, facts, expected):
    v = variable("v", 12, 4, dtype=dtype, **facts)
    found = [judged(v, "input"), judged(v, "target"), judged(v, "both"), judged(v, "input", static=True)]
    assert found == expected


@given(
    st.sampled_from(DTYPES),
    st.sampled_from([0, 1]),
    st.sampled_from([None, PACKED, MARKED]),
    st.sampled_from(list(ROLES)),
    st.booleans(),
)
def test_what_is_asked_for_is_not_judged_but_for_what_every_sample_needs(dtype, fill, encoding, role, static):
    v = variable("v", 12, 4, dtype=dtype, fill_value=fill, encoding=encoding)
    assert judged(v, role, static, missing="error") == "error"
    assert judged(v, role, static, missing="fill") == "fill"
    skipped = judged(v, role, static, missing="skip")
    assert skipped == (judged(v, role, static, missing="auto") if static else "skip")


@pytest.mark.parametrize(
    ("dtype", "facts", "text"),
    [
        ("int16", {"fill_value": 0, "encoding": PACKED}, "280"),
        ("int16", {"fill_value": -32768, "encoding": PACKED}, "nan"),
        ("float32", {"fill_value": None}, "nan"),
        ("float32", {"fill_value": 1.5}, "1.5"),
        (">f4", {"fill_value": 1.5}, "1.5"),
        ("uint8", {"fill_value": 255}, "255"),
        ("bool", {"fill_value": False}, "False"),
        ("int8", {"fill_value": -1, "encoding": Encoding(dtype="uint8", unsigned="uint8")}, "255"),
        ("int64", {"fill_value": 2**62 + 1}, str(2**62 + 1)),
    ],
)
def test_the_value_of_a_missing_chunk_is_said_decoded(dtype, facts, text):
    assert stands_for(variable("v", 12, 4, dtype=dtype, **facts)) == text
