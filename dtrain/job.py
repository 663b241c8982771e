"""A job: configuration, samples and the user's functions, resolved and checked, before a cluster is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from distributed import Client
from distributed.system import MEMORY_LIMIT

from dtrain.algorithm.local import optimizer_named
from dtrain.algorithm.outer import outer_optimizer
from dtrain.algorithm.stop import check_metric
from dtrain.config import FUNCTION, DataConfig, TrainConfig, parse_bytes
from dtrain.data.partition import DataPlan, check_memory, count_units, plan_data, plan_held_out
from dtrain.data.samples import Samples
from dtrain.data.source import describe
from dtrain.data.store import check_presence
from dtrain.errors import InvalidConfig
from dtrain.runtime.cluster import ClusterRunner
from dtrain.runtime.connect import open_cluster
from dtrain.runtime.resident import RunSpec
from dtrain.runtime.runner import Runner
from dtrain.runtime.serial import SerialRunner
from dtrain.runtime.usercode import directory_of, load_function, pickle_functions, source_sha256

Functions = dict[str, Callable[..., Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be trained, evaluated or planned."""

    config: TrainConfig
    samples: Samples
    held_out: Samples | None = None
    """Of ``data.val_path``."""
    functions: Functions
    """The user's functions by config key."""
    base: Path
    """Directory that relative paths and modules are looked up in."""

    @property
    def code(self) -> dict[str, str]:
        """SHA-256 of the source text of each of the user's functions."""
        return {key: source_sha256(function, self.base) for key, function in self.functions.items()}


def job_from_config(config: TrainConfig, base: Path) -> Job:
    """Resolve a configuration whose paths are relative to `base`: import its functions, describe its samples."""
    samples, held_out = describe(config.data, base), describe_held_out(config.data, base)
    functions = {key: load_function(key, reference, base) for key, reference in _references(config).items()}
    _check_names(config)
    return Job(config=config, samples=samples, held_out=held_out, functions=functions, base=base)


def describe_held_out(config: DataConfig, base: Path) -> Samples | None:
    """Describe the store of ``data.val_path``, if there is one; its variables are those of ``data.path``."""
    return describe(config.model_copy(update={"path": config.val_path}), base) if config.val_path else None


def job_from_python(
    model: Callable[..., Any] | str, samples: Samples, tables: Mapping[str, Any], config: TrainConfig | None
) -> Job:
    """Resolve what a Python program or notebook gives: a function, samples, and tables of the configuration.

    Raises
    ------
    InvalidConfig
        A table is wrong, both tables and a config are given, or there is no loss.
    """
    given = {name: table for name, table in tables.items() if table}
    if config is not None and given:
        raise InvalidConfig(f"config= and {', '.join(given)}= are both given; give one of them.")
    base_tables = config.model_dump(exclude_unset=True) if config is not None else given
    if "loss" in base_tables.get("train", {}) and callable(base_tables["train"]["loss"]):
        raise InvalidConfig('train.loss is a function; write its name as "module:function".')
    named = (
        model
        if isinstance(model, str)
        else f"{model.__module__}:{getattr(model, '__qualname__', type(model).__qualname__)}"
    )
    data = {**samples.config.model_dump(exclude_unset=True), "path": samples.path}
    if samples.config.val_path:
        data["val_path"] = str(Path(samples.config.val_path).expanduser().absolute())
    merged = {**base_tables, "model": named.replace("<locals>.", ""), "data": data}
    resolved = TrainConfig(**merged)
    if not resolved.train.loss:
        raise InvalidConfig("train.loss is missing.", 'Give train=dict(loss="mse") or another loss.')
    base = Path.cwd() if isinstance(model, str) else directory_of(model)
    references = _references(resolved)
    functions: Functions = {} if isinstance(model, str) else {"model": model}
    for key, reference in references.items():
        if key not in functions:
            functions[key] = load_function(key, reference, base)
    _check_names(resolved)
    held_out = describe_held_out(samples.config, Path.cwd())
    return Job(config=resolved, samples=samples, held_out=held_out, functions=functions, base=base)


