"""From a draft to a configuration that `dtrain plan` accepts: dtrain's own planner checks what is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dtrain.config.split import SplitConfig
from dtrain.data.plan.partition import plan_data
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Samples
from dtrain.data.source import open_samples
from dtrain.errors import TooFewSamples, listed
from dtrain_cli.survey.draft import Draft
from dtrain_cli.survey.gaps import Gaps, gaps_of
from dtrain_cli.survey.roles import Contents
from dtrain_cli.survey.tables import NONE, Keys, data_keys, model_args, model_file, train_keys
from dtrain_cli.survey.values import Look, Values

REPLICAS = 2
SHARES = ((0.1, 0.1), (0.2, 0.2), (0.3, 0.0), (0.0, 0.0))
"""Of validation and test; the first that leaves samples in each is taken."""
LARGER = {
    "tabular_model.py": ("hidden", 256),
    "cells_model.py": ("hidden", 512),
    "grid_model.py": ("width", 64),
    "text_model.py": ("width", 192),
}
"""By model: an argument that makes it larger, and a value."""
MOST_VALIDATED = 20_000
"""Less is held out for validation where a tenth would be more samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A configuration with its comments, and the file of its model."""

    draft: Draft
    model: str
    """Name of the file in ``templates/``."""
    tables: Mapping[str, Mapping[str, Any]]
    """The configuration by table and key."""
    why: Mapping[str, str]
    """By key: the comment."""
    off: Mapping[str, tuple[Any, str]]
    """By key: a value that is written as a comment, and when it is needed."""
    left_out: str
    """Arrays that can be neither inputs nor targets, and why."""
    filled: str
    """Which chunks are read as the fill value."""
    lost: str
    """Which chunks are missing; `dtrain plan` refuses the store."""


def settle(draft: Draft, contents: Contents, look: Look) -> Settings:
    """Return the configuration of a draft.

    Raises
    ------
    DtrainError
        The store cannot be trained on with any split.
    """
    values = {name: look(name) for name in dict.fromkeys((*draft.inputs, draft.target))}
    data = data_keys(draft, contents, values)
    samples = _opened(data)
    has_nan = _with_nan(values)
    gaps = gaps_of(samples, has_nan)
    if draft.classes and samples.variable(draft.target).model_dtype == np.int64:
        has_nan = [name for name in has_nan if name != draft.target]  # marked classes stay integers
    data = data | _missing(draft, has_nan, gaps)
    samples, plan, split = _split(data, draft)
    data = data | split
    train = train_keys(draft, samples, plan, skips_target=not draft.classes and draft.target in has_nan)
    return Settings(
        draft=draft,
        model=model_file(draft),
        tables={
            "model_args": model_args(draft, samples),
            "data": data.values,
            "train": train.values,
            "average": {"replicas": plan.replicas},
        },
        why={**draft.notes, **data.why, **train.why},
        off=_offered(draft, data, gaps, can_miss=any(contents.arrays[name].kind == "f" for name in values)),
        left_out=listed([f"{name} ({reason})" for name, reason in contents.left_out.items()]),
        filled=gaps.filled,
        lost=gaps.lost,
    )


def _with_nan(values: Mapping[str, Values]) -> list[str]:
    return [name for name, seen in values.items() if seen.missing or seen.infinite]


# Missing chunks and values ----------------------------------------------------------------------------------


def _missing(draft: Draft, has_nan: list[str], gaps: Gaps) -> Keys:
    """Return the keys for chunks that are left out and for values that are missing."""
    keys = NONE.also("data.missing", gaps.missing, gaps.filled) if gaps.missing else NONE
    if not has_nan:
        return keys
    inputs = [name for name in has_nan if name in draft.inputs]
    texts = [f"in {listed(inputs)}, model.py reads them as 0, the mean"] if inputs else []
    texts += [f"of {draft.target}, the loss leaves them out"] if draft.target in has_nan else []
    return keys.also("data.non_finite", "allow", f"values are missing: {'; '.join(texts)}")


def _offered(draft: Draft, data: Keys, gaps: Gaps, *, can_miss: bool) -> dict[str, tuple[Any, str]]:
    """Return keys that are written as comments, for what the sample did not show, each with its value and why."""
    key, value = LARGER[model_file(draft)]
    off: dict[str, tuple[Any, str]] = {f"model_args.{key}": (value, "a larger model learns more, and takes longer")}
    if gaps.lost:
        why = "if they are lost, skip leaves their samples out; if they hold only the fill value, write fill"
        off["data.missing"] = ("skip", f"{gaps.lost}: dtrain refuses that; {why}")
    if can_miss and "non_finite" not in data.values:
        off["data.non_finite"] = ("allow", "if values are missing: model.py reads them as 0, the mean")
        if not draft.classes:
            off["train.loss"] = ("model:mse", "if values of the target are missing: this loss leaves them out")
    return off | dict(draft.off)


# Samples, and their split -----------------------------------------------------------------------------------


def _opened(data: Keys) -> Samples:
    return open_samples(**{key: value for key, value in data.values.items() if key != "transform"})


def _split(data: Keys, draft: Draft) -> tuple[Samples, DataPlan, Keys]:
    """Return samples and plan of the first split that holds samples, and the split where it is not the default.

    Raises
    ------
    TooFewSamples
        There is none.
    """
    opened = _opened(data)
    shares = _shares(opened)
    fault: TooFewSamples | None = None
    for replicas in (REPLICAS, 1):
        for val, test in shares:
            why = "many samples" if (val, test) not in SHARES else "few samples"
            table = {**draft.split, "val": val, "test": test}
            split = NONE.also("data.split", table, draft.notes.get("data.split", why))
            config = opened.config.model_copy(update={"split": SplitConfig(**table)})
            samples = replace(opened, config=config)
            try:
                plan = plan_data(samples, replicas=replicas, seed=0)
            except TooFewSamples as error:
                fault = fault or error
            else:
                return samples, plan, NONE if (val, test) == SHARES[0] and not draft.split else split
    assert fault is not None
    raise fault


def _shares(samples: Samples) -> Iterable[tuple[float, float]]:
    """Return shares of validation and test to try; of very many samples fewer are validated after each round."""
    total = (samples.num_samples - samples.first_row) * len(samples.tiles) // samples.config.stride
    if total * SHARES[0][0] <= MOST_VALIDATED:
        return SHARES
    val = max(0.005, float(f"{MOST_VALIDATED / total:.1g}"))
    return ((val, 0.1), *SHARES)
