"""Resolve what decides bits: once, at a run's first start; later it is read back (`dtrain.resolved`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import TypeAlias

from dtrain.algorithm.mix import neighbourhoods
from dtrain.algorithm.plan import eval_cadence, pass_size, samples_a_round
from dtrain.algorithm.reduce import check_reduce
from dtrain.config.names import LABEL_LOSSES, LOSSES, METRICS
from dtrain.config.schema import DataConfig, Paths, TrainTable
from dtrain.data.categories import categories_of, check_categories
from dtrain.data.coordinate import Gaps, find_gaps
from dtrain.data.genes import check_genes, gene_digests, genes_of
from dtrain.data.given import SHARES, Found, find_ranges, found_groups, split_shares
from dtrain.data.groups import count_groups, deal_groups
from dtrain.data.paths import identity
from dtrain.data.plan.anchors import count_samples
from dtrain.data.plan.evaluation import StoreOfRun
from dtrain.data.plan.labels import GivenSplits
from dtrain.data.plan.missing import AbsentChunks, absence_of
from dtrain.data.plan.partition import JointPlan, count_units, plan_data, plan_held_out
from dtrain.data.plan.splits import Runs
from dtrain.data.plan.units import DataPlan
from dtrain.data.read.inventory import rows_absent
from dtrain.data.read.joined import values_counted
from dtrain.data.samples import Coordinate, MissingLabels, Samples
from dtrain.data.source import describe
from dtrain.data.weight import weight_text
from dtrain.errors import ClusterUnsuitable, DataChanged, InvalidConfig, LengthsDiffer
from dtrain.job import Job
from dtrain.resolved import Filled, Resolved
from dtrain.runtime.codetext import CODE_RULES
from dtrain.runtime.place import Place
from dtrain.runtime.spec import Source
from dtrain.urls import redacted_url


def described(job: Job, place: Place, snapshots: Sequence[str] = ()) -> Job:
    """Describe the stores that only their own workers can read, repositories at the given snapshots."""
    pairs = zip(job.sources, chain(snapshots, repeat("")), strict=False)
    return replace(job, sources=tuple(_described(source, snapshot, job, place) for source, snapshot in pairs))


def _described(source: Source, snapshot: str, job: Job, place: Place) -> Source:
    if source.samples is not None:
        return source
    return replace(source, samples=place.call(source, partial(describe, source.config, job.base, snapshot)))


def pinned(job: Job, snapshots: Sequence[str]) -> Job:
    """Return the job with its repositories at the given snapshots: a run goes on with those that it began with."""
    pairs = zip(job.all_sources, chain(snapshots, repeat("")), strict=False)
    now = tuple(_pinned(source, snapshot) for source, snapshot in pairs)
    return replace(job, sources=now[: len(job.sources)], held_out=job.held_out and now[-1])


def _pinned(source: Source, snapshot: str) -> Source:
    samples = source.samples
    if samples is None or not snapshot or samples.store.snapshot == snapshot:
        return source
    config = samples.config.model_copy(update={"path": samples.location})
    return replace(source, samples=describe(config, Path.cwd(), snapshot))


def resolve(job: Job, place: Place) -> Resolved:
    """Resolve a first start, but for the stores' contents.

    ``replicas = "auto"`` and ``device = "auto"`` look at the workers, nothing else does.

    Raises
    ------
    InvalidConfig, LengthsDiffer, ClusterUnsuitable, TooFewSamples, ChunkMissing
        The stores do not fit together or with the configuration, or the device is not there.
    """
    _check_alike(job)
    _check_means(job)
    genes = _genes(job, place)
    categories = categories_of(job.samples)
    for source in job.all_sources:
        check_categories(source.described, categories)
    gaps = tuple(_gaps(source, place) for source in job.all_sources)
    absent = tuple(absent_rows_of(source, place) for source in job.sources)
    given = _given(job, place, absent)
    plans = tuple(
        _plan(source, job, place, absent=rows, jumps=found.jumps, given=splits.splits)
        for source, rows, found, splits in zip(job.sources, absent, gaps, given, strict=False)
    )
    held_out = _held_out(job, gaps[-1].jumps, place, plans[0])
    device, plan = _device(job, place), JointPlan(plans)
    check_reduce(job.config.average, plan.replicas)
    neighbourhoods(job.config.average.mix, 1, plan.replicas)  # refuses groups that do not fit
    return Resolved(
        plan=plan,
        held_out=held_out,
        scalings={},
        device=device,
        contents=(),
        code=job.code,
        code_rules=CODE_RULES,
        gaps=tuple(found.text for found in gaps),
        weights=tuple(place.call(source, partial(weight_text, source.described)) for source in job.sources),
        given=given,
        labels=missing_labels(job.config.train),
        eval_every=eval_every(job, plan, held_out),
        categories=categories,
        genes=genes,
        snapshots=tuple(source.described.store.snapshot for source in job.all_sources),
    )


def eval_every(job: Job, plan: JointPlan, held_out: DataPlan | None) -> int:
    """Return the rounds between evaluations."""
    train = job.config.train
    own = sum(count_samples(one, "val").samples for one in plan.plans) if held_out is None else 0
    validation = own if held_out is None else count_samples(held_out, "all").samples
    return eval_cadence(validation, sum(samples_a_round(pass_size(n, train), train) for n in plan.sizes), train)


def missing_labels(train: TrainTable) -> MissingLabels:
    """Return what a value stands for that marks a missing label: it must not be trained on as a number.

    To a loss of the user's, -100 may be a class to leave out or a number, as the other values are.
    """
    numbers = any(name in METRICS and not METRICS[name].of_labels for name in train.metrics)
    if numbers or (train.loss in LOSSES and train.loss not in LABEL_LOSSES):
        return "nan"
    return "ignored" if train.loss in LABEL_LOSSES else "refused"


def labelled(job: Job, missing: MissingLabels) -> Job:
    """Return the job with another meaning of the values that mark missing labels."""
    sources = tuple(replace(source, samples=source.described.labelled(missing)) for source in job.sources)
    held_out = job.held_out and replace(job.held_out, samples=job.held_out.described.labelled(missing))
    return replace(job, sources=sources, held_out=held_out)


def filled(source: Source, absent: Mapping[str, AbsentChunks]) -> dict[str, Filled]:
    """Return, by variable of a store, the missing chunks that ``data.missing = "auto"`` fills."""
    samples = source.described
    if samples.config.missing != "auto":
        return {}
    counted = ((samples.variable(name), count) for name, count in absent.items())
    return {v.name: Filled(count.chunks, v.absent_value) for v, count in counted if absence_of(samples, v) == "fill"}


def check_filled(source: Source, now: Mapping[str, Filled], before: Mapping[str, Filled]) -> None:
    """Refuse a store of which other chunks are filled than when the run was started."""
    changed = [name for name in {**before, **now} if now.get(name) != before.get(name)]
    if changed:
        said = [f"{one.chunks:,}" if (one := some.get(changed[0])) else "none" for some in (now, before)]
        raise DataChanged(
            f"{source.described.path}: of the chunks of {changed[0]}, {said[0]} are missing and filled; {said[1]} were "
            "when the run was started.",
            "Restore the data, or train under another --run NAME.",
        )


def absent_rows_of(source: Source, place: Place) -> Runs:
    """Return the rows of a store that ``data.missing = "skip"`` leaves out."""
    samples = source.described
    return place.call(source, partial(rows_absent, samples)) if samples.config.missing == "skip" else ()


def _gaps(source: Source, place: Place) -> Gaps:
    """Find the jumps of a store, where it can be seen."""
    samples = source.described
    is_read = isinstance(samples.coordinate, Coordinate)
    return place.call(source, partial(find_gaps, samples)) if is_read else find_gaps(samples)


def _held_out(job: Job, jumps: str, place: Place, like: DataPlan) -> DataPlan | None:
    if job.held_out is None:
        return None
    samples = job.held_out.described
    plan = plan_held_out(samples, like, absent=absent_rows_of(job.held_out, place), jumps=jumps)
    return _counted(job.held_out, plan, place)


def _given(job: Job, place: Place, absent: tuple[Runs, ...]) -> tuple[Found, ...]:
    """Find the splits that are given by coordinate or by group; groups of one value in several stores are one."""
    samples, pairs = job.samples, list(zip(job.sources, absent, strict=True))
    if not samples.config.split.by:
        return tuple(
            place.call(source, partial(find_ranges, source.described)) if samples.config.split.ranges else SHARES
            for source in job.sources
        )
    groups = [place.call(source, partial(count_groups, source.described, rows)) for source, rows in pairs]
    dealt = deal_groups(groups, split_shares(samples), job.config.train.seed)
    return tuple(
        place.call(source, partial(found_groups, source.described, dealt, own))
        for source, own in zip(job.sources, groups, strict=True)
    )


def _plan(source: Source, job: Job, place: Place, *, absent: Runs, jumps: str, given: GivenSplits) -> DataPlan:
    wanted, samples = job.config.average.replicas, source.described
    if source.replicas is not None:
        replicas = source.replicas
    else:
        replicas = min(place.num_workers, count_units(samples)) if wanted == "auto" else wanted
    seed = job.config.train.seed
    plan = plan_data(samples, replicas=replicas, seed=seed, absent=absent, jumps=jumps, given=given)
    return _counted(source, plan, place)


def _counted(source: Source, plan: DataPlan, place: Place) -> DataPlan:
    """Count the values of sparse variables, where the store can be seen."""
    samples = source.described
    return place.call(source, partial(values_counted, samples, plan)) if samples.sparse else plan


def _device(job: Job, place: Place) -> str:
    if job.config.train.device == "auto":
        return place.device
    if job.config.train.device == "cuda" and place.device != "cuda":
        raise ClusterUnsuitable(
            'train.device = "cuda", but not every worker has a GPU that torch can use.', 'Set train.device = "cpu".'
        )
    return job.config.train.device


def _check_alike(job: Job) -> None:
    """Refuse stores that ask for another number of replicas than the run, or whose samples differ in kind."""
    if job.sources[0].replicas is None:
        return
    wanted, total = job.config.average.replicas, sum(source.replicas or 1 for source in job.sources)
    if wanted not in ("auto", total):
        raise InvalidConfig(
            f"average.replicas = {wanted}, but the stores of data.path have {total} together.",
            "Leave average.replicas out.",
        )
    first = job.samples
    for source in job.sources[1:]:
        other = source.described
        for a, b in zip(first.variables, other.variables, strict=True):
            if (a.row_shape, a.model_dtype) != (b.row_shape, b.model_dtype):
                raise LengthsDiffer(
                    f"{other.path}: a row of {b.name} is {b.model_dtype}{list(b.row_shape)}; "
                    f"in {first.path} it is {a.model_dtype}{list(a.row_shape)}.",
                    "All stores of data.path must hold the same kind of samples.",
                )


def _check_means(job: Job) -> None:
    """Refuse stores whose dimensions with means of their own are other axes than in the first store."""
    first = job.samples
    for source in job.all_sources[1:]:
        other = source.described
        for a, b in zip(first.variables, other.variables, strict=True):
            if a.mean_axes != b.mean_axes:
                raise LengthsDiffer(
                    f"{other.path}: {b.name} has the dimensions {', '.join(b.dims)}; in {first.path} they are "
                    f"{', '.join(a.dims)}. data.normalize has means along them.",
                    "Store the dimensions in the same order.",
                )


def _genes(job: Job, place: Place) -> dict[str, str]:
    """Return the digests of the genes; refuse stores whose columns are other genes than those of the first store."""
    first, *others = (place.call(source, partial(genes_of, source.described)) for source in job.all_sources)
    for source, genes in zip(job.all_sources[1:], others, strict=True):
        check_genes(source.described.path, genes, job.samples.path, first)
    return gene_digests(first)


def check_rows(samples: Samples, plan: DataPlan) -> None:
    """Refuse several stores of which one is longer or shorter than when a plan was made, by name."""
    if len(samples.members) != len(plan.members):
        before = max(1, len(plan.members))
        raise DataChanged(
            f"data.path chooses rows of {len(samples.stores):,} stores; of {before:,} when the run was started.",
            "Restore the data, or train under another --run NAME.",
        )
    for one, (_, first, stop) in zip(samples.members, plan.members, strict=True):
        if (rows := one.num_samples - one.first_row) != stop - first:
            raise DataChanged(
                f"{one.path} has {rows:,} rows; {stop - first:,} when the run was started.",
                "Restore the data, or train under another --run NAME.",
            )


def changed_contents(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the variables, or the numbers of stores, whose contents have another digest; unknown ones are alike."""
    return [name for name, digest in before.items() if now.get(name, digest) != digest]


