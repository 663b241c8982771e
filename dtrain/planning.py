"""The numbers behind ``dtrain plan``: what a run would do. Trains and writes nothing."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distributed import Client

from dtrain.algorithm.cadence import Costs
from dtrain.algorithm.plan import pass_size, samples_a_round, steps_a_round
from dtrain.algorithm.traffic import CommitBytes, Traffic, commit_bytes, traffic
from dtrain.config.values import value_of
from dtrain.data.balance import Balance
from dtrain.data.climatology import ClimatePlan
from dtrain.data.given import SHARES, Found, leakage_note
from dtrain.data.plan.footprint import format_bytes
from dtrain.data.plan.missing import absence_of, stands_for
from dtrain.data.plan.partition import JointPlan, eval_partitions
from dtrain.data.plan.readers import choose_readers
from dtrain.data.plan.summary import describe_plan
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Samples
from dtrain.initfile import init_path, read_init
from dtrain.job import Job
from dtrain.prepare import ESTIMATE_UNITS, open_runner
from dtrain.probe import Probe, limit_of, num_processes
from dtrain.resolved import Resolved
from dtrain.runtime.handles import SMALL_BYTES
from dtrain.runtime.reducing import reducer_slices
from dtrain.runtime.spec import PlannedSource
from dtrain.runtime.trial import Initial
from dtrain.stages import Limit

ROUND_SECONDS = 0.05
"""What a round of a small model costs beside steps and evaluation: 13 ms of its own (benchmarks/rounds.py), and
commits, and that driver and scheduler take time of the workers' cores (benchmarks/planned.py)."""
BYTE_SECONDS = 1.6e-9
"""The same for each byte of parameters (170 ms for 100 MB)."""


class Choice(NamedTuple):
    """The value that stands for "auto", and why."""

    value: str | int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlan:
    """What a run reads of one store."""

    source: PlannedSource
    counts: dict[str, Any]
    """Of `describe_plan`."""
    readers: dict[str, tuple[str, str]]
    """By variable: the reader, and why it is taken."""
    gaps: str
    """What its coordinate says about jumps; empty if samples have no windows."""
    weight: str = ""
    """What the values of ``data.weight`` are; empty without it."""
    given: Found = SHARES
    """Its splits that are given by coordinate or by group."""
    leakage: str = ""
    """Why its splits may leak, if they may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The numbers of a run that has not started."""

    data: JointPlan
    stores: tuple[StorePlan, ...]
    initial: Initial
    steps: tuple[int, ...]
    """Local steps a round, by replica; the first ``train.sync_rounds`` rounds have one."""
    samples: int
    """Samples of such a round, by all replicas."""
    held_out: PlannedSource | None
    """The store of ``data.val_path``."""
    held_out_samples: int | None
    """Samples of ``data.val_path``."""
    held_out_gaps: str
    """What its coordinate says about jumps."""
    rounds: int
    eval_every: int
    """Rounds between evaluations."""
    workers: int
    processes: int
    """That train: the workers, or one where replicas are trained in turn in this process."""
    traffic: Traffic
    """Bytes of a round."""
    commit: CommitBytes
    """Bytes of a committed round."""
    shared: bool | None
    """Whether workers see ``run.dir``, so that they write what they hold; None: this process does."""
    checksums: dict[str, bool]
    choices: dict[str, Choice]
    """By key that was "auto"."""
    climatology: ClimatePlan | None = None
    """Of what anomalies are differences from."""
    balance: Balance | None = None
    """The classes of ``data.balance``."""
    probe: Probe | None = None
    """What was measured of a step and a round."""
    bandwidth: float | None = None
    """Bytes a second of each worker's link, of a network to predict rounds for."""

    @property
    def in_turn(self) -> int:
        """Replicas that the busiest process trains in turn."""
        return math.ceil(self.data.replicas / self.processes)

    @property
    def steps_seconds(self) -> float:
        """Estimate of the local steps of a round."""
        return self.initial.seconds * max(self.steps) * self.in_turn

    @property
    def validation_samples(self) -> int:
        """Samples that an evaluation takes."""
        of_stores = sum(store.counts["val_samples"] for store in self.stores)
        return of_stores if self.held_out_samples is None else self.held_out_samples

    @property
    def evaluate_seconds(self) -> float:
        """Estimate of what evaluating adds to a round, on average."""
        return self.initial.evaluate_seconds * self.validation_samples / self.eval_every / self.processes

    @property
    def round_seconds(self) -> float:
        """Estimate of a round: steps, evaluation, and what a round costs beside them; reading goes on meanwhile."""
        beside = ROUND_SECONDS + BYTE_SECONDS * self.initial.params.nbytes
        return self.steps_seconds + self.evaluate_seconds + beside

    @property
    def worker_bytes(self) -> int:
        """Estimate of the memory of a worker at its peak: the process in a step, its data, the replicas' states."""
        return self.initial.process_bytes + self.resident_bytes + self.in_turn * self.initial.inner_bytes

    @property
    def costs(self) -> Costs | None:
        """What a step and a round cost, as measured or estimated; None if neither was asked for."""
        if self.probe is None and self.bandwidth is None:
            return None
        step = self.initial.seconds if self.probe is None else self.probe.step
        return Costs(
            step=step * self.in_turn,
            overhead=0.0 if self.probe is None else self.probe.overhead,
            traffic=self.traffic,
            bandwidth=self.bandwidth,
        )

    @property
    def limit(self) -> Limit | None:
        """The stage that limits rounds as they are configured; None without a probe."""
        if self.probe is None or self.costs is None:
            return None
        evaluated = self.validation_samples / self.eval_every / self.samples
        return limit_of(self.probe, self.costs, max(self.steps), evaluated)

    @property
    def reduced_bytes(self) -> int:
        """Bytes that all replicas send in a round, to be averaged."""
        return self.traffic.sent

    @property
    def resident_bytes(self) -> int:
        """Bytes that the data path of a worker needs at most."""
        sources = [store.source for store in self.stores]
        apart = [source.memory.total for source in sources if source.workers]
        beside = sum(source.memory.total for source in sources if not source.workers)
        return max([*apart, beside])


