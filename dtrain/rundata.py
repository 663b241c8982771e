"""The data of a run, or others with the run's settings, as an evaluation and a prediction take them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, get_args

from dtrain.algorithm.recipe import Functions
from dtrain.config.files import with_setting
from dtrain.config.functions import METRICS, Function
from dtrain.config.schema import DataConfig, TrainConfig
from dtrain.data.coordinate import find_gaps
from dtrain.data.given import find_given
from dtrain.data.plan.evaluation import StoreOfRun, plan_evaluation
from dtrain.data.plan.labels import BY_SHARE, GivenSplits
from dtrain.data.plan.partition import JointPlan
from dtrain.data.plan.splits import SplitName
from dtrain.data.plan.units import DataPlan
from dtrain.data.read.inventory import short_digest, take_inventory
from dtrain.data.read.joined import values_counted
from dtrain.data.samples import Samples, not_samples
from dtrain.description import read_config_of
from dtrain.errors import InvalidConfig, TooFewSamples, did_you_mean
from dtrain.job import Job, absolute, as_trained, held_out_source, open_sources, source_of
from dtrain.resolve import changed_contents, own_stores
from dtrain.resolved import Resolved
from dtrain.runtime.spec import Source
from dtrain.urls import has_secret

LoadFunctions: TypeAlias = Callable[[Sequence[str], Functions | None], Functions]
EVALUATED = ("model", "train.loss", METRICS, "data.transform")
"""Keys of the functions that an evaluation calls."""
NOT_EVALUATED = {"optimizer": "sgd", "schedule": "constant"}
"""Keys of ``[train]`` that play no part in an evaluation: their functions need not be there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a run knows of its data.

    Attributes
    ----------
    directory : Path
        Of the run.
    config : TrainConfig
        Of the run, as it was opened.
    base : Path
        What relative paths are relative to.
    resolved : Resolved
        Of the run's first start.
    load_functions : callable
        ``(keys, given) -> functions``: the user's functions of some keys, as the run was trained with them.
    """

    directory: Path
    config: TrainConfig
    base: Path
    resolved: Resolved
    load_functions: LoadFunctions

    def own(self, split: SplitName, keys: Sequence[str] | None = None) -> tuple[Job, Resolved, SplitName]:
        """Return what evaluates a split of the run's own data; `keys` are those of the functions that are needed."""
        data, base = self.config.data, self.base
        job = self._job(open_sources(data, base), held_out_source(data, base), keys=keys)
        known = self.resolved
        if data.non_finite != self._recorded.non_finite:
            known = _uncounted(known)
        # data that were modified since the start may be evaluated: their contents are not compared
        return job, replace(known, contents=(), filled=None), split

    @property
    def _recorded(self) -> DataConfig:
        """The table ``[data]`` that the run was trained with, without the settings of an evaluation."""
        return read_config_of(self.directory).data

    def given(self, samples: Samples, split: SplitName) -> tuple[Job, Resolved, SplitName]:
        """Return what evaluates a split of given samples."""
        if not isinstance(samples, Samples):
            raise not_samples(samples)
        known, own = self.resolved, own_stores(self.config.data, self.base)
        store, given = self.find_store(samples), samples.config
        is_given = store != "held_out" and "split" in given.model_fields_set
        if is_given and split != "all" and not given.split.holds_out(split):
            raise TooFewSamples(
                f'The split "{split}" holds no samples: they were opened with data.split.{split} = 0.',
                "Leave split out of open_samples: the run's is used. Or evaluate all of them (split all).",
            )
        samples = as_trained(samples, self.config.data, own=store is not None)
        plans, jumps = known.plan.plans, find_gaps(samples).jumps
        splits = BY_SHARE if split == "all" or store == "held_out" else _given_splits(samples, plans, store)
        plan, cut = plan_evaluation(samples, split, plans, known.held_out, store, jumps=jumps, given=splits)
        if store is None or not own.holds(samples) or samples.config.non_finite != self._recorded.non_finite:
            plan = replace(plan, multiplicity="")  # a copy may hold other values
        joint = JointPlan((values_counted(samples, plan),))
        known = replace(known, plan=joint, held_out=None, contents=(), filled=None, snapshots=())
        return self._job((source_of(samples),), None, samples.transform), known, cut

    def find_store(self, samples: Samples) -> StoreOfRun:
        """Return which of the run's stores the samples' is; behind a URL with a query other data may lie."""
        own = own_stores(self.config.data, self.base)
        store = own.find(samples)
        number, contents = store if isinstance(store, int) else len(own.trained), self.resolved.contents
        if store is None or not contents or not any(has_secret(one.path) for one in samples.stores):
            return store
        now = take_inventory(samples, full=False, digests=True, presence=False).digests
        if store == "part":
            known = {digest for one in contents for digest in one.values()}
            return store if known & {*now.values(), short_digest(now)} else None
        return None if number < len(contents) and changed_contents(contents[number], now) else store

    def _job(
        self,
        sources: tuple[Source, ...],
        held_out: Source | None,
        transform: Function | None = None,
        keys: Sequence[str] | None = None,
    ) -> Job:
        """Return what evaluates sources; of the user's functions only those that an evaluation calls are needed."""
        own = {} if transform is None else {"data.transform": transform}
        functions = self.load_functions(EVALUATED if keys is None else keys, own)
        tables = {
            "train": self.config.train.model_copy(update=NOT_EVALUATED),
            "average": self.config.average.model_copy(update={"outer": None}),
        }
        config = self.config.model_copy(update=tables).with_functions({})
        return Job(config=config, sources=sources, held_out=held_out, functions=functions, base=self.base)


def data_table(
    config: TrainConfig, base: Path, data: str | tuple[str, ...] | None, settings: tuple[str, ...] = ()
) -> DataConfig:
    """Return the run's table ``[data]`` with another path, and with keys that differ from the run's.

    Paths that are relative to the working directory, and the run's own, become absolute.
    """
    own = config.data
    if data is not None:
        own = own.model_copy(update={"path": absolute(data)})
    elif not own.is_federated:
        own = own.model_copy(update={"path": absolute(own.stores[0].path, base)})
    tables: dict[str, Any] = {"data": own.model_dump(mode="json")}
    for setting in settings:
        tables = with_setting(tables, setting)
    return TrainConfig(**tables).data


def _uncounted(resolved: Resolved) -> Resolved:
    """Return what is resolved, with plans of which all samples count until they are counted anew."""
    plans = tuple(replace(plan, multiplicity="") for plan in resolved.plan.plans)
    held_out = resolved.held_out and replace(resolved.held_out, multiplicity="")
    return replace(resolved, plan=JointPlan(plans), held_out=held_out)


def _given_splits(samples: Samples, plans: tuple[DataPlan, ...], store: StoreOfRun) -> GivenSplits:
    """Return the splits that ``data.split`` gives in samples; of groups, where they may be a copy of the run's."""
    like = next((plan for plan in plans if plan.num_samples == samples.num_samples), None)
    if samples.config.split.by and (store is not None or like is None):
        return BY_SHARE
    return find_given(samples, plans[0].seed, like.absent if like is not None else ()).splits


def check_split(split: str) -> None:
    """Refuse a split that is not evaluated."""
    allowed = [name for name in get_args(SplitName) if name != "train"]
    if split == "train":
        raise InvalidConfig(
            'split = "train": the training split is not evaluated.', "The loss of each round is history.train_loss."
        )
    if split not in allowed:
        raise InvalidConfig(
            f"split = {json.dumps(split, default=repr)}: allowed are {', '.join(allowed)}"
            f"{did_you_mean(str(split), allowed)}"
        )
