"""What the arguments of a call in Python mean: a job, and where it is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dtrain.config.compare import has_redacted
from dtrain.config.functions import Function, described, name_of
from dtrain.config.schema import DataConfig, TrainConfig
from dtrain.config.split import SplitConfig
from dtrain.data.paths import identity
from dtrain.data.samples import Samples, not_samples
from dtrain.errors import InvalidConfig
from dtrain.job import (
    Job,
    Model,
    Table,
    Tracker,
    absolute,
    check_names,
    described_with,
    held_out_source,
    load_functions,
    load_trackers,
    open_sources,
    plain,
    source_of,
    with_mode,
    with_scheduler,
)
from dtrain.runtime.modules import directory_of
from dtrain.runtime.place import PLACE_NAMES
from dtrain.runtime.where import Where, full_address, scheduler_text
from dtrain.urls import redacted_in

Value = TypeVar("Value")


def python_job(
    model: Model | None,
    samples: Samples | None,
    config: TrainConfig | None,
    model_args: Table | None,
    cluster: Where | None,
    **tables: Table | None,
) -> Job:
    """Return the job of the arguments of `train`; they and the configuration must not contradict each other."""
    job = job_from_python(model, samples, tables, config, model_args)
    job = replace(job, config=with_absolute_tls(job.config))
    scheduler = _agreed_scheduler(job.config, cluster)
    is_object = not isinstance(cluster, str | os.PathLike | None)
    return job if is_object else replace(job, config=with_scheduler(job.config, scheduler))


def with_absolute_tls(config: TrainConfig) -> TrainConfig:
    """Return a configuration whose ``cluster.tls`` has absolute paths: in Python they are relative to the process."""
    tls = config.cluster.tls
    if not tls.is_given:
        return config
    tls = tls.model_copy(update={name: absolute(getattr(tls, name)) for name in ("ca", "cert", "key")})
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"tls": tls})})


def with_trackers(job: Job, config: TrainConfig | None, trackers: Sequence[str | Tracker]) -> Job:
    """Return a job with the trackers of an argument: names, or objects of Python; `config` must not contradict it."""
    table = TrainConfig(run={**job.config.run.model_dump(exclude_unset=True), "trackers": trackers})
    wanted = table.run.trackers
    if config is not None and is_given(config, "run", "trackers") and wanted != config.run.trackers:
        raise contradiction("trackers", wanted, config.run.trackers, "run.trackers")
    placed = job.config.model_copy(update={"run": table.run})
    return replace(job, config=placed, trackers=load_trackers(placed, job.base, table.functions))


def _agreed_scheduler(config: TrainConfig, cluster: Where | None) -> str:
    """Return where to train: as the argument says, or the configuration; they must not contradict each other."""
    configured = full_address(config.cluster.scheduler, PLACE_NAMES)
    if cluster is None:
        return configured
    wanted = scheduler_text(cluster, PLACE_NAMES)
    if is_given(config, "cluster", "scheduler") and wanted != configured:
        raise contradiction("cluster", wanted, configured, "cluster.scheduler")
    return wanted


def job_from_python(
    model: Model | None,
    samples: Samples | None,
    tables: Mapping[str, Table | None],
    config: TrainConfig | None,
    model_args: Table | None = None,
) -> Job:
    """Resolve what a Python program or notebook gives: a function, samples, and tables or a whole configuration.

    None means: as the configuration says. Its relative paths are relative to the working directory.

    Raises
    ------
    InvalidConfig
        A table is wrong, model, samples or loss are missing, or the configuration says otherwise.
    """
    given = {name: table for name, table in tables.items() if table}
    _check_config(config, given)
    whole = config or TrainConfig()
    reference = _agreed("model", _model_name(model), whole.model)
    if not reference:
        raise InvalidConfig("model is missing.", "Give a function that returns a torch.nn.Module, or its name.")
    args = _agreed("model_args", None if model_args is None else dict(model_args), whole.model_args)
    samples, data = _agreed_samples(samples, whole.data)
    values = whole.model_dump(exclude_unset=True) if config is not None else given
    resolved = TrainConfig(**{**values, "model": reference, "model_args": args or {}, "data": data})
    if not resolved.train.loss:
        raise InvalidConfig("train.loss is missing.", 'Give train=dict(loss="mse") or another loss.')
    if resolved.train.init:
        train = resolved.train.model_copy(update={"init": absolute(resolved.train.init)})
        resolved = resolved.model_copy(update={"train": train})
    own: dict[str, Function] = {**whole.functions, **resolved.functions}
    own |= {"data.transform": samples.transform} if samples is not None and samples.transform is not None else {}
    own |= {"model": model} if callable(model) else {}
    base = directory_of(own["model"]) if "model" in own else Path.cwd()
    functions, resolved = load_functions(resolved, base, own), resolved.with_functions({})
    check_names(resolved)
    return Job(
        config=with_mode(resolved, functions),
        sources=(source_of(samples),) if samples is not None else open_sources(resolved.data, Path.cwd()),
        held_out=held_out_source(resolved.data, Path.cwd()),
        functions=functions,
        base=base,
        trackers=load_trackers(resolved, base, own),
    )


def _check_config(config: TrainConfig | None, given: Mapping[str, Table]) -> None:
    if config is not None and not isinstance(config, TrainConfig):
        raise InvalidConfig(f"config is a {type(config).__name__}; a dtrain.TrainConfig is needed.")
    if config is not None and given:
        raise InvalidConfig(f"config= and {', '.join(given)}= are both given; give one of them.")
    for name, table in given.items():
        if not isinstance(table, Mapping):
            raise InvalidConfig(f"{name} is {described(table)}; a table is needed, such as {name}=dict(...).")


def _model_name(model: Model | None) -> str | None:
    if model is None or isinstance(model, str):
        return model
    if not callable(model):
        raise InvalidConfig(
            f"model is {described(model)}; a function that returns a torch.nn.Module is needed, or its name."
        )
    return name_of(model)


# A configuration and arguments beside it --------------------------------------------------------------------


def _agreed(name: str, argument: Value | None, configured: Value) -> Value:
    """Return an argument, or what the configuration says where there is none; they must not contradict each other."""
    if argument is None:
        return configured
    if configured and configured != argument:
        raise contradiction(name, argument, configured)
    return argument


def contradiction(name: str, argument: object, configured: object, key: str = "") -> InvalidConfig:
    """Return the error for an argument that the configuration contradicts."""
    return InvalidConfig(
        f"{name} = {plain(argument)}, and config has {key or name} = {plain(configured)}.",
        f"Leave {name} out to take what config says, or change config.",
    )


def is_given(config: TrainConfig, table: str, key: str) -> bool:
    """Return True if a configuration itself sets a key, be it to the default."""
    return table in config.model_fields_set and key in getattr(config, table).model_fields_set


def _agreed_samples(samples: Samples | None, config: DataConfig) -> tuple[Samples | None, Table]:
    """Return samples, described with the keys of the configuration, and the table ``[data]`` with absolute paths."""
    if samples is None:
        if not config.path:
            raise InvalidConfig(
                "samples are missing.", "Give what dtrain.open_samples returns, or config with data.path."
            )
        return None, _absolute(config.model_dump(exclude_unset=True))
    if not isinstance(samples, Samples):
        raise not_samples(samples)
    own, theirs = _flat(samples.config), _flat(config)
    differing = [key for key in own.keys() & theirs.keys() if not _is_same(key, own[key], theirs[key], samples)]
    if differing:
        texts = [
            f"{key}, and config has others"
            if key in SECRET_KEYS
            else f"{key} = {plain(own[key])}, and config has {plain(theirs[key])}"
            for key in sorted(differing)[:4]
        ]
        raise InvalidConfig(
            f"The samples have data.{'; data.'.join(texts)}.",
            "Give each key once: to open_samples or in config. Or leave samples out: config names them.",
        )
    more = {key: getattr(config, key) for key in config.model_fields_set - samples.config.model_fields_set}
    if "split" in config.model_fields_set & samples.config.model_fields_set:
        parts = (config.split.model_dump(exclude_unset=True), samples.config.split.model_dump(exclude_unset=True))
        more["split"] = SplitConfig(**{**parts[0], **parts[1]})
    samples = described_with(samples, more)
    return samples, _absolute({**samples.config.model_dump(exclude_unset=True), "path": samples.location})


SECRET_KEYS = ("storage_options",)
"""Keys of ``[data]`` whose values are not shown."""


def _flat(config: DataConfig) -> dict[str, Any]:
    """Return the keys that a table ``[data]`` itself sets, those of its split apart."""
    values = config.model_dump(mode="json", exclude_unset=True)
    split = values.pop("split", {})
    return {**values, **{f"split.{key}": share for key, share in split.items()}}


def _is_same(key: str, own: object, theirs: object, samples: Samples) -> bool:
    if key == "path":
        own = samples.location
    if own == theirs or key not in ("path", "val_path"):
        return own == theirs
    if has_redacted(theirs):  # the configuration of a run
        own = redacted_in(own)
    return _identities(own) == _identities(theirs)


def _identities(paths: Any) -> list[str]:
    """Return the one spelling of each path; federated stores as text."""
    return [identity(str(path), Path.cwd()) for path in ([paths] if isinstance(paths, str) else paths)]


def _absolute(data: Table) -> Table:
    """Return a table ``[data]`` whose local paths are absolute: the run is found again from elsewhere."""
    return {
        **data,
        "path": _absolute_stores(data["path"]),
        **({"val_path": absolute(data["val_path"])} if data.get("val_path") else {}),
    }


def _absolute_stores(path: Any) -> Any:
    if isinstance(path, str) or isinstance(path[0], str):
        return absolute(path)
    return tuple({**store, "path": absolute(store["path"])} for store in path)
