"""TrainConfig: every value a run depends on, checked once, frozen, the same from TOML, YAML, JSON or Python.

The schema declares every key that users see. A key whose feature is not built yet (`dtrain.config.unbuilt`) is refused
when it is set; it is never accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import date, time
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)

from dtrain.config.average import AverageConfig, check_average
from dtrain.config.faults import sentences
from dtrain.config.functions import Function, Given, take_functions
from dtrain.config.names import FUNCTION, LOSSES, METRICS, SCHEDULES, metric_key
from dtrain.config.slices import LabelSelector, Offsets, Selector, Slice
from dtrain.config.split import SplitConfig
from dtrain.config.table import Bool, Float, Natural, NonNegative, Positive, Table, without_sgd_defaults
from dtrain.config.unbuilt import refuse_unbuilt
from dtrain.config.values import cache_bytes, parse_bytes, plain_value, value_of
from dtrain.errors import InvalidConfig, did_you_mean

Size = Annotated[str, BeforeValidator(lambda given: str(given) if type(given) is int else given)]
"""``auto``, or bytes such as ``512MB``; a number counts bytes."""

ClassAxis: TypeAlias = Literal["auto", 1, -1]
"""The axis of the classes in the model's output."""

FULL_BATCH_MICRO = 1024
"""Samples of a micro-batch where ``train.batch_size`` is ``full`` and ``train.micro_batch`` is 0."""


def _one_path(given: Any) -> Any:
    """Return the path of a list that holds one; refuse an empty list, and paths beside tables."""
    if not isinstance(given, list | tuple):
        return given
    if not given:
        raise ValueError("is an empty list; give at least one store")
    if len({isinstance(store, str) for store in given}) > 1:
        raise ValueError(
            "holds paths and tables; give paths, of stores that are one, or tables, of stores with own replicas"
        )
    return given[0] if len(given) == 1 and isinstance(given[0], str) else given


Paths: TypeAlias = Annotated[str | tuple[str, ...], BeforeValidator(_one_path)]
"""A store, or several that are one: the rows of each follow those of the one before."""


class Store(Table):
    """One of several stores (federated data)."""

    path: Paths
    workers: tuple[str, ...] = ()
    replicas: Positive = 1


class MinValid(Table):
    """``data.non_finite = { min_valid = 0.5 }``: samples are kept from that share of finite values on."""

    min_valid: Annotated[float, Strict(), Field(gt=0, le=1)]


class DataConfig(Table):
    """``[data]``: the samples, their split and their partitions."""

    @field_validator("input_offsets", "target_offsets")
    @classmethod
    def _not_empty(cls, offsets: Offsets) -> Offsets:
        if isinstance(offsets, Slice) and offsets.stop <= offsets.start:
            raise ValueError(f"start = {offsets.start} and stop = {offsets.stop} hold no offset")
        if offsets == ():
            raise ValueError("is an empty list; give at least one offset")
        return offsets

    @model_validator(mode="after")
    def _has_patches(self) -> Self:
        if self.split.patches and not self.patch:
            raise ValueError("split.patches = true cuts splits by patch, and data.patch names no dimension to cut")
        return self

    @model_validator(mode="after")
    def _says_once(self) -> Self:
        if twice := [dim for dim in self.sel if dim in self.isel]:
            raise ValueError(f"{twice[0]} is in sel, by coordinate, and in isel, by index; give one of them")
        if self.val_path and "val" in self.split.ranges:
            raise ValueError("split.val is a range, and val_path a store for validation; give one of them")
        return self

    path: Annotated[str | tuple[Store | str, ...], BeforeValidator(_one_path)] = ""
    inputs: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    storage_options: dict[str, Any] = Field(default={}, repr=False)
    group: str = ""
    isel: dict[str, Selector] = {}
    sel: dict[str, LabelSelector] = {}
    dims: dict[str, tuple[str, ...]] = {}
    sample_dim: str = "auto"
    input_offsets: Offsets = 0
    target_offsets: Offsets = 0
    stride: Positive = 1
    patch: dict[str, Positive] = {}
    split: SplitConfig = SplitConfig()
    gaps: Literal["auto", "drop", "error", "allow"] = "auto"
    split_order: Literal["auto", "random", "sequential"] = "auto"
    val_path: Paths = ""
    partition: Literal["stratified", "contiguous"] = "stratified"
    normalize: tuple[str, ...] | dict[str, tuple[str, ...]] = ()
    transform: str = ""
    missing: Literal["auto", "error", "fill", "skip"] = "auto"
    non_finite: Literal["error", "allow", "skip"] | MinValid = "error"
    weight: str = ""
    balance: str = ""
    shuffle: Bool = True
    memory: Size = "auto"
    cache: Size = "auto"
    reader: Literal["auto", "numcodecs", "zarrs", "zarr"] = "auto"

    @property
    def stores(self) -> tuple[Store, ...]:
        """The stores of `path`: several where they are tables, each with its own replicas (federated data)."""
        if isinstance(self.path, tuple):
            tables = tuple(store for store in self.path if isinstance(store, Store))
            return tables or (Store(path=tuple(path for path in self.path if isinstance(path, str))),)
        return (Store(path=self.path),)

    @property
    def is_federated(self) -> bool:
        """Whether `path` lists tables."""
        return isinstance(self.path, tuple) and isinstance(self.path[0], Store)

    @property
    def mean_dims(self) -> dict[str, tuple[str, ...]]:
        """By variable of `normalize`: the dimensions of which each index has its own mean; none: one mean."""
        if isinstance(self.normalize, dict):
            return self.normalize
        return dict.fromkeys(self.normalize, ())

    @property
    def min_valid(self) -> float | None:
        """The share of finite values that a sample needs to be kept; None: all are kept, or are a fault."""
        if isinstance(self.non_finite, MinValid):
            return self.non_finite.min_valid
        return 1.0 if self.non_finite == "skip" else None

    @property
    def fills_inputs(self) -> bool:
        """Whether samples that are kept may hold non-finite values: inputs become 0, and targets do not count."""
        return isinstance(self.non_finite, MinValid)


