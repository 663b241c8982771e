"""Put pages into the web application of a scheduler, and take them out again."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from dtrain.runtime.board.plots import PANES, page, pane
from dtrain.runtime.board.state import Board

PAGE = "dtrain"
STATE = r"/(?:.*/)?dtrain/state\.json"
BARE = r"/(?:.*/)?dtrain/?"


def mount(scheduler: Any, board: Board) -> Callable[[], None]:
    """Add ``dtrain/state.json``, and the page and the panes where Bokeh is installed.

    Returns
    -------
    callable
        Takes them out again.
    """
    application = scheduler.http_application
    undo = [_mount_json(application, board)]
    bokeh = next((one for one in application.applications if type(one).__name__.endswith("BokehTornado")), None)
    if bokeh is not None:
        try:
            undo.append(_mount_bokeh(scheduler, bokeh, board))
        except Exception:  # of a Bokeh that is made in another way: there are the numbers, without plots
            undo.append(_mount_bare(application))
            raise
    else:
        undo.append(_mount_bare(application))

    def unmount() -> None:
        for remove in undo:
            remove()

    return unmount


def _mount_json(application: Any, board: Board) -> Callable[[], None]:
    from tornado.web import RequestHandler

    class State(RequestHandler):  # type: ignore[misc]
        def get(self) -> None:
            self.set_header("Content-Type", "application/json")
            self.set_header("X-Content-Type-Options", "nosniff")
            self.write(json.dumps(board.as_json()))

    return _added(application, [(STATE, State)])


def _mount_bare(application: Any) -> Callable[[], None]:
    """Say where the numbers are, in place of the page."""
    from tornado.web import RequestHandler

    class Bare(RequestHandler):  # type: ignore[misc]
        def get(self) -> None:
            self.write(
                "<p>The scheduler has no Bokeh that Dask can use: there is no page, but the numbers are in "
                "<a href='dtrain/state.json'>dtrain/state.json</a>.</p><p>Where the scheduler runs: "
                "<code>pip install bokeh</code></p>"
            )

    return _added(application, [(BARE, Bare)])


def _mount_bokeh(scheduler: Any, bokeh: Any, board: Board) -> Callable[[], None]:
    """Add the page and the panes to Dask's Bokeh application, as its own are."""
    from bokeh.application import Application
    from bokeh.application.handlers.function import FunctionHandler
    from bokeh.server.contexts import ApplicationContext
    from bokeh.server.urls import per_app_patterns
    from bokeh.server.views.ws import WSHandler
    from distributed.dashboard.scheduler import template_variables

    variables = template_variables(scheduler)
    extra = {"prefix": f"{bokeh.prefix}/", **variables}
    made: dict[str, Any] = {f"/{PAGE}": partial(page, board, extra)}
    made |= {f"/individual-{PAGE}-{name}": partial(pane, board, plot) for name, plot in PANES.items()}
    rules: list[tuple[str, Any, dict[str, Any]]] = []
    for path, document in made.items():
        context = ApplicationContext(Application(FunctionHandler(document)), url=path, io_loop=bokeh._loop)
        bokeh._applications[path] = context  # the list of panes that JupyterLab asks for is made of these
        for pattern, handler, *_ in per_app_patterns:
            given = {"application_context": context, "bokeh_websocket_path": f"{bokeh.prefix}{path}/ws"}
            if issubclass(handler, WSHandler):
                given |= {"compression_level": None, "mem_level": None}
            rules.append((f"{bokeh.prefix}{path}{pattern}", handler, given))
    remove_rules = _added(bokeh, rules)
    if PAGE not in variables["pages"]:
        variables["pages"].append(PAGE)

    def remove() -> None:
        remove_rules()
        for path in made:
            bokeh._applications.pop(path, None)

    return remove


def _added(application: Any, handlers: list[Any]) -> Callable[[], None]:
    """Add handlers to a web application; return what takes them out again."""
    rules = application.default_router.rules
    before = list(rules)
    application.add_handlers(r".*", handlers)
    new = [rule for rule in rules if not any(rule is old for old in before)]

    def remove() -> None:
        rules[:] = [rule for rule in rules if not any(rule is one for one in new)]

    return remove
