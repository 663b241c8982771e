"""TrainConfig: every value a run depends on, checked once, frozen, the same from TOML, YAML, JSON or Python.

The schema declares every key that users see; another one is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import date, time
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, PrivateAttr, Strict, ValidationError, model_validator

from dtrain.config.average import AverageConfig, check_average
from dtrain.config.data import DataConfig as DataConfig
from dtrain.config.data import Paths as Paths
from dtrain.config.data import check_data
from dtrain.config.faults import sentences
from dtrain.config.functions import Function, Given, take_functions
from dtrain.config.names import FUNCTION, LOSSES, METRICS, SCHEDULES, metric_key
from dtrain.config.table import (
    Bool,
    Float,
    Natural,
    NonNegative,
    Positive,
    Size,
    Table,
    function_or,
    without_sgd_defaults,
)
from dtrain.config.values import cache_bytes, check_size, parse_bytes, plain_value, value_of
from dtrain.errors import InvalidConfig, did_you_mean

ClassAxis: TypeAlias = Literal["auto", 1, -1]
"""The axis of the classes in the model's output."""

FULL_BATCH_MICRO = 1024
"""Samples of a micro-batch where ``train.batch_size`` is ``full`` and ``train.micro_batch`` is 0."""


class TrainTable(Table):
    """``[train]``: the local steps of a replica in a round."""

    loss: Annotated[str, function_or(*LOSSES)] = ""
    """Required. A name, or "module:function": called with (outputs, targets), returns the mean over the batch or (sum,
    count)."""
    metrics: tuple[Annotated[str, function_or(*METRICS)], ...] = ()
    """Metrics that evaluations report beside the loss: names, or "module:function" as for the loss."""
    rounds: Positive = 20
    """Rounds of the run. A continued run may have more, where schedules are constant."""
    local_epochs: Positive = 1
    """Passes over the partition a round; or local_steps, not both."""
    local_steps: Positive | None = None
    """Full batches a round; the rest of a pass is carried over to the next round. `dtrain plan --probe` helps to
    choose."""
    sync_rounds: Natural = 0
    """The first rounds that have one local step each (post-local SGD); with local_steps only."""
    eval_every: Positive | Literal["auto"] = "auto"
    """Rounds between evaluations; the last round always has one. "auto": at most 0.3 samples are evaluated for each
    that is trained on."""
    drop_last: Bool = False
    """Leave out the short batch at the end of a pass."""
    class_axis: ClassAxis = "auto"
    """The axis of the classes in the model's output, for cross_entropy. "auto" refuses when both fit."""
    freeze: tuple[str, ...] = ()
    """Patterns of the names of parameters that are neither trained, averaged nor sent, such as "encoder.*"."""
    batch_size: Positive | Literal["full"] = 100
    """Samples of a local step; "full": one step a pass with the gradient of the whole partition."""
    micro_batch: Natural = 0
    """Samples of a forward pass: gradients of a batch are accumulated. 0: batch_size, or 1024 with "full"."""
    optimizer: str = "sgd"
    """The inner optimizer: any name of torch.optim, or "module:function"."""
    optimizer_args: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
    """Arguments of the optimizer. The default is that of sgd; other optimizers have torch's own defaults."""
    schedule: Annotated[str, function_or(*SCHEDULES)] = "constant"
    """Factor on the learning rate over local steps; or "module:function", called with (step, total)."""
    warmup_steps: Natural = 0
    """Local steps over which the learning rate grows linearly."""
    clip_norm: NonNegative = 0.0
    """Largest norm of a gradient; 0: gradients are not clipped."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast, with float32 parameters."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is computed; "auto": cuda if every worker has it."""
    init: str = ""
    """A safetensors file, or a run's directory, whose parameters the run starts from."""
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**63)] = 0
    """Seed of the model's initialisation, the splits and the order of samples."""

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, given: Any) -> Any:
        return without_sgd_defaults(given, "optimizer_args")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.local_steps is not None and "local_epochs" in self.model_fields_set:
            raise ValueError("local_epochs and local_steps are both given; give one of them")
        return self


class StopConfig(Table):
    """``[stop]``: the rules that end training early."""

    metric: str = "val_loss"
    """What the rules look at, and what the best round is chosen by: val_loss, val_<metric> or train_loss."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether small or large values are better; "auto": as the metric says."""
    target: Float | None = None
    """End when the metric has reached it."""
    patience: Positive | None = None
    """End after that many evaluations without an improvement."""
    min_delta: NonNegative = 0.0
    """A smaller change is no improvement."""


