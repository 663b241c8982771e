"""A job: a configuration, its stores and the user's functions, before there is a place to run it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from torch import nn

from dtrain.algorithm.metrics.torchmetric import direction, torchmetric_of
from dtrain.algorithm.optimizers import optimizer_named
from dtrain.algorithm.outer import outer_optimizer
from dtrain.algorithm.recipe import Functions
from dtrain.algorithm.stop import check_metric
from dtrain.config.functions import METRICS, TRACKERS, Function, take_functions
from dtrain.config.names import FUNCTION, metric_key
from dtrain.config.names import METRICS as BUILT_IN
from dtrain.config.schema import DataConfig, Paths, TrainConfig, check_metrics
from dtrain.config.values import TO_PLAIN
from dtrain.data.samples import Samples
from dtrain.data.source import describe
from dtrain.errors import InvalidConfig
from dtrain.events import Reporter
from dtrain.report.tracking import NamedTracker, named_tracker, own_tracker
from dtrain.runtime.codetext import CODE_RULES, source_sha256
from dtrain.runtime.module import check_builder, check_loss
from dtrain.runtime.spec import Source
from dtrain.runtime.usercode import checked_function, is_unfindable, load_function

Model: TypeAlias = Callable[..., nn.Module] | str
"""A function that builds a module, or its name as ``module:function``."""
Tracker: TypeAlias = Reporter | Callable[[], Reporter]
"""What is called with events, or a class of such objects (`dtrain.report.tracking`)."""
Table: TypeAlias = Mapping[str, Any]
"""A table of the configuration, unchecked."""
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be trained, evaluated or planned."""

    config: TrainConfig
    sources: tuple[Source, ...]
    """The stores of ``data.path``."""
    held_out: Source | None = None
    """The store of ``data.val_path``."""
    functions: Functions
    """The user's functions by config key."""
    base: Path
    """Directory that relative paths and modules are looked up in."""
    trackers: tuple[NamedTracker, ...] = ()
    """Of ``run.trackers``."""

    @property
    def samples(self) -> Samples:
        """The samples of the first store: all have the same variables."""
        return self.sources[0].described

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """The stores of ``data.path``, then that of ``data.val_path``."""
        return self.sources if self.held_out is None else (*self.sources, self.held_out)

    @property
    def code(self) -> dict[str, str]:
        """The identity of each of the user's functions."""
        return self.code_by(CODE_RULES)

    def code_by(self, rules: int) -> dict[str, str]:
        """Return the identity of each of the user's functions by the rules of a run (`source_sha256`)."""
        return {key: source_sha256(function, self.base, rules) for key, function in self.functions.items()}


def job_from_config(config: TrainConfig, base: Path) -> Job:
    """Resolve a configuration whose paths are relative to `base`: import its functions, describe its samples."""
    sources, held_out = open_sources(config.data, base), held_out_source(config.data, base)
    functions = load_functions(config, base)
    check_names(config)
    config, trackers = with_mode(config, functions), load_trackers(config, base)
    return Job(config=config, sources=sources, held_out=held_out, functions=functions, base=base, trackers=trackers)


# Stores ---------------------------------------------------------------------------------------------------


def open_sources(config: DataConfig, base: Path) -> tuple[Source, ...]:
    """Describe the store or stores of ``data.path``, except those that only workers can read."""
    return tuple(
        Source(
            config=(own := config.model_copy(update={"path": store.path})),
            samples=None if store.workers else describe(own, base),
            workers=store.workers,
            replicas=store.replicas if config.is_federated else None,
        )
        for store in config.stores
    )


def source_of(samples: Samples) -> Source:
    """Return the store of some samples; their transform is kept with the other functions."""
    plain_samples = samples if samples.transform is None else replace(samples, transform=None)
    return Source(config=samples.config, samples=plain_samples)


def held_out_source(config: DataConfig, base: Path) -> Source | None:
    """Describe the store of ``data.val_path``, if there is one; its variables are those of ``data.path``."""
    if not config.val_path:
        return None
    own = config.model_copy(update={"path": config.val_path})
    return Source(config=own, samples=describe(own, base))


# Samples that are evaluated -------------------------------------------------------------------------------

