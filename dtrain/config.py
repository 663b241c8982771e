"""TrainConfig: every value a run depends on, checked once, frozen, the same from TOML, YAML, JSON or Python.

The schema is the whole of what users see; a key whose feature this version lacks is refused with a sentence
when it is set, never accepted and ignored (`NOT_BUILT`).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date, time
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from dtrain.errors import ConfigFileNotFound, InvalidConfig, NotSupportedYet, UsageError, did_you_mean

Int = Annotated[int, Strict()]
Natural = Annotated[int, Strict(), Field(ge=0)]
Positive = Annotated[int, Strict(), Field(ge=1)]
Float = Annotated[float, Strict()]
NonNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Strict(), Field(ge=0, lt=1)]
Bool = Annotated[bool, Strict()]
Size = Annotated[str, BeforeValidator(lambda given: str(given) if type(given) is int else given)]
"""``auto``, or bytes such as ``512MB``; a number counts bytes."""

FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
"""A reference to a user's function, ``module:function``."""

LOSSES = ("mse", "mae", "huber", "cross_entropy", "bce")
METRICS = ("accuracy", "mse", "mae", "perplexity", "bits_per_byte")
SCHEDULES = ("constant", "cosine", "linear")


class Table(BaseModel):
    """A table of the configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants", protected_namespaces=())


class Slice(Table):
    """``{ start, stop, step }`` along one dimension."""

    start: Int = 0
    stop: Int
    step: Positive = 1


class Store(Table):
    """One of several stores (federated data)."""

    path: str
    workers: tuple[str, ...] = ()
    replicas: Positive = 1


Offsets = Int | tuple[Int, ...] | Slice


class SplitConfig(Table):
    """Shares of the data held out for validation and test."""

    val: Share = 0.1
    test: Share = 0.1

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError(f"val + test = {self.val + self.test:g} leaves nothing to train on; they must sum to < 1")
        return self


class DataConfig(Table):
    """``[data]``: which samples there are and how they are cut."""

    @field_validator("input_offsets", "target_offsets")
    @classmethod
    def _not_empty(cls, offsets: Offsets) -> Offsets:
        if isinstance(offsets, Slice) and offsets.stop <= offsets.start:
            raise ValueError(f"start = {offsets.start} and stop = {offsets.stop} hold no offset")
        if offsets == ():
            raise ValueError("is an empty list; give at least one offset")
        return offsets

    path: str | tuple[Store, ...] = ""
    inputs: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    storage_options: dict[str, Any] = Field(default={}, repr=False)
    group: str = ""
    isel: dict[str, Int | Slice] = {}
    sample_dim: str = "auto"
    input_offsets: Offsets = 0
    target_offsets: Offsets = 0
    stride: Positive = 1
    patch: dict[str, Positive] = {}
    split: SplitConfig = SplitConfig()
    split_order: Literal["auto", "random", "sequential"] = "auto"
    val_path: str = ""
    partition: Literal["stratified", "contiguous"] = "stratified"
    normalize: tuple[str, ...] = ()
    transform: str = ""
    missing: Literal["error", "fill", "skip"] = "error"
    non_finite: Literal["error", "allow"] = "error"
    shuffle: Bool = True
    memory: Size = "auto"
    cache: Size = "auto"
    reader: Literal["auto", "numcodecs", "zarrs", "zarr"] = "auto"


class TrainTable(Table):
    """``[train]``: what one replica does in one round."""

    loss: str = ""
    metrics: tuple[str, ...] = ()
    rounds: Positive = 20
    local_epochs: Positive = 1
    local_steps: Positive | None = None
    sync_rounds: Natural = 0
    batch_size: Positive | Literal["full"] = 100
    micro_batch: Natural = 0
    optimizer: str = "sgd"
    optimizer_args: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
    schedule: str = "constant"
    warmup_steps: Natural = 0
    clip_norm: NonNegative = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    init: str = ""
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.local_steps is not None and "local_epochs" in self.model_fields_set:
            raise ValueError("local_epochs and local_steps are both given; give one of them")
        return self


class MixConfig(Table):
    """``[average.mix]``: which replicas are averaged with which."""

    topology: Literal["full", "ring", "exponential", "hierarchical"] = "full"
    groups: Natural = 0
    period: Positive = 1


class OuterConfig(Table):
    """``[average.outer]``: the outer optimizer on the pseudo-gradient."""

    optimizer: str = "sgd"
    args: dict[str, Any] = {"lr": 0.7, "momentum": 0.9, "nesterov": True}


class CodecConfig(Table):
    """``[average.codec]``: how updates are compressed."""

    name: Literal["bf16", "int8", "int4"] = "int8"
    error_feedback: Bool = True


class AverageConfig(Table):
    """``[average]``: how the replicas' parameters become one set of parameters."""

    replicas: Positive | Literal["auto"] = "auto"
    weights: Literal["samples", "uniform", "fednova"] = "samples"
    reduce: Literal["mean", "median", "trimmed"] = "mean"
    inner_state: Literal["keep", "average", "reset"] = "keep"
    prox: NonNegative = 0.0
    max_rejected: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.25
    ema: Share = 0.0
    recalibrate_batchnorm: Bool = False
    mix: MixConfig = MixConfig()
    outer: OuterConfig | None = None
    codec: CodecConfig | None = None


