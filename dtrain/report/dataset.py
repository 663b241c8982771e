"""The history of a run as an xarray.Dataset; apart from the rows, since importing xarray takes half a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from dtrain.display import html_beside
from dtrain.report.curve import Series, curve_svg, curves_of

if TYPE_CHECKING:
    import pandas as pd


class History(xr.Dataset):  # type: ignore[no-untyped-call]
    """The history of a run over ``round``; ``replica_loss`` is over (round, replica)."""

    __slots__ = ()

    def to_pandas(self) -> pd.DataFrame:
        """Return the values of each round, a row a round; ``history.replica_loss.to_pandas()`` has the replicas'."""
        return self.drop_dims("replica", errors="ignore").to_dataframe()

    def _repr_html_(self) -> str:
        return html_beside([curve_svg(_curves(self))]) + super()._repr_html_()


def _curves(history: xr.Dataset) -> dict[str, Series]:
    """Return the curves of the losses that a history still has over ``round``."""
    names = [name for name in ("train_loss", "val_loss") if name in history and history[name].dims == ("round",)]
    rounds = history["round"].values.tolist() if names else []
    rows = [{"round": number} for number in rounds]
    for name in names:
        for row, value in zip(rows, history[name].values.tolist(), strict=True):
            row[name] = value
    return curves_of(rows)


def dataset_of(rows: Sequence[Mapping[str, Any]]) -> History:
    """Return the history as a Dataset over ``round``; what is listed by replica is over (round, replica).

    Variables are train_loss, the ``val_`` ones, then the others; NaN where a round has no value.
    """
    numbers = [row["round"] for row in rows]
    variables: dict[str, Any] = {}
    for name in sorted(dict.fromkeys(name for row in rows for name in row), key=_place):
        if name in ("event", "round"):
            continue
        values = [row.get(name) for row in rows]
        if name == "params_sha256":
            variables[name] = ("round", np.array(values, dtype=str))
        elif name in ("replica_loss", "update_norm"):
            variables[name] = (("round", "replica"), np.array(values, dtype=np.float64))
        else:
            dtype = np.int64 if all(isinstance(value, int) for value in values) else np.float64
            variables[name] = ("round", np.array(values, dtype=dtype))
    return History(variables, coords={"round": np.array(numbers, dtype=np.int64)})


def _place(name: str) -> int:
    return 0 if name == "train_loss" else 1 if name.startswith("val_") else 2
