"""``[average]``: how the replicas' parameters become one set of parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from dtrain.config.table import Bool, Natural, NonNegative, Positive, Share, Table, without_sgd_defaults
from dtrain.errors import InvalidConfig


class MixConfig(Table):
    """``[average.mix]``: the topology of averaging."""

    topology: Literal["full", "ring", "exponential", "hierarchical"] = "full"
    groups: Natural = 0
    period: Positive = 1


class OuterConfig(Table):
    """``[average.outer]``: the outer optimizer, applied to the pseudo-gradient."""

    optimizer: str = "sgd"
    args: dict[str, Any] = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
    schedule: str = "constant"
    clip_norm: NonNegative = 0.0

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, given: Any) -> Any:
        return without_sgd_defaults(given, "args")


class CodecConfig(Table):
    """``[average.codec]``: how updates are compressed."""

    name: Literal["bf16", "int8", "int4"] = "int8"
    error_feedback: Bool = True


class AverageConfig(Table):
    """``[average]``: how the replicas' parameters become one set of parameters."""

    replicas: Positive | Literal["auto"] = "auto"
    weights: Literal["samples", "uniform", "fednova"] = "samples"
    reduce: Literal["mean", "median", "trimmed"] = "mean"
    trim: Annotated[float, Strict(), Field(gt=0, lt=0.5)] = 0.1
    control: Bool = False
    inner_state: Literal["keep", "average", "reset"] = "keep"
    prox: NonNegative = 0.0
    max_rejected: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.25
    ema: Share = 0.0
    recalibrate_batchnorm: Bool = False
    mix: MixConfig = MixConfig()
    outer: OuterConfig | None = None
    codec: CodecConfig | None = None

    @property
    def outer_schedule(self) -> str:
        """The schedule of the outer learning rate; constant without an outer optimizer."""
        return "constant" if self.outer is None else self.outer.schedule


def check_average(average: AverageConfig) -> None:
    """Refuse keys of ``[average]`` that contradict each other.

    Raises
    ------
    InvalidConfig
    """
    mix, unset = average.mix, MixConfig()
    for key in ("groups", "period"):
        if mix.topology != "hierarchical" and getattr(mix, key) != getattr(unset, key):
            raise InvalidConfig(
                f'average.mix.{key} is for average.mix.topology = "hierarchical"; it is "{mix.topology}".',
                f"Leave {key} out, or set the topology.",
            )
    if average.trim != AverageConfig().trim and average.reduce != "trimmed":
        raise InvalidConfig(
            f'average.trim is for average.reduce = "trimmed"; it is "{average.reduce}".', "Leave one of the two out."
        )
    if average.inner_state == "average" and average.reduce != "mean":
        raise InvalidConfig(
            f'average.inner_state = "average" takes the mean, which average.reduce = "{average.reduce}" avoids.',
            'Use average.inner_state = "keep" or "reset".',
        )
    if average.weights == "fednova" and average.reduce != "mean":
        raise InvalidConfig(
            f'average.weights = "fednova" weighs a mean, which average.reduce = "{average.reduce}" avoids.',
            "Leave one of the two out: median and trimmed mean ignore weights.",
        )
    _check_neighbours(average)
    _check_control(average)


def _check_neighbours(average: AverageConfig) -> None:
    """Refuse what needs a common start of all that are averaged, where neighbours have parameters of their own."""
    topology = average.mix.topology
    if topology not in ("ring", "exponential"):
        return
    why = "neighbours start from different parameters, and {} says only how far a replica has moved."
    if average.codec is not None:
        raise InvalidConfig(
            f'average.codec cannot go with average.mix.topology = "{topology}": {why.format("an encoded update")}',
            "Leave one of the two out.",
        )
    if average.weights == "fednova":
        raise InvalidConfig(
            f'average.weights = "fednova" cannot go with average.mix.topology = "{topology}": '
            f"{why.format('a normalised update')}",
            'Use average.weights = "samples", or another topology.',
        )


def _check_control(average: AverageConfig) -> None:
    """Refuse what SCAFFOLD's control variates are not defined for."""
    if not average.control:
        return
    fits = {
        "average.mix.topology": (average.mix.topology, "full"),
        "average.reduce": (average.reduce, "mean"),
        "average.codec": (None if average.codec is None else average.codec.name, None),
    }
    for key, (given, needed) in fits.items():
        if given != needed:
            raise InvalidConfig(
                f'average.control = true cannot go with {key} = "{given}": control variates are averaged over all '
                "replicas, uncompressed.",
                "Leave one of the two out.",
            )
