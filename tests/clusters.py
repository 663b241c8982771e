"""Local clusters as dtrain starts them."""

from __future__ import annotations

import logging
from typing import Any

import dask
from distributed import LocalCluster

from dtrain.runtime.connect import OWNED


def new_cluster(workers: int, **more: Any) -> LocalCluster:
    with dask.config.set(OWNED):
        return LocalCluster(
            **more,
            n_workers=workers,
            threads_per_worker=2,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )
