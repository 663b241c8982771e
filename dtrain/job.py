"""A job: configuration, samples and the user's functions, resolved and checked, before a cluster is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from distributed import Client
from distributed.system import MEMORY_LIMIT

from dtrain.algorithm.local import optimizer_named
from dtrain.algorithm.outer import outer_optimizer
from dtrain.algorithm.stop import check_metric
from dtrain.config import FUNCTION, DataConfig, TrainConfig, cache_bytes, parse_bytes
from dtrain.data.encoding import Scaling
from dtrain.data.load.statistics import scalings_of
from dtrain.data.plan.memory import MemoryBudget, Reading, plan_memory
from dtrain.data.plan.partition import (
    JointPlan,
    count_units,
    eval_partitions,
    plan_data,
    plan_held_out,
    train_partitions,
)
from dtrain.data.plan.units import DataPlan
from dtrain.data.read.presence import absent_rows, check_presence, content_digest
from dtrain.data.samples import Samples
from dtrain.data.source import describe
from dtrain.errors import ClusterUnsuitable, DataChanged, InvalidConfig, LengthsDiffer
from dtrain.events import StepsTaken
from dtrain.runtime.cluster import ClusterRunner, call_there
from dtrain.runtime.connect import Connection, open_cluster
from dtrain.runtime.resident import RunSpec, Source
from dtrain.runtime.runner import Runner
from dtrain.runtime.serial import SerialRunner
from dtrain.runtime.tasks import EVAL_BATCH
from dtrain.runtime.usercode import directory_of, load_function, pickle_functions, source_sha256

Functions = dict[str, Callable[..., Any]]


Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """One store that a job trains on."""

    config: DataConfig
    """Its ``[data]`` table: the path is this store's."""
    samples: Samples | None
    """None until it has been described where it lies: by one of its workers."""
    workers: tuple[str, ...] = ()
    """The only workers that may read it; any, if there are none."""
    replicas: int | None = None
    """None: as ``average.replicas`` says."""

    @property
    def described(self) -> Samples:
        """Its samples, once they are known."""
        assert self.samples is not None
        return self.samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be trained, evaluated or planned."""

    config: TrainConfig
    stores: tuple[Store, ...]
    held_out: Samples | None = None
    """Of ``data.val_path``."""
    functions: Functions
    """The user's functions by config key."""
    base: Path
    """Directory that relative paths and modules are looked up in."""

    @property
    def samples(self) -> Samples:
        """The samples of the first store: all have the same variables."""
        return self.stores[0].described

    @property
    def code(self) -> dict[str, str]:
        """SHA-256 of the source text of each of the user's functions."""
        return {key: source_sha256(function, self.base) for key, function in self.functions.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """All that decides bits and is resolved once, at a run's first start."""

    plan: JointPlan
    scalings: Mapping[str, Scaling]
    """By variable of ``data.normalize``."""
    device: str
    contents: tuple[Mapping[str, str], ...] = ()
    """By store and variable: a digest of the sizes of its stored objects."""


def job_from_config(config: TrainConfig, base: Path) -> Job:
    """Resolve a configuration whose paths are relative to `base`: import its functions, describe its samples."""
    stores, held_out = open_stores(config.data, base), describe_held_out(config.data, base)
    functions = {key: load_function(key, reference, base) for key, reference in _references(config).items()}
    _check_names(config)
    return Job(config=config, stores=stores, held_out=held_out, functions=functions, base=base)


def open_stores(config: DataConfig, base: Path) -> tuple[Store, ...]:
    """Describe the store or stores of ``data.path``, but those that only workers can see."""
    if isinstance(config.path, str):
        return (Store(config=config, samples=describe(config, base)),)
    found = []
    for store in config.path:
        own = config.model_copy(update={"path": store.path})
        samples = None if store.workers else describe(own, base)
        found.append(Store(config=own, samples=samples, workers=store.workers, replicas=store.replicas))
    return tuple(found)


def store_of(samples: Samples) -> tuple[Store, ...]:
    """Return the one store of some samples."""
    return (Store(config=samples.config, samples=samples),)


def plan_like(samples: Samples, config: TrainConfig) -> DataPlan:
    """Plan other data than a run's own, to evaluate a split of them."""
    return plan_data(samples, replicas=1, seed=config.train.seed)


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
    return Job(config=resolved, stores=store_of(samples), held_out=held_out, functions=functions, base=base)


def _references(config: TrainConfig) -> dict[str, str]:
    train = config.train
    named = {
        "model": config.model,
        "train.loss": train.loss,
        "train.optimizer": train.optimizer,
        "train.schedule": train.schedule,
        "data.transform": config.data.transform,
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
    job: Job,
    run_id: str,
    *,
    known: Resolved | None = None,
    client: Client | None = None,
    most_units: int | None = None,
    full: bool = False,
    on_progress: Callable[[StepsTaken], None] | None = None,
) -> Iterator[tuple[Runner, Resolved]]:
    """Open the place that the job's configuration names, resolve what decides bits, and give a runner.

    Parameters
    ----------
    job : Job
    run_id : str
        Names this execution; keys of tasks carry it.
    known : Resolved, optional
        Of the run's first start; without it, it is resolved now.
    client : distributed.Client, optional
        Takes precedence over ``cluster.scheduler``.
    most_units : int, optional
        Units of each partition that ``data.normalize`` looks at, for an estimate; all of them, if not given.
    full : bool
        Look for missing chunks in every shard, also of remote stores with very many.
    on_progress : callable, optional
        Is told how far the pass for ``data.normalize`` is.

    Raises
    ------
    ChunkTooLarge, OutOfMemory, TooFewSamples, ChunkMissing
        The plan cannot work.
    ClusterUnreachable, ClusterUnsuitable
        There is no cluster.
    """
    with _open_place(job, client) as place:
        job = replace(job, stores=tuple(place.described(store, job.base) for store in job.stores))
        resolved = known or resolve(job, place)
        if known is not None:
            _check_kind(job, known)
        for store, samples in _samples_of(job):
            if samples.config.missing == "error":
                place.look(store, partial(check_presence, samples, full=full))
        if known is not None:
            _check_contents(job, known, place)
        normalize = job.config.data.normalize
        if normalize and not resolved.scalings:
            with place.runner(make_spec(job, resolved, f"{run_id}-n", place)) as runner:
                runner.on_progress = on_progress or runner.on_progress
                moments = runner.collect([runner.submit_moments(most_units)])[0]
            scalings = scalings_of(moments, job.samples.variables)
            resolved = replace(resolved, scalings=scalings)
        with place.runner(make_spec(job, resolved, run_id, place)) as runner:
            yield runner, resolved


@dataclass(frozen=True, slots=True)
class Place:
    """Where tasks run: this process, or a cluster."""

    connection: Connection | None
    num_workers: int
    memory: int
    """Bytes that the data path of a worker may use."""
    what: str
    """What that is."""

    @contextmanager
    def runner(self, spec: RunSpec) -> Iterator[Runner]:
        """Give a runner, and release what the run holds afterwards."""
        runner: Runner = SerialRunner(spec) if self.connection is None else ClusterRunner(self.connection, spec)
        try:
            yield runner
        finally:
            runner.close()

    def described(self, store: Store, base: Path) -> Store:
        """Describe a store that only its workers can see, by one of them."""
        if store.samples is not None:
            return store
        return replace(store, samples=self.look(store, partial(describe, store.config, base)))

    def look(self, store: Store | None, call: Callable[[], Value]) -> Value:
        """Call a function where a store can be seen: on one of its workers, if it has some, else here."""
        if store is None or not store.workers or self.connection is None:
            return call()
        return call_there(self.connection, str(store.config.path), store.workers, call)

    @property
    def device(self) -> str:
        """``cuda`` if every worker has it, else ``cpu``."""
        if self.connection is None:
            return "cuda" if torch.cuda.is_available() else "cpu"
        return "cuda" if all(self.connection.client.run(torch.cuda.is_available).values()) else "cpu"


@contextmanager
def _open_place(job: Job, client: Client | None) -> Iterator[Place]:
    config = job.config.cluster
    memory = job.config.data.memory
    given = parse_bytes(memory, "data.memory") if memory != "auto" else None
    if config.scheduler == "serial" and client is None:
        limit, what = int(MEMORY_LIMIT) // 2, "half of this machine's memory"
        yield Place(None, SerialRunner.num_workers, *_smaller(limit, what, given))
        return
    with open_cluster(config, job.base, client) as connection:
        # half of a worker's memory: the rest is for parameters, activations and torch itself
        limit, what = connection.worker_memory // 2, "half of a worker's memory"
        yield Place(connection, connection.num_workers, *_smaller(limit, what, given))


def _smaller(limit: int, what: str, given: int | None) -> tuple[int, str]:
    return (given, "data.memory") if given is not None and given < limit else (limit, what)


def _samples_of(job: Job) -> list[tuple[Store | None, Samples]]:
    """Return the stores that are read, with their samples; that of ``data.val_path`` is none of `Job.stores`."""
    found: list[tuple[Store | None, Samples]] = [(store, store.described) for store in job.stores]
    return found if job.held_out is None else [*found, (None, job.held_out)]


def make_spec(job: Job, resolved: Resolved, run_id: str, place: Place) -> RunSpec:
    """Return what travels to the workers."""
    plans, held_out = resolved.plan.plans, None
    held_out_plan = None if job.held_out is None else plan_held_out(job.held_out, plans[0])
    sources = []
    for store, plan in zip(job.stores, plans, strict=True):
        law = memory_law(job, store, plan, held_out_plan, place)
        sources.append(Source(samples=store.described, plan=plan, memory=law, workers=store.workers))
    if job.held_out is not None and held_out_plan is not None:
        held_out = Source(samples=job.held_out, plan=held_out_plan, memory=sources[0].memory)
    return RunSpec(
        run_id=run_id,
        sources=tuple(sources),
        held_out=held_out,
        scalings=resolved.scalings,
        config=job.config,
        code=pickle_functions(job.functions, job.base),
        threads=job.config.cluster.threads,
        device=resolved.device,
    )


def memory_law(job: Job, store: Store, plan: DataPlan, held_out: DataPlan | None, place: Place) -> MemoryBudget:
    """Divide the memory that a worker has for a store."""
    train = job.config.train
    micro = train.micro_batch or (EVAL_BATCH if train.batch_size == "full" else train.batch_size)
    workers = len(store.workers) or (1 if place.connection is None else place.num_workers)
    parts = train_partitions(plan)
    if held_out is None or job.held_out is None:
        samples, of = store.described, plan
        pieces = eval_partitions(of, "val") or eval_partitions(of, "all")
    else:
        samples, of = job.held_out, held_out
        pieces = eval_partitions(of, "all")
    beside = 1 if store.workers else sum(not other.workers for other in job.stores)
    cache = job.config.data.cache
    return plan_memory(
        Reading(
            samples=store.described,
            plan=plan,
            loaders=-(-plan.replicas // workers),
            units=max(len(part.units) for part in parts),
            batch_size=min(micro, max(part.num_samples for part in parts)),
            shuffle=plan.shuffle,
        ),
        Reading(
            samples=samples,
            plan=of,
            loaders=-(-len(pieces) // workers),
            units=max(len(piece.units) for piece in pieces),
            batch_size=min(micro, max(piece.num_samples for piece in pieces)),
            shuffle=False,
        ),
        place.memory // beside,
        place.what,
        None if cache == "auto" else cache_bytes(cache),
    )


def resolve(job: Job, place: Place) -> Resolved:
    """Resolve a first start; ``replicas = "auto"`` and ``device = "auto"`` look at the workers, nothing else does."""
    wanted, seed = job.config.average.replicas, job.config.train.seed
    plans = []
    if len(job.stores) > 1 or job.stores[0].replicas is not None:
        total = sum(store.replicas or 1 for store in job.stores)
        if wanted not in ("auto", total):
            raise InvalidConfig(
                f"average.replicas = {wanted}, but the stores of data.path have {total} together.",
                "Leave average.replicas out.",
            )
        _check_alike(job)
    for store in job.stores:
        samples = store.described
        if store.replicas is not None:
            replicas = store.replicas
        else:
            replicas = min(place.num_workers, count_units(samples)) if wanted == "auto" else wanted
        absent = place.look(store, partial(absent_rows, samples)) if samples.config.missing == "skip" else ()
        plans.append(plan_data(samples, replicas=replicas, seed=seed, absent=absent))
    device = place.device if job.config.train.device == "auto" else job.config.train.device
    if device == "cuda" and place.device != "cuda":
        raise ClusterUnsuitable(
            'train.device = "cuda", but not every worker has a GPU that torch can use.', 'Set train.device = "cpu".'
        )
    contents = tuple(place.look(store, partial(content_digest, samples)) for store, samples in _samples_of(job))
    return Resolved(plan=JointPlan(tuple(plans)), scalings={}, device=device, contents=contents)


def _check_alike(job: Job) -> None:
    """Refuse stores whose samples differ in kind."""
    first = job.stores[0].described
    for store in job.stores[1:]:
        other = store.described
        for a, b in zip(first.variables, other.variables, strict=True):
            if (a.row_shape, a.model_dtype) != (b.row_shape, b.model_dtype):
                raise LengthsDiffer(
                    f"{other.path}: a row of {b.name} is {b.model_dtype}{list(b.row_shape)}; "
                    f"in {first.path} it is {a.model_dtype}{list(a.row_shape)}.",
                    "All stores of data.path must hold the same kind of samples.",
                )


def _check_kind(job: Job, known: Resolved) -> None:
    """Refuse data of other metadata than those of the run's first start."""
    for store, plan in zip(job.stores, known.plan.plans, strict=True):
        if store.described.fingerprint != plan.source:
            raise DataChanged(
                f"{store.described.path} has other shapes, dtypes or chunks than when the run was started.",
                "Train under another --run NAME; to evaluate other data, name them with --data.",
            )


def _check_contents(job: Job, known: Resolved, place: Place) -> None:
    """Refuse a store that has been written again since the run's first start."""
    for (store, samples), before in zip(_samples_of(job), known.contents, strict=False):
        now = place.look(store, partial(content_digest, samples))
        changed = [name for name, digest in before.items() if now.get(name, digest) != digest]
        if changed:
            raise DataChanged(
                f"{samples.path}: chunks of {', '.join(changed)} have been written again since the run was started.",
                "Restore the data, or train under another --run NAME.",
            )


def resolved_values(job: Job, resolved: Resolved) -> dict[str, Any]:
    """Return the content of plan.json."""
    plans = resolved.plan.plans
    return {
        "data": asdict(plans[0]) if len(plans) == 1 else [asdict(plan) for plan in plans],
        "held_out": None if job.held_out is None else asdict(plan_held_out(job.held_out, plans[0])),
        "fingerprint": resolved.plan.fingerprint,
        "threads": job.config.cluster.threads,
        "device": resolved.device,
        "normalize": {name: asdict(scaling) for name, scaling in resolved.scalings.items()},
        "contents": [dict(content) for content in resolved.contents],
        "torch": torch.__version__,
        "code": job.code,
    }


def resolved_from(values: Mapping[str, Any]) -> Resolved:
    """Return what `resolved_values` has written."""
    data = values["data"]
    plans = tuple(_plan_from(plan) for plan in (data if isinstance(data, list) else [data]))
    scalings = {
        name: Scaling(tuple(scaling["mean"]), tuple(scaling["std"]), scaling["axis"])
        for name, scaling in values.get("normalize", {}).items()
    }
    contents = tuple(values.get("contents", ()))
    return Resolved(plan=JointPlan(plans), scalings=scalings, device=values["device"], contents=contents)


def _plan_from(values: Mapping[str, Any]) -> DataPlan:
    absent = tuple((start, stop) for start, stop in values.get("absent", ()))
    return DataPlan(**{**values, "absent": absent})
