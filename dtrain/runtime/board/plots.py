"""What is known of the runs as Bokeh documents: a page, and panes for JupyterLab."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dtrain.runtime.board.state import ROWS, Board, RunState
from dtrain.runtime.board.texts import faults_html, speeds, summary_html

UPDATE_MILLISECONDS = 500
TRAIN, VAL = "#1e88e5", "#ef6c00"
WORKERS = ("#1e88e5", "#ef6c00", "#43a047", "#8e24aa", "#00acc1", "#c0ca33", "#f06292", "#6d4c41", "#3949ab", "#546e7a")
"""Colours of the timeline, by worker."""
NEWEST = "newest"


class Plots:
    """The plots of one open page; Bokeh makes them anew for each."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.chosen = NEWEST
        self._shown: tuple[str, int] | None = None
        self._updates: list[Callable[[RunState], None]] = []
        self._colours: dict[str, str] = {}

    def state(self) -> RunState | None:
        """Return the run that is shown."""
        return self.board.runs.get(self.chosen) or self.board.newest()

    def update(self) -> None:
        """Bring what is shown up to date, if it has changed."""
        state = self.state()
        seen = None if state is None else (state.run, state.changes)
        if state is None or seen == self._shown:
            return
        self._shown = seen
        for update in self._updates:
            update(state)

    # Plots ------------------------------------------------------------------------------------------------

    def loss(self) -> Any:
        """Return the losses over rounds."""
        from bokeh.models import ColumnDataSource

        train, val = ColumnDataSource({"x": [], "y": []}), ColumnDataSource({"x": [], "y": []})
        figure = _figure("Loss", "round")
        for source, colour, name in ((train, TRAIN, "train"), (val, VAL, "val")):
            figure.line("x", "y", source=source, color=colour, line_width=2, legend_label=name)
            figure.scatter("x", "y", source=source, color=colour, size=4, legend_label=name)
        _hover(figure, [("round", "@x"), ("loss", "@y{0.0000}")])
        figure.legend.background_fill_alpha = 0.5

        def update(state: RunState) -> None:
            train.data, val.data = _points(state, "train_loss"), _points(state, "val_loss")

        self._updates.append(update)
        return figure

    def throughput(self) -> Any:
        """Return samples a second over rounds."""
        return self._over_rounds("Throughput of the last rounds", "samples/s", speeds)

    def traffic(self) -> Any:
        """Return the bytes that replicas send in each round, to be averaged."""
        return self._over_rounds(
            "Bytes sent to be averaged", "MB a round", lambda rows: [(row["bytes"] or 0) / 1e6 for row in rows]
        )

    def _over_rounds(self, title: str, label: str, values: Callable[[list[dict[str, Any]]], list[float]]) -> Any:
        from bokeh.models import ColumnDataSource

        source = ColumnDataSource({"x": [], "y": []})
        figure = _figure(title, "round", label)
        figure.y_range.start = 0
        figure.line("x", "y", source=source, color=TRAIN, line_width=2)
        figure.scatter("x", "y", source=source, color=TRAIN, size=4)
        _hover(figure, [("round", "@x"), (label, "@y{0,0.00}")])

        def update(state: RunState) -> None:
            rows = state.rounds.items()
            source.data = {"x": [row["round"] for row in rows], "y": values(rows)}

        self._updates.append(update)
        return figure

    def timeline(self) -> Any:
        """Return who trained when on which worker: a row a replica, and rows of evaluations and averages."""
        from bokeh.models import ColumnDataSource, DatetimeTickFormatter, Range1d

        names = ("left", "right", "bottom", "top", "colour", "worker", "round", "what", "seconds")
        source = ColumnDataSource({name: [] for name in names})
        figure = _figure("Who trains when, coloured by worker", "time", "replica", x_axis_type="datetime")
        figure.y_range = Range1d(-2.6, 1.6)
        figure.xaxis.formatter = DatetimeTickFormatter(seconds="%H:%M:%S", minsec="%H:%M:%S", minutes="%H:%M")
        figure.yaxis.major_label_overrides = {row: name for name, row in ROWS.items()}
        figure.quad("left", "right", "top", "bottom", source=source, color="colour", alpha=0.85)
        _hover(figure, [("task", "@what"), ("round", "@round"), ("worker", "@worker"), ("seconds", "@seconds{0.000}")])

        def update(state: RunState) -> None:
            spans = list(state.spans)
            source.data = {
                "left": [1e3 * one["start"] for one in spans],
                "right": [1e3 * one["stop"] for one in spans],
                "bottom": [one["row"] - 0.42 for one in spans],
                "top": [one["row"] + 0.42 for one in spans],
                "colour": [self._colour(one["worker"]) for one in spans],
                "worker": [one["worker"] for one in spans],
                "round": [one["round"] if one["round"] is not None else "" for one in spans],
                "what": [one["what"] for one in spans],
                "seconds": [one["stop"] - one["start"] for one in spans],
            }
            replicas = max([int(state.facts.get("replicas") or 1), *(one["row"] + 1 for one in spans)])
            figure.y_range.start, figure.y_range.end = -2.6, replicas - 0.4
            figure.yaxis.ticker = sorted({*ROWS.values(), *range(0, replicas, max(1, replicas // 8))})

        self._updates.append(update)
        return figure

    def _colour(self, worker: str) -> str:
        return self._colours.setdefault(worker, WORKERS[len(self._colours) % len(WORKERS)])

    def faults(self) -> Any:
        """Return the last faults; they are text of others, which is escaped."""
        return self._text(faults_html)

    def summary(self) -> Any:
        """Return how far the run is, and what its replicas do."""
        return self._text(summary_html)

    def _text(self, html: Callable[[RunState], str]) -> Any:
        from bokeh.models import Div

        div = Div(text="No run of dtrain has begun since this page was added.", sizing_mode="stretch_width")

        def update(state: RunState) -> None:
            div.text = html(state)

        self._updates.append(update)
        return div

    def choice(self) -> Any:
        """Return the box to choose a run, of several on one scheduler."""
        from bokeh.models import Select

        box = Select(value=NEWEST, options=[(NEWEST, "the newest run")], width=220)

        def choose(attribute: str, old: str, new: str) -> None:
            self.chosen, self._shown = new, None
            self.update()

        def update(state: RunState) -> None:
            runs = [(run, f"{one.name} ({run})") for run, one in reversed(self.board.runs.items())]
            box.options = [(NEWEST, "the newest run"), *runs]

        box.on_change("value", choose)
        self._updates.append(update)
        return box


PANES: dict[str, str] = {
    "loss": "loss",
    "timeline": "timeline",
    "throughput": "throughput",
    "bytes": "traffic",
    "faults": "faults",
    "summary": "summary",
}
"""By the end of its address (``/individual-dtrain-loss``): the plot of a pane."""


def pane(board: Board, plot: str, document: Any) -> None:
    """Make the document of a pane."""
    plots = Plots(board)
    root = getattr(plots, plot)()
    root.sizing_mode = "stretch_both"
    document.title = f"Dask: dtrain {plot}"
    _live(document, plots, root)


def page(board: Board, extra: dict[str, Any], document: Any) -> None:
    """Make the document of the page ``dtrain``, with the bar of Dask's pages above it."""
    from bokeh.layouts import column, row
    from distributed.dashboard.components.scheduler import env

    plots = Plots(board)
    left = column(plots.loss(), plots.throughput(), sizing_mode="stretch_width")
    right = column(plots.timeline(), plots.traffic(), sizing_mode="stretch_width")
    root = column(
        plots.choice(),
        plots.summary(),
        row(left, right, sizing_mode="stretch_width"),
        plots.faults(),
        sizing_mode="stretch_width",
        styles={"padding": "8px 16px"},
    )
    document.title = "Dask: dtrain"
    document.template = env.get_template("simple.html")
    document.template_variables.update(extra)
    _live(document, plots, root)


def _live(document: Any, plots: Plots, root: Any) -> None:
    """Show plots and keep them up to date while the page is open."""
    plots.update()
    document.add_root(root)

    def update() -> None:
        try:
            plots.update()
        except Exception as error:
            logging.getLogger("distributed.scheduler").info("The page of dtrain could not be updated: %s", error)

    document.add_periodic_callback(update, UPDATE_MILLISECONDS)


# Parts ----------------------------------------------------------------------------------------------------


def _figure(title: str, x: str, y: str = "", **options: Any) -> Any:
    from bokeh.models import BasicTicker
    from bokeh.plotting import figure

    made = figure(
        title=title,
        height=260,
        sizing_mode="stretch_width",
        tools="pan,xwheel_zoom,box_zoom,reset",
        toolbar_location="above",
        x_axis_label=x,
        y_axis_label=y or None,
        **options,
    )
    made.toolbar.logo = None
    if x == "round":  # whole numbers, also of the first rounds
        made.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
    return made


def _hover(figure: Any, tips: list[tuple[str, str]]) -> None:
    from bokeh.models import HoverTool

    figure.add_tools(HoverTool(tooltips=tips))


def _points(state: RunState, name: str) -> dict[str, list[Any]]:
    rows = [row for row in state.rounds.items() if row[name] is not None]
    return {"x": [row["round"] for row in rows], "y": [row[name] for row in rows]}
