"""What a run of elastic.py says: what its kills cost, the bound, and the table.

The bound is what no system can beat that must compute lost tasks again. At kill i the task under way loses the w_i
seconds since it began, and until the successor is ready, after a_i seconds, the worker is absent. Two workers that
share all that is left take

    bound  =  calm  +  sum over the kills before the bound of (w_i + a_i) / 2

with w_i and a_i as the workers logged them. It lets a task be cut between workers at any place, and no worker ever
waits for the end of a round.

The speed of a machine that others share changes by the hour. So calm is the time of a calm run at the speed of the run
it is compared with: multiplied by the ratio of the median seconds of a training task in the two.

Where the workers' time went: "useful" tasks (the last execution of each), tasks "cut" by a kill, tasks "repeated"
though they had been finished, "absent" workers, and "idle" ones (ready, without a task), as a share of the time.
"""

from __future__ import annotations

import itertools
import signal
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from small_runs import markdown

WORKERS, BATCH = 2, 16
SYSTEMS = ("dtrain", "restart", "drop", "drop-lost")


@dataclass(frozen=True)
class Kill:
    at: float
    pid: int
    successor: int


@dataclass
class Life:
    """A worker process."""

    slot: int
    born: float
    died: float | None = None
    ready: float | None = None
    tasks: list[tuple[tuple[int, int], float, float | None]] = field(default_factory=list)
    """(round, replica), begin, end."""


# What was lost -------------------------------------------------------------------------------------------------------


def losses(
    kills: Sequence[Kill], lives: Mapping[int, Life], began: float, ended: float
) -> list[tuple[float, float, float]]:
    """Return, by kill, when it was, the seconds of the task that it cut, and those without the worker."""
    each = []
    for kill in kills:
        cut = [kill.at - since for _, since, until in lives[kill.pid].tasks if until is None]
        ready = lives[kill.successor].ready
        each.append((kill.at - began, sum(cut), min(ready or ended, ended) - kill.at))
    return each


def shares(lives: Mapping[int, Life], began: float, ended: float) -> dict[str, Any]:
    """Return where the time of the workers went, in worker-seconds, and how many tasks were begun again."""
    finished: dict[tuple[int, int], list[tuple[float, float]]] = {}
    begun, cut, present = list[tuple[int, int]](), 0.0, 0.0
    for life in lives.values():
        died = min(life.died or ended, ended)
        if life.ready is not None:
            present += max(0.0, died - max(life.ready, began))
        for key, since, until in life.tasks:
            begun.append(key)
            if until is None:
                cut += died - since
            else:
                finished.setdefault(key, []).append((until, until - since))
    seconds = [[own for _, own in sorted(each)] for each in finished.values()]
    useful, again = sum(each[-1] for each in seconds), sum(sum(each[:-1]) for each in seconds)
    total = WORKERS * (ended - began)
    return {
        "useful": useful,
        "cut": cut,
        "repeated": again,
        "absent": total - present,
        "idle": present - useful - cut - again,
        "begun_again": len(begun) - len(set(begun)),
        "task": statistics.median(itertools.chain.from_iterable(seconds)),
    }


def bound(calm: float, each: Sequence[tuple[float, float, float]]) -> float:
    """Return the seconds that no system can beat which computes lost tasks again."""
    seconds = calm
    for at, cut, absent in each:
        if at < seconds:
            seconds += (cut + absent) / WORKERS
    return seconds


def calm_seconds(calm: Mapping[str, Any], one: Mapping[str, Any]) -> float:
    """Return the seconds that a calm run takes where a task takes as long as in another run."""
    return float(calm["seconds"] * one["task"] / calm["task"])


# The table -----------------------------------------------------------------------------------------------------------


def calm_of(found: Sequence[Mapping[str, Any]], system: str, seed: int) -> Mapping[str, Any]:
    return next(one for one in found if (one["system"], one["every"], one["seed"]) == (system, 0, seed))


def report(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the table: least and most of the seeds, where there are several."""
    rows = []
    for every, system in itertools.product(sorted({one["every"] for one in found}), SYSTEMS):
        runs = [one for one in found if (one["every"], one["system"]) == (every, system)]
        if not runs:
            continue
        cells = [row(one, calm_of(found, system, one["seed"]), calm_of(found, "dtrain", one["seed"])) for one in runs]
        rows.append([f"{every:g} s" if every else "none", system, *map(spread, zip(*cells, strict=True))])
    titles = ["kill each", "system", "minutes", "kills", "goodput", "of dtrain's calm", "of the bound"]
    more = ["samples lost", "trained again", "same sha256"]
    parts = ["useful", "cut", "repeated", "absent", "idle", "task, s", "cut, s a kill", "start, s"]
    return markdown([*titles, *more, *parts, "others, cores"], rows)


def row(one: Mapping[str, Any], own: Mapping[str, Any], dtrain: Mapping[str, Any]) -> list[str]:
    total, each = WORKERS * one["seconds"], one["losses"]
    calm = calm_seconds(dtrain, one)
    result = one["result"] or {}
    share = 1.0 if result else (one["finished"] or 0) / one["rounds"]
    least = share * bound(calm, each) / one["seconds"] if one["system"] in ("dtrain", "restart") else None
    same = result.get("params_sha256") == dtrain["result"]["params_sha256"]
    minutes = f"{one['seconds'] / 60:.2f}"
    end = "not in" if one["code"] == -signal.SIGKILL else f"exit code {one['code']} after"
    return [
        minutes if result else f"{end} {minutes}: {one['finished']} of {one['rounds']} rounds",
        str(one["kills"]),
        f"{share * calm_seconds(own, one) / one['seconds']:.2f}",
        f"{share * calm / one['seconds']:.2f}",
        "" if least is None else f"{least:.2f}",
        f"{result.get('lost', 0):,}",
        f"{one['begun_again'] * one['steps'] * BATCH:,}",
        ("yes" if same else "no") if result else "",
        *(f"{one[name] / total:.3f}" for name in ("useful", "cut", "repeated", "absent", "idle")),
        f"{one['task']:.2f}",
        f"{statistics.fmean(cut for _, cut, _ in each):.2f}" if each else "",
        f"{statistics.fmean(absent for _, _, absent in each):.1f}" if each else "",
        f"{one['others']:.2f}",
    ]


def spread(values: Sequence[str]) -> str:
    """Return one value, or the least and most of several; words as they are."""
    try:
        ordered = sorted(set(values), key=lambda text: float(text.replace(",", "")))
    except ValueError:
        return ", ".join(dict.fromkeys(values))
    return " to ".join(ordered[:: max(1, len(ordered) - 1)])
