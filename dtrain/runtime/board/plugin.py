"""The scheduler's plugin: feeds the board with messages, progress and finished tasks, and mounts its pages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin

from dtrain.runtime.board.mount import mount
from dtrain.runtime.board.state import Board

NAME = "dtrain-board"
TOPIC = "dtrain"
"""Of the messages of clients; the progress of a run's replicas comes on ``dtrain-RUN``."""


class BoardPlugin(SchedulerPlugin):  # type: ignore[misc]
    """Shows the runs of dtrain on a page of the scheduler's dashboard.

    Parameters
    ----------
    version : tuple of int
        Of dtrain: a newer plugin takes the place of an older one, an older one leaves a newer one in its place.
    digest : str
        Of the plugin's source: the same one is registered once.
    """

    idempotent = True

    def __init__(self, version: tuple[int, ...], digest: str) -> None:
        self.version = version
        self.name = f"{NAME}-{digest}"
        self.board: Board | None = None
        self._unmount: Callable[[], None] | None = None

    async def start(self, scheduler: Any) -> None:
        """Mount the pages, in place of those of an older plugin; whatever fails is logged and harms no run."""
        try:
            others = [one for name, one in scheduler.plugins.items() if name.startswith(NAME)]
            if any(one.version > self.version for one in others if one.board is not None):
                return
            for one in others:
                one.stop()
                scheduler.remove_plugin(one.name)
            self.board = Board()
            for at, message in scheduler.get_events(TOPIC):  # of runs that began before
                self.board.message(message, at)
            self._unmount = mount(scheduler, self.board)
        except Exception as error:
            self._log(error)

    def stop(self) -> None:
        """Take the pages out, and take no account of anything any more."""
        self.board = None
        if self._unmount is not None:
            self._unmount()
            self._unmount = None

    # Events -----------------------------------------------------------------------------------------------

    def log_event(self, topic: str, msg: Any) -> None:
        """Take account of a message."""
        if self.board is not None and topic.startswith(TOPIC):
            self._safely(self._message, topic, msg)

    def _message(self, board: Board, topic: str, message: Any) -> None:
        if topic == TOPIC:
            board.message(message)
        elif "steps" in message:
            board.steps(topic[len(TOPIC) + 1 :], message["steps"])

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Take account of a task that has ended."""
        if finish == "memory" and start == "processing" and self.board is not None and str(key).startswith("dtrain-"):
            self._safely(Board.task, str(key), kwargs.get("worker", ""), kwargs.get("startstops") or ())

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """Take account of a worker that has left."""
        if self.board is not None:
            self._safely(Board.worker_left, worker)

    def remove_client(self, scheduler: Any, client: str) -> None:
        """Take account of a client that has left."""
        if self.board is not None:
            self._safely(Board.client_left, client)

    def _safely(self, take: Callable[..., None], *arguments: Any) -> None:
        """Take account of an event; after a failure of any more."""
        try:
            take(self.board, *arguments)
        except Exception as error:
            self.board = None
            self._log(error)

    def _log(self, error: Exception) -> None:
        logger = logging.getLogger("distributed.scheduler")
        logger.info("The page of dtrain is not up to date: %s: %s. Training goes on.", type(error).__name__, error)
