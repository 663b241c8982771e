"""``[average]``: contradictions are refused with a sentence, everything else is accepted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from dtrain.algorithm.outer import outer_optimizer
from dtrain.config.average import AverageConfig, check_average
from dtrain.config.schema import TrainConfig
from dtrain.errors import InvalidConfig
from tests.config.helpers import SMALLEST

GROUPS = {"topology": "hierarchical", "groups": 2}


def checked(**average: Any) -> AverageConfig:
    return TrainConfig(**SMALLEST, average=average).average


@pytest.mark.parametrize(
    ("average", "said", "cure"),
    [
        (
            {"mix": {"groups": 2}},
            'average.mix.groups is for average.mix.topology = "hierarchical"; it is "full".',
            "Leave groups out, or set the topology.",
        ),
        (
            {"mix": {"topology": "ring", "period": 2}},
            'average.mix.period is for average.mix.topology = "hierarchical"; it is "ring".',
            "Leave period out, or set the topology.",
        ),
        (
            {"trim": 0.2},
            'average.trim is for average.reduce = "trimmed"; it is "mean".',
            "Leave one of the two out.",
        ),
        (
            {"trim": 0.2, "reduce": "median"},
            'average.trim is for average.reduce = "trimmed"; it is "median".',
            "Leave one of the two out.",
        ),
        *(
            (
                {"inner_state": "average", "reduce": reduce},
                f'average.inner_state = "average" takes the mean, which average.reduce = "{reduce}" avoids.',
                'Use average.inner_state = "keep" or "reset".',
            )
            for reduce in ("median", "trimmed")
        ),
        *(
            (
                {"weights": "fednova", "reduce": reduce},
                f'average.weights = "fednova" weighs a mean, which average.reduce = "{reduce}" avoids.',
                "Leave one of the two out: median and trimmed mean ignore weights.",
            )
            for reduce in ("median", "trimmed")
        ),
        *(
            (
                {"codec": {"name": "bf16"}, "mix": {"topology": topology}},
                f'average.codec cannot go with average.mix.topology = "{topology}": neighbours start from different '
                "parameters, and an encoded update says only how far a replica has moved.",
                "Leave one of the two out.",
            )
            for topology in ("ring", "exponential")
        ),
        *(
            (
                {"weights": "fednova", "mix": {"topology": topology}},
                f'average.weights = "fednova" cannot go with average.mix.topology = "{topology}": neighbours start '
                "from different parameters, and a normalised update says only how far a replica has moved.",
                'Use average.weights = "samples", or another topology.',
            )
            for topology in ("ring", "exponential")
        ),
        *(
            (
                {"control": True, **more},
                f"average.control = true cannot go with {given}: control variates are averaged over all replicas, "
                "uncompressed.",
                "Leave one of the two out.",
            )
            for more, given in (
                ({"mix": GROUPS}, 'average.mix.topology = "hierarchical"'),
                ({"mix": {"topology": "ring"}}, 'average.mix.topology = "ring"'),
                ({"mix": {"topology": "exponential"}}, 'average.mix.topology = "exponential"'),
                ({"reduce": "median"}, 'average.reduce = "median"'),
                ({"reduce": "trimmed"}, 'average.reduce = "trimmed"'),
                ({"codec": {"name": "int4"}}, 'average.codec = "int4"'),
            )
        ),
    ],
)
def test_a_contradiction_is_refused_with_its_sentence(average: dict[str, Any], said: str, cure: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        checked(**average)
    assert caught.value.message == said
    assert caught.value.hint == cure


OPTIONS: dict[str, tuple[Any, ...]] = {
    "mix": ({}, GROUPS, {"topology": "ring"}, {"topology": "exponential"}),
    "reduce": ("mean", "median", "trimmed"),
    "weights": ("samples", "uniform", "fednova"),
    "inner_state": ("keep", "average", "reset"),
    "codec": (None, {"name": "bf16"}, {"name": "int4", "error_feedback": False}),
    "control": (False, True),
}


def contradicts(mix: Any, reduce: str, weights: str, inner_state: str, codec: Any, control: bool) -> bool:
    """The same in one place, written out."""
    neighbours = mix.get("topology") in ("ring", "exponential")
    return (
        (reduce != "mean" and (inner_state == "average" or weights == "fednova"))
        or (neighbours and (codec is not None or weights == "fednova"))
        or (control and (bool(mix) or reduce != "mean" or codec is not None))
    )


def test_all_combinations_that_do_not_contradict_are_accepted() -> None:
    accepted = 0
    for values in itertools.product(*OPTIONS.values()):
        given = dict(zip(OPTIONS, values, strict=True))
        average = AverageConfig.model_validate(
            {
                **given,
                "outer": {"schedule": "cosine", "clip_norm": 1.0},
                "ema": 0.9,
                "recalibrate_batchnorm": True,
                "prox": 0.1,
            }
        )
        if contradicts(**given):
            with pytest.raises(InvalidConfig):
                check_average(average)
        else:
            check_average(average)
            accepted += 1
    assert accepted == 139  # of 648: 130 without controls, 9 with them


def test_the_default_of_trim_may_be_given() -> None:
    assert checked(trim=0.1).trim == 0.1
    assert checked(trim=0.3, reduce="trimmed").trim == 0.3


@pytest.mark.parametrize(
    "average",
    [
        {"ema": 1.0},
        {"ema": -0.1},
        {"control": 1},
        {"recalibrate_batchnorm": "yes"},
        {"outer": {"clip_norm": -1.0}},
        {"outer": {"clip_norm": float("inf")}},
        {"codec": {"name": "int2"}},
        {"codec": {"name": "int8", "block": 64}},
        {"weights": "steps"},
        {"prox": float("nan")},
    ],
)
def test_values_out_of_range_are_refused(average: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match="average"):
        checked(**average)


def test_the_schedule_of_the_outer_optimizer_is_a_known_name_or_a_function() -> None:
    assert checked().outer_schedule == "constant"
    assert checked(outer={}).outer_schedule == "constant"
    assert checked(outer={"schedule": "cosine"}).outer_schedule == "cosine"
    assert checked(outer={"schedule": "module:function"}).outer_schedule == "module:function"
    with pytest.raises(InvalidConfig, match=r'average.outer.schedule = "cosin".*did you mean "cosine"'):
        checked(outer={"schedule": "cosin"})


def test_another_outer_optimizer_than_sgd_has_its_own_defaults() -> None:
    outer = checked(outer={"optimizer": "adam"}).outer
    assert outer is not None
    assert outer.args == {}
    assert outer_optimizer(outer).__name__ == "Adam"
