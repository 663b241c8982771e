"""Stop rules: pure functions of the history, so that resume and rounds submitted ahead change nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.algorithm.plan import is_evaluated
from dtrain.config.names import METRICS, MetricFacts, metric_key
from dtrain.config.schema import TrainConfig
from dtrain.errors import InvalidConfig, did_you_mean
from dtrain.types import History, StopReason


def higher_is_better(config: TrainConfig) -> bool:
    """Whether larger values of ``stop.metric`` are better."""
    if config.stop.mode != "auto":
        return config.stop.mode == "max"
    name = config.stop.metric.removeprefix("val_").removeprefix("ema_")
    return METRICS.get(name, MetricFacts()).higher_is_better


def end_reason(history: Sequence[float | None], config: TrainConfig) -> StopReason | None:
    """Return why a run with this history is complete, or None. Same arguments as `stop_reason`."""
    return stop_reason(history, config) or ("rounds" if len(history) >= config.train.rounds else None)


def stop_reason(history: Sequence[float | None], config: TrainConfig) -> StopReason | None:
    """Return which rule of ``[stop]`` the last round fulfils, if any.

    Parameters
    ----------
    history : sequence of float or None
        ``stop.metric`` of every round so far; NaN where it was not finite, which is never an improvement; None where
        it was not computed: such rounds do not count.
    config : TrainConfig

    Notes
    -----
    ``target`` is met when the last value is at least as good. ``patience`` is over when the best value, improved by
    more than ``min_delta`` each time, is that many values old: evaluations, or rounds of ``train_loss``.
    """
    stop, sign = config.stop, -1.0 if higher_is_better(config) else 1.0
    last = history[-1] if history else None
    if stop.target is not None and last is not None and sign * last <= sign * stop.target:
        return "target"
    if stop.patience is not None:
        best, best_index = float("inf"), -1
        computed = [value for value in history if value is not None]
        for index, value in enumerate(computed):
            if sign * value < best - stop.min_delta:
                best, best_index = sign * value, index
        if last is not None and len(computed) - 1 - best_index >= stop.patience:
            return "patience"
    return None


def stop_history(rows: Sequence[Mapping[str, Any]], config: TrainConfig, eval_every: int) -> History:
    """Return ``stop.metric`` of finished rounds, as the rules of ``[stop]`` count them.

    Parameters
    ----------
    rows : sequence of mapping
        The lines of history.jsonl.
    config : TrainConfig
    eval_every : int
        Rounds between evaluations.

    Notes
    -----
    A round may have been evaluated outside of the cadence: ``--max-time`` ended on it, or it was the last one before
    ``train.rounds`` was raised. It does not count, so that a run that was continued ends on the same round as one that
    never stopped.
    """
    of_training = config.stop.metric == "train_loss"
    return tuple(
        metric_of(row, config) if of_training or is_evaluated(row["round"], eval_every, config.train) else None
        for row in rows
    )


def metric_of(values: Mapping[str, float | None], config: TrainConfig) -> float | None:
    """Return ``stop.metric`` among the values of a round; NaN if it is not finite, None if it was not computed."""
    if config.stop.metric not in values:
        return None
    value = values[config.stop.metric]
    return value if value is not None and math.isfinite(value) else math.nan


def check_metric(config: TrainConfig, has_validation: bool) -> None:
    """Refuse a ``stop.metric`` that is not computed.

    Raises
    ------
    InvalidConfig
        A rule is set, and its metric is not computed.
    """
    if config.stop.target is None and config.stop.patience is None:
        return
    known = ["train_loss"]
    if has_validation:
        names = ["loss", *map(metric_key, config.train.metrics)]
        known += [f"val_{name}" for name in names]
        known += [f"val_ema_{name}" for name in names] if config.average.ema else []
    if config.stop.metric not in known:
        raise InvalidConfig(
            f'stop.metric = "{config.stop.metric}" is not computed{did_you_mean(config.stop.metric, known)}',
            f"Computed are {', '.join(known)}; train.metrics and data.split.val add others.",
        )
