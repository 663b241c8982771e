"""The climatology of targets: the mean of the training rows at each place, by calendar month where there are enough.

It stands beside a forecast as a baseline, and is what anomalies are differences from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.by import Each
from dtrain.data.cf import date_part, missing_times
from dtrain.data.column import NUMBERS, describe_column, find_coordinate
from dtrain.data.distinct import dates_along, store_of, whole_column
from dtrain.data.load.climate import BYTES_A_PLACE, NO_PERIOD
from dtrain.data.plan.parts import cell_anchors
from dtrain.data.plan.units import DataPlan, cell_bounds
from dtrain.data.read.inventory import of_each
from dtrain.data.samples import Samples
from dtrain.errors import OutOfMemory

Months: TypeAlias = npt.NDArray[np.int64]
"""int64[row]: 12 x year + month - 1; -1 without a date."""
Periods: TypeAlias = npt.NDArray[np.uint8]
"""uint8[row]: the period of each row; `NO_PERIOD` where it has none."""
MONTHS = 12
MOST_BYTES = 256 << 20
"""That a climatology may take in each process while it is computed."""


@dataclass(frozen=True, slots=True, eq=False)
class Climatology:
    """Means of the training rows."""

    means: Mapping[str, npt.NDArray[np.float32]]
    """By variable: float32[period, *row], in decoded units; NaN where there is no value."""
    places: Mapping[str, str]
    """By variable: a digest of the places of a row (`places_digest`)."""
    text: str
    """How it was computed."""

    @property
    def count(self) -> int:
        """Number of periods: 12, or 1."""
        return len(next(iter(self.means.values())))

    @property
    def nbytes(self) -> int:
        """Bytes of the means."""
        return sum(means.nbytes for means in self.means.values())


@dataclass(frozen=True, slots=True)
class ClimatePlan:
    """What a climatology is computed of."""

    names: tuple[str, ...]
    """Variables."""
    periods: tuple[Periods, ...]
    """By store of ``data.path``."""
    count: int
    """Number of periods."""
    places: int
    """Places of a row, of all variables together."""
    text: str


def plan_climatology(samples: Samples, names: Sequence[str], plans: Sequence[DataPlan], each: Each) -> ClimatePlan:
    """Plan the climatology of variables: by calendar month, where each month is in two years of the training rows.

    Parameters
    ----------
    samples : Samples
        Of the first store.
    names : sequence of str
    plans : sequence of DataPlan
        By store of ``data.path``.
    each : callable
        As `Each`; stores beyond the plans are left out.

    Raises
    ------
    OutOfMemory
        It would take too much memory.
    """
    months = list(each(months_of))[: len(plans)]
    years = _years(months, [train_rows(plan) for plan in plans])
    places = sum(int(np.prod(samples.variable(name).row_shape, dtype=np.int64)) for name in names)
    by_month = "by calendar month: " if years is not None and min(years) >= 2 else ""
    size = BYTES_A_PLACE * places * (MONTHS if by_month else 1)
    if by_month and size > MOST_BYTES:
        by_month, size = "", BYTES_A_PLACE * places
        text = f"not by calendar month, which would take more than {MOST_BYTES >> 20} MB"
    elif by_month:
        assert years is not None
        least, most = min(years), max(years)
        text = f"each month is in {least if least == most else f'{least} to {most}'} years of them"
    else:
        why = "rows have no dates" if years is None else "not each month is in two years of them"
        text = f"not by calendar month: {why}"
    if size > MOST_BYTES:
        raise OutOfMemory(
            f"A climatology of {', '.join(names)} has {places:,} places and takes {-(-size >> 20):,} MB; at most "
            f"{MOST_BYTES >> 20} MB are used.",
            "Select fewer places (data.isel, data.sel), or leave out anomaly_correlation.",
        )
    count = MONTHS if by_month else 1
    mean = "the mean of the training rows at each place"
    return ClimatePlan(tuple(names), periods_of(months, plans, count), count, places, f"{mean}, {by_month}{text}")


def _years(months: Sequence[Months | None], trained: Sequence[npt.NDArray[np.bool_]]) -> list[int] | None:
    """Return, by calendar month, the number of years that training rows have it in; None without dates."""
    known = [one[rows] for one, rows in zip(months, trained, strict=True) if one is not None]
    if len(known) < len(months):
        return None
    found = np.unique(np.concatenate(known))
    found = found[found >= 0]
    return np.bincount(found % MONTHS, minlength=MONTHS).tolist() if len(found) else None


def periods_of(months: Sequence[Months | None], plans: Sequence[DataPlan], count: int) -> tuple[Periods, ...]:
    """Return the period of each row, by store."""
    if count == 1:
        return tuple(np.zeros(plan.num_samples, np.uint8) for plan in plans)
    return tuple(_calendar_months(one, plan) for one, plan in zip(months, plans, strict=True))


def _calendar_months(months: Months | None, plan: DataPlan) -> Periods:
    if months is None:
        return np.full(plan.num_samples, NO_PERIOD, np.uint8)
    return np.where(months < 0, NO_PERIOD, months % MONTHS).astype(np.uint8)


def train_rows(plan: DataPlan) -> npt.NDArray[np.bool_]:
    """Return which rows are in cells of the training split."""
    rows = np.zeros(plan.num_samples + 1, np.int64)
    start, stop = cell_bounds(plan, cell_anchors(plan, "train").cells)
    np.add.at(rows, start, 1)
    np.subtract.at(rows, stop, 1)
    held: npt.NDArray[np.bool_] = np.cumsum(rows)[:-1] > 0
    return held & plan.is_of("train", 0, plan.num_samples)


# Read -------------------------------------------------------------------------------------------------------


def months_of(samples: Samples) -> Months | None:
    """Read the month of each row; None if the coordinate of the sample dimension holds no dates."""
    if samples.members:
        own = of_each(samples, months_of)
        rows = np.full(samples.num_samples, -1, np.int64)
        for begin, months in zip(samples.begins, own, strict=True):
            if months is None:
                return None
            rows[begin : begin + len(months)] = months
        return rows
    dim, length = samples.sample_dim, samples.moving[0].shape[samples.moving[0].sample_axis]
    times = dates_along(samples, dim, length)
    if times is None:
        return None
    times, missing = times[: samples.num_samples], missing_times(times[: samples.num_samples])
    months = np.full(len(times), -1, np.int64)
    there = times[~missing]
    months[~missing] = date_part(there, "year").astype(np.int64) * MONTHS + date_part(there, "month") - 1
    return months


def places_digest(samples: Samples, name: str) -> str:
    """Return a digest of the places of a row of a variable: its dimensions, and their coordinates where there are some.

    A climatology is that of these places.
    """
    one = samples.stores[0]
    variable, digest = one.variable(name), hashlib.sha256()
    store = store_of(one)
    for axis in variable.row_axes:
        dim, part = variable.dims[axis], slice(*variable.select[axis])
        found = find_coordinate(store, one.config.group, [name], dim, variable.shape[axis])
        column = found if isinstance(found, str) else describe_column(one.path, *found)
        whole = np.arange(variable.shape[axis]) if isinstance(column, str) else whole_column(one, column)
        values = whole[part]
        text = values.astype(str) if values.dtype.kind not in NUMBERS else values.astype(np.float64)
        digest.update(f"{dim} {len(values)} ".encode() + text.tobytes())
    return digest.hexdigest()