class TrainTable(Table):
    """``[train]``: the local steps of a replica in a round."""

    loss: str = ""
    metrics: tuple[str, ...] = ()
    rounds: Positive = 20
    local_epochs: Positive = 1
    local_steps: Positive | None = None
    sync_rounds: Natural = 0
    eval_every: Positive | Literal["auto"] = "auto"
    drop_last: Bool = False
    class_axis: ClassAxis = "auto"
    freeze: tuple[str, ...] = ()
    batch_size: Positive | Literal["full"] = 100
    micro_batch: Natural = 0
    optimizer: str = "sgd"
    optimizer_args: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
    schedule: str = "constant"
    warmup_steps: Natural = 0
    clip_norm: NonNegative = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    init: str = ""
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**63)] = 0

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
    mode: Literal["auto", "min", "max"] = "auto"
    target: Float | None = None
    patience: Positive | None = None
    min_delta: NonNegative = 0.0


class ClusterConfig(Table):
    """``[cluster]``: where tasks run."""

    scheduler: str = "local"
    workers: Positive | Literal["auto"] = "auto"
    threads: Positive = 1
    memory: Size = "auto"
    allow_plain: Bool = False
    slices: Positive | Literal["auto"] = "auto"
    tls: dict[Literal["ca", "cert", "key"], str] = {}


class RunConfig(Table):
    """``[run]``: the run directory and the rounds kept in it."""

    dir: str = "runs"
    commit_every: Positive | Literal["auto"] = "auto"
    keep: Positive = 3
    trackers: tuple[str, ...] = ()


class TrainConfig(Table):
    """The configuration of a run.

    In Python the values of ``model``, ``train.loss``, ``train.metrics``, ``train.optimizer``, ``train.schedule`` and
    ``data.transform`` may be functions; numbers may be NumPy's and paths `pathlib.Path`.

    Raises
    ------
    InvalidConfig
        A key is unknown, or a value is not allowed; the message names every fault.
    NotSupportedYet
        A key asks for a feature that is not built yet.
    """

    model: str = ""
    model_args: dict[str, Any] = {}
    data: DataConfig = DataConfig()
    train: TrainTable = TrainTable()
    average: AverageConfig = AverageConfig()
    stop: StopConfig = StopConfig()
    cluster: ClusterConfig = ClusterConfig()
    run: RunConfig = RunConfig()
    _functions: Given = PrivateAttr(default_factory=dict)

    def __init__(self, /, **tables: Any) -> None:
        named, functions = take_functions(plain_value(tables))
        try:
            super().__init__(**named)
        except ValidationError as error:
            raise InvalidConfig(*sentences(error, TrainConfig)) from None
        self._functions = functions
        _check_values(self)
        check_plain(self)
        refuse_unbuilt(self, DEFAULTS)

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
    for name in config.train.metrics:
        _check_name("train.metrics", name, METRICS)
    _check_reported_names(config.train.metrics)
    _check_name("train.schedule", config.train.schedule, SCHEDULES)
    _check_sync_rounds(config.train)
    for key in ("data.memory", "cluster.memory"):
        if (text := value_of(config, key)) != "auto":
            parse_bytes(text, key)
    if config.data.cache != "auto":
        cache_bytes(config.data.cache)
    _check_name("data.transform", config.data.transform, (), empty=True)
    _check_dims(config.data)
    _check_weight(config.data)
    _check_normalize(config.data)
    check_average(config.average)
    _check_name("average.outer.schedule", config.average.outer_schedule, SCHEDULES)


def _check_sync_rounds(train: TrainTable) -> None:
    if train.sync_rounds and train.local_steps is None:
        raise InvalidConfig(
            f"train.sync_rounds = {train.sync_rounds} is for rounds of train.local_steps; without it, a round is "
            f"train.local_epochs = {train.local_epochs}.",
            "Set train.local_steps, or leave sync_rounds out.",
        )


def _check_dims(data: DataConfig) -> None:
    for name, dims in data.dims.items():
        _check_known("dims", name, data)
        if not all(dims):
            raise InvalidConfig(f"data.dims.{name} = {list(dims)}: a name is empty.", "Name each dimension.")
        if twice := [dim for dim in dims if dims.count(dim) > 1]:
            raise InvalidConfig(f'data.dims.{name} names "{twice[0]}" twice.', "Give each dimension its own name.")


def _check_normalize(data: DataConfig) -> None:
    for name, dims in data.mean_dims.items():
        _check_known("normalize", name, data)
        if twice := [dim for dim in dims if dims.count(dim) > 1]:
            raise InvalidConfig(f'data.normalize.{name} names the dimension "{twice[0]}" twice.', "Name it once.")


def _check_weight(data: DataConfig) -> None:
    if data.weight in data.mean_dims:
        raise InvalidConfig(
            f'data.normalize names "{data.weight}", which is data.weight: weights are used as they are.',
            f"Leave {data.weight} out of data.normalize.",
        )


def _check_known(key: str, name: str, data: DataConfig) -> None:
    known = (*data.inputs, *data.targets)
    if key == "dims" and name == data.weight:
        return
    if known and name not in known:  # Python may name them later
        raise InvalidConfig(
            f'data.{key} names "{name}", which is neither an input nor a target{did_you_mean(name, known)}'
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


DEFAULTS = TrainConfig.model_construct()