class TlsConfig(Table):
    """``cluster.tls``: the certificates that this process shows to a TLS cluster, and trusts."""

    ca: str = ""
    """Certificate of the cluster's private CA, in PEM, relative to this file; `dtrain certs` makes one."""
    cert: str = ""
    """Certificate of that CA that this process shows."""
    key: str = ""
    """Its private key, without a password, readable by you alone."""

    @property
    def is_given(self) -> bool:
        """Whether files are named."""
        return bool(self.ca or self.cert or self.key)

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        lacking = [name for name in ("ca", "cert", "key") if not getattr(self, name)]
        if self.is_given and lacking:
            raise ValueError(f"lacks {' and '.join(lacking)}; give ca, cert and key")
        return self


class ClusterConfig(Table):
    """``[cluster]``: where tasks run."""

    scheduler: str = "local"
    """Where: "local" starts workers on this machine, "serial" uses this process; or tcp://host:port, tls://host:port,
    or the path of a scheduler file."""
    workers: Positive | Literal["auto"] = "auto"
    """Workers of a local cluster; "auto": one for each core, or for each `threads` cores."""
    threads: Positive = 1
    """torch threads of a task. They decide bits."""
    memory: Size = "auto"
    """Bytes of a worker of a local cluster, such as "4GB"; "auto": its share of this machine."""
    allow_plain: Bool = False
    """Allow tcp:// to other machines: it is not encrypted, and whoever reaches the port can run code as you."""
    slices: Positive | Literal["auto"] = "auto"
    """Slices of the parameters that are averaged apart, on several workers; "auto": by their size."""
    tls: TlsConfig = TlsConfig()
    """Files of certificates for a tls:// scheduler: { ca = "ca.pem", cert = "client.pem", key = "client-key.pem" }.
    Without them, those of Dask's own configuration."""


class RunConfig(Table):
    """``[run]``: the run directory, the rounds kept in it, and the trackers beside it."""

    dir: str = "runs"
    """The directory that holds runs, relative to this file."""
    commit_every: Positive | Literal["auto"] = "auto"
    """Rounds between commits, which fall on evaluated rounds; "auto": commits take about 2 % of the time. After rounds
    that were lost, they come sooner for a while."""
    keep: Positive = 3
    """Committed rounds that are kept, besides the best one."""
    trackers: tuple[str, ...] = ()
    """What else gets the values of each round: "tensorboard", "mlflow", or "module:function" or "module:Class" of
    yours, called with each event. None by default: nothing leaves the machine unless asked."""


class TrainConfig(Table):
    """The configuration of a run.

    In Python the values of ``model``, ``train.loss``, ``train.metrics``, ``train.optimizer``, ``train.schedule``,
    ``data.transform`` and ``run.trackers`` may be functions; numbers may be NumPy's and paths `pathlib.Path`.

    Raises
    ------
    InvalidConfig
        A key is unknown, or a value is not allowed; the message names every fault.
    """

    model: str = ""
    """Required. The function that returns the torch.nn.Module, as "module:function": of a file next to this one, or of
    an installed module."""
    model_args: dict[str, Any] = {}
    """Keyword arguments of the function."""
    data: DataConfig = DataConfig()
    """The samples, their split and their partitions."""
    train: TrainTable = TrainTable()
    """The local steps of a replica in a round."""
    average: AverageConfig = AverageConfig()
    """How the replicas' parameters become one set of parameters."""
    stop: StopConfig = StopConfig()
    """The rules that end training early; every rule is off unless given."""
    cluster: ClusterConfig = ClusterConfig()
    """Where tasks run."""
    run: RunConfig = RunConfig()
    """The run directory, the rounds kept in it, and the trackers beside it."""
    _functions: Given = PrivateAttr(default_factory=dict)

    def __init__(self, /, **tables: Any) -> None:
        check_size(tables)
        named, functions = take_functions(plain_value(tables))
        try:
            super().__init__(**named)
        except ValidationError as error:
            raise InvalidConfig(*sentences(error, TrainConfig)) from None
        self._functions = functions
        _check_values(self)
        check_plain(self)

    @property
    def functions(self) -> Mapping[str, Function]:
        """The functions that were given as such, by key; the keys themselves hold their names."""
        return self._functions

    def with_functions(self, functions: Mapping[str, Function]) -> TrainConfig:
        """Return the configuration with other functions beside it; without any it is as a file holds it."""
        config = self.model_copy()
        config._functions = dict(functions)
        return config