AS_OPENED = ("path", "group", "inputs", "targets", "dims", "storage_options", "memory", "cache", "reader")
"""Keys of ``[data]`` that say where samples are: they are as the samples were opened."""
OF_THE_RUN = ("split", "split_order", "val_path", "partition", "shuffle")
"""Keys that say how rows are divided: they are the run's."""
AGREED = ("normalize", "transform")
"""Keys of what the model was trained with: samples have the same, or leave them out."""


def as_trained(samples: Samples, config: DataConfig, *, own: bool) -> Samples:
    """Return samples as the model of a run takes them: keys of ``[data]`` that they leave out are the run's.

    Another store than the run's `own` is not cut by the run's ``isel`` and ``sel``.

    Raises
    ------
    InvalidConfig
        They are prepared in another way than those that the model was trained with.
    """
    given, table = samples.config.model_fields_set, samples.config
    for key in AGREED:
        if key in given and getattr(table, key) != getattr(config, key):
            raise InvalidConfig(
                f"The samples have data.{key} = {plain(getattr(table, key))}, and the run was trained with "
                f"{plain(getattr(config, key))}.",
                f"Leave {key} out of open_samples: the run's is used.",
            )
    kept = {*given, *AS_OPENED, *(() if own else ("isel", "sel"))} - {*OF_THE_RUN}
    return described_with(samples, {k: getattr(config, k) for k in DataConfig.model_fields if k not in kept})


def described_with(samples: Samples, keys: Mapping[str, Any]) -> Samples:
    """Describe samples again with other values of keys of ``[data]``; the same object where no value differs."""
    changed = {key: value for key, value in keys.items() if getattr(samples.config, key) != value}
    if not changed:
        return samples
    config = TrainConfig(data=samples.config.model_copy(update={**changed, "path": samples.location})).data
    kept = samples.transform if config.transform == samples.config.transform else None
    snapshot = "" if "storage_options" in changed else samples.store.snapshot
    return replace(describe(config, Path.cwd(), snapshot), transform=kept)


def plain(value: object) -> str:
    """Return a value of the configuration as a config file has it."""
    return json.dumps(TO_PLAIN.dump_python(value, mode="json"))


def absolute(path: Paths, base: Path | None = None) -> Paths:
    """Return paths relative to a directory, by default the working directory, as absolute ones; URLs as they are."""
    if not isinstance(path, str):
        return tuple(str(absolute(one, base)) for one in path)
    return path if "://" in path else str(Path(base or Path.cwd(), Path(path).expanduser()).absolute())


# Names ----------------------------------------------------------------------------------------------------


def load_functions(config: TrainConfig, base: Path, given: Functions | None = None) -> Functions:
    """Return the user's functions by config key: those that are given, and those that the configuration names."""
    references = references_in(config)
    own = {key: function for key, function in (given or {}).items() if key in references}
    named = {key: load_function(key, name, base) for key, name in references.items() if key not in own}
    found = {key: own[key] if key in own else named[key] for key in references}
    return checked(found, config.data.weight)


def load_trackers(config: TrainConfig, base: Path, given: Functions | None = None) -> tuple[NamedTracker, ...]:
    """Return the trackers of ``run.trackers``: given ones, those of the user's that it names, and built-in ones.

    Raises
    ------
    InvalidConfig
        There is no such tracker, its package is not installed, or it cannot be called with an event.
    """
    given, trackers = given or {}, []
    for name in config.run.trackers:
        if (key := f"{TRACKERS}.{name}") in given:
            trackers.append(own_tracker(name, given[key]))
        elif not FUNCTION.match(name):
            trackers.append(named_tracker(name))
        elif is_unfindable(name):
            raise InvalidConfig(
                f'run.trackers: "{name}" was given in Python; it is not found by name.',
                "Give it again: dtrain.train(..., trackers=[...]). Or leave it out: trackers=[].",
            )
        else:
            trackers.append(own_tracker(name, load_function(TRACKERS, name, base)))
    return tuple(trackers)


def checked(functions: Functions, weight: str = "") -> Functions:
    """Return the user's functions if each can be called as dtrain calls it, with ``data.weight``.

    Raises
    ------
    NotAModule, InvalidConfig
        One of them cannot.
    """
    for key, function in functions.items():
        if key == "model":
            check_builder(function)
            continue
        if key == "train.loss":
            check_loss(function, weight)
        checked_function(key, function, weighted=bool(weight))
    return functions


