"""What the shell completes: runs, config files, keys and names. It must answer at once: heavy packages stay out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

SUFFIXES = (".toml", ".yaml", ".yml", ".json")
STORE_SUFFIXES = (".zarr", ".zip", ".icechunk", ".parq", ".parquet")


def runs(incomplete: str) -> list[str]:
    """Complete a run: the names of ``runs/*`` and ``*/runs/*``; after a slash, the paths of their directories."""
    found = [path.parent for pattern in ("runs/*/config.toml", "*/runs/*/config.toml") for path in Path().glob(pattern)]
    return _starting((str(run) if "/" in incomplete else run.name for run in found), incomplete)


def config_files(incomplete: str) -> list[str]:
    """Complete a config file: those here, in directories here, and below what is typed."""
    typed = Path(f"{incomplete.rpartition('/')[0]}/") if "/" in incomplete else Path()
    patterns = ("*", "*/dtrain.*")
    found = [path for pattern in patterns for path in typed.glob(pattern) if path.suffix in SUFFIXES]
    return _starting((str(path) for path in found if not path.name.startswith(".")), incomplete)


def config_files_or_runs(incomplete: str) -> list[str]:
    """Complete a config file or a run."""
    return [*config_files(incomplete), *runs(incomplete)]


def runs_or_stores(incomplete: str) -> list[str]:
    """Complete a run or a store: stores here, in directories here, and below what is typed."""
    typed = Path(f"{incomplete.rpartition('/')[0]}/") if "/" in incomplete else Path()
    found = [path for pattern in ("*", "*/*") for path in typed.glob(pattern) if path.suffix in STORE_SUFFIXES]
    return sorted({*runs(incomplete), *_starting(map(str, found), incomplete)})


def keys(incomplete: str) -> list[str]:
    """Complete the key of a setting."""
    if "=" in incomplete:
        return []
    from dtrain.config.schema import DEFAULTS
    from dtrain.config.values import flat_values

    return _starting((f"{key}=" for key, _ in flat_values(DEFAULTS)), incomplete)


def places(incomplete: str) -> list[str]:
    """Complete where to run: a word, or a scheduler file."""
    return _starting(["local", "serial", "tcp://", "tls://", *map(str, Path().glob("*.json"))], incomplete)


def presets(incomplete: str) -> list[str]:
    """Complete the name of a preset of averaging."""
    from dtrain.config.presets import PRESETS

    return _starting(PRESETS, incomplete)


def rounds(incomplete: str) -> list[str]:
    """Complete a committed round."""
    return _starting(["last", "best"], incomplete)


def splits(incomplete: str) -> list[str]:
    """Complete a split."""
    return _starting(["val", "test", "all"], incomplete)


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})