class StopConfig(Table):
    """``[stop]``: when the requirement is met."""

    metric: str = "val_loss"
    mode: Literal["auto", "min", "max"] = "auto"
    target: Float | None = None
    patience: Positive | None = None
    min_delta: NonNegative = 0.0


class ClusterConfig(Table):
    """``[cluster]``: where tasks run."""

    scheduler: str = "local"
    workers: Positive | Literal["auto"] = "auto"
    threads: Positive = 1
    memory: Size = "auto"
    allow_plain: Bool = False
    slices: Positive | Literal["auto"] = "auto"
    tls: dict[Literal["ca", "cert", "key"], str] = {}


class RunConfig(Table):
    """``[run]``: what is kept."""

    dir: str = "runs"
    commit_every: Positive | Literal["auto"] = "auto"
    keep: Positive = 3
    trackers: tuple[str, ...] = ()


class TrainConfig(Table):
    """The configuration of a run.

    Raises
    ------
    InvalidConfig
        A key is unknown, a value has the wrong type or is not allowed; every fault is named.
    NotSupportedYet
        A key asks for a feature that this version does not have.
    """

    model: str = ""
    model_args: dict[str, Any] = {}
    data: DataConfig = DataConfig()
    train: TrainTable = TrainTable()
    average: AverageConfig = AverageConfig()
    stop: StopConfig = StopConfig()
    cluster: ClusterConfig = ClusterConfig()
    run: RunConfig = RunConfig()

    def __init__(self, /, **tables: Any) -> None:
        try:
            super().__init__(**tables)
        except ValidationError as error:
            raise InvalidConfig(*_sentences(error)) from None
        _check_names(self)
        _check_plain(self)
        _refuse_what_is_not_built(self)


# What this version does not do yet ----------------------------------------------------------------------

NOT_BUILT: dict[str, str] = {
    "train.sync_rounds": "post-local SGD",
    "average.reduce": "robust averaging",
    "average.inner_state": "another policy for the inner optimizer's state",
    "average.prox": "FedProx",
    "average.ema": "an average over rounds",
    "average.recalibrate_batchnorm": "recalibration of batch norm",
    "average.mix.topology": "averaging among neighbours",
    "average.mix.groups": "hierarchical averaging",
    "average.mix.period": "hierarchical averaging",
    "average.codec": "compressed updates",
    "cluster.slices": "cutting the reducer into slices",
    "cluster.tls": "TLS clusters",
    "run.trackers": "trackers",
}
NOT_BUILT_VALUES: dict[str, tuple[Any, str]] = {
    "average.weights": ("fednova", "FedNova"),
}


