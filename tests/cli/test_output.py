"""Results on stdout, narration on stderr; colours, quiet and debug."""

import errno
import io
import json
import os
import pty
import re
import subprocess
import threading

import numpy as np
import pytest

from dtrain_cli import output
from tests.cli.helpers import MODEL, SCRIPT, last, objects

ESCAPE = "\x1b"


def at_a_terminal(*arguments, stdout_too=True, **env):
    """Run the console script with a terminal for stderr (and stdout); return exit code, stdout and stderr."""
    ours, theirs = pty.openpty()
    said = bytearray()

    def listen():
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # nobody has the other end any more
                return
            if not data:
                return
            said.extend(data)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        done = subprocess.run(
            [SCRIPT, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=theirs if stdout_too else subprocess.PIPE,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color", **env},
            timeout=60,
            check=False,
        )
    finally:
        os.close(theirs)
        listener.join()
        os.close(ours)
    return done.returncode, (done.stdout or b"").decode(), said.decode()


def commands(job):
    return {
        "init": ("init", "new", "--template", "tabular"),
        "plan": ("plan", job.config),
        "train": ("train", job.config, "--run", "another"),
        "again": ("train", job.config),
        "status": ("status", job.run),
        "eval": ("eval", job.run),
        "predict": ("predict", job.run, "--out", "predicted.zarr"),
        "show": ("config", "show", job.config),
        "schema": ("config", "schema"),
    }


NAMES = ("init", "plan", "train", "again", "status", "eval", "predict", "show", "schema")


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", NAMES)
def test_with_json_stdout_holds_an_object_a_line(cli, job, name):
    outcome = cli("--json", *commands(job)[name])
    assert outcome.code == 0, outcome.err
    found = objects(outcome.out)
    assert found
    assert all(isinstance(one, dict) for one in found)
    assert name == "schema" or all("event" in one for one in found)
    assert "{" not in outcome.err


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
def test_quiet_silences_narration_but_not_results(cli, job, name):
    outcome = cli("-q", *commands(job)[name])
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.out.endswith("\n")
    assert outcome.out.strip()


def test_quiet_and_json_together(cli, project):
    outcome = cli("-q", "--json", "train", project().config, "--run", "another")
    assert [one["event"] for one in objects(outcome.out)] == ["round", "round", "done"]
    assert outcome.err == ""


@pytest.mark.parametrize("name", NAMES)
def test_words_hold_no_escape_codes_where_there_is_no_terminal(cli, job, name):
    outcome = cli(*commands(job)[name])
    assert ESCAPE not in outcome.out + outcome.err


def test_quiet_does_not_silence_errors(cli):
    outcome = cli("-q", "status", "nowhere")
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")


def test_verbose_tells_of_commits(cli, project):
    job = project()
    assert "RoundCommitted" not in cli("train", job.config).err
    assert cli("-v", "train", job.config, "--run", "another").err.count("RoundCommitted") == 2


def test_debug_prints_a_traceback(cli):
    outcome = cli("--debug", "--json", "status", "nowhere")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert "RunNotFound" in outcome.err
    assert "error: nowhere: no such run" in outcome.err
    assert [one["event"] for one in objects(outcome.out)] == ["error"]
    assert "Traceback" not in cli("status", "nowhere").err


def test_debug_shows_the_users_own_lines(cli, project):
    job = project(model="def build():\n    return 1 / 0\n")
    outcome = cli("train", job.config, "--debug")
    assert outcome.code == 3
    assert "return 1 / 0" in outcome.err


@pytest.mark.parametrize("arguments", [["statsu"], ["--help"]])
def test_at_a_terminal_there_are_colours(arguments):
    assert ESCAPE in at_a_terminal(*arguments)[2]


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        (["--no-color", "statsu"], {}),
        (["statsu"], {"NO_COLOR": "1"}),
        (["--no-color", "--help"], {}),
        (["--help"], {"NO_COLOR": "1"}),
        (["train", "--help", "--no-color"], {}),
    ],
)
def test_colours_can_be_turned_off(arguments, env):
    _, _, said = at_a_terminal(*arguments, **env)
    assert said
    assert ESCAPE not in said


def test_an_empty_no_color_does_not_count():
    assert ESCAPE in at_a_terminal("statsu", NO_COLOR="")[2]


def test_training_at_a_terminal_without_colours(project):
    code, _, said = at_a_terminal("--no-color", "train", project().config)
    assert code == 0
    assert "done (rounds)" in said
    assert ESCAPE not in said


def test_results_go_to_stdout_while_stderr_is_a_terminal(project):
    code, out, said = at_a_terminal("--json", "train", project().config, stdout_too=False)
    assert code == 0, said
    assert [one["event"] for one in objects(out)] == ["round", "round", "done"]
    assert '"event"' not in said


@pytest.mark.parametrize("arguments", ["config schema", "config show job/dtrain.toml"])
def test_a_reader_that_leaves_is_no_error(project, arguments):
    project()
    command = f"set -o pipefail; '{SCRIPT}' {arguments} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_error_of_many_lines_is_folded(capsys):
    from dtrain_cli.output import Options, error

    error(Options(json=True), 3, "one\ntwo\n  three", "four\nfive", "six")
    out, err = capsys.readouterr()
    assert err == "error: one two three\n  four five\n  six\n"
    assert json.loads(out) == {"event": "error", "code": 3, "message": "one\ntwo\n  three", "hint": "four\nfive"}


