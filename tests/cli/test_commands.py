"""The commands, their options and their help."""

import json
import subprocess
import sys
import time

import pytest
import typer

from dtrain_cli import main
from tests.cli.helpers import last

GLOBAL = {"--json", "--quiet -q", "--verbose -v", "--no-color", "--debug", "--version"}
COMMANDS = {
    "init": {"[DIR]", "--template", "--data"},
    "plan": {"CONFIG", "--set", "--scheduler", "--full", "--probe", "--bandwidth"},
    "train": {"CONFIG", "--run", "--set", "--scheduler", "--max-time"},
    "status": {"RUN", "--watch"},
    "eval": {
        *("RUN", "--data", "--split", "--round", "--by", "--metric", "--no-baselines", "--all-times"),
        *("--scheduler", "--set", "--project", "--trust-code"),
    },
    "predict": {
        *("RUN", "--data", "--out", "--continue", "--round", "--values", "--overlap", "--scheduler", "--set"),
        *("--project", "--trust-code"),
    },
    "doctor": {"--scheduler", "--data", "--set"},
    "export": {"RUN", "--to", "--out", "--round", "--ema", "--set", "--project", "--trust-code"},
    "config show": {"CONFIG|RUN", "--set"},
    "config schema": set(),
    "config diff": {"A", "B"},
    "config presets": {"[NAME]"},
    "verify": {"PATH", "--manifest", "--set"},
    "certs": {"DIR", "--host", "--days"},
}
HEAVY = ("torch", "xarray", "zarr", "dask", "distributed", "numpy", "pydantic")


def leaves(group, prefix=""):
    found = {}
    for name, command in group.commands.items():
        found |= leaves(command, f"{prefix}{name} ") if hasattr(command, "commands") else {f"{prefix}{name}": command}
    return found


def names(parameters):
    spelt = {" ".join(p.opts) if p.param_type_name == "option" else p.metavar or p.name.upper() for p in parameters}
    return spelt - {"-h --help", "--help -h"}


def test_the_commands_and_their_options_are_these():
    group = typer.main.get_command(main.build_app())
    assert {name: names(command.params) for name, command in leaves(group).items()} == COMMANDS
    assert names(group.params) - {"--install-completion", "--show-completion"} == GLOBAL


def test_every_command_and_every_option_has_help():
    group = typer.main.get_command(main.build_app())
    everything = {"dtrain": group, "config": group.commands["config"], **leaves(group)}
    for name, command in everything.items():
        assert (command.help or "").endswith("."), name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


def test_help_lists_the_commands(cli):
    outcome = cli("--help")
    assert outcome.code == 0
    assert outcome.err == ""
    for name in (*COMMANDS, *GLOBAL):
        assert name.split()[0] in outcome.out


@pytest.mark.parametrize("command", [*COMMANDS, "config"])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_of_a_command(cli, command, option):
    outcome = cli(*command.split(), option)
    assert outcome.code == 0
    assert f"Usage: dtrain {command}" in outcome.out


def modules_imported(code):
    """The names of the modules that a Python process has imported after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('modules', *sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_help_imports_little_more_than_typer():
    # the time of `dtrain --help` is that of its imports; their number is the same on a busy machine
    base = "import logging, typer, typer.rich_utils, shellingham, rich.markdown"
    more = modules_imported("from dtrain_cli import main; main.run(['--help'])") - modules_imported(base)
    known = {*sys.stdlib_module_names, "dtrain_cli", "rich", "typer"}
    assert {name for name in more if name.partition(".")[0] not in known} == set()
    assert len(more) < 40


@pytest.mark.alone
def test_help_takes_a_few_starts_of_python(script):
    def seconds(call):
        times = []
        for _ in range(5):
            started = time.monotonic()
            assert call() == 0
            times.append(time.monotonic() - started)
        return sorted(times)

    typed = seconds(lambda: subprocess.run([sys.executable, "-c", "import typer.main, rich.console"]).returncode)
    helped = seconds(lambda: script("--help").code)
    assert helped[2] < 4 * typed[2] + 0.1


@pytest.mark.parametrize("call", ["", "main.run(['--help'])", "main.run([])", "main.run(['--version'])"])
def test_nothing_heavy_is_imported_before_a_command_runs(call):
    code = f"""
import sys
from dtrain_cli import main
{call}
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(cli, script):
    assert cli("--version") == (0, "dtrain 0.1.0\n", "")
    assert script("--version") == (0, "dtrain 0.1.0\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "x.toml"], ["trian", "train"]),
        (["config", "shwo", "x.toml"], ["shwo", "show"]),
        (["train", "x.toml", "--sett", "a=b"], ["--sett", "--set"]),
        (["train", "x.toml", "--max-tiem", "1s"], ["--max-tiem", "--max-time"]),
        (["status", "a", "b"], ["b"]),
        (["--jsno", "status"], ["--jsno", "--json"]),
        (["train"], ["CONFIG"]),
        (["eval"], ["run"]),
        (["train", "x.toml", "--set"], ["--set"]),
        (["train", "x.toml", "--run"], ["--run"]),
    ],
)
def test_misspelt_words_are_usage_errors(cli, arguments, words):
    outcome = cli(*arguments)
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert lines[0].startswith("error: ")
    assert [line.startswith("error:") for line in lines].count(True) == 1
    assert len(lines) <= 4
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in lines[0]

    outcome = cli("--json", *arguments)
    assert outcome.code == 2
    found = last(outcome)
    assert set(found) == {"event", "code", "message", "hint"}
    assert (found["event"], found["code"]) == ("error", 2)
    assert all(word in found["message"] for word in words)


@pytest.mark.parametrize("arguments", [[], ["config"]])
def test_without_a_command_there_is_help_and_an_error(cli, arguments):
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert "Usage: dtrain" in outcome.out
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 2


@pytest.mark.parametrize(
    ("text", "code"), [("soon", 2), ("", 2), ("-1s", 2), ("1w", 2), ("2h h", 2), ("1e3", 2), ("inf", 2)]
)
def test_durations_that_are_none(cli, project, text, code):
    outcome = cli("train", project().config, "--max-time", text)
    assert outcome.code == code
    assert outcome.err.startswith(f'error: --max-time "{text}"')


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), (" 1 d ", 86400), ("0s", 0)]
)
def test_durations(text, seconds):
    from dtrain_cli.commands.train import parse_duration

    assert parse_duration(text) == seconds


def test_the_shell_can_complete_commands(script):
    env = {"_DTRAIN_COMPLETE": "complete_bash", "COMP_WORDS": "dtrain st", "COMP_CWORD": "1"}
    assert script(env=env) == (0, "status\n", "")


def test_global_flags_may_stand_anywhere(cli):
    for arguments in (["--json", "config", "show", "no.toml"], ["config", "show", "no.toml", "--json"]):
        outcome = cli(*arguments)
        assert json.loads(outcome.out)["code"] == 2


def test_short_flags_may_be_joined(cli, project):
    job = project()
    for arguments in (["-qv", "train", job.config], ["train", job.config, "-vq"]):
        outcome = cli(*arguments)
        assert outcome.code == 0, outcome.err
        assert outcome.err == ""
