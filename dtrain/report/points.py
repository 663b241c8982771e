"""What trackers are given of a run: the numbers of a round, and the settings, each under one name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.report.history import Row, read_rows

MOST_REPLICAS = 32
"""Of more replicas, the smallest and the largest value are points, not each of them."""
LAST = "round/samples"
"""The last point of a round, which each round has: where it is, the round is complete."""


def points(row: Row) -> dict[str, float]:
    """Return the numbers of a round that are finite, `LAST` at the end.

    Parameters
    ----------
    row : dict
        A line of history.jsonl.

    >>> points({"round": 3, "train_loss": 0.5, "val_loss": None, "samples": 100, "replica_loss": [0.4]})
    {'replica_loss/0': 0.4, 'train_loss': 0.5, 'round/samples': 100.0}
    """
    named = dict(_named(row))
    return {name: named[name] for name in sorted(named, key=lambda name: (name == LAST, name))}


def _named(row: Row) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, list):
            yield from _by_replica(key, value)
        elif isinstance(value, int | float) and key != "round":
            yield f"{_group(key)}{key.removeprefix('seconds_')}", float(value)
    if row.get("seconds"):
        yield "round/samples_per_second", row["samples"] / row["seconds"]


def _group(key: str) -> str:
    """Return the group that trackers show a column of the history in; losses and metrics stand alone."""
    if key == "train_loss" or key.startswith("val_"):
        return ""
    return "stages/" if key.startswith("seconds_") else "round/"


def _by_replica(key: str, values: Sequence[float | None]) -> Iterator[tuple[str, float]]:
    known = [(k, float(value)) for k, value in enumerate(values) if value is not None]
    if len(values) <= MOST_REPLICAS:
        yield from ((f"{key}/{k}", value) for k, value in known)
    elif known:
        yield f"{key}/min", min(value for _, value in known)
        yield f"{key}/max", max(value for _, value in known)


def settings_of(tables: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Return settings by dotted key, lists as text; keys without a value are left out.

    >>> settings_of({"train.rounds": 3, "model_args": {"width": 8}, "data.inputs": ["x", "y"], "stop.target": None})
    {'train.rounds': 3, 'model_args.width': 8, 'data.inputs': 'x, y'}
    """
    flat: dict[str, str | int | float | bool] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            flat |= settings_of(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat |= {f"{prefix}{key}": ", ".join(map(str, value))} if value else {}
        elif value is not None and value != "":
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat


def rows_between(run: Path, after: int, last: int) -> list[Row]:
    """Return the rounds of a run's history after one round, up to another one."""
    return [row for row in read_rows(run) if after < row["round"] <= last]