class Heard(io.StringIO):
    """Tells when something is written to it."""

    def __init__(self, tty):
        super().__init__()
        self.tty, self.heard = tty, threading.Event()

    def isatty(self):
        return self.tty

    def write(self, text):
        super().write(text)
        self.heard.set()


@pytest.mark.parametrize(("tty", "said"), [(False, "reading ...\n"), (True, f"reading ...\r{ESCAPE}[2K")])
def test_what_takes_long_is_said(monkeypatch, tty, said):
    heard = Heard(tty)
    monkeypatch.setattr(output.sys, "stderr", heard)
    monkeypatch.setattr(output, "WAITING_SECONDS", 0.0)
    with output.waiting(output.Options(), "reading"):
        assert heard.heard.wait(60)
    assert heard.getvalue() == said


@pytest.mark.parametrize(("options", "seconds"), [(output.Options(quiet=True), 0.0), (output.Options(), 600.0)])
def test_what_is_quick_or_quiet_is_not_said(monkeypatch, capsys, options, seconds):
    monkeypatch.setattr(output, "WAITING_SECONDS", seconds)
    with output.waiting(options, "reading"):
        pass
    assert capsys.readouterr().err == ""


# Columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plan", "status", "eval"])
def test_results_fit_eighty_columns(cli, project, name):
    arrays = {"x": {"dims": ("sample", "a_dimension_with_a_very_long_name"), "values": np.zeros((60, 3), "f4")}}
    arrays["x"]["chunks"] = (20, 3)
    job = project(arrays=arrays)
    assert cli("-q", "train", job.config).code == 0
    outcome = cli(*commands(job)[name])
    assert outcome.code == 0, outcome.err
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_an_error_is_wrapped_on_a_terminal_only(cli, job, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    plain = cli("train", job.config, "--set", "train.lr=3").err
    assert len(plain.splitlines()) == 1
    monkeypatch.setenv("COLUMNS", "60")
    fitted = cli("train", job.config, "--set", "train.lr=3").err
    assert max(map(len, fitted.splitlines())) <= 60
    assert fitted.split() == plain.split()
    code, _, said = at_a_terminal("train", job.config, "--set", "train.lr=3", COLUMNS="72")
    assert code == 3
    assert max(len(line.replace(ESCAPE + "[31m", "").replace(ESCAPE + "[0m", "")) for line in said.splitlines()) <= 72


def test_small_losses_are_not_printed_as_nothing(cli, project, tmp_path):
    model = MODEL + "\n\ndef tiny(outputs, targets):\n    return 1e-9 * outputs.square().mean()\n"
    job = project({"train": {"loss": "model:tiny", "metrics": []}}, model=model)
    outputs = [cli("train", job.config), cli("plan", job.config), cli("status", job.run), cli("eval", job.run)]
    for outcome in outputs:
        text = outcome.out + outcome.err
        assert outcome.code == 0, text
        assert re.search(r"loss\S*:? .*e-\d\d", text), text
        assert not re.search(r"loss 0\.0+\b", text), text


def test_a_path_with_a_detour_is_shown_without(cli, job):
    outcome = cli("plan", job.config, "--set", "data.path=job/../job/train.zarr")
    assert re.search(r"^store +job/train.zarr$", outcome.out, re.MULTILINE)


# What code of the user's prints -------------------------------------------------------------------------------------

LOUD = """\
import os
from torch import nn

print("imported")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        print("loud " * 2000)
        os.write(1, b"from C\\n")
        return self.linear(x)


def build():
    return Net()
"""


@pytest.mark.parametrize("where", ["serial", pytest.param("local", marks=pytest.mark.alone)])
def test_what_is_printed_by_code_of_the_users_is_no_result(project, script, where):
    job = project({"train": {"batch_size": 1, "rounds": 4}}, model=LOUD)
    outcome = script("--json", "train", job.config, "--set", f"cluster.scheduler={where}", timeout=200)
    assert outcome.code == 0, outcome.err[-2000:]
    assert [row["event"] for row in objects(outcome.out)] == ["round"] * 4 + ["done"]
    assert "loud loud" in outcome.err
    assert "from C" in outcome.err
    if where == "local":
        assert "more output is left out" in outcome.err
        assert outcome.err.count("loud") < 2 * 200_000 + 10_000


def test_errors_of_the_machine_are_no_bugs(cli, job, monkeypatch):
    def broken(path, *more, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    for name in ("listdir", "lstat"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, broken)
            outcome = cli("--json", "status", job.run)
        assert outcome.code in (5, 8)
        assert "nput/output error" in last(outcome)["message"]
    for error, code in ((MemoryError(), 8), (OSError(errno.ENOSPC, "x", "/dev/shm/a"), 8), (OSError("odd"), 1)):
        with monkeypatch.context() as patch:
            patch.setattr("dtrain.directory.find_run", lambda text, error=error: (_ for _ in ()).throw(error))
            outcome = cli("--json", "status", job.run)
        assert outcome.code == code
        assert "Traceback" not in outcome.err