def _references(config: TrainConfig) -> dict[str, str]:
    train = config.train
    named = {
        "model": config.model,
        "train.loss": train.loss,
        "train.optimizer": train.optimizer,
        "train.schedule": train.schedule,
        **{f"train.metrics.{name}": name for name in train.metrics},
    }
    return {key: text for key, text in named.items() if key == "model" or FUNCTION.match(text)}


def _check_names(config: TrainConfig) -> None:
    """Refuse names that torch or the run does not know, before anything is started."""
    if config.average.outer is not None:
        outer_optimizer(config.average.outer)
    check_metric(config, has_validation=config.data.split.val > 0 or bool(config.data.val_path))
    if not FUNCTION.match(config.train.optimizer):
        optimizer_named(config.train.optimizer)


# Runners ------------------------------------------------------------------------------------------------


@contextmanager
def open_runner(
    job: Job, run_id: str, *, plan: DataPlan | None = None, client: Client | None = None
) -> Iterator[tuple[Runner, DataPlan]]:
    """Open the place that the job's configuration names, plan the data for it, and give a runner.

    Parameters
    ----------
    job : Job
    run_id : str
        Names this execution; keys of tasks carry it.
    plan : DataPlan, optional
        Of the run's first start; without it one is made.
    client : distributed.Client, optional
        Takes precedence over ``cluster.scheduler``.

    Raises
    ------
    ChunkTooLarge, OutOfMemory, TooFewSamples, ChunkMissing
        The plan cannot work.
    ClusterUnreachable, ClusterUnsuitable
        There is no cluster.
    """
    config = job.config.cluster
    if config.scheduler == "serial" and client is None:
        resolved = _resolved(job, plan, SerialRunner.num_workers, int(MEMORY_LIMIT), "the memory of this machine")
        yield SerialRunner(make_spec(job, resolved, run_id)), resolved
        return
    with open_cluster(config, job.base, client) as connection:
        # half of a worker's memory: the rest is for parameters, activations and torch itself
        limit, what = connection.worker_memory // 2, "half of a worker's memory"
        resolved = _resolved(job, plan, connection.num_workers, limit, what)
        runner = ClusterRunner(connection, make_spec(job, resolved, run_id))
        try:
            yield runner, resolved
        finally:
            runner.close()


def make_spec(job: Job, plan: DataPlan, run_id: str) -> RunSpec:
    """Return what travels to the workers."""
    return RunSpec(
        run_id=run_id,
        samples=job.samples,
        plan=plan,
        held_out=None if job.held_out is None else (job.held_out, plan_held_out(job.held_out, plan)),
        config=job.config,
        code=pickle_functions(job.functions, job.base),
        threads=job.config.cluster.threads,
    )


def _resolved(job: Job, plan: DataPlan | None, workers: int, limit: int, what: str) -> DataPlan:
    if plan is None:
        plan = resolve_plan(job, workers)
    memory = job.config.data.memory
    if memory != "auto":
        limit, what = min(limit, parse_bytes(memory, "data.memory")), "data.memory"
    check_memory(job.samples, plan, limit, what)
    if job.held_out is not None:
        check_memory(job.held_out, plan_held_out(job.held_out, plan), limit, what)
    if job.config.data.missing == "error":
        for samples in filter(None, (job.samples, job.held_out)):
            check_presence(samples)
    return plan


def resolve_plan(job: Job, workers: int) -> DataPlan:
    """Return the data plan of a first start; ``replicas = "auto"`` looks at the workers, nothing else does."""
    wanted = job.config.average.replicas
    replicas = min(workers, count_units(job.samples)) if wanted == "auto" else wanted
    return plan_data(job.samples, replicas=replicas, seed=job.config.train.seed)


def resolved_values(job: Job, plan: DataPlan) -> dict[str, Any]:
    """Return all that decides bits and was resolved at the first start: the content of plan.json."""
    return {
        "data": asdict(plan),
        "held_out": None if job.held_out is None else asdict(plan_held_out(job.held_out, plan)),
        "fingerprint": plan.fingerprint,
        "threads": job.config.cluster.threads,
        "device": "cpu",
        "torch": torch.__version__,
        "code": job.code,
    }
