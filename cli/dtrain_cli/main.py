"""The command line: finds the commands, takes the global options, turns errors into exit codes."""

from __future__ import annotations

import atexit
import errno
import importlib
import logging
import os
import pkgutil
import re
import sys
import threading
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, TextIO

import typer

from dtrain_cli import commands
from dtrain_cli.output import Options, error
from dtrain_cli.signals import end_once, terminable

GLOBAL_FLAGS = {
    "--json": "json",
    "-q": "quiet",
    "--quiet": "quiet",
    "-v": "verbose",
    "--verbose": "verbose",
    "--no-color": "no_color",
    "--debug": "debug",
}
INTERRUPTED = 130
ROUNDS_KEPT = "Committed rounds are kept; the same command continues."
KEPT = {
    "train": ROUNDS_KEPT,
    "predict": "What is written stays: the same command with --continue goes on.",
    "verify": "Nothing was written; the same command begins anew.",
}
"""By command that can go on later: what is said after Ctrl-C and SIGTERM."""
OF_THE_MACHINE = {
    *(errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT),
}
"""Errors of the operating system that are no bug of dtrain: a disk, memory, or limits of the process."""
DASK_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "loggers": {name: {"level": "CRITICAL"} for name in ("distributed", "bokeh", "tornado")},
}
"""In Dask's configuration, as `logging.config` has it."""
HELP = {"--help", "-h", "--version"}
JOINED = re.compile(r"^-[qv]{2,}$")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"dtrain {version('dtrain')}")
        raise typer.Exit


def _global(
    json: Annotated[
        bool, typer.Option("--json", help="Print machine-readable output: JSON, one object a line.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No narration and no progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print more narration.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours and no live line (also NO_COLOR).")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train PyTorch models on Zarr data larger than memory, on any Dask cluster."""


def build_app() -> typer.Typer:
    """Return the Typer app with every command of `dtrain_cli.commands`, ordered by their ``ORDER``."""
    app = typer.Typer(
        name="dtrain",
        help="Train PyTorch models on Zarr data larger than memory, on any Dask cluster.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global)
    names = [module.name for module in pkgutil.iter_modules(commands.__path__, f"{commands.__name__}.")]
    for module in sorted((importlib.import_module(name) for name in names), key=lambda module: module.ORDER):
        app.add_typer(module.app)
    return app


@cache
def _command(folders: tuple[str, ...]) -> Any:
    """Return the command line of the commands in folders."""
    return typer.main.get_command(build_app())


def split_flags(arguments: list[str]) -> tuple[Options, list[str]]:
    """Take the global flags out of the arguments, wherever they stand; flags after ``--`` are not ours."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    ours = [f for text in arguments[:end] for f in ([f"-{c}" for c in text[1:]] if JOINED.match(text) else [text])]
    flags = {GLOBAL_FLAGS[text] for text in ours if text in GLOBAL_FLAGS}
    rest = [text for text in ours if text not in GLOBAL_FLAGS] + arguments[end:]
    color = "no_color" not in flags and not os.environ.get("NO_COLOR")
    return Options("json" in flags, "quiet" in flags, "verbose" in flags, color, "debug" in flags), rest


def run(arguments: list[str], out: TextIO | None = None) -> int:
    """Run the command line; return its exit code. Results are printed to `out`, by default stdout."""
    options, rest = split_flags(arguments)
    if out is not None:
        options = replace(options, out=out)
    if options.quiet:
        logging.getLogger("dtrain").setLevel(logging.ERROR)
    if not options.color:
        os.environ.update(NO_COLOR="1", TERM="dumb")  # rich and typer read them
    name = next((text for text in rest if not text.startswith("-")), "")
    printed: AbstractContextManager[object] = nullcontext()
    if options.json and not HELP & set(rest):
        printed = redirect_stdout(sys.stderr)
    try:
        with printed, terminable(KEPT[name]) if name in KEPT else nullcontext():
            command = _command(tuple(commands.__path__))
            code: int | None = command.main(args=rest, prog_name="dtrain", standalone_mode=False, obj=options)
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except (BrokenPipeError, SystemExit) as left:
        if isinstance(left, SystemExit) and not isinstance(left.__context__, BrokenPipeError):  # typer makes one of it
            raise
        for descriptor in {1, _descriptor(options.out)}:  # the reader of our output is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        return 0
    except Exception as fault:
        return _report(options, fault)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code
        error(options, code, "Stopped by Ctrl-C.", KEPT.get(name, ROUNDS_KEPT))
    return code or 0


def _report(options: Options, fault: Exception) -> int:
    if hasattr(fault, "exit_code") and hasattr(fault, "format_message"):  # typer's usage errors
        error(options, 2, fault.format_message() or "no command", _usage(fault))
        return 2
    from dtrain.errors import DtrainError
    from dtrain.urls import redacted

    if options.debug:
        import traceback

        print(redacted("".join(traceback.format_exception(fault))), end="", file=sys.stderr)
    if isinstance(fault, DtrainError):
        error(options, fault.code, fault.message, fault.hint)
        return fault.code
    if isinstance(fault, MemoryError) or (isinstance(fault, OSError) and fault.errno in OF_THE_MACHINE):
        return _report_machine(options, fault)
    text = " ".join(str(fault).split())
    error(options, 1, f"{type(fault).__name__}: {text}", "This is a bug of dtrain. --debug shows where it happened.")
    return 1


def _report_machine(options: Options, fault: MemoryError | OSError) -> int:
    """Report that memory or a disk of this machine fails."""
    if isinstance(fault, MemoryError):
        error(options, 8, "This process is out of memory.", "Free some, or use a machine with more.")
        return 8
    where = f"{fault.filename}: " if fault.filename else ""
    text = f"{where}{os.strerror(fault.errno or 0)}."
    error(options, 8, text[0].upper() + text[1:], "Look at the disk; committed rounds are safe.")
    return 8


def _usage(fault: Any) -> str:
    context = getattr(fault, "ctx", None)
    command = context.command_path if context is not None else "dtrain"
    return f"`{command} --help` shows what is allowed."


def _silence_libraries() -> None:
    """Silence the logs of Dask and asyncio: our errors say what their tracebacks mean."""
    os.environ.setdefault("DASK_LOGGING", repr(DASK_LOGGING))  # read when Dask is imported, also by workers
    for name in ("asyncio", "tornado"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _descriptor(stream: TextIO) -> int:
    """Return the file descriptor of a stream; 1 for one that has none."""
    try:
        return stream.fileno()
    except OSError:
        return 1


def _own_stdout() -> TextIO:
    """Return stdout for results alone: all else that this process and its children print to it goes to stderr."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    end_once()
    if "--debug" not in arguments:
        _silence_libraries()
    code = run(arguments, _own_stdout() if "--json" in arguments and not HELP & set(arguments) else None)
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.exit(code)  # Python waits for it
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)  # nothing is left to do, and Python would take half a second to take PyTorch apart
