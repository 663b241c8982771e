r"""The moving average of the models of all rounds, evaluated and saved beside the model: ``average.ema``.

    ema_1 = theta_1 ;  ema_t = beta ema_{t-1} + (1 - beta) theta_t

It never comes back into training. Buffers are those of the newest model.

References
----------
Polyak and Juditsky 1992, SIAM Journal on Control and Optimization 30; of checkpoints: Kaddour 2022, arXiv:2209.14981.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dtrain.algorithm.reduce import BLOCK
from dtrain.types import Parameters


def next_ema(before: Parameters | None, model: Parameters, decay: float) -> Parameters:
    """Return the average after a round, of slices too; None: this is the first round."""
    if before is None:
        return model
    flat = model.flat.copy()
    for start in range(0, model.num_params, BLOCK):
        part = slice(start, min(start + BLOCK, model.num_params))
        flat[part] = before.flat[part].astype(np.float64) * decay + model.flat[part].astype(np.float64) * (1 - decay)
    return replace(model, flat=flat)
