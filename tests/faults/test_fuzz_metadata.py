"""Metadata documents that are damaged in seeded ways: each ends with a result or with an error that says what it is.

Every case runs the whole way: `open_samples`, the plan, the memory of the plan, what is stored, and the first unit.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import random
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from dtrain.data.coordinate import find_gaps
from dtrain.data.genes import genes_of
from dtrain.data.given import find_given
from dtrain.data.plan.memory import Reading, plan_memory
from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.plan.units import Box
from dtrain.data.read.inventory import take_inventory
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import DtrainError
from tests.conftest import _write_store
from tests.data.layouts.fixtures import write_anndata, write_cells, write_ome

SECONDS, MEGABYTES = 10, 300
"""What a case may take, and how far memory may grow beyond that before it."""
ADDRESSES = 16 << 30
"""Bytes of addresses that the process of a long run may use: a machine is not brought down."""
CODES = {3, 5, 8}
"""Of the exit codes, those of what cannot work, of damaged data, and of no memory."""


# Stores that are damaged --------------------------------------------------------------------------------------


class Whole(NamedTuple):
    """A right store, and how its samples are opened."""

    write: Callable[[Path], Path]
    data: dict[str, Any]


def _plain(path: Path, zarr_format: int, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    x = {"dims": ("time", "k"), "values": rng.random((40, 3), "float32"), "chunks": (10, 3), **changes}
    arrays = {
        "x": x,
        "y": {"dims": ("time",), "values": np.arange(40, dtype="int32") % 2, "chunks": (10,)},
        "time": {"dims": ("time",), "values": np.arange(40), "chunks": (40,)},
        "k": {"dims": ("k",), "values": np.arange(3.0), "chunks": (3,)},
    }
    return _write_store(path, arrays, zarr_format=zarr_format, consolidated=True)


def _image(path: Path, version: str) -> Path:
    image = np.random.default_rng(0).random((4, 2, 16, 16)).astype("float32")
    labels = {"cells": (np.arange(4 * 256).reshape(4, 16, 16).astype("int32") % 3, "zyx")}
    return write_ome(path, image, "zcyx", version=version, labels=labels)


def _cells(path: Path) -> Path:
    from scipy.sparse import csr_matrix

    return write_cells(path, csr_matrix(np.eye(30, 6, dtype="float32")))


WINDOWS = {"input_offsets": [-1, 0], "sel": {"k": {"start": 0, "stop": 1}}}
PLAIN = {"inputs": ["x"], "targets": ["y"]}
IMAGE = {"inputs": ["0"], "targets": ["labels/cells/0"], "patch": {"y": 8, "x": 8}}
TABLE = {"inputs": ["X"], "targets": ["obs/cell_type"], "split": {"by": "obs/cell_type", "val": 0.3, "test": 0.0}}
STORES = {
    "v2": Whole(lambda path: _plain(path, 2), {**PLAIN, **WINDOWS}),
    "v3": Whole(lambda path: _plain(path, 3), {**PLAIN, **WINDOWS}),
    "sharded": Whole(lambda path: _plain(path, 3, chunks=(5, 3), shards=(20, 3)), {**PLAIN, "missing": "fill"}),
    "v2 zip": Whole(lambda path: _plain(path, 2), PLAIN),
    "v3 zip": Whole(lambda path: _plain(path, 3), {**PLAIN, "missing": "skip"}),
    "ome 0.4": Whole(lambda path: _image(path, "0.4"), IMAGE),
    "ome 0.5": Whole(lambda path: _image(path, "0.5"), IMAGE),
    "anndata v2": Whole(lambda path: write_anndata(path, "v2"), TABLE),
    "anndata v3": Whole(lambda path: write_anndata(path, "v3"), TABLE),
    "anndata 0.7": Whole(lambda path: write_anndata(path, "legacy"), TABLE),
    "sparse": Whole(_cells, {"inputs": ["X"], "targets": ["obs/y"]}),
}
NAMES = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


# Damage -------------------------------------------------------------------------------------------------------

HUGE = [2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64, 10**12, 10**18, 10**30, 10**400]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "/", "..", "a\0b"),
    *("NaN", "0x7fc00000", "9" * 5000, "x" * 100_000, "é", "time", "zstd", "gzip", "<f8", ">i2", "|O", "<U1000000000"),
    *(
        "|S2147483647",
        "<M8[ns]",
        "float64",
        "int8",
        "bool",
        "string",
        "C",
        "F",
        "csr_matrix",
        "csc_matrix",
        "dataframe",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        [0],
        [1, 2, 3],
        ["x"],
        [[["deep"]]],
        {"a": {}},
        {"name": "gzip"},
        {"name": 3},
        {"id": "lz4"},
    ),
    *(
        {"id": "pickle"},
        {"name": "bytes", "configuration": {"endian": "big"}},
        {"name": "sharding_indexed"},
        [True] * 100,
    ),
    *HUGE,
]
TEXTS = [
    "",
    "{",
    "[]",
    "null",
    "3",
    '"x"',
    "{}",
    "NaN",
    "[" * 100_000,
    '{"a":' * 50_000,
    "\0" * 100,
    "é",
    '{"a": ' + "9" * 5000 + "}",
]


def _places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value of a document."""
    yield at
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from _places(value, (*at, key))


