"""Check a store: whether it opens, and one chunk of it, read as training reads, here and on the workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dask.utils import format_bytes
from distributed import Client

from dtrain.checkup.check import DATA_FAILED, Check, TimeOver, failed, limited
from dtrain.config.schema import TrainConfig
from dtrain.data.plan.units import Box
from dtrain.data.read.inventory import take_inventory
from dtrain.data.read.joined import open_reader
from dtrain.data.samples import Samples
from dtrain.data.source import describe
from dtrain.errors import DtrainError

DATA_SECONDS = 30.0
"""Time limit of a reading."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one chunk took to read."""

    nbytes: int
    """Decoded."""
    seconds: float
    reader: str


def samples_of(path: str, group: str, name: str) -> Samples:
    """Describe a variable of a store as samples."""
    table = {"path": path, "group": group, "inputs": (name,), "targets": (name,), "missing": "fill"}
    return describe(TrainConfig(data=table).data, Path.cwd())


def read_chunk(samples: Samples) -> Reading:
    """Read the first chunk of a variable through the reader of training.

    Raises
    ------
    DtrainError
        The chunk is missing, damaged, or cannot be reached.
    """
    first = _first_chunk(samples)
    variable, started = first.variables[0], time.monotonic()
    reader = open_reader(first)
    reader.read(Box(first.first_row, first.num_samples))
    rows = first.num_samples - first.first_row
    chosen = getattr(reader, "readers", {}).get(variable.name, ("", ""))[0]
    return Reading(first.row_bytes * rows, time.monotonic() - started, chosen)


def _first_chunk(samples: Samples) -> Samples:
    """Describe samples of the first chunk alone; of a sparse matrix, of its first rows."""
    variable = samples.variables[0]
    if variable.sparse is not None or variable.is_static:
        lengths = {samples.sample_dim: min(100, samples.num_samples)}
    else:
        pairs = zip(variable.dims, variable.chunks, variable.shape, strict=True)
        lengths = {dim: min(chunk, length) for dim, chunk, length in pairs}
    isel = {dim: {"start": 0, "stop": length} for dim, length in lengths.items()}
    table = {**samples.config.model_dump(exclude_unset=True), "path": samples.path, "isel": isel, "missing": "error"}
    return describe(TrainConfig(data=table).data, Path.cwd())


def check_data(path: str, choose: Callable[[str], tuple[str, str]], client: Client | None) -> Iterator[Check]:
    """Check that a store can be opened and read, here and on the workers.

    Parameters
    ----------
    path : str
        Path or URL.
    choose : callable
        Returns the group and the name of the variable to read.
    client : distributed.Client, optional
        Of the cluster whose workers read it too.
    """
    try:
        group, name = limited(lambda: choose(path), DATA_SECONDS)
        samples = limited(lambda: samples_of(path, group, name), DATA_SECONDS)
        reading = limited(lambda: read_chunk(samples), DATA_SECONDS)
    except (DtrainError, TimeOver, OSError, ValueError) as error:
        yield failed("data", error, DATA_FAILED, "See README, Your data.")
        return
    variable = samples.variables[0]
    yield Check(name="data", status="ok", text=f"{path} opens; {name} is {variable.dtype}{list(variable.shape)}")
    yield Check(name="read", status="ok", text=f"one chunk of {name}, {_speed(reading)}")
    yield _checksums(samples)
    yield _presence(samples)
    if client is not None:
        yield _check_remote(samples, client)


def _speed(reading: Reading) -> str:
    by = f" by {reading.reader}" if reading.reader else ""
    rate = reading.nbytes / max(reading.seconds, 1e-6)
    return f"{format_bytes(reading.nbytes)} in {1000 * reading.seconds:.0f} ms ({format_bytes(rate)}/s){by}"


def _checksums(samples: Samples) -> Check:
    unchecked = [variable.name for variable in samples.stored if not variable.checksums]
    return Check(
        name="checksums",
        status="warning" if unchecked else "ok",
        text=f"none in {', '.join(unchecked)}: a flipped bit reads as data" if unchecked else "each chunk has one",
        cure="Write it with a checksum, such as zarr's crc32c codec." if unchecked else "",
    )


def _presence(samples: Samples) -> Check:
    """Count the chunks that are not stored."""
    try:
        absent = limited(lambda: take_inventory(samples, full=False, digests=False, presence=True).absent, DATA_SECONDS)
    except TimeOver as error:
        return Check(name="chunks", status="warning", text=f"not counted: {error}", cure="`dtrain plan` counts them.")
    except (DtrainError, OSError) as error:
        return failed("chunks", error, DATA_FAILED, "`dtrain plan` says what training makes of them.")
    if gone := {name: count for name, count in absent.items() if count.chunks}:
        text = ", ".join(f"{count.chunks:,} of {count.of:,} of {name}" for name, count in gone.items())
        cure = "`dtrain plan` says what training makes of them (data.missing)."
        return Check(name="chunks", status="warning", text=f"not stored: {text}", cure=cure)
    return Check(name="chunks", status="ok", text="all are stored")


def _check_remote(samples: Samples, client: Client) -> Check:
    """Read the chunk on each worker."""
    workers = list(client.nthreads())
    tasks = [
        client.submit(read_chunk, samples, workers=[address], pure=False, key=f"dtrain-doctor-read-{address}")
        for address in workers
    ]
    try:
        readings = limited(lambda: client.gather(tasks), 2 * DATA_SECONDS)
    except Exception as error:  # whatever is raised on a worker
        cure = "Workers must see the data under the same path or URL, with the same credentials."
        return failed("remote read", error, DATA_FAILED, cure)
    slowest = max(readings, key=lambda reading: reading.seconds)
    return Check(name="remote read", status="ok", text=f"each worker reads that chunk, the slowest {_speed(slowest)}")