def plan_job(job: Job, *, full: bool = False, client: Client | None = None) -> RunPlan:
    """Resolve a job as `train` would, check its data, and try the model on one real batch.

    Parameters
    ----------
    job : Job
    full : bool
        Look for missing chunks in every shard, also of remote stores with very many.
    client : distributed.Client, optional
        Takes precedence over ``cluster.scheduler``.

    Raises
    ------
    DtrainError
        Whatever would stop the run at its start.
    """
    init, run_id = init_path(job), uuid.uuid4().hex[:8]
    opened = open_runner(job, run_id, client=client, most_units=ESTIMATE_UNITS, full=full, count=True, leave_out=False)
    with opened as (runner, resolved):
        initial = runner.initialise(None if init is None else read_init(init))
        workers, sources, held_out = runner.num_workers, runner.spec.sources, runner.spec.held_out
        shared = runner.sees(Path(job.base, job.config.run.dir).expanduser())
        climatology, processes = runner.spec.climate_plan, num_processes(runner)
    train, plan = job.config.train, resolved.plan
    sizes = [pass_size(size, train) for size in plan.sizes]
    steps = tuple(steps_a_round(size, train) for size in sizes)
    stores = tuple(  # the last of the gaps may be those of data.val_path
        StorePlan(
            source=source,
            counts=describe_plan(source.samples, source.plan),
            readers=choose_readers(source.samples, job.config.data.reader),
            gaps=gaps,
            weight=weight,
            given=given,
            leakage="" if source.workers else leakage_note(source.samples),
        )
        for source, gaps, given, weight in zip(sources, resolved.gaps, resolved.given, resolved.weights, strict=False)
    )
    return RunPlan(
        data=plan,
        stores=stores,
        initial=initial,
        steps=steps,
        samples=sum(samples_a_round(size, train) for size in sizes),
        held_out=held_out,
        held_out_samples=_held_out_samples(resolved.held_out),
        held_out_gaps=resolved.gaps[-1] if resolved.held_out is not None else "",
        rounds=train.rounds,
        workers=workers,
        processes=processes,
        traffic=_traffic(job, initial, plan.replicas, workers),
        commit=commit_bytes(initial.params.layout, initial.inner_bytes, job.config.average, plan.replicas),
        shared=shared,
        checksums=_checksums(sources[0].samples),
        choices=_choices(job, stores, resolved, workers),
        eval_every=resolved.eval_every,
        climatology=climatology,
        balance=resolved.balance,
    )


