"""Classes of torchmetrics as metrics: their states travel as float64 arrays, and merge as they themselves say.

torchmetrics (the extra ``dtrain[metrics]``) is never imported here: whoever names one of its classes has imported it.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from dtrain.algorithm.losses import classes_first, described
from dtrain.algorithm.metrics.state import Floats, Metric, Parts, Rule
from dtrain.config.functions import Function
from dtrain.config.schema import ClassAxis
from dtrain.errors import InvalidConfig, ShapesDiffer, one_line

RULES: Mapping[str, Rule] = {"dim_zero_sum": "sum", "dim_zero_max": "max", "dim_zero_min": "min"}
"""By the name of torchmetrics' function for ``dist_reduce_fx``: how a state merges."""


def is_torchmetric(value: object) -> bool:
    """Whether a value is a class of torchmetrics, a subclass of the user's, or an object of one."""
    return _is_of(value, "torchmetrics")


def _is_of(value: object, package: str) -> bool:
    kind = value if isinstance(value, type) else type(value)
    return any(f"{base.__module__}.".startswith(f"{package}.") for base in kind.__mro__)


def makes_metric(function: Function) -> bool:
    """Whether a function takes no arguments: then it returns a metric of torchmetrics, with its options."""
    if isinstance(function, type) or is_torchmetric(function):
        return False
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a function written in C
        return False
    return not parameters


def torchmetric_of(function: Function) -> Any:
    """Return the metric of torchmetrics that a class, an object or a function without arguments stands for.

    Returns
    -------
    torchmetrics.Metric or None
        A copy that may be changed; None for a function of outputs and targets.

    Raises
    ------
    InvalidConfig
        It needs arguments, or its state grows with the data or does not merge.
    """
    if is_torchmetric(function):
        metric = _made(function) if isinstance(function, type) else copy.deepcopy(function)
    elif makes_metric(function):
        metric = copy.deepcopy(function())
    else:
        return None
    if not is_torchmetric(metric) or isinstance(metric, type):
        named = getattr(function, "__name__", "a function")
        raise InvalidConfig(
            f"train.metrics: {named}() returned {type(metric).__name__}; a function without arguments "
            "returns a metric of torchmetrics.",
            "Return one, such as BinaryF1Score(threshold=0.3), or write a function of (outputs, targets).",
        )
    _check_states(metric)
    return metric


def _made(kind: Callable[..., Any]) -> Any:
    name = kind.__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the memory that states take: those that grow are refused
            return kind()
    except (TypeError, ValueError) as error:
        raise InvalidConfig(
            f"train.metrics: {name} of torchmetrics needs arguments: {one_line(error)}",
            f'Name a function in model.py that returns it: def skill(): return {name}(...), and "model:skill".',
        ) from None


def _check_states(metric: Any) -> None:
    name = type(metric).__name__
    if not getattr(metric, "_defaults", {}):
        raise InvalidConfig(
            f"train.metrics: {name} has no state of its own: collections and wrappers of metrics cannot be merged.",
            "Name each metric alone.",
        )
    growing = [key for key, default in metric._defaults.items() if isinstance(default, list)]
    if growing:
        is_binned = "thresholds" in inspect.signature(type(metric).__init__).parameters
        raise InvalidConfig(
            f"train.metrics: {name} keeps all values in its state {' and '.join(growing)}, which grows with the data.",
            f"Give it fixed thresholds: a function in model.py that returns {name}(thresholds=200, ...)."
            if is_binned
            else "Take a metric whose states are sums, or the built-in metrics of that name.",
        )
    odd = [key for key, reduce in metric._reductions.items() if getattr(reduce, "__name__", "") not in RULES]
    if odd:
        how = getattr(metric._reductions[odd[0]], "__name__", "None").removeprefix("dim_zero_")
        raise InvalidConfig(
            f"train.metrics: the state {odd[0]} of {name} does not merge: its dist_reduce_fx is {how}, and needs to be "
            "sum, max or min, so that the value does not depend on how samples are cut into batches.",
            "Take another metric; a subclass can add up what the value is computed from.",
        )


def torchmetric(metric: Any, loss: str, class_axis: ClassAxis = "auto") -> Metric:
    """Return a metric of torchmetrics as `Metric`.

    Weights of samples do not reach it. Metrics of classes get probabilities where the loss says that outputs are
    logits: left to itself, torchmetrics takes logits that happen to lie in [0, 1] as probabilities. Numbers are summed
    in float64.

    Parameters
    ----------
    metric : torchmetrics.Metric
        It is changed: nobody else uses it.
    loss : str
        ``train.loss``.
    """
    names = tuple(metric._defaults)
    metric._defaults.update({name: _exact(default) for name, default in metric._defaults.items()})
    is_of_classes = _is_of(metric, "torchmetrics.classification")

    def of_batch(outputs: Any, targets: Any, weight: Any = None) -> Parts:
        pair = _probabilities(outputs, targets, loss, class_axis) if is_of_classes else (outputs, targets)
        metric.to(pair[1].device if isinstance(pair[1], torch.Tensor) else "cpu").reset()
        metric.update(*(_exact(one) for one in pair))
        return tuple(getattr(metric, name).detach().double().cpu().numpy() for name in names)

    def value(*parts: Floats) -> float:
        metric.to("cpu").reset()
        for name, part in zip(names, parts, strict=True):
            default = metric._defaults[name]
            state = torch.from_numpy(np.array(part))
            setattr(metric, name, state if default.is_floating_point() else state.to(default.dtype))
        metric._update_count = 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes that do not occur
            computed = metric.compute()
        return _number(type(metric).__name__, computed)

    return Metric(of_batch, value, tuple(RULES[metric._reductions[name].__name__] for name in names))


def _probabilities(outputs: Any, targets: Any, loss: str, class_axis: ClassAxis) -> tuple[Any, Any]:
    if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        return outputs, targets
    if loss == "cross_entropy":
        return classes_first(outputs, targets, class_axis).double().softmax(1), targets
    if loss == "bce":
        is_mask = targets.is_floating_point() and bool(((targets == 0) | (targets == 1)).all())
        return outputs.double().sigmoid(), targets.long() if is_mask else targets
    return outputs, targets


def _exact(value: Any) -> Any:
    """Return floats in float64."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _number(name: str, computed: Any) -> float:
    if isinstance(computed, torch.Tensor) and computed.numel() == 1:
        return float(computed.item())
    if isinstance(computed, int | float):
        return float(computed)
    raise ShapesDiffer(
        f"The metric {name} gives {described(computed)}; a metric of dtrain is one number.",
        'Let it average over classes or outputs (average="macro", multioutput="uniform_average").',
    )


def direction(function: Function) -> bool | None:
    """Return whether larger values of a metric of torchmetrics are better; None if it does not say, or is no such."""
    metric = torchmetric_of(function)
    higher = None if metric is None else metric.higher_is_better
    return None if higher is None else bool(higher)
