"""The model card: what a file holds, how to call it, and what it was trained on, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.config.schema import DEFAULTS, TrainConfig
from dtrain.config.values import flat_values
from dtrain.display import number
from dtrain.exporting.facts import Facts, Tensor

MOST_CLASSES = 50
"""Classes whose names are listed; the metadata of the file has all of them."""
SHOWN_SETTINGS = ("train.", "average.", "stop.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Where a model comes from."""

    name: str
    """Of the run."""
    round: int
    is_average: bool
    """Whether it is the moving average of models (``average.ema``)."""
    config: TrainConfig
    """Without secrets."""
    row: Mapping[str, Any]
    """The round's line of the history."""
    data: Sequence[tuple[str, str]]
    """Label and text of each line about the data."""
    versions: Mapping[str, str]
    params_sha256: str


def card_text(facts: Facts, trained: Trained, file: str, usage: str, checked: str) -> str:
    """Return a model card.

    Parameters
    ----------
    facts : Facts
    trained : Trained
    file : str
        Name of the file.
    usage : str
        Lines of Python that load and call it.
    checked : str
        What the comparison with the run's model gave.
    """
    what = f"round {trained.round}" + (", the moving average of models" if trained.is_average else "")
    sections = {
        "Use": _use(facts, usage),
        "Inputs and outputs": [*_inputs(facts), "", *_outputs(facts)],
        "Data": _table(("", ""), trained.data),
        "Training": _table(("key", "value"), _settings(trained.config)),
        f"Metrics of round {trained.round}": _table(("", ""), _metrics(trained.row)),
        "Check": [checked],
        "Versions": _table(("package", "version"), [(name, text) for name, text in trained.versions.items() if text]),
    }
    lines = [f"# {trained.name}", "", f"`{file}` is the model of run {trained.name}, {what}, trained with dtrain."]
    lines += [f"`params_sha256` of its parameters: `{trained.params_sha256}`"]
    for title, content in sections.items():
        lines += ["", f"## {title}", "", *content]
    return "\n".join(lines) + "\n"


def _use(facts: Facts, usage: str) -> list[str]:
    return [
        "It needs no dtrain. It takes decoded values (scale and offset applied, in the units of the data, float32; "
        "integers as int64) of any number of samples at once; normalisation is inside.",
        "",
        "```python",
        usage,
        "```",
    ]


def _inputs(facts: Facts) -> Iterator[str]:
    rows = [(f"`{one.name}`", one.axes, one.dtype, _notes(one, facts.fills)) for one in facts.inputs]
    yield from _table(("input", "axes", "dtype", "notes"), rows)


def _outputs(facts: Facts) -> Iterator[str]:
    rows = [
        (f"`{one.name or one.argument}`", one.axes, one.dtype, _output_notes(one, one.name in facts.standardised))
        for one in facts.outputs
    ]
    yield from _table(("output for", "axes", "dtype", "notes"), rows)


def _notes(one: Tensor, fills: bool) -> str:
    notes = [f"rows {', '.join(f'{row:+d}' for row in one.rows)} from the sample's" if one.rows else ""]
    notes.append("standardised inside" if one.is_scaled else "")
    notes.append("values that are not finite become 0" if fills and (one.is_float or one.is_scaled) else "")
    notes.append(f"names of the columns have the digest `{one.genes[:16]}...`" if one.genes else "")
    notes.append(_classes("codes", one.classes))
    return "; ".join(filter(None, notes))


def _output_notes(one: Tensor, is_standardised: bool) -> str:
    units = "in the units of the data" if one.is_scaled else "standardised, not restored" if is_standardised else ""
    return "; ".join(filter(None, [units, _classes("classes", one.classes)]))


def _classes(word: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    listed = ", ".join(f"{code} {name}" for code, name in enumerate(names[:MOST_CLASSES]))
    return f"{word}: {listed}" + (f" and {len(names) - MOST_CLASSES:,} more" if len(names) > MOST_CLASSES else "")


def _settings(config: TrainConfig) -> list[tuple[str, str]]:
    """Return the settings that differ from the defaults, and those that every run has."""
    defaults, own = dict(flat_values(DEFAULTS)), dict(flat_values(config))
    shown = {"model", "model_args", "train.loss", "train.rounds", "train.batch_size", "train.optimizer"}
    changed = {k for k, value in own.items() if k.startswith(SHOWN_SETTINGS) and value != defaults.get(k)}
    return [(f"`{key}`", f"`{json.dumps(value)}`") for key, value in own.items() if key in shown | changed]


def _metrics(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = [name for name in row if name == "train_loss" or name.startswith("val_")]
    return [(name, "not finite" if row[name] is None else number(row[name])) for name in names]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(_cell(text) for text in line)} |" for line in lines]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
