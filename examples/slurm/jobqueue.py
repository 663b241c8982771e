"""Workers that are Slurm jobs of their own. Run: python examples/slurm/jobqueue.py in the directory of dtrain.toml

Needs: pip install dask-jobqueue, which also knows PBS, SGE, LSF, HTCondor and OAR. Workers come and go with the queue:
training takes those that are there, and its parameters do not depend on their number, because the number of replicas is
a setting of the run. The same command continues after any interruption.
"""

import sys
import tomllib

from dask_jobqueue import SLURMCluster

import dtrain

JOB = {"cores": 2, "processes": 1, "memory": "8GB", "walltime": "02:00:00"}
"""Of a worker: one of its two threads trains, the other averages and answers."""


def main(jobs=4, **options):
    """Train on up to `jobs` workers and return the run; `options` are those of SLURMCluster."""
    with open("dtrain.toml", "rb") as file:
        config = dtrain.TrainConfig(**tomllib.load(file))
    options = {"scheduler_options": {"dashboard_address": "127.0.0.1:0"}, **JOB, **options}
    with SLURMCluster(**options) as cluster:
        cluster.adapt(minimum_jobs=1, maximum_jobs=jobs)
        return dtrain.train(config=config, cluster=cluster, run="slurm")


if __name__ == "__main__":
    run = main(**dict(option.split("=") for option in sys.argv[1:]))
    print(f"{run.directory}: {len(run.rows)} rounds, {run.rows[-1]['params_sha256']}")
