"""What the codes of categoricals stand for in a run: kept in plan.json, and compared with the stores that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtrain.data.samples import Samples
from dtrain.data.variable import Categories
from dtrain.errors import DataChanged, listed


def categories_of(samples: Samples) -> dict[str, Categories]:
    """Return the categories of each categorical."""
    return {v.name: v.categories for v in samples.variables if v.categories is not None}


def check_categories(samples: Samples, known: Mapping[str, Categories]) -> None:
    """Refuse a categorical whose codes stand for other categories than those that a run is trained on.

    Categories that only one of them has at its end do no harm.

    Raises
    ------
    DataChanged
        Names the first code.
    """
    for name, own in categories_of(samples).items():
        of_run = known.get(name, own)
        pairs = enumerate(zip(own.names, of_run.names, strict=False))
        code = next((code for code, (here, there) in pairs if here != there), None)
        if code is not None:
            raise DataChanged(
                f"{samples.path}: code {code} of {name} stands for {own.names[code]}, in the run for "
                f"{of_run.names[code]}: its categories are {listed(own.names)}; the run's are {listed(of_run.names)}.",
                "Write it with the run's categories in their order (pandas: column.cat.set_categories([...])).",
            )


def categories_table(known: Mapping[str, Categories]) -> dict[str, dict[str, Any]]:
    """Return categories as plan.json holds them."""
    return {name: {"count": one.count, "names": list(one.names)} for name, one in known.items()}


def categories_from(table: Mapping[str, Any]) -> dict[str, Categories]:
    """Return what `categories_table` has written."""
    return {name: Categories(one["count"], tuple(one["names"])) for name, one in table.items()}