def _changed(document: Any, place: tuple[Any, ...], draw: random.Random) -> Any:
    """Return a document with one value taken out, replaced, wrapped or repeated."""
    if not place:
        return draw.choice([*VALUES, [document], {"a": document}])
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    key, own = place[-1], copy.deepcopy(holder[place[-1]])
    match draw.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.insert(key, own)
        case 1:
            holder[draw.choice(["x", "name", "shape", "dtype", "chunks", "codecs", ""])] = own
        case 2:
            holder[key] = draw.choice([[own], {"a": own}, {"name": own}, [own] * 3])
        case 3 if isinstance(own, int):
            holder[key] = draw.choice([own + 1, own - 1, -own, own * 2, own / 3, float(own), str(own), *HUGE])
        case 3 if isinstance(own, str):
            holder[key] = draw.choice(
                [own[1:], own[::-1], own.upper(), own * 1000, f"numcodecs.{own}", f"{own}\n", [own]]
            )
        case _:
            holder[key] = draw.choice(VALUES)
    return document


def damaged(text: str, draw: random.Random) -> str:
    """Return a document with one to three faults."""
    kind = draw.randrange(12)
    if kind == 0:
        return draw.choice(TEXTS)
    if kind == 1:
        cut = draw.randrange(len(text) + 1)
        return draw.choice([text[:cut], text[:cut] + draw.choice('{}[],:"0x-') + text[cut:], text + text])
    document = json.loads(text)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        document = _changed(document, draw.choice(list(_places(document))), draw)
    return json.dumps(document)


def write_case(folder: Path, seed: int) -> tuple[Path, dict[str, Any], str]:
    """Write the store of a seed; return its path, how it is opened, and what was damaged."""
    draw = random.Random(seed)
    name = draw.choice(list(STORES))
    whole = folder / f"{name}.whole"
    if not whole.exists():
        STORES[name].write(whole)
    path = folder / "case"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    read = NAMES if name.endswith("zip") else NAMES[:-1]  # consolidated metadata of directories are not
    documents = sorted(file for file in path.rglob("*") if file.name in read)
    for file in draw.sample(documents, draw.choice([1, 1, 1, 2])):
        file.write_text(damaged(file.read_text(encoding="utf-8"), draw), encoding="utf-8")
        said = f"{name}: {file.relative_to(path)}"
    if name.endswith("zip"):
        packed = folder / "case.zip"
        with zipfile.ZipFile(packed, "w") as archive:
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    archive.write(file, file.relative_to(path))
        path = packed
    return path, STORES[name].data, said


def go_all_the_way(path: Path, data: dict[str, Any]) -> None:
    """Open samples, plan them, and read the first unit."""
    samples = open_samples(path, **{"split": {"val": 0.2, "test": 0.0}, **data})
    repr(samples)
    genes_of(samples)
    take_inventory(samples, full=False, digests=True, presence=samples.config.missing in ("auto", "error"))
    given = find_given(samples, 0, ()).splits
    plan = plan_data(samples, replicas=2, seed=0, jumps=find_gaps(samples).jumps, given=given)
    part = train_partitions(plan)[0]
    reading = Reading(samples=samples, plan=plan, loaders=1, units=len(part.units), batch_size=4, shuffle=True)
    plan_memory(reading, None, 1 << 30, "memory")
    UnitReader(samples).read(Box(samples.first_row + 1, samples.first_row + 2))


