"""dtrain config: show a configuration with its defaults, compare two, print the schema, and presets of averaging."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrain_cli import completion
from dtrain_cli.arguments import SET, epilog
from dtrain_cli.output import result, say, table

if TYPE_CHECKING:
    from dtrain.config.schema import TrainConfig
    from dtrain.config.values import Plain, Tables

ORDER = 60
WIDTH = 80
EPILOG = epilog(
    ("dtrain config show my/dtrain.toml", "each key with its value and its origin"),
    ("dtrain config diff my/dtrain.toml my", "a run against a file"),
    ("dtrain config presets diloco", "a published way of averaging, as TOML"),
)
app = typer.Typer(
    name="config",
    help="Show and compare configurations, their schema, and presets of averaging.",
    epilog=EPILOG,
    no_args_is_help=True,
)


SHOW = epilog(
    ("dtrain config show my/dtrain.toml", "each key with its value and its origin"),
    ("dtrain config show my/dtrain.toml --set train.rounds=50", ""),
    ("dtrain config show my --json", "of a run"),
)
SCHEMA = epilog(
    ("dtrain config schema > dtrain.schema.json", "for editors"),
    ("#:schema ./dtrain.schema.json", "as the first line of dtrain.toml"),
)
DIFF = epilog(
    ("dtrain config diff my/dtrain.toml other/dtrain.toml", "two files"),
    ("dtrain config diff my my/dtrain.toml", "a run and a file"),
    ("dtrain config diff first second --json", "two runs"),
)
PRESET = epilog(
    ("dtrain config presets", "lists them, with their sources"),
    ("dtrain config presets diloco", "one, as TOML to paste"),
)


@app.command("show", epilog=SHOW)
def show(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|RUN",
            help="A config file, or a run.",
            show_default=False,
            autocompletion=completion.config_files_or_runs,
        ),
    ],
    settings: SET = None,
) -> None:
    """Show every key with its value and its origin."""
    from dtrain.config.compare import without_secrets
    from dtrain.config.values import flat_values

    config, given = _read(source, tuple(settings or ()))
    by_hand = {text.partition("=")[0].strip() for text in settings or ()}
    values = dict(flat_values(without_secrets(config)))
    origins = {key: _origin(key, value, given, by_hand) for key, value in values.items()}
    record = {key: {"value": value, "origin": origins[key]} for key, value in values.items()}
    result(ctx.obj, _text(values, origins), {"event": "config", "values": record})
    if Path(source).is_file():
        say(ctx.obj, f"next: dtrain plan {source}")


@app.command("schema", epilog=SCHEMA)
def schema(ctx: typer.Context) -> None:
    """Print the JSON Schema of config files: an editor with it completes and explains keys."""
    from dtrain.config.jsonschema import json_schema

    schema = json_schema()
    result(ctx.obj, json.dumps(schema, indent=1), schema)
    say(
        ctx.obj,
        "next: dtrain config schema > dtrain.schema.json, and `#:schema ./dtrain.schema.json` as the first line of "
        "dtrain.toml: editors with Taplo (Even Better TOML) read it.",
    )


@app.command("diff", epilog=DIFF)
def diff(
    ctx: typer.Context,
    first: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A config file, or a run.",
            show_default=False,
            autocompletion=completion.config_files_or_runs,
        ),
    ],
    second: Annotated[
        str,
        typer.Argument(
            metavar="B", help="Another one.", show_default=False, autocompletion=completion.config_files_or_runs
        ),
    ],
) -> None:
    """Show which keys differ between two configurations, and which of them a continued run may change."""
    from dtrain.config.compare import differences, may_change, without_secrets

    (old, _), (new, _) = _read(first, ()), _read(second, ())
    changes = [
        {"key": key, "old": before, "new": after, "may_change": may_change(key, new)}
        for key, before, after in differences(without_secrets(old), without_secrets(new))
    ]
    result(ctx.obj, _changes_text(changes), {"event": "diff", "a": first, "b": second, "changes": changes})
    if fixed := [change["key"] for change in changes if not change["may_change"]]:
        one = "is a key" if len(fixed) == 1 else f"are {len(fixed)} keys"
        say(ctx.obj, f"There {one} that a continued run cannot change: train B under another --run NAME.")
    elif changes:
        say(ctx.obj, "A continued run may change all of them: dtrain train goes on.")


@app.command("presets", epilog=PRESET)
def presets(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A preset.", show_default=False, autocompletion=completion.presets),
    ] = None,
) -> None:
    """List ways of averaging, or print one as TOML to paste, with its source."""
    from dtrain.config.presets import PRESETS, preset_named
    from dtrain_cli.survey.document import plain

    if name is None:
        rows = [(preset.name, f"{preset.summary}. {preset.source}") for preset in PRESETS.values()]
        records = [{"name": each.name, "summary": each.summary, "source": each.source} for each in PRESETS.values()]
        result(ctx.obj, table(rows), {"event": "presets", "presets": records})
        say(ctx.obj, "`dtrain config presets NAME` prints one as TOML to paste.")
        return
    preset = preset_named(name)
    record = {key: plain(getattr(preset, key)) for key in ("name", "summary", "source", "about", "adapt")}
    text = _document(record, preset.toml)
    result(ctx.obj, text, {"event": "presets", **record, "tables": preset.tables, "toml": text})


def _changes_text(changes: list[dict[str, Any]]) -> str:
    """Return a line ``key = old -> new  # whether a continued run may change it`` for each key that differs."""
    if not changes:
        return "no key differs"
    lines = [f"{one['key']} = {_value(one['old'])} -> {_value(one['new'])}" for one in changes]
    width = max((len(line) for line in lines if len(line) <= WIDTH), default=0)
    notes = ["a continued run may change it" if one["may_change"] else "a new run" for one in changes]
    return "\n".join(f"{line:<{width}}  # {note}" for line, note in zip(lines, notes, strict=True))