def _traffic(job: Job, initial: Initial, replicas: int, workers: int) -> Traffic:
    layout = initial.params.layout
    return traffic(
        layout,
        initial.inner_bytes,
        job.config.average,
        replicas=replicas,
        workers=workers,
        slices=len(reducer_slices(job.config, layout, min(replicas, workers), replicas)),
        small=SMALL_BYTES,
    )


def _checksums(samples: Samples) -> dict[str, bool]:
    """Return, by variable, True if a flipped bit of its chunks is detected: by a codec, or by the store."""
    return {v.name: v.checksums or bool(samples.store.checksum) for v in samples.variables}


def _held_out_samples(plan: DataPlan | None) -> int | None:
    return None if plan is None else sum(piece.num_samples for piece in eval_partitions(plan, "all"))


def _choices(job: Job, stores: tuple[StorePlan, ...], resolved: Resolved, workers: int) -> dict[str, Choice]:
    """Return the value of each key that is "auto"."""
    config, first, source = job.config, stores[0], stores[0].source
    cached, units = source.memory.train.limits.cached, first.counts["partition_units"]
    gpu = "every worker has a GPU" if resolved.device == "cuda" else "no GPU on the workers"
    replicas = f"the smaller of {workers} workers and the units of the store"
    order = ("sequential", "samples have windows") if source.plan.sequential else ("random", "samples have no windows")
    chosen = {
        "data.sample_dim": Choice(source.samples.sample_dim, "the first dimension that all variables share"),
        "data.split_order": Choice(*order),
        "data.missing": _missing_choice(first.source.samples),
        "data.reader": _reader_choice(first),
        "data.memory": Choice(format_bytes(source.memory.limit), source.memory.what),
        "data.cache": Choice(
            format_bytes(source.memory.cached_bytes),
            f"what is left: {cached:,} of the {units:,} units of a replica",
        ),
        "train.eval_every": Choice(resolved.eval_every, "evaluations take at most about a tenth of the time of steps"),
        "train.device": Choice(resolved.device, gpu),
        "average.replicas": Choice(
            sum(store.source.plan.replicas for store in stores),
            "the sum of the stores'" if config.data.is_federated else replicas,
        ),
        "cluster.workers": Choice(workers, _cores(config.cluster.threads)),
        "run.commit_every": Choice("as measured", "on evaluated rounds; commits take about 2 % of the time"),
    }
    if first.given.held and source.plan.val + source.plan.test == 0:  # nothing is drawn
        del chosen["data.split_order"]
    if config.cluster.scheduler != "local":
        del chosen["cluster.workers"]
    return {key: choice for key, choice in chosen.items() if value_of(config, key) == "auto"}


def _missing_choice(samples: Samples) -> Choice:
    """Return what a chunk that is not stored stands for, by variable, and what it decodes to."""
    judged = {"nan": "as data.non_finite says"}
    absences = [(v, absence_of(samples, v)) for v in samples.stored]
    values = ", ".join(f"{v.name} {judged.get(absence, absence)}" for v, absence in absences)
    return Choice(
        values, "by what a missing chunk decodes to: " + ", ".join(f"{v.name} {stands_for(v)}" for v, _ in absences)
    )


def _cores(threads: int) -> str:
    return "a core each" if threads == 1 else f"a core for each of the {threads} threads of a task"


def _reader_choice(store: StorePlan) -> Choice:
    """Return the readers of a store's variables, with the variables of each where they differ."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, choice in store.readers.items():
        reasons.setdefault(choice, []).append(name)
    names = ", ".join(dict.fromkeys(reader for reader, _ in reasons))
    if len(reasons) == 1:
        return Choice(names, next(iter(reasons))[1])
    return Choice(
        names, "; ".join(f"{reader} for {', '.join(of)}, since {why}" for (reader, why), of in reasons.items())
    )
