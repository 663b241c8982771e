"""What the arguments of a call in Python mean: a job, and where it is done."""

from __future__ import annotations

import os
from dataclasses import replace

from dtrain.config.schema import TrainConfig
from dtrain.data.samples import Samples
from dtrain.job import Job, Model, Table, contradiction, is_given, job_from_python, with_scheduler
from dtrain.runtime.place import PLACE_NAMES
from dtrain.runtime.where import Where, full_address, scheduler_text


def python_job(
    model: Model | None,
    samples: Samples | None,
    config: TrainConfig | None,
    model_args: Table | None,
    cluster: Where | None,
    **tables: Table | None,
) -> Job:
    """Return the job of the arguments of `train`; they and the configuration must not contradict each other."""
    job = job_from_python(model, samples, tables, config, model_args)
    scheduler = _agreed_scheduler(job.config, cluster)
    is_object = not isinstance(cluster, str | os.PathLike | None)
    return job if is_object else replace(job, config=with_scheduler(job.config, scheduler))


def _agreed_scheduler(config: TrainConfig, cluster: Where | None) -> str:
    """Return where to train: as the argument says, or the configuration; they must not contradict each other."""
    configured = full_address(config.cluster.scheduler, PLACE_NAMES)
    if cluster is None:
        return configured
    wanted = scheduler_text(cluster, PLACE_NAMES)
    if is_given(config, "cluster", "scheduler") and wanted != configured:
        raise contradiction("cluster", wanted, configured, "cluster.scheduler")
    return wanted
