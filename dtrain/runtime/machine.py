"""What a machine has, and whether it takes a local step. Sent to workers as bytes: it also runs without dtrain."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import shutil
import time
from typing import Any

import cloudpickle

DECIDING = ("dtrain", "torch", "numpy", "zarr", "distributed")
"""Packages that decide bits, or that processes of several versions do not understand each other with."""
PACKAGES = (*DECIDING, "dask", "xarray")


def machine_facts(*, torch: bool = True) -> dict[str, Any]:
    """Return versions of Python and `PACKAGES` (empty where one is missing), and what the machine has.

    Parameters
    ----------
    torch : bool
        Import it, to ask for the instructions that it uses and for a GPU.
    """
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    try:
        free = shutil.disk_usage(os.getcwd()).free
    except OSError:
        free = -1
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": CPU_COUNT,
        "memory": int(MEMORY_LIMIT),
        "free": free,
        **(_of_torch() if torch else {}),
    }


async def machine_facts_in_thread() -> dict[str, Any]:
    """Return the same from a worker, which goes on to answer while torch is imported."""
    return await asyncio.to_thread(machine_facts)


def _of_torch() -> dict[str, Any]:
    """Return the CPU instructions that torch uses, the names of GPUs, and why torch cannot be imported, if so."""
    try:
        import torch

        gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        return {"capability": torch.backends.cpu.get_cpu_capability(), "gpus": gpus, "torch_error": ""}
    except Exception as error:  # of a broken installation, whatever
        return {"capability": "", "gpus": [], "torch_error": f"{type(error).__name__}: {error}"}


def one_step() -> float:
    """Take a local step of dtrain on a tiny model, and another one; return the seconds of that: the first imports."""
    import torch

    from dtrain.algorithm.batch import TensorBatch
    from dtrain.algorithm.local import run_local_steps
    from dtrain.algorithm.recipe import recipe_of
    from dtrain.algorithm.replica import empty_inner_state
    from dtrain.config.schema import TrainTable

    module = torch.nn.Linear(8, 1)
    batch = TensorBatch(inputs=(torch.ones(4, 8),), targets=torch.zeros(4, 1), size=4)
    before = module.weight.detach().clone()
    recipe = recipe_of(TrainTable(loss="mse"), {})
    for _ in range(2):
        started = time.monotonic()
        run_local_steps(module, recipe, empty_inner_state(), [(4, [batch])], first_step=0, total_steps=1)
    if torch.equal(before, module.weight):
        raise RuntimeError("the step has changed nothing")
    return time.monotonic() - started


def register() -> None:
    """Let the functions of this module travel as bytes: workers need not have them."""
    import dtrain.runtime.machine as own

    cloudpickle.register_pickle_by_value(own)
