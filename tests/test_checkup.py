"""The checks of `dtrain doctor`: what is compared, and that none takes longer than it may."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from distributed import Client

from dtrain.checkup import here as own
from dtrain.checkup import place as there
from dtrain.checkup.check import Check, TimeOver, exit_code, failed, held, limited
from dtrain.checkup.place import compared
from dtrain.config.schema import ClusterConfig
from dtrain.errors import ClusterUnreachable
from dtrain.runtime import machine

HERE = {
    "versions": {"python": "3.11", "dtrain": "0.1", "torch": "2.13", "numpy": "2.4", "zarr": "3.1", "distributed": "1"}
    | {"dask": "1", "xarray": "5"}
}
NEEDED = ("python", *machine.DECIDING)


def facts(**versions: str) -> dict[str, Any]:
    return {"versions": {**HERE["versions"], **versions}}


def test_the_same_versions() -> None:
    check = compared("workers", {"tcp://a:1": facts(), "tcp://b:1": facts()}, HERE, NEEDED)
    assert (check.status, check.text, check.cure) == ("ok", "2 with the versions of this process", "")
    assert compared("scheduler", {"the scheduler": facts()}, HERE, NEEDED).text == "the versions of this process"


def test_other_versions_are_marked_with_the_cure() -> None:
    processes = {"tcp://a:1": facts(), "tcp://b:1": facts(torch="2.9", numpy="")}
    check = compared("workers", processes, HERE, NEEDED)
    assert (check.status, check.code) == ("error", 6)
    assert check.text == "tcp://b:1 has torch 2.9, here 2.13, tcp://b:1 lacks numpy"
    assert check.cure.startswith("Install the same versions on client, scheduler and workers")


def test_packages_that_decide_nothing_are_a_warning_or_may_be_missing() -> None:
    assert compared("workers", {"w": facts(xarray="6")}, HERE, NEEDED).status == "warning"
    bare = {"the scheduler": facts(torch="", dtrain="", numpy="", zarr="", xarray="")}
    assert compared("scheduler", bare, HERE, ("python", "distributed")).status == "ok"
    old = {"the scheduler": facts(distributed="0")}
    assert compared("scheduler", old, HERE, ("python", "distributed")).status == "error"


def test_the_exit_code_is_that_of_the_first_error() -> None:
    def check(status: Any, code: int) -> Check:
        return Check(name="x", status=status, text="", code=code)

    assert exit_code([check("ok", 6), check("warning", 5)]) == 0
    assert exit_code([check("ok", 6), check("error", 5), check("error", 6)]) == 5
    assert check("ok", 6).code == 0


def test_errors_in_words() -> None:
    known = failed("x", ClusterUnreachable("no scheduler", "start one"), 6, "other")
    assert (known.text, known.cure, known.code) == ("no scheduler", "start one", 6)
    other = failed("x", OSError("disk\ngone"), 5, "look at it")
    assert (other.text, other.cure) == ("OSError: disk gone", "look at it")
    assert failed("x", TimeOver("no answer within 3 s"), 5, "").text == "no answer within 3 s"


def test_a_check_ends_in_time() -> None:
    assert limited(lambda: 3, 60) == 3
    with pytest.raises(ZeroDivisionError):
        limited(lambda: 1 // 0, 60)
    release = threading.Event()
    with pytest.raises(TimeOver, match="no answer within 0 s"):
        limited(release.wait, 0.01)
    release.set()


def test_a_cluster_is_opened_and_closed_in_one_thread_and_in_time() -> None:
    threads: list[int] = []

    @contextmanager
    def place(release: threading.Event) -> Iterator[str]:
        threads.append(threading.get_ident())
        release.wait(60)
        yield "client"
        threads.append(threading.get_ident())

    ready = threading.Event()
    ready.set()
    with held(place(ready), 60) as client:
        assert client == "client"
    assert len(threads) == 2
    assert threads[0] == threads[1] != threading.get_ident()

    @contextmanager
    def broken() -> Iterator[str]:
        raise ClusterUnreachable("no")
        yield ""

    with pytest.raises(ClusterUnreachable), held(broken(), 60):
        pass
    hangs = threading.Event()
    timer = threading.Timer(0.3, hangs.set)
    timer.start()
    with pytest.raises(TimeOver), held(place(hangs), 0.01):
        pass


def test_extras_are_those_of_the_project() -> None:
    found = own.extras()
    assert found["tensorboard"] == ["tensorboard"]
    assert found["onnx"] == ["onnx", "onnxruntime", "onnxscript"]
    assert "dev" not in found
    text = own.extras_text()
    assert text.startswith("installed: ")
    assert all(extra in text for extra in found)


def test_a_step_changes_the_model() -> None:
    assert 0 < machine.one_step() < 60


def test_a_machine_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    found = machine.machine_facts()
    assert found["capability"] == ""
    assert "torch" in found["torch_error"]
    checks = {check.name: check for check in own.check_machine()}
    assert (checks["versions"].status, checks["versions"].code) == ("error", 6)
    assert checks["versions"].cure == "pip install dtrain in this environment"


def test_little_memory_and_disk_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "SMALL_DISK", 2**62)
    (check,) = [check for check in own.check_machine() if check.name == "machine"]
    assert check.status == "warning"
    assert "set run.dir to another disk" in check.cure


# A cluster --------------------------------------------------------------------------------------------------------


def place_checks(scheduler: str) -> list[Any]:
    with ExitStack() as stack:
        return list(there.check_place(ClusterConfig(scheduler=scheduler), stack))


def test_a_cluster_that_answers(client: Client) -> None:
    *checks, last = place_checks(client.scheduler.address)
    assert isinstance(last, Client)
    assert [(check.name, check.status) for check in checks] == [
        (name, "ok") for name in ("cluster", "scheduler", "workers", "machines", "step")
    ]
    assert checks[0].text.startswith(f"{client.scheduler.address} answers, with 2 workers, in ")
    assert checks[3].text.startswith("2 x Linux")


@pytest.mark.parametrize(
    ("package", "name", "status"), [("torch", "workers", "error"), ("xarray", "workers", "warning")]
)
def test_workers_of_other_versions(
    client: Client, monkeypatch: pytest.MonkeyPatch, package: str, name: str, status: str
) -> None:
    here = machine.machine_facts()
    here["versions"][package] = "0.0.1"
    monkeypatch.setattr(there, "facts_here", lambda: here)
    checks = {check.name: check for check in place_checks(client.scheduler.address) if isinstance(check, Check)}
    assert checks["workers"].status == status
    assert f"has {package} " in checks["workers"].text
    assert ", here 0.0.1" in checks["workers"].text
    assert "Install the same versions" in checks["workers"].cure


def test_a_worker_on_which_the_step_fails(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "one_step", _fails)
    checks = {check.name: check for check in place_checks(client.scheduler.address) if isinstance(check, Check)}
    assert (checks["step"].status, checks["step"].code) == ("error", 6)
    assert checks["step"].text == "ModuleNotFoundError: No module named 'torch'"


def _fails() -> float:
    raise ModuleNotFoundError("No module named 'torch'")


def test_workers_that_do_not_answer_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"tcp://a:1": {"last_seen": 100.0}, "tcp://b:1": {"last_seen": 39.0}, "tcp://c:1": {"last_seen": 99.0}}
    monkeypatch.setattr(there, "known_workers", lambda client: seen)
    client: Any = None
    check = there.unanswered(client, TimeOver("no answer within 60 s"))
    assert (check.status, check.code) == ("error", 6)
    assert check.text == "no answer within 60 s; tcp://b:1 has sent nothing for 61 s"
    assert "A worker is frozen or overloaded" in check.cure
    monkeypatch.setattr(there, "known_workers", lambda client: {})
    check = there.unanswered(client, TimeOver("no answer within 30 s"))
    assert (check.name, check.status, check.text) == ("scheduler", "error", "no answer within 30 s")


def test_a_port_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(there, "CLUSTER_SECONDS", 0.5)
    monkeypatch.setattr(there, "WORKER_SECONDS", 0.1)
    monkeypatch.setattr("dtrain.runtime.connect.CONNECT_TIMEOUT", 1.0)  # the test ends when this does
    with socket.create_server(("127.0.0.1", 0)) as server:
        (check,) = place_checks(f"tcp://127.0.0.1:{server.getsockname()[1]}")
    assert (check.name, check.status, check.code) == ("cluster", "error", 6)
    assert check.text == "no answer within 0 s"
