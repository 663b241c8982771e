"""Freezing: parameters that are not trained, averaged or sent."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from dtrain.errors import InvalidConfig, did_you_mean


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Turn off the gradient of the parameters whose names match a pattern (``*``, ``?`` and ``[...]``, as in a shell).

    A tied parameter is frozen if one of its names matches. Buffers are no parameters: the running statistics of a
    frozen batch norm follow the data in training mode, as in torch.

    Raises
    ------
    InvalidConfig
        A pattern matches no parameter.
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matching = [name for name in named if fnmatchcase(name, pattern)]
        if not matching:
            shown = ", ".join([*list(named)[:5], *(["..."] if len(named) > 5 else [])])
            raise InvalidConfig(
                f'train.freeze: no parameter matches "{pattern}"{did_you_mean(pattern, named)}',
                f'The parameters are {shown}; "encoder.*" matches all whose names begin with "encoder.".',
            )
        for name in matching:
            named[name].requires_grad_(False)