def check_kind(samples: Samples, plan: DataPlan) -> None:
    """Refuse data of other metadata than a plan was made for."""
    check_rows(samples, plan)
    if samples.fingerprint != plan.source:
        raise DataChanged(
            f"{samples.path} has other shapes, dtypes or chunks than when the run was started.",
            "Train under another --run NAME; to evaluate other data, name them with --data.",
        )


# The stores of a run ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OwnStores:
    """The stores of a run; several that are one have several names each."""

    trained: tuple[Names, ...]
    """Of ``data.path``."""
    held_out: Names
    """Of ``data.val_path``."""

    def find(self, samples: Samples) -> StoreOfRun:
        """Return which of them the samples' store is, or that some of them is a part of it."""
        own = _names(samples.location, samples.config.group, Path.cwd())
        if own in self.trained:
            return self.trained.index(own)
        if any(set(own) & set(names) for names in self.trained):
            return "part"
        return "held_out" if set(own) <= set(self.held_out) else None

    def holds(self, samples: Samples) -> bool:
        """Return True if the samples' stores are one of them: all of its stores, in order."""
        return _names(samples.location, samples.config.group, Path.cwd()) in (*self.trained, self.held_out)


Names: TypeAlias = tuple[tuple[str, str], ...]
"""Of a store, or of each of several that are one: `identity` and group. Of a URL it has what a run keeps: a renewed
signature makes no other store."""


def own_stores(config: DataConfig, base: Path) -> OwnStores:
    """Return the stores that a ``[data]`` table names; relative paths are relative to `base`."""
    return OwnStores(
        tuple(_names(store.path, config.group, base) for store in config.stores),
        _names(config.val_path, config.group, base) if config.val_path else (),
    )


def _names(paths: Paths, group: str, base: Path) -> Names:
    kept = map(redacted_url, [paths] if isinstance(paths, str) else paths)
    return tuple((identity(path, base), group.strip("/")) for path in kept)