# Checks that pydantic's types cannot state ---------------------------------------------------


def _check_values(config: TrainConfig) -> None:
    _check_name("train.loss", config.train.loss, LOSSES, empty=True)
    check_metrics(config.train)
    _check_name("train.schedule", config.train.schedule, SCHEDULES)
    _check_sync_rounds(config.train)
    for key in ("data.memory", "cluster.memory"):
        if (text := value_of(config, key)) != "auto":
            parse_bytes(text, key)
    if config.data.cache != "auto":
        cache_bytes(config.data.cache)
    _check_name("data.transform", config.data.transform, (), empty=True)
    check_data(config.data)
    check_average(config.average)
    _check_name("average.outer.schedule", config.average.outer_schedule, SCHEDULES)


def check_metrics(train: TrainTable) -> None:
    """Refuse metrics that are not known, do not fit the loss, or would be reported under one name."""
    for name in train.metrics:
        _check_name("train.metrics", name, METRICS)
        _check_kind(name, train.loss)
    _check_reported_names(train.metrics)


def _check_sync_rounds(train: TrainTable) -> None:
    if train.sync_rounds and train.local_steps is None:
        raise InvalidConfig(
            f"train.sync_rounds = {train.sync_rounds} is for rounds of train.local_steps; without it, a round is "
            f"train.local_epochs = {train.local_epochs}.",
            "Set train.local_steps, or leave sync_rounds out.",
        )


def _check_reported_names(metrics: Sequence[str]) -> None:
    """Refuse metrics whose values would be reported under one name."""
    cure = 'Give the function another name (of a partial or an object: metric.__name__ = "q90"), or leave it out.'
    known: dict[str, str] = {}
    for name in metrics:
        key = metric_key(name)
        if key == "<lambda>":
            raise InvalidConfig(
                "train.metrics: a lambda has no name that its values could be reported with.",
                'Write a function with def, or give it one: metric.__name__ = "bias".',
            )
        if key == "loss":
            raise InvalidConfig(f'train.metrics: "{name}" would be reported as val_loss, which is the loss.', cure)
        if key in known:
            raise InvalidConfig(
                f'train.metrics: "{known[key]}" and "{name}" would both be reported as val_{key}.', cure
            )
        known[key] = name


def _check_name(key: str, name: str, allowed: Collection[str], *, empty: bool = False) -> None:
    if name in allowed or FUNCTION.match(name) or (empty and not name):
        return
    names = ", ".join([*allowed, '"module:function"']).replace(', "module', ' or "module')
    raise InvalidConfig(f'{key} = "{name}": allowed are {names}{did_you_mean(name, allowed)}')


def check_plain(config: TrainConfig) -> None:
    """Refuse values that config.toml cannot store; they can come from Python, YAML or JSON."""
    for key in ("model_args", "train.optimizer_args", "data.storage_options"):
        _check_plain_value(key, value_of(config, key))


def _check_kind(metric: str, loss: str) -> None:
    """Refuse a metric of labels with a loss of numbers, and one of numbers with a loss of labels."""
    facts = METRICS.get(metric)
    if facts is None or loss not in facts.refused_losses:
        return
    fitting = ", ".join(name for name, other in METRICS.items() if other.of_labels != facts.of_labels)
    kinds = ("labels: it takes outputs as logits", "numbers") if facts.of_labels else ("numbers", "labels")
    raise InvalidConfig(
        f'train.metrics: {metric} is of {kinds[0]}, and train.loss = "{loss}" is of {kinds[1]}.',
        f"With this loss there are {fitting}; or write a metric of your own.",
    )


def _check_plain_value(key: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_plain_value(f"{key}.{name}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_plain_value(key, inner)
    elif not isinstance(value, str | int | float | date | time):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise InvalidConfig(f"{key} is {kind}; allowed are text, numbers, booleans, dates, lists and tables.")


REQUIRED = ("model", "data.path", "data.inputs", "data.targets", "train.loss")
"""Keys that every config file gives."""
DEFAULTS = TrainConfig.model_construct()
