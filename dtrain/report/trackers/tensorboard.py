"""TensorBoard: event files in the run's directory. ``tensorboard --logdir runs`` shows all runs.

Each round's points are there once, also after kills and replays: a start looks for the last round that is complete in
the event files, marks what follows as purged (``purge_step``), and writes the rounds that the history has beyond it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.events import Event, RoundFinished, RunFinished, RunStarted
from dtrain.report.history import Row, row_of
from dtrain.report.points import LAST, points, rows_between, settings_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PACKAGE = "tensorboard"
EXTRA = "tensorboard"
LOOK = "tensorboard --logdir {runs}"
FOLDER = "tensorboard"
"""Below the run's directory."""
COMPARED = ("val_loss", "train_loss")
"""Points that the page of hyper-parameters shows beside them."""


class Tracker:
    """Writes the points of each round, the settings as text, and both for the page of hyper-parameters."""

    def __init__(self) -> None:
        self._start: RunStarted | None = None
        self._run = Path()
        self._writer: SummaryWriter | None = None
        self._written = 0
        """The last round that is written."""

    def __call__(self, event: Event) -> None:
        """Take an event."""
        match event:
            case RunStarted():
                self.close()
                self._start, self._run = event, Path(event.run).absolute()
                self._written = min(complete_rounds(self._run / FOLDER), event.round)
                self._write(rows_between(self._run, self._written, event.round))
            case RoundFinished(result) if self._start is not None:
                if result.round > self._written + 1:  # a write has failed
                    self._write(rows_between(self._run, self._written, result.round - 1))
                self._write([row_of(result)])
            case RunFinished():
                self.close()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, rows: list[Row]) -> None:
        if rows:
            writer = self._opened()
            for row in rows:
                for name, value in points(row).items():
                    writer.add_scalar(name, value, row["round"])
                self._written = row["round"]
            writer.flush()

    def _opened(self) -> SummaryWriter:
        """Return the writer; it begins an event file that purges what earlier ones have after the written rounds."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            assert self._start is not None
            folder = self._run / FOLDER
            is_new = not folder.exists()
            self._writer = SummaryWriter(str(folder), purge_step=self._written + 1)
            if is_new:
                self._write_settings(self._writer, settings_of(self._start.settings))
        return self._writer

    def _write_settings(self, writer: SummaryWriter, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        table = ["| key | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in settings.items())]
        writer.add_text("settings", "\n".join(table), 0)
        for summary in hparams(settings, dict.fromkeys(COMPARED, 0.0)):  # type: ignore[no-untyped-call]
            writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]


def complete_rounds(folder: Path) -> int:
    """Return the last of the rounds, from the first one on, whose points are all in the event files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    if not folder.exists():
        return 0
    found = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    found.Reload()
    if LAST not in found.Tags()[SCALARS]:
        return 0
    steps = {event.step for event in found.Scalars(LAST)}
    return next(number - 1 for number in range(1, len(steps) + 2) if number not in steps)
