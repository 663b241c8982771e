"""dtrain config: the configuration, resolved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dtrain_cli.output import Options, result
from dtrain_cli.train import SET

app = typer.Typer(help="Show configurations.", no_args_is_help=True)


@app.command("show")
def show(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="CONFIG|RUN", help="A config file, or a run.", show_default=False)],
    settings: SET = None,
) -> None:
    """Show every key with its value and where that comes from."""
    from dtrain.config import flat_values, load_config, read_tables, without_secrets
    from dtrain.run import find_run, load_run

    options: Options = ctx.obj
    path = Path(source)
    if path.is_file() or path.suffix in (".toml", ".yaml", ".yml", ".json"):
        given = set(_keys(read_tables(path)))
        config = load_config(path, tuple(settings or ()))
    else:
        given, config = set(), load_run(find_run(source)).config
    by_hand = {text.partition("=")[0].strip() for text in settings or ()}
    keys = {key: (value, _origin(key, value, given, by_hand)) for key, value in flat_values(without_secrets(config))}
    width = max(len(f"{key} = {json.dumps(value)}") for key, (value, _) in keys.items() if len(json.dumps(value)) < 40)
    lines = [
        f"{f'{key} = {json.dumps(value)}':<{width}}  # {origin}"
        for key, (value, origin) in keys.items()
        if value is not None or origin != "default"
    ]
    record = {"event": "config", "values": {k: {"value": v, "origin": o} for k, (v, o) in keys.items()}}
    result(options, "\n".join(lines), record)


@app.command("schema")
def schema(ctx: typer.Context) -> None:
    """Print the JSON Schema of config files."""
    from dtrain.config import TrainConfig

    found = TrainConfig.model_json_schema()
    result(ctx.obj, json.dumps(found, indent=1), found)


def _keys(tables: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in tables.items():
        found.append(f"{prefix}{name}")
        if isinstance(value, dict):
            found += _keys(value, f"{prefix}{name}.")
    return found


def _origin(key: str, value: Any, given: set[str], by_hand: set[str]) -> str:
    if any(key == name or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in by_hand):
        return "--set"
    if key in given:
        return "file"
    from dtrain.config import DEFAULTS, flat_values

    if dict(flat_values(DEFAULTS)).get(key) != value:
        return "run"
    return "auto: resolved when the run starts" if value == "auto" else "default"
