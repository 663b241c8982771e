"""Retries by a clock that is turned by hand: pauses, errors, credentials and warnings."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise

import pytest

from dtrain.data.read import retry
from dtrain.data.read.retry import ATTEMPTS, Retries
from dtrain.errors import ChunkMissing, InvalidConfig, StoreForbidden, StoreUnavailable


class Clock:
    """Tells the time that pauses have taken together."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        self.pauses = []
        monkeypatch.setattr(retry.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(retry.asyncio, "sleep", self.sleep)

    async def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


class Server:
    """Answers 7, after it has raised the given errors; counts requests and looks for credentials."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.requests = self.refreshed = 0

    async def request(self):
        self.requests += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7

    async def refresh(self):
        self.refreshed += 1

    def ask(self, **options):
        return asyncio.run(Retries("s3://store", self.refresh, **options).call("x/c/0", self.request))


class NoCredentialsError(Exception):
    """Named as the one of botocore."""


class Refused(Exception):
    status = 403


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_the_pause_between_attempts_doubles_and_is_drawn_at_random(clock, monkeypatch):
    drawn = []

    def uniform(low, high):
        drawn.append((low, high))
        return random.Random(len(drawn)).uniform(low, high)

    monkeypatch.setattr(retry.JITTER, "uniform", uniform)
    monkeypatch.setattr(retry, "BACKOFF_SECONDS", 1.0)
    server = Server(*[OSError("down")] * ATTEMPTS)
    with pytest.raises(StoreUnavailable) as caught:
        server.ask()
    assert server.requests == ATTEMPTS == 8
    assert drawn == [(0.5, 1.5)] * (ATTEMPTS - 1)
    assert [0.5 * 2**n <= seconds <= 1.5 * 2**n for n, seconds in enumerate(clock.pauses)] == [True] * (ATTEMPTS - 1)
    assert len({seconds / 2**n for n, seconds in enumerate(clock.pauses)}) == ATTEMPTS - 1
    elapsed = sum(clock.pauses)
    assert f"s3://store: x/c/0 could not be read in 8 attempts over {elapsed:.0f} s: down" in caught.value.message
    assert caught.value.code == 75


@pytest.mark.parametrize("failures", range(ATTEMPTS))
def test_a_request_that_succeeds_in_the_end_has_its_result(clock, failures):
    server = Server(*[OSError("down")] * failures)
    assert server.ask() == 7
    assert (server.requests, len(clock.pauses)) == (failures + 1, failures)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (Refused("no"), StoreForbidden, "access to x/c/0 was refused: no"),
        (PermissionError("no"), StoreForbidden, "access to x/c/0 was refused: no"),
        (TypeError("no such option"), InvalidConfig, "x/c/0 cannot be requested: no such option"),
        (ValueError("bad bucket"), InvalidConfig, "x/c/0 cannot be requested: bad bucket"),
        (FileNotFoundError("gone"), FileNotFoundError, "gone"),
        (ChunkMissing("as it is"), ChunkMissing, "as it is"),
    ],
)
def test_an_error_that_a_retry_cannot_mend_is_raised_at_once(clock, error, kind, text):
    server = Server(error)
    with pytest.raises(kind, match=text):
        server.ask()
    assert (server.requests, clock.pauses) == (1, [])


def test_credentials_that_lack_are_looked_for_once_more(clock):
    server = Server(NoCredentialsError("none"))
    assert server.ask() == 7
    assert (server.requests, server.refreshed, clock.pauses) == (2, 1, [])
    server = Server(NoCredentialsError("none"), NoCredentialsError("none"))
    with pytest.raises(StoreForbidden, match="none") as caught:
        server.ask()
    assert (server.requests, server.refreshed) == (2, 1)
    assert "anon = true" in caught.value.hint
    with pytest.raises(StoreForbidden) as caught:
        Server(Refused("no")).ask(masked=("key", "secret"))
    assert "A run does not keep key, secret: give it again" in caught.value.hint


def test_an_attempt_that_stalls_is_cut_off():
    async def never():
        await asyncio.Event().wait()

    async def ask():
        return await Retries("s3://store", never).call("x/c/0", never, 0.001)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "BACKOFF_SECONDS", 0.0)
        with pytest.raises(StoreUnavailable, match=r"no answer within 0\.001 s"):
            asyncio.run(ask())


def test_requests_beside_one_that_has_given_up_are_not_retried_any_more(clock):
    asked = []

    async def two():
        has_failed = asyncio.Event()
        retries = Retries("s3://store", has_failed.wait)

        async def request():
            asked.append(1)
            await has_failed.wait()
            raise OSError("down")

        async def fails():
            raise OSError("down")

        beside = asyncio.create_task(retries.call("x/c/1", request))
        await asyncio.wait([beside], timeout=0)
        with pytest.raises(StoreUnavailable, match="x/c/0 could not be read in 8 attempts"):
            await retries.call("x/c/0", fails)
        has_failed.set()
        with pytest.raises(StoreUnavailable, match="x/c/1 could not be read in 1 attempt"):
            await beside
        with pytest.raises(
            StoreUnavailable, match="x/c/0 could not be read in 8 attempts"
        ):  # a later one is tried again
            await retries.call("x/c/0", fails)

    asyncio.run(two())
    assert len(asked) == 1


def test_retries_leave_the_random_numbers_of_the_user_alone(clock):
    state = random.getstate()
    assert Server(OSError("down")).ask() == 7
    assert random.getstate() == state


def test_only_a_request_that_takes_long_is_spoken_of_and_not_at_every_attempt(clock, caplog, monkeypatch):
    monkeypatch.setattr(retry.JITTER, "uniform", lambda low, high: 1.0)
    assert Server(*[OSError("down")] * 3).ask() == 7  # pauses of 0.25, 0.5 and 1 s: before the last, 0.75 s are over
    assert caplog.records == []
    with pytest.raises(StoreUnavailable):  # pauses until 0.25, 0.75, 1.75, 3.75, 7.75, 15.75 and 31.75 s
        Server(*[OSError("down")] * ATTEMPTS).ask()
    assert [record.getMessage() for record in caplog.records] == [
        "s3://store: x/c/0 could not be read: down; trying again in 2 s (attempt 5 of 8)",  # after 1.75 s
        "s3://store: x/c/0 could not be read: down; trying again in 8 s (attempt 7 of 8)",  # after 7.75 s
        "s3://store: x/c/0 could not be read: down; trying again in 16 s (attempt 8 of 8)",  # after 15.75 s
    ]


def test_of_many_requests_one_speaks(clock, monkeypatch):
    times = []
    monkeypatch.setattr(retry.LOG, "warning", lambda *args: times.append(clock.now))
    retries = Retries("s3://store", Server().refresh)

    async def many():
        calls = [retries.call(f"x/c/{n}", Server(*[OSError("down")] * ATTEMPTS).request) for n in range(20)]
        return await asyncio.gather(*calls, return_exceptions=True)

    assert all(isinstance(error, StoreUnavailable) for error in asyncio.run(many()))
    assert len(times) > 1
    assert all(later - earlier >= 5 for earlier, later in pairwise(times))
