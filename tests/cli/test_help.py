"""Help, examples and completion of every command."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

from dtrain_cli import completion, main
from tests.cli.helpers import SCRIPT
from tests.cli.test_commands import leaves

GROUP = typer.main.get_command(main.build_app())
COMMANDS = {**leaves(GROUP), "config": GROUP.commands["config"]}
WIDTH = 78
"""Of a terminal of 80 columns, with its margins."""


def lines_of(command):
    return [line.replace("\\[", "[") for line in (command.epilog or "").split("\n\n")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_fit_a_line(name):
    first, *lines = lines_of(COMMANDS[name])
    assert first == "For example:"
    assert len(lines) >= 2
    for line in lines:
        assert len(line) <= WIDTH, line
        assert line.startswith(f"dtrain {name.split()[0]} ") or line in (f"dtrain {name}",) or "#:schema" in line, line


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_name_options_that_exist(name):
    for line in lines_of(COMMANDS[name])[1:]:
        words = shlex.split(line.partition("   ")[0].partition(" > ")[0])
        if words[0] != "dtrain":
            continue
        called = " ".join(words[1:3]) if words[1] == "config" else words[1]
        command, known = COMMANDS[called], {*main.GLOBAL_FLAGS}
        known |= {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_examples_as_they_are_typed(cli, name):
    outcome = cli(*name.split(), "--help")
    assert outcome.code == 0
    shown = " ".join(outcome.out.split())
    for line in lines_of(COMMANDS[name]):
        assert " ".join(line.split()) in shown


def test_no_help_loses_words_in_brackets(cli):
    """Rich takes words in square brackets for markup, and leaves them out."""
    for name, command in COMMANDS.items():
        texts = [command.help or "", *(parameter.help or "" for parameter in command.params)]
        assert not [text for text in texts if re.search(r"(?<!\\)\[(?!data\b|train\b)[a-z]+:? ", text)], name


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "config"])
def test_every_command_takes_json(cli, name):
    """What is missing or wrong is reported as JSON too."""
    outcome = cli("--json", *name.split(), "--no-such-option")
    assert outcome.code == 2
    assert outcome.out.startswith('{"event": "error", "code": 2, ')


# Completion --------------------------------------------------------------------------------------------------------


def completed(words: str, position: int) -> list[str]:
    env = {**os.environ, "_DTRAIN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    return subprocess.run([SCRIPT], env=env, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_shell_completes_runs_files_keys_and_names(job):
    assert completed("dtrain eval ", 2) == ["job"]
    assert completed("dtrain eval job/", 2) == ["job/runs/job"]
    assert completed("dtrain train jo", 2) == ["job/dtrain.toml"]
    assert completed("dtrain train job/dtrain.toml --set train.opt", 4) == ["train.optimizer=", "train.optimizer_args="]
    assert completed("dtrain init --template d", 3) == ["demo", "digits"]


def test_what_is_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my/dtrain.toml", "my/runs/first/config.toml", "my/other.yaml", "top.json", ".hidden.toml", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert completion.runs("") == ["first"]
    assert completion.runs("my/") == ["my/runs/first"]
    assert completion.config_files("") == ["my/dtrain.toml", "top.json"]
    assert completion.config_files("my/") == ["my/dtrain.toml", "my/other.yaml"]
    assert completion.config_files_or_runs("") == ["my/dtrain.toml", "top.json", "first"]
    assert completion.places("") == ["local", "serial", "tcp://", "tls://", "top.json"]
    assert completion.rounds("b") == ["best"]
    assert completion.splits("") == ["all", "test", "val"]
    assert completion.keys("stop.") == [f"stop.{key}=" for key in ("metric", "min_delta", "mode", "patience", "target")]
    assert completion.keys("train.rounds=5") == []
    assert "diloco" in completion.presets("")
    assert completion.presets("fedn") == ["fednova"]


def test_formats_and_templates_are_those_that_exist():
    from dtrain.exporting.export import format_names
    from dtrain_cli.commands import export, init

    assert export._formats("") == format_names()
    assert init._templates("") == list(init.TEMPLATES)


def test_completion_can_be_installed(tmp_path):
    """Typer's own: it writes below the home directory."""
    env = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = subprocess.run([SCRIPT, "--show-completion", "bash"], env=env, capture_output=True, text=True, check=True)
    assert "complete -o default -F _dtrain_completion dtrain" in shown.stdout
    subprocess.run([SCRIPT, "--install-completion", "bash"], env=env, capture_output=True, text=True, check=True)
    written = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert any("dtrain" in path.read_text() for path in written)
