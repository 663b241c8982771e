"""Check where training would run: a cluster, its versions, and a local step on each worker."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from distributed import Client

from dtrain.checkup.check import CLUSTER_FAILED, Check, TimeOver, failed, held, limited
from dtrain.checkup.here import facts_here, machine_text
from dtrain.config.schema import ClusterConfig
from dtrain.errors import DtrainError, listed
from dtrain.runtime import machine
from dtrain.runtime.connect import is_loopback, open_client
from dtrain.runtime.frozen import known_workers
from dtrain.runtime.workers import first_workers

CLUSTER_SECONDS, WORKER_SECONDS = 60.0, 30.0
"""Time limits: to start or reach a cluster, and of a question to all workers."""
SILENT_SECONDS = 10.0
"""A worker that the scheduler has not heard of for so long, while it heard of others, is named."""
LOCAL_WORKERS = 2
"""Of the cluster that is started to see that one starts."""
SAME_VERSIONS = "Install the same versions on client, scheduler and workers (constraints.txt); the bits depend on them."


def check_place(config: ClusterConfig, stack: ExitStack) -> Iterator[Check | Client]:
    """Check where training would run; of a cluster the client comes last, for further checks.

    Parameters
    ----------
    config : ClusterConfig
        Its ``scheduler`` is ``local``, ``serial``, an address, or the path of a scheduler file.
    stack : ExitStack
        Closes the cluster.
    """
    if config.scheduler != "serial":
        yield from _check_cluster(config, stack)
        return
    try:
        seconds = limited(machine.one_step, WORKER_SECONDS)
    except Exception as error:  # whatever torch raises
        yield failed("step", error, CLUSTER_FAILED, "Reinstall torch in this environment.")
        return
    yield Check(name="step", status="ok", text=f"a local step in this process, in {1000 * seconds:.0f} ms")


def _check_cluster(config: ClusterConfig, stack: ExitStack) -> Iterator[Check | Client]:
    """Check that a cluster starts or answers, its versions, and that its workers take a local step."""
    scheduler = config.scheduler
    config = config.model_copy(update={"workers": min(LOCAL_WORKERS, _cores()), "allow_plain": True})
    started = time.monotonic()
    try:
        client = stack.enter_context(held(open_client(config, Path.cwd()), CLUSTER_SECONDS))
        states = limited(lambda: first_workers(client, WORKER_SECONDS), 2 * WORKER_SECONDS)
    except (DtrainError, TimeOver, OSError, RuntimeError) as error:
        yield failed("cluster", error, CLUSTER_FAILED, "Start one: `dask scheduler` and `dask worker ADDRESS`.")
        return
    seconds, count = time.monotonic() - started, f"{len(states)} worker{'s' if len(states) != 1 else ''}"
    what = f"a local one starts, with {count}," if scheduler == "local" else f"{scheduler} answers, with {count},"
    yield Check(name="cluster", status="ok", text=f"{what} in {seconds:.1f} s")
    address = client.scheduler.address
    if address.startswith("tls://"):
        yield Check(name="network", status="ok", text=f"{address} is encrypted, and both sides show a certificate")
    elif scheduler != "local" and not is_loopback(address):
        yield Check(
            name="network",
            status="warning",
            text=f"{address} is neither encrypted nor on this machine: whoever reaches that port can run code as you",
            cure="Use tls:// (`dtrain certs DIR`); or, if the network is yours alone, set cluster.allow_plain = true. "
            "Train refuses it otherwise.",
        )
    yield from _check_processes(client)
    yield client


def _cores() -> int:
    return int(machine.machine_facts(torch=False)["cores"])


def _check_processes(client: Client) -> Iterator[Check]:
    """Check the versions of scheduler and workers, and that each worker takes a local step."""
    machine.register()
    here = facts_here()
    try:
        scheduler = limited(lambda: client.run_on_scheduler(machine.machine_facts, torch=False), WORKER_SECONDS)
        workers = limited(lambda: client.run(machine.machine_facts_in_thread), 2 * WORKER_SECONDS)
    except TimeOver as error:
        yield unanswered(client, error)
        return
    except Exception as error:  # of a scheduler or worker that cannot run it
        yield failed("workers", error, CLUSTER_FAILED, SAME_VERSIONS)
        return
    yield compared("scheduler", {"the scheduler": scheduler}, here, needed=("python", "distributed"))
    yield compared("workers", workers, here, needed=("python", *machine.DECIDING))
    if broken := {address: facts["torch_error"] for address, facts in workers.items() if facts["torch_error"]}:
        address, text = next(iter(broken.items()))
        yield Check(
            name="torch",
            status="error",
            text=f"{len(broken)} of {len(workers)} workers cannot import torch; {address}: {text}",
            cure="Install torch in the workers' environment.",
            code=CLUSTER_FAILED,
        )
    yield _check_kinds(workers)
    yield _check_steps(client, list(workers))


def unanswered(client: Client, error: TimeOver) -> Check:
    """Name the workers that the scheduler has not heard of for long, or the scheduler itself."""
    seen: dict[str, float] = {}
    with suppress(TimeOver, OSError, RuntimeError):
        workers = limited(lambda: known_workers(client), WORKER_SECONDS)
        seen = {address: float(known["last_seen"]) for address, known in workers.items()}
    if not seen:
        return failed(
            "scheduler", error, CLUSTER_FAILED, "It is frozen or overloaded: look at its log, or start another."
        )
    newest = max(seen.values())
    silent = [
        f"{address} has sent nothing for {newest - at:.0f} s"
        for address, at in sorted(seen.items())
        if newest - at > SILENT_SECONDS
    ]
    return Check(
        name="workers",
        status="error",
        text=f"{error}; {listed(silent, most=4)}" if silent else str(error),
        cure="A worker is frozen or overloaded: look at its log, or end its process. A run gives it up after 30 s.",
        code=CLUSTER_FAILED,
    )


def compared(
    name: str, there: Mapping[str, Mapping[str, Any]], here: Mapping[str, Any], needed: tuple[str, ...]
) -> Check:
    """Compare the versions of processes with those here: those of `needed` packages must be the same."""
    wrong: list[str] = []
    other: list[str] = []
    for process, facts in sorted(there.items()):
        for package, version in here["versions"].items():
            found = facts["versions"].get(package, "")
            if found != version and (found or package in needed):
                text = f"{process} has {package} {found}, here {version}" if found else f"{process} lacks {package}"
                (wrong if package in needed else other).append(text)
    same = f"{len(there)} with the versions of this process" if name == "workers" else "the versions of this process"
    return Check(
        name=name,
        status="error" if wrong else "warning" if other else "ok",
        text=listed([*wrong, *other], most=4) if wrong or other else same,
        cure=SAME_VERSIONS if wrong or other else "",
        code=CLUSTER_FAILED,
    )


def _check_kinds(workers: Mapping[str, Mapping[str, Any]]) -> Check:
    """Say what the workers' machines are, and whether they differ in what decides bits."""
    kinds: dict[str, int] = {}
    for facts in workers.values():
        kinds[machine_text(facts)] = kinds.get(machine_text(facts), 0) + 1
    capabilities = {(facts["platform"], facts["capability"]) for facts in workers.values()}
    return Check(
        name="machines",
        status="warning" if len(capabilities) > 1 else "ok",
        text="; ".join(f"{count} x {text}" for text, count in kinds.items()),
        cure="Their CPUs differ: a task may give other bits on another worker. ATEN_CPU_CAPABILITY makes them alike."
        if len(capabilities) > 1
        else "",
    )


def _check_steps(client: Client, workers: list[str]) -> Check:
    """Take a local step on each worker."""
    tasks = {
        address: client.submit(machine.one_step, workers=[address], pure=False, key=f"dtrain-doctor-step-{address}")
        for address in workers
    }
    try:
        seconds = limited(lambda: client.gather(list(tasks.values())), 2 * WORKER_SECONDS)
    except Exception as error:  # whatever the imports or the step raise on a worker
        return failed("step", error, CLUSTER_FAILED, "Look at the worker's log; dtrain and torch must work there.")
    return Check(name="step", status="ok", text=f"a local step on each worker, in {1000 * max(seconds):.0f} ms at most")