def plan_and_read(path: Path, data: dict[str, Any]) -> None:
    """Plan a training as a user does, with a model that takes any shapes; then the same as above."""
    import torch

    import dtrain

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return self.scale * inputs[0].float()

    samples = dtrain.open_samples(path, **{"split": {"val": 0.2, "test": 0.0}, **data})
    dtrain.plan(Model, samples, train={"loss": _distance, "rounds": 2, "batch_size": 4}, cluster="serial")
    go_all_the_way(path, data)


def _distance(outputs: Any, targets: Any) -> Any:
    return outputs.mean() - targets.float().mean()


def outcome(path: Path, data: dict[str, Any], way: Callable[[Path, dict[str, Any]], None] = go_all_the_way) -> str:
    """Return how a case ends: "ok", the name of an error of dtrain, or the fault."""
    try:
        way(path, data)
    except DtrainError as error:
        if error.code in CODES and error.message:
            return type(error).__name__
        return f"FAULT exit code {error.code}: {error}"
    except BaseException as error:
        return f"FAULT {type(error).__name__}: {str(error)[:200]}"
    return "ok"


# Tests --------------------------------------------------------------------------------------------------------

FOUND: dict[int, str] = {
    1004: "TypeError: a group above an image, when the names of genes are looked for",
    1050: "JSONDecodeError: the same, its attributes",
    1066: "TypeError: the array that names genes",
    1081: "ValueError: the dtype of that array",
    2836: "OverflowError: a chunk of 10^400 values has no size in TB",
}
"""Seeds that once ended otherwise, and how."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metadata")


@pytest.mark.parametrize("name", STORES)
def test_a_store_that_is_not_damaged_gives_a_result(folder: Path, name: str) -> None:
    assert outcome(STORES[name].write(folder / f"{name}.right"), STORES[name].data) == "ok"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [*range(40), *FOUND])
def test_damaged_metadata_end_with_an_error_or_a_result(folder: Path, seed: int) -> None:
    path, data, said = write_case(folder, seed)
    assert not outcome(path, data).startswith("FAULT"), said


def _peak() -> int:
    """Return the peak of this process's memory since the last call, in MB, where the system tells it."""
    try:
        text = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
        return int(text.partition("VmHWM:")[2].split()[0]) >> 10
    except OSError:
        return 0


def run_seeds(folder: str, first: int, stop: int) -> None:
    """Run cases, and print a line for each: in a process of its own, which may not use all memory."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    for seed in range(first, stop):
        path, data, said = write_case(Path(folder), seed)
        if seed == first:  # what is imported counts for no case
            outcome(Path(folder) / "nothing", data, plan_and_read)
            outcome(next(Path(folder).glob("*.whole")), data, plan_and_read)
        faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
        _peak()
        before, began = _peak(), time.monotonic()
        how = outcome(path, data, plan_and_read)
        faulthandler.cancel_dump_traceback_later()
        line = {"seed": seed, "case": said, "how": how, "seconds": time.monotonic() - began, "grown": _peak() - before}
        print(json.dumps(line), flush=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(1000, 3000, 250))
def test_thousands_of_damaged_metadata_end_in_time_and_memory(tmp_path: Path, first: int) -> None:
    code = "import sys; from tests.faults.test_fuzz_metadata import run_seeds; run_seeds(*map(eval, sys.argv[1:]))"
    arguments = [repr(str(tmp_path)), str(first), str(first + 250)]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [line for line in lines if line["how"].startswith("FAULT")]
    assert not [line for line in lines if line["seconds"] > SECONDS or line["grown"] > MEGABYTES]
    assert len(lines) == 250, f"seed {first + len(lines)}: {done.stderr[-3000:]}"
    assert {"ok", "NotZarr", "UnsuitableVariable"} < {line["how"] for line in lines}
