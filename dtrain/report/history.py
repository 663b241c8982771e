"""The history of a run, one row a round: in history.jsonl and as an xarray.Dataset."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.runfiles import HISTORY, lines_of
from dtrain.stages import Limit, StageSeconds, limiting_stage
from dtrain.types import Contribution, RoundResult

Row = dict[str, Any]
DATA_STAGES = ("fetch", "decode", "gather")
STAGES = (*DATA_STAGES, "model", "reduce", "evaluate")
COUNTS = ("round", "samples", "steps", "bytes_reduced", "rejected", "retried")
LISTS = ("replica_loss", "update_norm")
"""By replica."""


def row_of(result: RoundResult) -> Row:
    """Return the row of a round; numbers that are not finite become None (null in JSON)."""
    return {
        "event": "round",
        "round": result.round,
        "train_loss": _finite(result.train_loss),
        **{name: _finite(value) for name, value in result.metrics.items()},
        "samples": result.samples,
        "steps": result.steps,
        "seconds": round(result.seconds, 4),
        "bytes_reduced": result.bytes_reduced,
        "rejected": result.rejected,
        "retried": result.retried,
        "params_sha256": result.params_sha256,
        "replica_loss": [_finite(loss) for loss in result.replica_loss],
        "update_norm": [_finite(c.update_norm) for c in result.contributions],
        "update_cosine": result.update_cosine,
        **{name: round(seconds, 4) for name, seconds in _seconds(result).items()},
    }


def _seconds(result: RoundResult) -> dict[str, float]:
    """Return where the time of a round goes: of its slowest replica, of its busiest process, and beside them."""
    slowest = max(result.contributions, key=lambda c: c.seconds)
    by_process: dict[str, list[Contribution]] = {}
    for one in result.contributions:
        by_process.setdefault(one.process, []).append(one)
    busiest = max(by_process.values(), key=lambda turns: sum(c.seconds for c in turns))
    data = {stage: sum(getattr(c, stage) for c in busiest) for stage in DATA_STAGES}
    return {
        "seconds_steps": slowest.seconds - slowest.waited,
        "seconds_waiting": slowest.waited,
        **{f"seconds_{stage}": seconds for stage, seconds in data.items()},
        "seconds_model": sum(c.seconds for c in busiest) - sum(data.values()),
        "seconds_reduce": result.reduce_seconds,
        "seconds_evaluate": result.evaluate_seconds / len(by_process),  # its tasks are spread over the processes
    }


def limit_of_rows(rows: Sequence[Mapping[str, Any]]) -> Limit | None:
    """Return the stage that limited a run; None if its history does not say.

    Left out are rounds that were begun again and, if there are others, the first one, which opens data and models.
    """
    own = [row for row in rows if not row["retried"] and "seconds_model" in row]
    own = [row for row in own if row["round"] > 1] or own
    total = {name: math.fsum(row[name] for row in own) for name in ("seconds", *map(_column, STAGES))}
    stages = {stage: total[_column(stage)] for stage in STAGES}
    beside = total["seconds"] - (sum(stages.values()) - stages["reduce"])
    return limiting_stage(StageSeconds(**{**stages, "reduce": max(stages["reduce"], beside)}))


def _column(stage: str) -> str:
    return f"seconds_{stage}"


def read_rows(run: Path) -> list[Row]:
    """Return the rows of a run's history.jsonl, up to a line that is incomplete because the process was killed.

    Raises
    ------
    RunDamaged
        The file cannot be read.
    """
    rows: list[Row] = []
    for row in read_lines(run / HISTORY):
        first = rows[0] if rows else row
        if not _is_row(row, len(rows) + 1) or any(len(row[name]) != len(first[name]) for name in LISTS):
            break
        rows.append(row)
    return rows


def read_rows_of(run: Path, numbers: Collection[int]) -> list[Row]:
    """Return the rows of some rounds, as `read_rows` does; the others are not parsed, so that long runs stay small.

    Raises
    ------
    RunDamaged
        The file cannot be read.
    """
    rows: list[Row] = []
    for number, line in enumerate(lines_of(run / HISTORY), start=1):
        if number in numbers and (row := _parsed(line)) is not None and _is_row(row, number):
            rows.append(row)
    return rows


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one JSON object a line, up to a line that is none.

    Raises
    ------
    RunDamaged
        The file cannot be read.
    """
    for line in lines_of(path):
        if (value := _parsed(line)) is None:
            return
        yield value


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line; None if it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_row(row: Row, number: int) -> bool:
    """Whether an object is the row of a round, as `row_of` makes it."""
    counts = all(type(row.get(name)) is int and _is_number(row[name]) for name in COUNTS)
    seconds = all(_is_number(value) for name, value in row.items() if name.startswith("seconds"))
    values = [value for name, value in row.items() if name.startswith("val_")]
    values += [row.get("train_loss"), row.get("update_cosine")]
    for name in LISTS:
        each = row.get(name)
        if not isinstance(each, list):
            return False
        values += each
    numbers = all(value is None or _is_number(value) for value in values)
    is_named = row.get("event") == "round" and isinstance(row.get("params_sha256"), str) and "seconds" in row
    return counts and seconds and numbers and is_named and row["round"] == number


def _is_number(value: object) -> bool:
    """Whether a value of JSON is a number that fits into 64 bits."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def best_round(rows: Sequence[Mapping[str, Any]], metric: str = "val_loss", higher: bool = False) -> int | None:
    """Return the first round with the best value of a metric; without that metric, of train_loss."""
    key = metric if any(row.get(metric) is not None for row in rows) else "train_loss"
    scored = [(row[key], row["round"]) for row in rows if row.get(key) is not None]
    if not scored:
        return None
    sign = -1 if higher and key == metric else 1
    return int(min(scored, key=lambda pair: (sign * pair[0], pair[1]))[1])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
