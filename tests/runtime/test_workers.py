"""Workers that leave while they are asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from distributed.comm.core import CommClosedError

from dtrain.errors import ClusterUnreachable
from dtrain.runtime import workers
from dtrain.runtime.workers import ask_workers

LEFT = {"tcp://127.0.0.1:1": CommClosedError("stream is closed")}


class Client:
    """A client whose workers answer as it is told, call by call."""

    scheduler = SimpleNamespace(address="tcp://127.0.0.1:0")

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)

    def run(self, function: Any, on_error: str) -> dict[str, Any]:
        assert on_error == "return"
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture(autouse=True)
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "first_workers", lambda client, timeout: ())


def test_others_are_asked_where_all_workers_have_left() -> None:
    client: Any = Client({}, LEFT, {"tcp://127.0.0.1:2": True})
    assert ask_workers(client, bool) == {"tcp://127.0.0.1:2": True}


def test_a_worker_that_leaves_is_not_counted() -> None:
    client: Any = Client({**LEFT, "tcp://127.0.0.1:2": False})
    assert ask_workers(client, bool) == {"tcp://127.0.0.1:2": False}


def test_workers_that_never_answer() -> None:
    client: Any = Client(LEFT)
    with pytest.raises(ClusterUnreachable, match=r"tcp://127.0.0.1:0 leave before they answer"):
        ask_workers(client, bool, timeout=0.0)


def test_what_the_function_raises_is_raised() -> None:
    client: Any = Client({"tcp://127.0.0.1:1": ZeroDivisionError("of the function")})
    with pytest.raises(ZeroDivisionError, match="of the function"):
        ask_workers(client, bool)
