"""TrainState <-> a directory of a run: committed whole or not at all, verified before it is used.

    RUN/ config.toml plan.json env.json LOCK history.jsonl events.jsonl
         rounds/round-000010/ params.safetensors inner-0000.safetensors ... state.json manifest.json

A round is written into a temporary directory, every file is synced, the manifest with their SHA-256 comes last,
then one rename makes it visible. safetensors and JSON only: reading a run executes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from dtrain.algorithm.params import Entry, InnerState, Layout, Parameters, Slot, from_tensors, tensors_of
from dtrain.errors import DiskFull, DtrainError, RoundNotFound, RunDamaged
from dtrain.types import Cursor, TrainState

FORMAT = 1
PARAMS, STATE, MANIFEST = "params.safetensors", "state.json", "manifest.json"
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, safetensors.SafetensorError)
"""How files say that they are not what was written."""


# Rounds -------------------------------------------------------------------------------------------------


def commit_round(run: Path, state: TrainState[Any], fingerprint: str) -> int:
    """Write a state as a committed round of a run; return the bytes written.

    Parameters
    ----------
    run : path
        The run's directory.
    state : TrainState
        Held by the driver.
    fingerprint : str
        Of the data plan; the cursors are only good together with it.

    Raises
    ------
    DiskFull
        The round could not be written; rounds committed before are as they were.
    """
    params: Parameters = state.params[0]
    files = {PARAMS: save_tensors({name: tensor.clone() for name, tensor in tensors_of(params).items()})}
    for replica, inner in enumerate(state.inner):
        files[_inner_name(replica)] = save_tensors(_inner_tensors(inner))
    for piece, outer in enumerate(state.outer):
        files[_outer_name(piece)] = save_tensors(_inner_tensors(outer))
    described = {
        "format": FORMAT,
        "round": state.round,
        "fingerprint": fingerprint,
        "cursors": [asdict(cursor) for cursor in state.cursors],
        "steps": list(state.steps),
        "layout": asdict(params.layout),
        "inner": [[_described_slot(slot) for slot in inner.slots] for inner in state.inner],
        "outer": [[_described_slot(slot) for slot in outer.slots] for outer in state.outer],
    }
    files[STATE] = _json(described)
    manifest = {
        "format": FORMAT,
        "round": state.round,
        "files": {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()},
    }
    rounds = run / "rounds"
    temporary = rounds / f".round-{state.round:06d}-{uuid.uuid4().hex[:8]}"
    with _disk_errors(f"round {state.round}", rounds):
        try:
            rounds.mkdir(exist_ok=True)
            temporary.mkdir()
            for name, data in [*files.items(), (MANIFEST, _json(manifest))]:
                _write_synced(temporary / name, data)
            _sync_directory(temporary)
            _move_into_place(temporary, round_directory(run, state.round))
            _sync_directory(rounds)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return sum(len(data) for data in files.values())


def load_round(directory: Path) -> tuple[TrainState[Any], str]:
    """Read and verify a committed round; return its state and the data plan's fingerprint.

    Raises
    ------
    RunDamaged
        A file is missing, or is not what the manifest says.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise RunDamaged(f"{directory} has format {manifest['format']}; this version reads format {FORMAT}.")
        files: dict[str, bytes] = {}
        for name, said in manifest["files"].items():
            data = (directory / Path(name).name).read_bytes()
            if len(data) != said["bytes"] or _sha256(data) != said["sha256"]:
                raise RunDamaged(f"{directory / name} is not what was committed.")
            files[name] = data
        described = json.loads(files[STATE])
        layout = _layout(described["layout"])
        params = from_tensors(load_tensors(files[PARAMS]), layout)
        inner, outer = (
            tuple(
                _inner_state([_slot(slot) for slot in slots], load_tensors(files[named(index)]))
                for index, slots in enumerate(described[kind])
            )
            for kind, named in (("inner", _inner_name), ("outer", _outer_name))
        )
        state: TrainState[Any] = TrainState(
            round=described["round"],
            params=(params,) * len(inner),
            inner=inner,
            outer=outer,
            cursors=tuple(Cursor(**cursor) for cursor in described["cursors"]),
            steps=tuple(described["steps"]),
        )
        return state, described["fingerprint"]
    except RunDamaged:
        raise
    except (*UNREADABLE, DtrainError) as error:
        raise RunDamaged(f"{directory} cannot be read: {' '.join(str(error).split())}") from error


def load_params(directory: Path) -> Parameters:
    """Return the parameters of a committed round."""
    params: Parameters = load_round(directory)[0].params[0]
    return params


def committed_rounds(run: Path) -> list[int]:
    """Return the numbers of the rounds that are in place, ascending; they are not verified."""
    found = (run / "rounds").glob("round-*")
    return sorted(int(p.name.removeprefix("round-")) for p in found if p.name.removeprefix("round-").isdigit())


def round_directory(run: Path, number: int) -> Path:
    """Return the directory of a round."""
    return run / "rounds" / f"round-{number:06d}"


def newest_state(run: Path) -> tuple[TrainState[Any] | None, str, list[tuple[int, str]]]:
    """Return the newest state that verifies, its fingerprint, and (round, reason) of those that do not.

    Raises
    ------
    RunDamaged
        There are committed rounds, but none of them verifies.
    """
    damaged: list[tuple[int, str]] = []
    for number in reversed(committed_rounds(run)):
        try:
            state, fingerprint = load_round(round_directory(run, number))
            return state, fingerprint, damaged
        except RunDamaged as error:
            damaged.append((number, error.message))
    if damaged:
        raise RunDamaged(
            f"{run}: none of its {len(damaged)} committed rounds can be read; {damaged[0][1]}",
            "Restore the directory from a copy, or start again under another --run NAME.",
        )
    return None, "", []


