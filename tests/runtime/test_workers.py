"""Workers that leave while they are asked."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from distributed.comm.core import CommClosedError

from dtrain.errors import ClusterUnreachable
from dtrain.runtime import workers
from dtrain.runtime.workers import WorkerState, ask_workers, first_workers

LEFT = {"tcp://127.0.0.1:1": CommClosedError("stream is closed")}


class Client:
    """A client whose workers answer as it is told, call by call."""

    scheduler = SimpleNamespace(address="tcp://127.0.0.1:0")

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)

    def run(self, function: Any, on_error: str) -> dict[str, Any]:
        assert on_error == "return"
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "first_workers", lambda client, timeout: ())
    monkeypatch.setattr(workers, "FrozenWorkers", lambda client: None)
    monkeypatch.setattr(workers, "answer", lambda client, call, look, before: call())


@pytest.mark.usefixtures("there")
def test_others_are_asked_where_all_workers_have_left() -> None:
    client: Any = Client({}, LEFT, {"tcp://127.0.0.1:2": True})
    assert ask_workers(client, bool) == {"tcp://127.0.0.1:2": True}


@pytest.mark.usefixtures("there")
def test_a_worker_that_leaves_is_not_counted() -> None:
    client: Any = Client({**LEFT, "tcp://127.0.0.1:2": False})
    assert ask_workers(client, bool) == {"tcp://127.0.0.1:2": False}


@pytest.mark.usefixtures("there")
def test_workers_that_never_answer() -> None:
    client: Any = Client(LEFT)
    with pytest.raises(ClusterUnreachable, match=r"tcp://127.0.0.1:0 leave before they answer"):
        ask_workers(client, bool, timeout=0.0)


@pytest.mark.usefixtures("there")
def test_what_the_function_raises_is_raised() -> None:
    client: Any = Client({"tcp://127.0.0.1:1": ZeroDivisionError("of the function")})
    with pytest.raises(ZeroDivisionError, match="of the function"):
        ask_workers(client, bool)


def test_a_long_wait_for_the_first_worker_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.setLevel(logging.NOTSET)  # a cluster of another test may have raised it
    now, running = iter(range(100)), WorkerState("tcp://127.0.0.1:1", "running", 0, 0)
    found = iter([(), *[()] * 45, (running,)])
    monkeypatch.setattr(workers, "worker_states", lambda client: next(found))
    monkeypatch.setattr(workers, "request_of_worker", lambda client: nullcontext(lambda: None))
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: next(now), sleep=lambda seconds: None))
    client: Any = None
    assert first_workers(client, timeout=60.0) == (running,)
    assert [record.args for record in caplog.records] == [(11,), (21,), (41,)]
    assert "No worker runs yet, after 11 s" in caplog.text
