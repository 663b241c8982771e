"""Metrics: what is summed over a batch (a state of fixed size), how states merge, and the value of a state.

    state.py          states, their rules of merging, and `Metric`
    terms.py          sums of terms: accuracy, mse, mae, rmse, and functions of the user's
    moments.py        r2, anomaly_correlation
    confusion.py      f1, iou, dice
    curve.py          auroc
    torchmetric.py    classes of torchmetrics and the user's subclasses of them
    named.py          the registry of built-in names

A new metric is a `Metric` in one of these files, a line in `named.py`, and its facts in `dtrain.config.names`.
"""