def _refuse_what_is_not_built(config: TrainConfig) -> None:
    for key, feature in NOT_BUILT.items():
        given, default = value_of(config, key), value_of(DEFAULTS, key)
        if given != default:
            raise NotSupportedYet(
                f"{key} = {_toml(given)}: this version does not have {feature} yet.", f"Leave {key} out."
            )
    for key, (value, feature) in NOT_BUILT_VALUES.items():
        if value_of(config, key) == value:
            raise NotSupportedYet(
                f"{key} = {_toml(value)}: this version does not have {feature} yet.", f"Leave {key} out."
            )


# Names with a fixed list of values or a function of the user's ---------------------------------------------


def _check_names(config: TrainConfig) -> None:
    _check_name("train.loss", config.train.loss, LOSSES, empty=True)
    for name in config.train.metrics:
        _check_name("train.metrics", name, METRICS)
    _check_name("train.schedule", config.train.schedule, SCHEDULES)
    for key in ("data.memory", "cluster.memory"):
        if (text := value_of(config, key)) != "auto":
            parse_bytes(text, key)
    if config.data.cache != "auto":
        cache_bytes(config.data.cache)
    _check_name("data.transform", config.data.transform, (), empty=True)
    known = (*config.data.inputs, *config.data.targets)
    if odd := [name for name in config.data.normalize if name not in known]:
        raise InvalidConfig(
            f'data.normalize names "{odd[0]}", which is neither an input nor a target{did_you_mean(odd[0], known)}'
        )


def _check_name(key: str, name: str, allowed: tuple[str, ...], *, empty: bool = False) -> None:
    if name in allowed or FUNCTION.match(name) or (empty and not name):
        return
    names = ", ".join([*allowed, '"module:function"']).replace(', "module', ' or "module')
    raise InvalidConfig(f'{key} = "{name}": allowed are {names}{did_you_mean(name, allowed)}')


def _check_plain(config: TrainConfig) -> None:
    """Refuse values that config.toml cannot hold: Python, YAML and JSON can give them."""
    for key in ("model_args", "train.optimizer_args", "data.storage_options"):
        _check_plain_value(key, value_of(config, key))


