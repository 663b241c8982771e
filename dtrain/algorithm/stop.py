"""When the requirement is met: pure functions of the history, so that resuming and looking ahead change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from dtrain.algorithm.evaluate import HIGHER_IS_BETTER, metric_key
from dtrain.config import TrainConfig
from dtrain.errors import InvalidConfig, did_you_mean

Reason: TypeAlias = Literal["target", "patience"]


def higher_is_better(config: TrainConfig) -> bool:
    """Whether larger values of ``stop.metric`` are better."""
    if config.stop.mode != "auto":
        return config.stop.mode == "max"
    return config.stop.metric.removeprefix("val_") in HIGHER_IS_BETTER


def stop_reason(values: Sequence[float | None], config: TrainConfig) -> Reason | None:
    """Return which rule of ``[stop]`` the last round fulfils, if any.

    Parameters
    ----------
    values : sequence of float or None
        ``stop.metric`` of every round so far; None where it was not finite, which never is an improvement.
    config : TrainConfig

    Notes
    -----
    ``target`` is met when the last value is at least as good. ``patience`` is over when the best value, improved by
    more than ``min_delta`` each time, is that many rounds old.
    """
    stop, sign = config.stop, -1.0 if higher_is_better(config) else 1.0
    last = values[-1] if values else None
    if stop.target is not None and last is not None and sign * last <= sign * stop.target:
        return "target"
    if stop.patience is not None:
        best, best_index = float("inf"), -1
        for index, value in enumerate(values):
            if value is not None and sign * value < best - stop.min_delta:
                best, best_index = sign * value, index
        if len(values) - 1 - best_index >= stop.patience:
            return "patience"
    return None


def metric_of(row: Mapping[str, Any], config: TrainConfig) -> float | None:
    """Return ``stop.metric`` of a row of the history."""
    value: float | None = row.get(config.stop.metric)
    return value


def check_metric(config: TrainConfig, has_validation: bool) -> None:
    """Refuse a ``stop.metric`` that no round will have.

    Raises
    ------
    InvalidConfig
        A rule is set, and its metric is not computed.
    """
    if config.stop.target is None and config.stop.patience is None:
        return
    known = ["train_loss"]
    if has_validation:
        known += ["val_loss", *(f"val_{metric_key(name)}" for name in config.train.metrics)]
    if config.stop.metric not in known:
        raise InvalidConfig(
            f'stop.metric = "{config.stop.metric}" is not computed{did_you_mean(config.stop.metric, known)}',
            f"Computed are {', '.join(known)}; train.metrics and data.split.val add others.",
        )
