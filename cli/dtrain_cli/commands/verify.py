"""dtrain verify: whether all of a run, a round or a store is intact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrain_cli import completion
from dtrain_cli.arguments import SET, epilog
from dtrain_cli.output import Options, result, say, shown, table, waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtrain.config.schema import DataConfig
    from dtrain.verify.fault import Fault
    from dtrain.verify.place import Found
    from dtrain.verify.result import StoreVerified
    from dtrain.verify.run import RunVerified

ORDER = 58
DAMAGED = 5
MOST_LINES = 50
"""Faults that are printed for people; with --json all are."""
KEYS = ("storage_options", "missing")
app = typer.Typer()


EPILOG = epilog(
    ("dtrain verify my", "the run of that name, with each round that it keeps"),
    ("dtrain verify my/runs/my/rounds/round-000010", "one round"),
    ("dtrain verify train.zarr", "reads and decodes each chunk"),
    ("dtrain verify train.zarr --manifest train.json", "and compares all contents"),
    ("dtrain verify s3://bucket/a.zarr --set data.storage_options.anon=true", ""),
)


@app.command("verify", epilog=EPILOG)
def verify(
    ctx: typer.Context,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A run (its directory or name), one of its rounds, or a Zarr store (path or URL).",
            show_default=False,
            autocompletion=completion.runs_or_stores,
        ),
    ],
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest",
            metavar="FILE",
            help="Of a store: size and SHA-256 of each stored object. The store is compared with it; where there is no "
            "such file, it is written, once nothing is at fault.",
            show_default=False,
        ),
    ] = None,
    settings: SET = None,
) -> None:
    """Check that a run, a round or a Zarr store is intact; list all that is not, and end with exit code 5.

    A flipped bit in a chunk without a checksum, and two chunks that are swapped,
    show against a manifest alone. --set takes data.storage_options and
    data.missing, which says whether a chunk that is not stored is a fault.
    """
    options: Options = ctx.obj
    from dtrain.errors import UsageError

    found = _found(path)
    if found.kind == "store":
        raise typer.Exit(_verify_store(options, path, manifest, _data(settings or [])))
    if manifest is not None:
        raise UsageError(
            f"--manifest {manifest}: {path} is no Zarr store; a run's rounds have manifests of their own.",
            f"Leave it out: dtrain verify {path}",
        )
    if settings:
        raise UsageError(f"--set {settings[0]}: keys of data are for Zarr stores.", "Leave it out for a run.")
    raise typer.Exit(_verify_run(options, found))


def _found(path: str) -> Found:
    """Return what lies at a path, or is named by it."""
    from dtrain.verify.place import Found, find

    found = find(path)
    if found.kind != "name":
        return found
    from dtrain.directory import find_run
    from dtrain.errors import RunNotFound

    try:
        return Found("run", str(find_run(path)))
    except RunNotFound as error:
        if Path(path).exists():
            return Found("store", path)
        hint = f"{error.hint.removesuffix('.')}; or a round, or a Zarr store by its path or URL."
        raise RunNotFound(error.message, hint) from None


def _data(settings: list[str]) -> DataConfig:
    """Return the table ``[data]`` that the options mean."""
    from dtrain.config.files import with_setting
    from dtrain.config.schema import TrainConfig
    from dtrain.config.values import Tables
    from dtrain.errors import UsageError

    tables: Tables = {}
    for setting in settings:
        if not setting.startswith(tuple(f"data.{key}{mark}" for key in KEYS for mark in "=.")):
            raise UsageError(
                f"--set {setting}: verify takes data.storage_options and data.missing.",
                'For example --set data.missing=fill, or --set "data.storage_options={ anon = true }".',
            )
        tables = with_setting(tables, setting)
    return TrainConfig(**tables).data


def _faults(options: Options) -> Callable[[Fault], None]:
    """Return what prints each fault as it is found; of very many the first ones."""
    printed = 0

    def tell(fault: Fault) -> None:
        nonlocal printed
        printed += 1
        if options.json or printed <= MOST_LINES:
            record = {"event": "fault", "what": fault.what, "key": fault.key, "array": fault.array}
            result(options, str(fault), {**record, "message": str(fault)})
        elif printed == MOST_LINES + 1:
            result(options, "... (--json lists all)", {})

    return tell


def _conclude(options: Options, path: str, faults: dict[str, int], rows: list[tuple[str, str]], record: Any) -> int:
    """Print what has been looked at; return the exit code."""
    count, code = sum(faults.values()), DAMAGED if faults else 0
    parts = ", ".join(f"{number:,} {what}" for what, number in sorted(faults.items()))
    verdict = f"not intact, {count:,} fault{'s' if count > 1 else ''}: {parts}" if faults else "intact"
    text = table([(record["kind"], f"{path}: {verdict}"), *rows])
    result(options, text, {"event": "verify", "path": path, "code": code, "faults": faults, **record})
    return code


# Runs -----------------------------------------------------------------------------------------------------


def _verify_run(options: Options, found: Found) -> int:
    with waiting(options, "reading all files of the run"):
        from dtrain.verify.run import verify_round_of, verify_run

        tell = _faults(options)
        verified = (
            verify_round_of(Path(found.path), tell) if found.kind == "round" else verify_run(Path(found.path), tell)
        )
    return _show_run(options, found, verified)


def _show_run(options: Options, found: Found, verified: RunVerified) -> int:
    from dtrain.display import bytes_text

    kind, path = "round" if found.kind == "round" else "run", shown(verified.path)
    rounds = ", ".join(map(str, verified.rounds)) or "none is committed"
    rows = [
        *([("rounds", rounds)] if kind == "run" else []),
        ("read", f"{verified.files:,} files, {bytes_text(verified.nbytes)}; each as it was written"),
    ]
    if verified.faults:
        rows[-1] = ("read", f"{verified.files:,} files, {bytes_text(verified.nbytes)}")
    record = {
        "kind": kind,
        "rounds": list(verified.rounds),
        "files": verified.files,
        "bytes": verified.nbytes,
        "notes": list(verified.notes),
    }
    code = _conclude(options, path, verified.faults, rows, record)
    for note in verified.notes:
        say(options, note)
    if code:
        say(options, "Restore it from a copy. Training goes on from the newest round that is intact.")
    return code


# Stores ---------------------------------------------------------------------------------------------------


def _verify_store(options: Options, path: str, manifest: Path | None, data: DataConfig) -> int:
    from dtrain.report.verifying import verifying_progress
    from dtrain.verify.store import verify_store

    with verifying_progress(quiet=options.quiet, color=options.color) as tell:
        verified = verify_store(path, data, manifest, report=_faults(options), tell=tell)
    rows = _rows(verified, manifest)
    record = {
        "kind": "store",
        "snapshot": verified.snapshot,
        "groups": verified.groups,
        "arrays": len(verified.arrays),
        "objects": verified.objects,
        "bytes": verified.nbytes,
        "absent": {one.name: one.absent for one in verified.arrays if one.absent},
        "without_checksum": [one.name for one in verified.arrays if not one.checksums],
        "manifest": None if manifest is None else {"file": str(manifest), "state": verified.manifest},
        "notes": list(verified.notes),
    }
    code = _conclude(options, shown(verified.path), dict(verified.faults), rows, record)
    for note in (*verified.notes, *_cures(verified)):
        say(options, note)
    return code


def _rows(verified: StoreVerified, manifest: Path | None) -> list[tuple[str, str]]:
    from dtrain.display import bytes_text
    from dtrain.errors import listed

    chunks = sum(one.chunks - one.absent for one in verified.arrays)
    arrays = f"{len(verified.arrays):,} array{'s' if len(verified.arrays) != 1 else ''}"
    rows = [("read", f"{arrays}, {chunks:,} chunks in {verified.objects:,} objects, {bytes_text(verified.nbytes)}")]
    if verified.snapshot:
        rows.append(("snapshot", verified.snapshot))
    for one in verified.arrays:
        if one.absent:
            absent = f"{one.name}: {one.absent:,} of {one.chunks:,} chunks; Zarr reads them as {one.reads_as}"
            rows.append(("not stored", absent))
    if unchecked := [one.name for one in verified.arrays if not one.checksums and one.chunks]:
        rows.append(("no checksum", f"{listed(unchecked)}: a flipped bit there shows against a manifest alone"))
    if manifest is not None:
        rows.append(("manifest", f"{shown(manifest)}: {verified.manifest}"))
    return rows


def _cures(verified: StoreVerified) -> list[str]:
    """Return what one does next."""
    if verified.manifest == "not written":
        return ["No manifest was written: it would list what is at fault. Repair the store first."]
    if verified.manifest == "differs":
        return ["A store that was changed on purpose needs a new manifest, under another name."]
    if verified.faults.get("missing"):
        return ["If chunks that hold only the fill value are left out: --set data.missing=fill."]
    if verified.faults:
        return ["Restore it from a copy of the store."]
    return []
