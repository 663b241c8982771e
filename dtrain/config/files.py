"""Read configuration files (TOML, YAML, JSON), apply ``--set`` settings, write a configuration as TOML."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from dtrain.config.schema import REQUIRED, TrainConfig, check_plain
from dtrain.config.values import MOST_DEPTH, Plain, Tables, value_of
from dtrain.errors import ConfigFileNotFound, InvalidConfig, UsageError, shortened

TLS_KEYS = ("cluster.tls.ca", "cluster.tls.cert", "cluster.tls.key")
PATH_KEYS = ("data.path", "data.val_path", "train.init", "run.dir", "cluster.scheduler", *TLS_KEYS)
TWICE_GIVEN = re.compile(r"Cannot (declare .* twice|overwrite)")
"""In messages of tomllib."""
TWICE = "A table or key is given twice: keep one, and put the keys of both tables into it."
MOST_BYTES = 2**24
"""Of a config file."""
TOO_DEEP = f"it is nested too deeply; at most {MOST_DEPTH} levels are allowed"
YAML_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def load_config(path: str | Path, settings: tuple[str, ...] = ()) -> TrainConfig:
    """Read a config file and apply ``key=value`` settings.

    Parameters
    ----------
    path : path
        A ``.toml``, ``.yaml``, ``.yml`` or ``.json`` file.
    settings : tuple of str
        ``"train.rounds=50"``; values in TOML syntax, bare words as strings. Paths in them are relative to the
        working directory, paths in the file to the file.

    Raises
    ------
    ConfigFileNotFound
        There is no such file.
    InvalidConfig
        The file or a setting does not follow the schema.
    """
    tables = read_tables(path)
    for setting in settings:
        tables = with_setting(tables, setting)
    config = TrainConfig(**tables)
    for key in REQUIRED:
        if not value_of(config, key):
            raise InvalidConfig(
                f"{path}: {key} is missing.", f"Every run needs {key}; `dtrain init` writes an example."
            )
    return config


def read_tables(path: str | Path) -> Tables:
    """Return the nested tables of a config file; the schema is not checked.

    Raises
    ------
    ConfigFileNotFound
        There is no such file.
    InvalidConfig
        The file is not valid TOML, YAML or JSON.
    """
    path = Path(path)
    text = _read(path)
    try:
        tables = _parse(path.suffix.lower(), text)
    except RecursionError:
        raise InvalidConfig(f"{path}: {TOO_DEEP}.") from None
    except ValueError as error:
        said = " ".join(str(error).split())
        raise InvalidConfig(f"{path}: {said}", TWICE if TWICE_GIVEN.search(said) else "") from None
    if not isinstance(tables, dict):
        raise InvalidConfig(f"{path}: holds {type(tables).__name__}, not tables of keys.")
    if odd := [key for key in tables if not isinstance(key, str)]:
        raise InvalidConfig(f"{path}: the key {odd[0]!r} is not text; put it in quotes.")
    return tables


def _read(path: Path) -> str:
    if path.is_dir():
        raise ConfigFileNotFound(f"{path} is a directory, not a config file.", f"Try {path / 'dtrain.toml'}")
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise InvalidConfig(f"{path}: a config file has at most {MOST_BYTES:,} bytes.")
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise ConfigFileNotFound(f"{path}: no such config file.", "`dtrain init` writes one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path}: cannot be read: {error}") from None


def _parse(suffix: str, text: str) -> Any:
    if suffix in (".yaml", ".yml"):
        import yaml  # comes with Dask

        class Loader(yaml.SafeLoader):
            """Reads 1e-3 as a number, as TOML and JSON do; PyYAML asks for 1.0e-3."""

        Loader.add_implicit_resolver("tag:yaml.org,2002:float", YAML_FLOAT, list("-+.0123456789"))
        try:
            return yaml.load(text, Loader)
        except yaml.YAMLError as error:  # its text quotes the lines of the file, which may hold a secret
            place = getattr(error, "problem_mark", None)
            where = f"line {place.line + 1}, column {place.column + 1}: " if place is not None else ""
            raise ValueError(f"{where}{getattr(error, 'problem', None) or type(error).__name__}") from None
    if suffix == ".json":
        return json.loads(text)
    return tomllib.loads(text)


def with_setting(tables: Tables, setting: str) -> Tables:
    """Return tables with one ``key=value`` setting applied."""
    key, equals, text = setting.partition("=")
    key = key.strip()
    if key.count(".") > MOST_DEPTH:
        raise UsageError(f"--set {shortened(key, 60)}: {TOO_DEEP}.")
    if not equals or not key:
        raise UsageError(f"--set {setting}: write it as key=value, for example --set train.rounds=50")
    value = _toml_value(text.strip())
    if key in PATH_KEYS:
        value = [_absolute(one) for one in value] if isinstance(value, list) else _absolute(value)
    if key == "cluster.tls" and isinstance(value, dict):
        value = {name: _absolute(one) for name, one in value.items()}
    return _replaced(tables, key.split("."), value, key)


def _absolute(value: Plain) -> Plain:
    """Return a path relative to the working directory as an absolute one; any other value as it is."""
    if not isinstance(value, str) or "://" in value or value in ("", "local", "serial"):
        return value
    return str(Path(value).expanduser().absolute())


def _toml_value(text: str) -> Plain:
    """Return a value in TOML syntax; a bare word is a string."""
    try:
        value: Plain = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except RecursionError:
        raise InvalidConfig(f"--set: {TOO_DEEP}.") from None
    return value


def _replaced(tables: Tables, parts: list[str], value: Plain, key: str) -> Tables:
    head, *rest = parts
    if not rest:
        return {**tables, head: value}
    inner = tables.get(head, {})
    if not isinstance(inner, dict):
        whole = key.removesuffix("." + ".".join(rest))
        raise InvalidConfig(
            f"--set {key}: {whole} is not a table.", f"Set all of it: --set '{whole}={{ {'.'.join(rest)} = ... }}'"
        )
    return {**tables, head: _replaced(inner, rest, value, key)}


def to_toml(config: TrainConfig) -> str:
    """Return a configuration as TOML; keys without a value are left out."""
    import tomli_w

    check_plain(config)  # model_copy(update=...) checks nothing
    tables = config.model_dump(mode="json", exclude_none=True)
    if "local_steps" in tables["train"]:
        del tables["train"]["local_epochs"]  # one of them is given, never both
    return tomli_w.dumps(tables)
