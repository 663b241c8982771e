"""The figures of an evaluation: as a dict, as an xarray.Dataset over what it is broken down by, and as rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.algorithm.evaluate import LOSS, Sums, columns
from dtrain.algorithm.metrics.named import FROM_LOSS
from dtrain.algorithm.metrics.state import Floats
from dtrain.data.encoding import Array
from dtrain.runtime.runner import Runner
from dtrain.runtime.spec import Asked

if TYPE_CHECKING:
    import xarray as xr

LEAD_UNITS = {"D": "d", "h": "h", "m": "min", "s": "s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The figures of one evaluation."""

    round: int
    samples: int
    """That were evaluated."""
    columns: Mapping[str, Floats]
    """By figure, ``loss`` first: float64[group]."""
    by_group: Array
    """int64[group]: samples that have values in each group."""
    asked: Asked

    @property
    def values(self) -> dict[str, float]:
        """The figures of everything."""
        return {name: float(column[0]) for name, column in self.columns.items()}

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of what it is broken down by: ``month`` of ``time.month``, ``donor`` of ``obs/donor``."""
        names = [one.name for one in self.asked.groupings]
        short = [name.rpartition(".")[2].rpartition("/")[2] for name in names]
        return tuple(one if short.count(one) == 1 else name for one, name in zip(short, names, strict=True))

    def dataset(self) -> xr.Dataset:
        """Return the figures over what the evaluation is broken down by; labels without samples are left out.

        Its variables are ``samples``, ``loss`` and the metrics.
        """
        import xarray as xr

        shape = tuple(one.count for one in self.asked.groupings)
        variables = {"samples": self.by_group, **self.columns}
        coordinates = {dim: one.values for dim, one in zip(self.dims, self.asked.groupings, strict=True)}
        found = xr.Dataset({name: (self.dims, v.reshape(shape)) for name, v in variables.items()}, coordinates)
        occurs = {dim: found.samples.any([d for d in self.dims if d != dim]).values for dim in self.dims}
        return found.isel({dim: np.flatnonzero(own) for dim, own in occurs.items()}).assign_attrs(
            round=self.round, notes=list(self.asked.notes)
        )

    def beside(self) -> tuple[list[str], list[list[str]], int] | None:
        """Return a table of the model beside the baselines, as `texts_of` does; None without baselines."""
        baselines, values = self.asked.baselines, self.values
        if not baselines:
            return None
        endings = [f"_{one}" for one in baselines]
        names = [name for name in values if name != LOSS and not name.endswith(tuple(endings))]
        rows = [["model", *(f"{values[name]:.5g}" for name in names), ""]]
        for one in baselines:
            figures = [values.get(f"{name}_{one}") for name in (*names, "skill")]
            rows.append([one, *("" if value is None else f"{value:.5g}" for value in figures)])
        return ["", *names, "model's skill"], rows, 1


def scores_of(runner: Runner[Any], sums: Sums, number: int, wanted: Sequence[str]) -> Scores:
    """Return the figures of the sums of an evaluation of round `number`."""
    found = columns(sums, wanted, runner.metrics, runner.spec.asked.baselines)
    if LOSS not in sums.states and sums.samples:
        for name in (LOSS, *(name for name in FROM_LOSS if name in wanted)):
            del found[name]  # it is none of the parts of a sample
    return Scores(
        round=number,
        samples=sums.samples,
        columns=found,
        by_group=sums.by_group,
        asked=runner.spec.asked,
    )


def rows_of(dataset: xr.Dataset) -> Iterator[dict[str, Any]]:
    """Yield the figures of each group as plain values: what it is, its samples, and the figures; None for NaN."""
    dims = [str(dim) for dim in dataset.samples.dims]
    for index in np.ndindex(*(dataset.sizes[dim] for dim in dims)):
        own = dataset.isel(dict(zip(dims, index, strict=True)))
        if not int(own.samples):
            continue
        row: dict[str, Any] = {dim: plain(own[dim].values[()]) for dim in dims}
        yield row | {str(name): plain(value.values[()]) for name, value in own.data_vars.items()}


def texts_of(dataset: xr.Dataset, baselines: Sequence[str] = ()) -> tuple[list[str], list[list[str]], int]:
    """Return header and rows of a table for people, and how many columns say what a row is.

    Of baselines it has the rmse, and the model's skill beside it.
    """
    dims = [str(dim) for dim in dataset.samples.dims]
    endings, kept = (
        tuple(f"_{one}" for one in baselines),
        [f"{k}_{one}" for one in baselines for k in ("rmse", "skill")],
    )
    dataset = dataset[[str(n) for n in dataset.data_vars if n in kept or not (endings and str(n).endswith(endings))]]
    labels = {dim: _texts(dataset[dim].values) for dim in dims}
    rows = []
    for index in np.ndindex(*(dataset.sizes[dim] for dim in dims)):
        own = dataset.isel(dict(zip(dims, index, strict=True)))
        if int(own.samples):
            keys = [labels[dim][place] for dim, place in zip(dims, index, strict=True)]
            figures = [f"{float(value):.5g}" for name, value in own.data_vars.items() if name != "samples"]
            rows.append([*keys, f"{int(own.samples):,}", *figures])
    return [*dims, *map(str, dataset.data_vars)], rows, len(dims)


def _texts(values: Array) -> list[str]:
    """Return values of a coordinate for people: durations in one unit."""
    if values.dtype.kind == "m":
        unit = next((u for u in LEAD_UNITS if (values.astype(f"m8[{u}]") == values).all()), None)
        if unit is not None:
            return [f"{int(value)} {LEAD_UNITS[unit]}" for value in values.astype(f"m8[{unit}]").astype(np.int64)]
    if values.dtype.kind == "M":
        texts: list[str] = np.datetime_as_string(values.astype("M8[s]")).tolist()
        return [text.removesuffix("T00:00:00") for text in texts]
    return [f"{value:.6g}" if isinstance(value, float) else str(value) for value in values.tolist()]


def plain(value: Any) -> Any:
    """Return a value of a Dataset as JSON has it: dates and durations in ISO 8601.

    >>> plain(np.timedelta64(6, "h")), plain(np.datetime64("2020-01-01T06")), plain(np.float64("nan"))
    ('PT6H', '2020-01-01T06:00:00', None)
    """
    if isinstance(value, np.timedelta64):
        return _duration(int(value.astype("m8[ns]").astype(np.int64)))
    if isinstance(value, np.datetime64):
        return str(value.astype("M8[s]"))
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if isinstance(value, int | str | bool) else str(value)


def _duration(nanoseconds: int) -> str:
    seconds, rest = divmod(abs(nanoseconds), 10**9)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    time = "".join(f"{n}{unit}" for n, unit in ((hours, "H"), (minutes, "M")) if n)
    time += f"{seconds}{f'.{rest:09d}'.rstrip('0') if rest else ''}S" if seconds or rest else ""
    text = f"P{f'{days}D' if days else ''}{f'T{time}' if time else ''}"
    return ("-" if nanoseconds < 0 else "") + (text if text != "P" else "PT0S")
