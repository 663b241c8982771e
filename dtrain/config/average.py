"""``[average]``: how the replicas' parameters become one set of parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from dtrain.config.names import SCHEDULES
from dtrain.config.table import Bool, Natural, NonNegative, Positive, Share, Table, function_or, without_sgd_defaults
from dtrain.errors import InvalidConfig


class MixConfig(Table):
    """``[average.mix]``: the topology of averaging."""

    topology: Literal["full", "ring", "exponential", "hierarchical"] = "full"
    """Who is averaged with whom: all replicas, neighbours on a ring, one neighbour at distances 1, 2, 4 ...
    (exponential), or groups (hierarchical)."""
    groups: Natural = 0
    """Groups of the hierarchical topology."""
    period: Positive = 1
    """Rounds between averages over all groups; between them each group averages its own replicas."""


class OuterConfig(Table):
    """``[average.outer]``: the outer optimizer, applied to the pseudo-gradient."""

    optimizer: str = "sgd"
    """Any name of torch.optim."""
    args: dict[str, Any] = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
    """Arguments of the outer optimizer. The default is that of sgd; other optimizers have torch's own defaults."""
    schedule: Annotated[str, function_or(*SCHEDULES)] = "constant"
    """Factor on the outer learning rate over rounds; or "module:function", called with (round, rounds)."""
    clip_norm: NonNegative = 0.0
    """Largest norm of the pseudo-gradient; 0: it is not clipped."""

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, given: Any) -> Any:
        return without_sgd_defaults(given, "args")


class CodecConfig(Table):
    """``[average.codec]``: how updates are compressed."""

    name: Literal["bf16", "int8", "int4"] = "int8"
    """The numbers that updates are sent as: a half, a quarter or an eighth of the bytes."""
    error_feedback: Bool = True
    """Add what the rounding lost to the update of the next round."""


class AverageConfig(Table):
    """``[average]``: how the replicas' parameters become one set of parameters."""

    replicas: Positive | Literal["auto"] = "auto"
    """Logical copies of the parameters, M. "auto": the smaller of the workers at the first start and the units."""
    weights: Literal["samples", "uniform", "fednova"] = "samples"
    """Weights of the mean: samples of the round, all alike, or samples and updates divided by their steps (fednova)."""
    reduce: Literal["mean", "median", "trimmed"] = "mean"
    """How values of replicas become one. Median and trimmed mean withstand bad replicas, and ignore weights."""
    trim: Annotated[float, Strict(), Field(gt=0, lt=0.5)] = 0.1
    """Share of replicas that the trimmed mean cuts off at each end."""
    control: Bool = False
    """SCAFFOLD's control variates, for partitions that differ."""
    inner_state: Literal["keep", "average", "reset"] = "keep"
    """What becomes of the inner optimizers' states after a round: each replica keeps its own, all get the mean, or they
    are reset."""
    prox: NonNegative = 0.0
    """FedProx: weight of the squared distance from the round's start in the loss."""
    max_rejected: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.25
    """Share of replicas whose updates may be left out of a round because they are not finite; more stop the run."""
    ema: Share = 0.0
    """Decay of a moving average of the models of all rounds, evaluated and saved beside the model; 0: none."""
    recalibrate_batchnorm: Bool = False
    """Take the running statistics of batch norm anew for the averaged model."""
    mix: MixConfig = MixConfig()
    """The topology of averaging."""
    outer: OuterConfig | None = None
    """The outer optimizer, applied to the averaged update; without this table: plain averaging."""
    codec: CodecConfig | None = None
    """How updates are compressed; without this table: float32."""

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
