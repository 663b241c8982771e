"""What an evaluation is broken down by (``dtrain eval --by``), and the label of each row and place.

lead            the steps of the target's window
variable        the targets, each alone
NAME            a dimension of the target: each place; or a coordinate of one dimension: each of its values, such as the
                donor of a cell, its category by name, or the region of a latitude
NAME.month      a part of a date (`PARTS`); of the sample dimension and its coordinates, it is that of the target's row
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

from dtrain.data.cf import missing_times
from dtrain.data.distinct import dates_along, joined, read_distinct, target_fields
from dtrain.data.encoding import Array
from dtrain.data.plan.hashing import Ints
from dtrain.data.read.inventory import of_each
from dtrain.data.samples import Samples
from dtrain.errors import InvalidConfig

MOST_GROUPS = 10_000
Kind: TypeAlias = Literal["lead", "variable", "place", "row"]
LEAD, VARIABLE = "lead", "variable"
Each: TypeAlias = Callable[[Callable[[Samples], Any]], Sequence[Any]]
"""Calls a function with the samples of each store, where the store can be seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """One of the things that an evaluation is broken down by."""

    name: str
    kind: Kind
    values: Array
    """By label: what it stands for."""
    dim: str = ""
    """The dimension of a ``place``."""
    labels: tuple[Ints, ...] = ()
    """Of a ``place``: the label of each place of the selected part of the dimension. Of a ``row``, by store: the label
    of each row. -1: it has none."""

    @property
    def count(self) -> int:
        """Number of labels."""
        return len(self.values)


# Groupings --------------------------------------------------------------------------------------------------


def find_groupings(samples: Samples, names: Sequence[str], each: Each) -> tuple[Grouping, ...]:
    """Find what an evaluation is broken down by.

    Parameters
    ----------
    samples : Samples
        Of the first store.
    names : sequence of str
    each : callable
        As `Each`.

    Raises
    ------
    InvalidConfig
        The target has no such dimension or coordinate, or there are too many groups.
    ChunkMissing, ChunkUndecodable, DataChanged
        Names the chunk of a coordinate.
    """
    if twice := [name for name in names if names.count(name) > 1]:
        raise InvalidConfig(f'by names "{twice[0]}" twice.', "Name it once.")
    found = tuple(_grouping(samples, name, each) for name in names)
    _check_targets(samples, found)
    if (groups := math.prod(one.count for one in found)) > MOST_GROUPS:
        largest = max(found, key=lambda one: one.count)
        is_date = np.asarray(largest.values).dtype.kind in "MO" and largest.kind == "row"
        cure = f"--by {largest.name}.month, or another part of a date" if is_date else "a coordinate of fewer values"
        raise InvalidConfig(
            f"by {', '.join(one.name for one in found)}: there are {groups:,} groups ({largest.name} has "
            f"{largest.count:,}); at most {MOST_GROUPS:,} are computed.",
            f"Name {cure}.",
        )
    return found


def _grouping(samples: Samples, name: str, each: Each) -> Grouping:
    own_dims = {dim for field in target_fields(samples) for dim in samples.variable(field.name).row_dims}
    if name == LEAD and LEAD not in own_dims:
        offsets = np.array(target_fields(samples)[0].offsets or (0,), np.int64)
        return Grouping(name=name, kind="lead", values=_as_leads(offsets, each(regular_step)))
    if name == VARIABLE and VARIABLE not in own_dims:
        return Grouping(name=name, kind="variable", values=np.array(samples.config.targets, dtype=str))
    columns = each(partial(read_distinct, name=name))
    first = columns[0]
    if first.dim != samples.sample_dim:
        return Grouping(name=name, kind="place", values=first.values, dim=first.dim, labels=(first.labels,))
    values, labels = joined(columns)
    return Grouping(name=name, kind="row", values=values, dim=first.dim, labels=labels)


def cuts_samples(samples: Samples, groupings: Iterable[Grouping]) -> bool:
    """Whether values of one sample belong to different groups."""
    has_leads = any(len(field.offsets) > 1 for field in target_fields(samples))
    return any(one.kind == "place" or (one.kind in ("lead", "row") and has_leads) for one in groupings)


def _check_targets(samples: Samples, found: Sequence[Grouping]) -> None:
    """Refuse to cut several targets together, and to cut a target along a dimension that it lacks."""
    targets = samples.config.targets
    is_single = len(targets) == 1 or any(one.kind == "variable" for one in found)
    if not is_single and cuts_samples(samples, found):
        names = ", ".join(one.name for one in found)
        raise InvalidConfig(
            f"by {names}: there are {len(targets)} targets ({', '.join(targets)}), and values of a sample belong to "
            "different groups.",
            "Evaluate each target alone: --by variable beside it.",
        )
    for one in found:
        lacking = [name for name in targets if one.kind == "place" and one.dim not in samples.variable(name).row_dims]
        if lacking:
            raise InvalidConfig(
                f"by {one.name}: the target {lacking[0]} has no dimension {one.dim}.",
                "Name what all targets have.",
            )


# Leads ------------------------------------------------------------------------------------------------------


def _as_leads(offsets: Ints, steps: Sequence[np.timedelta64 | None]) -> Array:
    """Return offsets as times, where rows follow each other in the same step in all stores; else as rows."""
    step = steps[0]
    return offsets if step is None or any(other != step for other in steps) else offsets * step


def regular_step(samples: Samples) -> np.timedelta64 | None:
    """Return the time from row to row, as timedelta64[ns]; None if it differs, or rows have no dates.

    Steps that no window crosses (``data.gaps``) do not count.
    """
    if samples.members:
        first, *others = of_each(samples, regular_step)
        return first if all(step == first for step in others) else None
    dim, rows = samples.sample_dim, samples.moving[0].shape[samples.moving[0].sample_axis]
    times = dates_along(samples, dim, rows)
    times = None if times is None else times[samples.first_row : samples.num_samples]
    if times is None or len(times) < 2 or missing_times(times).any():
        return None
    steps: Ints = np.diff(times).astype("m8[ns]").astype(np.int64)
    if samples.config.gaps != "allow":
        steps = steps[(steps > 0) & (steps <= np.median(steps) * 1.5)]
    return np.timedelta64(int(steps[0]), "ns") if len(steps) and (steps == steps[0]).all() else None