def _check_plain_value(key: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_plain_value(f"{key}.{name}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_plain_value(key, inner)
    elif not isinstance(value, str | int | float | date | time):
        what = "null" if value is None else f"a {type(value).__name__}"
        raise InvalidConfig(f"{key} is {what}; allowed are text, numbers, booleans, dates, lists and tables.")


def cache_bytes(text: str) -> int:
    """Return the bytes that ``data.cache`` allows; 0 turns the cache off."""
    return 0 if text.strip().rstrip("bB").strip() == "0" else parse_bytes(text, "data.cache")


def parse_bytes(text: str, key: str) -> int:
    """Return the number of bytes that a text like ``512MB`` or ``2GiB`` names.

    Raises
    ------
    InvalidConfig
        The text is not a positive number of bytes.
    """
    try:
        value = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        value = 0
    if value <= 0:
        raise InvalidConfig(f'{key} = "{text}" is not a size; write "auto" or for example "512MB" or "2GiB".')
    return value


# Reading ------------------------------------------------------------------------------------------------


def load_config(path: str | Path, settings: tuple[str, ...] = ()) -> TrainConfig:
    """Read a config file, with ``key=value`` settings on top.

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
    for key, value in {
        "model": config.model,
        "data.path": config.data.path,
        "data.inputs": config.data.inputs,
        "data.targets": config.data.targets,
        "train.loss": config.train.loss,
    }.items():
        if not value:
            raise InvalidConfig(
                f"{path}: {key} is missing.", f"Every run needs {key}; `dtrain init` writes an example."
            )
    return config


def read_tables(path: str | Path) -> dict[str, Any]:
    """Return the nested tables of a config file, unchecked.

    Raises
    ------
    ConfigFileNotFound
        There is no such file.
    InvalidConfig
        The file is not valid TOML, YAML or JSON.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigFileNotFound(f"{path} is a directory, not a config file.", f"Try {path / 'dtrain.toml'}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigFileNotFound(f"{path}: no such config file.", "`dtrain init` writes one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path}: cannot be read: {error}") from None
    try:
        tables = _parse(path.suffix.lower(), text)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(tables, dict):
        raise InvalidConfig(f"{path}: holds {type(tables).__name__}, not tables of keys.")
    if odd := [key for key in tables if not isinstance(key, str)]:
        raise InvalidConfig(f"{path}: the key {odd[0]!r} is not text; put it in quotes.")
    return tables


def _parse(suffix: str, text: str) -> Any:
    if suffix in (".yaml", ".yml"):
        import yaml  # comes with Dask

        class Loader(yaml.SafeLoader):
            """Reads 1e-3 as a number, as TOML and JSON do; PyYAML asks for 1.0e-3."""

        Loader.add_implicit_resolver("tag:yaml.org,2002:float", YAML_FLOAT, list("-+.0123456789"))
        try:
            return yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
    if suffix == ".json":
        return json.loads(text)
    return tomllib.loads(text)


YAML_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
PATH_KEYS = ("data.path", "data.val_path", "train.init", "run.dir", "cluster.scheduler")


def with_setting(tables: dict[str, Any], setting: str) -> dict[str, Any]:
    """Return tables with one ``key=value`` setting on top, as `load_config` takes it."""
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UsageError(f"--set {setting}: write it as key=value, for example --set train.rounds=50")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if key in PATH_KEYS and isinstance(value, str) and "://" not in value and value not in ("", "local", "serial"):
        value = str(Path(value).expanduser().absolute())
    return _replaced(tables, key.split("."), value, key)


def _replaced(tables: dict[str, Any], parts: list[str], value: Any, key: str) -> dict[str, Any]:
    head, *rest = parts
    if not rest:
        return {**tables, head: value}
    inner = tables.get(head, {})
    if not isinstance(inner, dict):
        raise InvalidConfig(f"--set {key}: {head} is not a table.")
    return {**tables, head: _replaced(inner, rest, value, key)}


# Views --------------------------------------------------------------------------------------------------


def value_of(config: BaseModel, key: str) -> Any:
    """Return the value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


PLAIN: TypeAdapter[Any] = TypeAdapter(Any, config=ConfigDict(ser_json_inf_nan="constants"))


def flat_values(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its value in plain types, in the order of the schema."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from flat_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", PLAIN.dump_python(value, mode="json")


SECRET = re.compile(r"key|secret|token|passw|auth|cookie|credential|signature|connection_string", re.IGNORECASE)
REDACTED = "***"


def without_secrets(config: TrainConfig) -> TrainConfig:
    """Return the configuration as a run keeps it: values in ``data.storage_options`` that look secret are ``***``."""
    kept = _redacted(config.data.storage_options)
    return config.model_copy(update={"data": config.data.model_copy(update={"storage_options": kept})})


def _redacted(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _redacted(value)
        if isinstance(value, Mapping)
        else REDACTED
        if isinstance(value, str) and SECRET.search(key)
        else value
        for key, value in options.items()
    }


def to_toml(config: TrainConfig) -> str:
    """Return the resolved configuration as TOML; keys without a value are left out."""
    import tomli_w

    _check_plain(config)  # model_copy(update=...) checks nothing
    tables = config.model_dump(mode="json", exclude_none=True)
    if "local_steps" in tables["train"]:
        del tables["train"]["local_epochs"]  # one of them is given, never both
    return tomli_w.dumps(tables)


def differences(old: TrainConfig, new: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Return ``(key, old value, new value)`` for every key whose value differs."""
    before, after = dict(flat_values(old)), dict(flat_values(new))
    keys = list(dict.fromkeys([*before, *after]))
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def may_change(key: str, config: TrainConfig) -> bool:
    """Whether a continued run may change this key: what cannot change a bit of the rounds to come."""
    if key == "train.rounds":
        return config.train.schedule == "constant"
    if key in ("data.memory", "data.cache", "data.reader", "data.storage_options"):
        return True
    return key.startswith(("stop.", "cluster.", "run.")) and key != "cluster.threads"


def _toml(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    return json.dumps(value)


# pydantic's errors as sentences ------------------------------------------------------------------------------


def _sentences(error: ValidationError) -> tuple[str, str]:
    seen: dict[str, str] = {}
    faults = error.errors(include_url=False)
    for fault in faults:
        loc, kind = fault["loc"], fault["type"]
        deeper = [f for f in faults if len(f["loc"]) > len(loc) and f["loc"][: len(loc) - 1] == loc[:-1]]
        if kind.endswith("_type") and deeper and len(_branches(_place(loc[:-1])[2])) > 1:
            continue  # this branch of a union is not meant: another one fits up to a part of the value
        key, known, _ = _place(loc)
        said = _sentence(key, kind, fault["msg"], fault["input"], known)
        # a value that fits no branch of a union has a fault for each: together they say what is allowed
        allowed = said.partition(": input should be ")[2]
        if key not in seen:
            seen[key] = said
        elif allowed and allowed not in seen[key]:
            seen[key] += f" or {allowed}"
    hint = "" if len(seen) == 1 else f"{len(seen)} keys are wrong."
    return "; ".join(seen.values()), hint


def _place(loc: tuple[int | str, ...]) -> tuple[str, tuple[str, ...], Any]:
    """Turn a pydantic location into a config key, the keys of its table, and the type of its value."""
    key = ""
    known: tuple[str, ...] = ()
    kind: Any = TrainConfig
    for part in loc:
        branches = _branches(kind)
        if len(branches) > 1:  # the name of one of them, and no part of the key
            kind = next((b for b in branches if str(part).partition("[")[0] == _origin(b).__name__), None)
            continue
        kind = branches[0] if branches else None
        origin = _origin(kind)
        if origin is tuple:
            key, kind = f"{key}[{part}]", get_args(kind)[0]
        elif origin is dict:
            key, kind = f"{key}.{part}", get_args(kind)[1]
        elif isinstance(origin, type) and issubclass(origin, Table):
            known = tuple(origin.model_fields)
            key, kind = f"{key}.{part}", origin.model_fields[str(part)].annotation if part in known else None
        else:
            break
    return key.removeprefix("."), known, kind


def _branches(kind: Any) -> list[Any]:
    """Return the types that a value may have, but None."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) not in (Union, UnionType):
        return [kind]
    return [branch for part in get_args(kind) if part is not NoneType for branch in _branches(part)]


def _origin(kind: Any) -> Any:
    return get_origin(kind) or kind


def _sentence(key: str, kind: str, text: str, given: Any, known: tuple[str, ...]) -> str:
    table, _, name = key.rpartition(".")
    if kind == "extra_forbidden":
        elsewhere = [k for k, _ in flat_values(DEFAULTS) if k.rpartition(".")[2] == name]
        guess = f'; did you mean "{elsewhere[0]}"?' if elsewhere else did_you_mean(name, known)
        where = f"[{table}]" if table else "the config"
        has = f"; {where} has {', '.join(known)}"
        return f"{key}: no such key{guess or has}"
    if kind == "missing":
        return f"{key} is missing"
    text = text.removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {text}" if key else text
    guess = ""
    if kind == "literal_error" and isinstance(given, str):
        guess = did_you_mean(given, re.findall(r"'([^']+)'", text))
    text = re.sub(r"a valid dictionary( or instance of \w+)?", "a table", text).replace("a valid tuple", "a list")
    given = REDACTED if key.startswith("data.storage_options") else given
    return f"{key} = {_short(given)}: {text[0].lower()}{text[1:]}{guess}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


DEFAULTS = TrainConfig.model_construct()