def prune(run: Path, keep: int, best: int | None) -> None:
    """Delete all committed rounds but the newest `keep` and the best one."""
    numbers = committed_rounds(run)
    for number in numbers[:-keep]:
        if number != best:
            doomed = round_directory(run, number)
            temporary = doomed.with_name(f".{doomed.name}-{uuid.uuid4().hex[:8]}")
            with contextlib.suppress(OSError):  # what cannot be deleted is in nobody's way
                doomed.rename(temporary)  # so that a half-deleted round is never taken for a damaged one
                shutil.rmtree(temporary)


def sweep(run: Path) -> None:
    """Delete temporary directories that a killed process left behind. Only under the run's lock."""
    for left in (run / "rounds").glob(".round-*"):
        shutil.rmtree(left, ignore_errors=True)


def find_round(run: Path, wanted: str, best: int | None) -> int:
    """Return the number of the round that ``best``, ``last`` or a number names.

    Raises
    ------
    RoundNotFound
        The run does not keep it.
    """
    kept = committed_rounds(run)
    if not kept:
        raise RoundNotFound(f"{run} has no committed round yet.")
    if wanted == "last":
        return kept[-1]
    if wanted == "best":
        return best if best in kept else kept[-1]
    if wanted.isdigit() and int(wanted) in kept:
        return int(wanted)
    raise RoundNotFound(f'{run} keeps no round "{wanted}".', f"Kept are best, last and {', '.join(map(str, kept))}.")


# Files --------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole.

    Raises
    ------
    DiskFull
        It could not be written.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    with _disk_errors(path.name, path.parent):
        try:
            _write_synced(temporary, text.encode())
            os.replace(temporary, path)
            _sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append_line(path: Path, text: str) -> None:
    """Append a line to a file and sync it.

    Raises
    ------
    DiskFull
        It could not be written.
    """
    with _disk_errors(path.name, path.parent):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _write_all(descriptor, f"{text}\n".encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_tensor_file(path: Path, layout: Layout) -> Parameters:
    """Return parameters from a safetensors file of a state_dict.

    Raises
    ------
    RunDamaged
        It cannot be read, or does not fit the model.
    """
    try:
        return from_tensors(load_tensors(path.read_bytes()), layout)
    except (OSError, ValueError, safetensors.SafetensorError, DtrainError) as error:
        raise RunDamaged(f"{path} cannot be used: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _disk_errors(what: str, where: Path) -> Iterator[None]:
    try:
        yield
    except DtrainError:
        raise
    except OSError as error:
        hint = {
            errno.ENOSPC: "Free some space",
            errno.EDQUOT: "Your disk quota is used up: free some space",
            errno.EROFS: "The file system is read-only: set run.dir to another place",
            errno.EACCES: "Permission is denied: set run.dir to a place that you may write to",
        }.get(error.errno or 0, "Look at the disk")
        raise DiskFull(
            f"{what} could not be written to {where}: {error.strerror or error}.",
            f"{hint}, then run the same command again; committed rounds are safe.",
        ) from error


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, final: Path) -> None:
    if final.exists():  # a damaged round that was skipped, and is done again
        aside = final.with_name(f".{final.name}-{uuid.uuid4().hex[:8]}")
        final.rename(aside)
        try:
            temporary.rename(final)
        except BaseException:
            aside.rename(final)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        temporary.rename(final)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Conversions --------------------------------------------------------------------------------------------


def _inner_name(replica: int) -> str:
    return f"inner-{replica:04d}.safetensors"


def _outer_name(piece: int) -> str:
    return f"outer-{piece:04d}.safetensors"


def _inner_tensors(inner: InnerState) -> dict[str, torch.Tensor]:
    return {
        f"{slot.param}.{slot.key}": torch.from_numpy(inner.data[slot.offset : slot.offset + slot.size].copy())
        .view(getattr(torch, slot.dtype))
        .reshape(slot.shape)
        for slot in inner.slots
        if slot.dtype
    }


def _inner_state(slots: list[Slot], tensors: dict[str, torch.Tensor]) -> InnerState:
    size = max((slot.offset + slot.size + (-slot.size % 8) for slot in slots), default=0)
    data = np.zeros(size, np.uint8)
    for slot in slots:
        if slot.dtype:
            raw = tensors[f"{slot.param}.{slot.key}"].contiguous().reshape(-1).view(torch.uint8).numpy()
            data[slot.offset : slot.offset + slot.size] = raw
    return InnerState(tuple(slots), data)


def _layout(described: dict[str, Any]) -> Layout:
    entries = tuple(Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in described["entries"])
    return Layout(entries, described["num_params"], described["num_flat"], described["num_extra"])


def _described_slot(slot: Slot) -> dict[str, Any]:
    value = slot.value
    return {**asdict(slot), "value": str(value) if isinstance(value, float) and not math.isfinite(value) else value}


def _slot(described: dict[str, Any]) -> Slot:
    value = described["value"]  # JSON has no inf and nan
    plain = float(value) if isinstance(value, str) else value
    return Slot(**{**described, "shape": tuple(described["shape"]), "value": plain})
