"""The climatology of a run: as it was trained with, or kept in its directory since, or computed and kept now."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dtrain.asking import targets_of
from dtrain.climatefile import read_climate, write_climate
from dtrain.data.climatology import Climatology
from dtrain.errors import DataNotFound, DiskFull, OutOfMemory
from dtrain.events import Reporter
from dtrain.job import Job
from dtrain.prepare import open_runner
from dtrain.resolved import Resolved
from dtrain.runtime.where import Where, client_of

LOG = logging.getLogger("dtrain")


def climatology_of(
    run: Path,
    resolved: Resolved,
    job: Job,
    own: Callable[[], tuple[Job, Resolved]],
    cluster: Where,
    report: Reporter | None,
) -> Climatology | str:
    """Return the climatology of the targets of a job over the training rows of its run.

    Where it would take too much memory, or the run's data are not there any more, return why there is none.

    Parameters
    ----------
    run : path
        The run's directory.
    resolved : Resolved
        Of the run's first start.
    job : Job
        An evaluation, perhaps of other data.
    own : callable
        Returns the job and the plans of the run's own data.
    cluster : Where
        Where it is computed.
    report : callable, optional
        Gets the progress of the pass over the training rows.
    """
    fingerprint = resolved.plan.fingerprint
    kept = resolved.climatology or read_climate(run, fingerprint)
    if kept is not None and all(name in kept.means for name in targets_of(job)):
        return kept
    try:
        computed = _computed(job, own, cluster, report)
    except (OutOfMemory, DataNotFound) as error:
        return f"{error.message[0].lower()}{error.message[1:].removesuffix('.')}"
    try:
        write_climate(run, computed, fingerprint)
    except DiskFull as error:
        LOG.warning("The climatology is not kept: %s", error.message)
    return computed


def _computed(
    job: Job, own: Callable[[], tuple[Job, Resolved]], cluster: Where, report: Reporter | None
) -> Climatology:
    """Read the training rows once."""
    run_job, known = own()
    run_job, run_id = replace(run_job, config=job.config, functions=job.functions), uuid.uuid4().hex[:8]
    with (
        client_of(cluster) as client,
        open_runner(run_job, run_id, known=known, client=client, climatology=True, on_progress=report) as (_, found),
    ):
        assert found.climatology is not None
        return found.climatology
