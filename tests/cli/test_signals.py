"""Training that is stopped from outside: committed rounds stay, and the same command goes on to the same bits."""

import json
import os
import signal
import subprocess

import pytest

from tests.cli.helpers import MODEL, SCRIPT, history, kept, last, objects
from tests.training import bits

pytestmark = pytest.mark.alone
ROUNDS = 12
MANY = ("--set", f"train.rounds={ROUNDS}")


def stopped(job, number, after=3):
    """Start a driver, send it a signal once it has printed some rounds; return its exit code, output and errors."""
    command = [SCRIPT, "--json", "-q", "train", job.config, *MANY]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NAP": "0.05"},
        start_new_session=True,
    ) as driver:
        said = [driver.stdout.readline() for _ in range(after)]
        os.killpg(driver.pid, number) if number == signal.SIGINT else driver.send_signal(number)  # as a terminal does
        rest, errors = driver.communicate(timeout=60)
    return driver.returncode, "".join(said) + rest, errors


SERIAL = {}
LOCAL = {"cluster": {"scheduler": "local", "workers": 2}}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("number", "code", "tables"),
    [(signal.SIGTERM, 75, SERIAL), (signal.SIGINT, 130, LOCAL), (signal.SIGKILL, -9, SERIAL)],
    ids=["TERM", "INT", "KILL"],
)
def test_a_stopped_driver_leaves_a_run_that_continues_to_the_same_bits(cli, project, trained, number, code, tables):
    job = project(tables)
    found, out, err = stopped(job, number)
    assert found == code, err
    committed = kept(job.run)
    assert 2 <= committed[-1] < ROUNDS
    assert "Traceback" not in err
    if number != signal.SIGKILL:
        fault = objects(out)[-1]
        assert (fault["event"], fault["code"]) == ("error", code)
        assert "same command" in fault["hint"]
        assert err.startswith("error: ")
        assert err.count("\n") <= 4
        assert not list((job.run / "rounds").glob(".*"))
        assert not (job.run / "LOCK").exists()

    status = last(cli("--json", "status", job.run))
    assert (status["state"], status["committed"]) == ("stopped", committed)
    outcome = cli("--json", "train", job.config, *MANY, "--scheduler", "serial")
    assert outcome.code == 0, outcome.err
    assert [row["round"] for row in objects(outcome.out)[:-1]] == list(range(committed[-1] + 1, ROUNDS + 1))
    assert bits(history(job.run)) == bits(trained(ROUNDS))
    assert not list((job.run / "rounds").glob(".*"))


SIGNALLING = MODEL.replace(
    "        return self.layers(x)",
    "        if self.training and not os.environ.get('QUIET'):\n"
    "            os.kill(os.getpid(), {number})\n"
    "        return self.layers(x)",
)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_in_the_users_code_is_no_fault_of_that_code(cli, project, name, code):
    job = project(model=SIGNALLING.replace("{number}", str(int(getattr(signal, name)))))
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    outcome = cli("--json", "train", job.config)
    assert outcome.code == last(outcome)["code"] == code, outcome.err
    assert set(last(outcome)) == {"event", "code", "message", "hint"}
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_while_modules_are_imported(project):
    job = project()
    driver = subprocess.Popen([SCRIPT, "train", str(job.config)], stderr=subprocess.PIPE, text=True)
    assert driver.stderr.readline().startswith("loading PyTorch")
    driver.send_signal(signal.SIGTERM)
    said = driver.communicate(timeout=60)[1]
    assert driver.returncode == 75, said
    assert "error: Stopped by SIGTERM." in said
    assert "Traceback" not in said


def test_a_second_signal_does_not_disturb_the_first(cli, project, monkeypatch):
    from dtrain import lock

    job = project(model=SIGNALLING.replace("{number}", str(int(signal.SIGTERM))))
    monkeypatch.setattr(lock.Path, "unlink", lambda path, missing_ok=False: os.kill(os.getpid(), signal.SIGTERM))
    outcome = cli("--json", "train", job.config)
    assert outcome.code == last(outcome)["code"] == 75, outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_while_data_are_read_is_no_fault_of_the_data(cli, project, monkeypatch, name, code):
    from dtrain.data.read.store import ReadStore

    job = project()
    real = ReadStore.read_file
    once = iter([getattr(signal, name)])  # threads that still read when the command is over must not signal again

    def signalling(self, *arguments, **options):
        if number := next(once, None):
            os.kill(os.getpid(), number)
        return real(self, *arguments, **options)

    monkeypatch.setattr(ReadStore, "read_file", signalling)
    outcome = cli("--json", "train", job.config)
    assert outcome.code == last(outcome)["code"] == code, outcome.err


def test_a_signal_between_rounds(cli, project, trained, monkeypatch):
    from dtrain import trainer

    job = project()
    real = trainer.commit_round

    def signalling(*arguments):
        written = real(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return written

    monkeypatch.setattr(trainer, "commit_round", signalling)
    assert cli("-q", "train", job.config).code == 75
    assert kept(job.run) == [1]
    monkeypatch.undo()
    monkeypatch.chdir(job.dir.parent)
    assert cli("-q", "train", job.config).code == 0
    assert bits(history(job.run)) == bits(trained(2))


def test_a_plan_can_be_stopped_too(cli, project):
    job = project(model=SIGNALLING.replace("{number}", str(int(signal.SIGINT))))
    outcome = cli("--json", "plan", job.config)
    assert outcome.code == 130
    assert json.loads(outcome.out)["code"] == 130
