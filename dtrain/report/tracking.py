"""Trackers: what else gets the events of a run. Each is called in a thread of its own, and never stops training.

The hook is one: a tracker is called with every event of `dtrain.events`, from `RunStarted`, which names the run's
directory and settings, to `RunFinished`. ``close()``, if it has that method, is called at the end, also after a fault.
It may be a function, an object, or a class that is called without arguments. ``run.trackers`` names built-in ones
(`dtrain.report.trackers`) or ``module:function``; Python gives objects too.

Progress from inside rounds (`StepsTaken`) may be left out, and the result of a round comes without its state: a tracker
that is slow must not hold the parameters of many rounds. The history is in the run directory: a tracker that has missed
rounds, since it was killed or its service was gone, can take them from there (`dtrain.report.points`).
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dtrain.config.functions import described
from dtrain.errors import InvalidConfig, did_you_mean, one_line
from dtrain.events import Event, Reporter, RoundFinished, RunStarted, StepsTaken
from dtrain.packages import is_installed
from dtrain.report import trackers

LOG = logging.getLogger("dtrain")
MOST_EVENTS = 10_000
"""Events that wait for a slow tracker; further ones are lost to it."""
CLOSE_SECONDS, FAULT_SECONDS = 20.0, 3.0
"""How long the end of a run waits for its trackers; and where it ends with an error or Ctrl-C."""
PATIENCE_SECONDS = 2.0
"""After this time it says what it waits for."""


@dataclass(frozen=True, slots=True)
class NamedTracker:
    """A tracker that is not made yet."""

    name: str
    make: Callable[[], Reporter]
    look: str = ""
    """How to look at what it keeps; ``{runs}`` stands for the directory that holds runs."""


def tracker_names() -> list[str]:
    """Return the names of the built-in trackers."""
    return sorted(module.name for module in pkgutil.iter_modules(trackers.__path__))


def named_tracker(name: str) -> NamedTracker:
    """Return a built-in tracker; its package is looked for, and imported later.

    Raises
    ------
    InvalidConfig
        There is no such tracker, or its package is not installed.
    """
    known = tracker_names()
    if name not in known:
        allowed = ", ".join([*known, '"module:function"'])
        raise InvalidConfig(f'run.trackers: "{name}"; allowed are {allowed}{did_you_mean(name, known)}')
    module = importlib.import_module(f"{trackers.__name__}.{name}")
    if not is_installed(module.PACKAGE):
        raise InvalidConfig(
            f'run.trackers: "{name}" needs the package {module.PACKAGE}, which is not installed.',
            f'pip install "dtrain[{module.EXTRA}]", or leave "{name}" out.',
        )
    return NamedTracker(name, module.Tracker, module.LOOK)


def own_tracker(name: str, tracker: Any) -> NamedTracker:
    """Return a tracker of the user's.

    Raises
    ------
    InvalidConfig
        It cannot be called with an event, or is a class that needs arguments.
    """
    if not callable(tracker):
        raise InvalidConfig(
            f"run.trackers: {described(tracker)} cannot be called.", "Give a function of one event, or its name."
        )
    is_class = isinstance(tracker, type)
    try:
        inspect.signature(tracker).bind(*(() if is_class else ("event",)))
    except TypeError as error:
        called = "without arguments, and its object with each event" if is_class else "with one event"
        raise InvalidConfig(
            f"run.trackers: {described(tracker)} is called {called}: {error}.",
            "See dtrain.events for the events; RunStarted names the run's directory and settings.",
        ) from None
    except ValueError:  # of a function written in C
        pass
    return NamedTracker(name, tracker if is_class else lambda: tracker)


@contextmanager
def tracking(chosen: Sequence[NamedTracker]) -> Iterator[Reporter]:
    """Yield a reporter that gives events to trackers; when the block ends, it waits for them, for some time."""
    followers = [_Follower(tracker) for tracker in chosen]

    def report(event: Event) -> None:
        for follower in followers:
            follower.put(event)

    seconds = FAULT_SECONDS
    try:
        yield report
        seconds = CLOSE_SECONDS
    finally:
        for follower in followers:
            follower.end()
        _wait_for(followers, min(PATIENCE_SECONDS, seconds))
        if slow := [follower.name for follower in followers if follower.is_busy]:
            LOG.warning("waiting for %s, at most %.0f s", " and ".join(slow), seconds)
            _wait_for(followers, seconds - PATIENCE_SECONDS)
        for follower in followers:
            follower.give_up()


def _wait_for(followers: Sequence[_Follower], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for follower in followers:
        follower.join(max(0.0, deadline - time.monotonic()))


class _Follower:
    """A tracker with its thread and the events that wait for it."""

    def __init__(self, chosen: NamedTracker) -> None:
        self.name = chosen.name
        self._make = chosen.make
        self._events: queue.Queue[Event | None] = queue.Queue(MOST_EVENTS)
        self._thread = threading.Thread(target=self._run, name=f"dtrain-tracker-{chosen.name}", daemon=True)
        self._has_started = self._has_warned = False

    def put(self, event: Event) -> None:
        """Hand over an event, at once; those before `RunStarted` are left out."""
        if isinstance(event, RunStarted) and not self._has_started:
            self._has_started = True
            self._thread.start()
        if not self._has_started or (isinstance(event, StepsTaken) and not self._events.empty()):
            return
        if isinstance(event, RoundFinished) and event.result.state is not None:
            event = RoundFinished(replace(event.result, state=None))
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._warn(f"it is too slow: {MOST_EVENTS:,} events wait for it.")

    def end(self) -> None:
        """Tell the tracker that nothing follows."""
        with suppress(queue.Full):  # then it does not end in time either
            self._events.put_nowait(None)

    @property
    def is_busy(self) -> bool:
        """Whether the tracker has not ended."""
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Wait for the tracker to end."""
        if self.is_busy:
            self._thread.join(seconds)

    def give_up(self) -> None:
        """Say so if the tracker has not ended."""
        if self.is_busy:
            self._warn("it did not take all events in time. The same command gives it what it lacks.")

    def _run(self) -> None:
        try:
            tracker = self._make()
        except Exception as error:  # of whatever packages it uses
            self._warn(one_line(error))
            return
        while (event := self._events.get()) is not None:
            self._call(partial(tracker, event))
        if callable(close := getattr(tracker, "close", None)):
            self._call(close)

    def _call(self, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception as error:
            self._warn(one_line(error))

    def _warn(self, reason: str) -> None:
        """Say once that the tracker fails; what follows is given to it all the same."""
        if not self._has_warned:
            self._has_warned = True
            LOG.warning('run.trackers: "%s" fails, and training goes on: %s', self.name, reason)
