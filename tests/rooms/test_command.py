"""A new command is one module: nothing else changes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain_cli import commands, main

GREET = '''
"""dtrain greet: greet somebody."""

from typing import Annotated

import typer

from dtrain_cli.arguments import SET
from dtrain_cli.output import result, say

ORDER = 25
app = typer.Typer()


@app.command("greet")
def greet(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Somebody.")],
    settings: SET = None,
) -> None:
    """Greet somebody."""
    from dtrain.errors import RunNotFound

    if name == "nobody":
        raise RunNotFound("nobody: there is no such person.", "Name another one.")
    say(ctx.obj, "narration")
    result(ctx.obj, f"hello {name}", {"event": "greet", "name": name, "settings": settings})
'''

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """Run the command line, which has a command more."""
    (tmp_path / "greet.py").write_text(GREET)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main.run(list(arguments))
        return code, *capsys.readouterr()

    yield run
    sys.modules.pop("dtrain_cli.commands.greet", None)


def test_it_is_listed_in_its_place(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    known = ["init", "plan", "greet", "train", "status", "eval", "config"]
    listed = [line.split()[1] for line in out.splitlines() if len(line.split()) > 2 and line.split()[1] in known]
    assert listed == known
    assert "Greet somebody." in out


def test_it_has_its_own_help_with_the_shared_options(call: Call) -> None:
    code, out, _ = call("greet", "--help")
    assert code == 0
    assert "Usage: dtrain greet" in out
    assert "--set" in out


def test_it_runs_with_the_global_options(call: Call) -> None:
    assert call("greet", "world") == (0, "hello world\n", "narration\n")
    assert call("-q", "greet", "world") == (0, "hello world\n", "")
    code, out, _ = call("greet", "world", "--set", "a=1", "--json")
    assert code == 0
    assert json.loads(out) == {"event": "greet", "name": "world", "settings": ["a=1"]}


def test_its_errors_have_exit_codes(call: Call) -> None:
    code, out, err = call("greet", "nobody")
    assert (code, out) == (2, "")
    assert err == "error: nobody: there is no such person.\n  Name another one.\n"
    code, _, err = call("greet")
    assert code == 2
    assert err.startswith("error: ")
    assert call("gret")[0] == 2


def test_without_it_the_command_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["greet", "world"]) == 2
    assert "No such command" in capsys.readouterr().err