def _value(value: Plain) -> str:
    return "not given" if value is None else json.dumps(value)


def _document(texts: Mapping[str, str], toml: str) -> str:
    """Return a preset as TOML, with its source and what to adapt as comments."""
    from dtrain.display import wrapped

    paragraphs = (
        f"{texts['name']}: {texts['summary']}",
        f"Source: {texts['source']}",
        texts["about"],
        f"Adapt: {texts['adapt']}",
        "Paste the keys into the tables of the same names in your config file.",
    )
    return "\n".join([*(f"# {wrapped(text, WIDTH - 2, '#   ')}" for text in paragraphs), toml.rstrip()])


def _read(source: str, settings: tuple[str, ...]) -> tuple[TrainConfig, set[str]]:
    """Return the configuration of a config file or a run, and the keys that the file gives."""
    from dtrain.config.files import load_config, read_tables
    from dtrain.directory import find_run
    from dtrain.runs import load_run

    path = Path(source)
    if path.is_file() or path.suffix in (".toml", ".yaml", ".yml", ".json"):
        return load_config(path, settings), set(_keys(read_tables(path)))
    return load_run(find_run(source)).config, set()


def _keys(tables: Tables, prefix: str = "") -> list[str]:
    keys = []
    for name, value in tables.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, dict):
            keys += _keys(value, f"{prefix}{name}.")
    return keys


def _origin(key: str, value: Plain, given: set[str], by_hand: set[str]) -> str:
    if any(key == name or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in by_hand):
        return "--set"
    if key in given:
        return "file"
    from dtrain.config.schema import DEFAULTS
    from dtrain.config.values import flat_values

    if dict(flat_values(DEFAULTS)).get(key) != value:
        return "run"
    return "auto: resolved when the run starts" if value == "auto" else "default"


def _text(values: Tables, origins: dict[str, str]) -> str:
    """Return a line ``key = value  # origin`` for each key; values of usual length are aligned."""
    lines = {key: f"{key} = {json.dumps(value)}" for key, value in values.items()}
    width = max(len(lines[key]) for key, value in values.items() if len(json.dumps(value)) < 40)
    shown = [key for key, value in values.items() if value is not None or origins[key] != "default"]
    return "\n".join(f"{lines[key]:<{width}}  # {origins[key]}" for key in shown)
