"""All that decides bits, and plan.json, which keeps it: written at a run's first start, and read back since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from dtrain.config.compare import without_secrets
from dtrain.config.values import flat_values
from dtrain.data.balance import Balance
from dtrain.data.categories import categories_from, categories_table
from dtrain.data.climatology import Climatology
from dtrain.data.encoding import Scaling
from dtrain.data.given import Found
from dtrain.data.load.finite import LeftOut
from dtrain.data.plan.partition import JointPlan
from dtrain.data.plan.table import plan_from, plan_table
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import MissingLabels
from dtrain.data.variable import Categories
from dtrain.job import Job

T = TypeVar("T")
VERSION = 3
"""Of plan.json. A key that is added later is optional, with the behaviour of before as its default; a change that an
older dtrain would misread raises the version."""


@dataclass(frozen=True, slots=True)
class Filled:
    """Chunks of a variable that are not stored, and the value that stands for each of theirs."""

    chunks: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """All that decides bits."""

    plan: JointPlan
    held_out: DataPlan | None
    """Of the store of ``data.val_path``."""
    scalings: Mapping[str, Scaling]
    """By variable of ``data.normalize``."""
    device: str
    contents: tuple[Mapping[str, str], ...]
    """By store and variable: a digest of the sizes of its stored objects."""
    code: Mapping[str, str]
    """By config key: the identity of a function of the user's."""
    code_rules: int
    """What the identities cover (`dtrain.runtime.codetext.CODE_RULES`)."""
    gaps: tuple[str, ...] = ()
    """By store: what `plan` says about jumps of its coordinate; only at the first start."""
    weights: tuple[str, ...] = ()
    """By store of ``data.path``: what `plan` says about the values of ``data.weight``; only at the first start."""
    given: tuple[Found, ...] = ()
    """By store of ``data.path``: its splits that are given by coordinate or by group; only at the first start."""
    left_out: tuple[LeftOut, ...] = ()
    """By store of which some are: the samples that ``data.non_finite`` leaves out; only at the first start."""
    balance: Balance | None = None
    """The classes of ``data.balance``; only at the first start."""
    eval_every: int = 1
    """Rounds between evaluations."""
    labels: MissingLabels = "nan"
    """What a value stands for that marks a missing label."""
    filled: tuple[Mapping[str, Filled], ...] | None = ()
    """By store and variable: the missing chunks that ``data.missing = "auto"`` fills; None: they are not compared."""
    init: str = ""
    """SHA-256 of the file of ``train.init``; empty without it."""
    categories: Mapping[str, Categories] = field(default_factory=dict)
    """By categorical: what its codes stand for."""
    genes: Mapping[str, str] = field(default_factory=dict)
    """By matrix of AnnData: a digest of the names of its genes (`dtrain.data.genes`)."""
    climatology: Climatology | None = None
    """What anomalies of ``train.metrics`` are differences from; a file beside plan.json keeps it."""
    climatology_sha256: str = ""
    """Of that file; empty in runs that are trained without it."""
    snapshots: tuple[str, ...] = ()
    """By store of `Job.all_sources`: the snapshot of a repository; empty for other stores."""


# plan.json ------------------------------------------------------------------------------------------------


def to_json(job: Job, resolved: Resolved) -> dict[str, Any]:
    """Return the content of plan.json, without its digest.

    ``config`` has the configuration of the first start: a config.toml that says something else has been modified.
    """
    plans = [plan_table(plan) for plan in resolved.plan.plans]
    return {
        "version": VERSION,
        "data": plans[0] if len(plans) == 1 else plans,
        "held_out": None if resolved.held_out is None else plan_table(resolved.held_out),
        "fingerprint": resolved.plan.fingerprint,
        "threads": job.config.cluster.threads,
        "device": resolved.device,
        "normalize": {name: asdict(scaling) for name, scaling in resolved.scalings.items()},
        "contents": [dict(content) for content in resolved.contents],
        "labels": resolved.labels,
        "eval_every": resolved.eval_every,
        "filled": [{name: asdict(one) for name, one in store.items()} for store in resolved.filled or ()],
        "init": resolved.init,
        "categories": categories_table(resolved.categories),
        "genes": dict(resolved.genes),
        "climatology": resolved.climatology_sha256,
        "snapshots": list(resolved.snapshots),
        "torch": torch.__version__,
        "code": dict(resolved.code),
        "code_rules": resolved.code_rules,
        "config": dict(flat_values(without_secrets(job.config))),
    }


def from_json(values: Mapping[str, Any]) -> Resolved:
    """Return what `to_json` has written."""
    data, held_out = values["data"], values["held_out"]
    plans = tuple(plan_from(plan) for plan in (data if isinstance(data, list) else [data]))
    return Resolved(
        plan=JointPlan(plans),
        held_out=None if held_out is None else plan_from(held_out),
        scalings={name: _scaling_from(scaling) for name, scaling in values["normalize"].items()},
        device=_typed(values, "device", str),
        contents=tuple(values["contents"]),
        labels=values["labels"],
        eval_every=max(1, _typed(values, "eval_every", int)),
        filled=tuple({name: Filled(**one) for name, one in store.items()} for store in values["filled"]),
        init=_typed(values, "init", str),
        categories=categories_from(values["categories"]),
        genes=_typed(values, "genes", dict),
        climatology_sha256=_typed(values, "climatology", str),
        snapshots=tuple(values["snapshots"]),
        code=_typed(values, "code", dict),
        code_rules=_typed(values, "code_rules", int),
    )


def _typed(values: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = values[name]
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r:.40}")
    return value


def _scaling_from(values: Mapping[str, Any]) -> Scaling:
    return Scaling(*(tuple(values[name]) for name in ("mean", "std", "axes", "rest")))