def with_mode(config: TrainConfig, functions: Functions) -> TrainConfig:
    """Return the configuration with ``stop.mode``, where ``stop.metric`` is of torchmetrics, whose classes say it.

    Raises
    ------
    InvalidConfig
        The class does not say it.
    """
    stop, metric = config.stop, config.stop.metric.removeprefix("val_").removeprefix("ema_")
    own = {
        metric_key(key.removeprefix(f"{METRICS}.")): one for key, one in functions.items() if key.startswith(METRICS)
    }
    if stop.mode != "auto" or metric not in own or torchmetric_of(own[metric]) is None:
        return config
    higher = direction(own[metric])
    if higher is None:
        raise InvalidConfig(
            f'stop.metric = "{stop.metric}": {metric} does not say whether more is better (higher_is_better is None).',
            'Set stop.mode = "max" or stop.mode = "min".',
        )
    return config.model_copy(update={"stop": stop.model_copy(update={"mode": "max" if higher else "min"})})


def with_metrics(job: Job, metrics: Sequence[str | Function]) -> Job:
    """Return the job of an evaluation with other metrics than those of ``train.metrics``.

    Raises
    ------
    InvalidConfig
        One is neither built in, nor one of the run, of torchmetrics or a function.
    """
    named, given = take_functions({"train": {"metrics": tuple(metrics)}})
    names: tuple[str, ...] = named["train"]["metrics"]
    train = job.config.train.model_copy(update={"metrics": names})
    check_metrics(train)
    functions = {key: function for key, function in job.functions.items() if not key.startswith(METRICS)}
    for name in names:
        key = f"{METRICS}.{name}"
        own = given.get(key) or job.functions.get(key)
        if own is None and name.startswith("torchmetrics"):
            own = load_function(key, name, job.base)
        if own is not None:
            functions[key] = own
        elif name not in BUILT_IN:
            raise InvalidConfig(
                f'metrics: "{name}" is no metric of the run, and code is taken from nowhere else.',
                f"Allowed are {', '.join(BUILT_IN)}, those of train.metrics and classes of torchmetrics; in Python "
                "functions too.",
            )
    config = job.config.model_copy(update={"train": train})
    return replace(job, config=config, functions=checked(functions, config.data.weight))


def of_one_target(job: Job) -> Job:
    """Return the job with the metrics alone that can be computed of one of several targets.

    Raises
    ------
    InvalidConfig
        There are none.
    """
    own = {name: job.functions.get(f"{METRICS}.{name}") for name in job.config.train.metrics}
    kept = [
        name
        for name, function in own.items()
        if (function is None and not BUILT_IN[name].from_loss)
        or (function is not None and torchmetric_of(function) is not None)
    ]
    if not kept:
        raise InvalidConfig(
            "by variable: train.metrics has no built-in metric, which could be computed of one target alone: functions "
            "and the loss take all of them.",
            'Name others: --metric rmse, in Python metrics=["rmse"].',
        )
    return with_metrics(job, kept)


def references_in(config: TrainConfig) -> dict[str, str]:
    """Return, by config key, the values that name a function of the user's."""
    train = config.train
    named = {
        "model": config.model,
        "train.loss": train.loss,
        "train.optimizer": train.optimizer,
        "train.schedule": train.schedule,
        "average.outer.schedule": config.average.outer.schedule if config.average.outer is not None else "",
        "data.transform": config.data.transform,
        **{f"{METRICS}.{name}": name for name in train.metrics},
    }
    return {key: text for key, text in named.items() if key == "model" or FUNCTION.match(text)}


def check_names(config: TrainConfig) -> None:
    """Refuse names that torch or the run does not know, before anything is started."""
    if config.average.outer is not None:
        outer_optimizer(config.average.outer)
    check_metric(config, has_validation=config.data.split.holds_out("val") or bool(config.data.val_path))
    if not FUNCTION.match(config.train.optimizer):
        optimizer_named(config.train.optimizer)


def with_scheduler(config: TrainConfig, scheduler: str) -> TrainConfig:
    """Return the configuration with another ``cluster.scheduler``."""
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"scheduler": scheduler})})
