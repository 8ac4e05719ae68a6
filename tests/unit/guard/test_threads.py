"""`check_sync` and `check_threadsafe`: one fetch for all threads and loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import httpx
import pytest

from tests.fakes.clock import ManualClock
from tests.fakes.issuer import AUDIENCE, URL, App, FakeIssuer, jwk, make_token
from worker.guard import Claims, Guard, IssuerUnavailable, TokenRefused

T = TypeVar("T")
APP = App("org_a", "client-a", "secret-a", scopes=("read:kb",))
KEYS = "/.well-known/jwks"
THREADS = 16


@pytest.fixture
def issuer(clock: ManualClock) -> FakeIssuer:
    return FakeIssuer(clock)


@pytest.fixture
def guard(issuer: FakeIssuer, clock: ManualClock) -> Guard:
    return Guard(URL, audience=AUDIENCE, client=issuer.client, clock=clock)


def at_once(work: Callable[[], T]) -> list[T]:
    """The results of the same work in sixteen threads that begin together."""
    together = threading.Barrier(THREADS)

    def begin(_: int) -> T:
        together.wait()
        return work()

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(begin, range(THREADS)))


def test_sixteen_threads_with_a_cold_cache_make_one_fetch(guard: Guard, issuer: FakeIssuer) -> None:
    token = issuer.token(APP)

    found = at_once(lambda: guard.check_sync(token, org_code="org_a"))

    assert [claims.org_code for claims in found] == ["org_a"] * THREADS
    assert issuer.count(KEYS) == 1


def test_sixteen_loops_with_a_cold_cache_make_one_fetch(guard: Guard, issuer: FakeIssuer) -> None:
    token = issuer.token(APP)

    async def twice() -> Claims:
        await guard.check_threadsafe(token)
        return await guard.check_threadsafe(token)

    found = at_once(lambda: asyncio.run(twice()))

    assert [claims.org_code for claims in found] == ["org_a"] * THREADS
    assert issuer.count(KEYS) == 1


def test_it_refuses_as_check_does(guard: Guard, issuer: FakeIssuer) -> None:
    for arguments, reason in (
        ({"org_code": "org_b"}, "org_mismatch"),
        ({"client_id": "client-b"}, "client_mismatch"),
        ({"scopes": {"admin:kb"}}, "scope_missing"),
    ):
        with pytest.raises(TokenRefused) as refused:
            guard.check_sync(issuer.token(APP), **arguments)  # type: ignore[arg-type]
        assert refused.value.reason == reason

    forged = make_token(issuer.payload(APP), {"kid": "made-up"}, key="evil")
    with pytest.raises(TokenRefused) as refused:
        guard.check_sync(forged)
    assert refused.value.detail == "unknown_kid"


def test_made_up_kids_of_many_threads_cost_one_fetch(guard: Guard, issuer: FakeIssuer) -> None:
    guard.check_sync(issuer.token(APP))
    forged = make_token(issuer.payload(APP), {"kid": "made-up"}, key="evil")

    def refused() -> bool:
        with pytest.raises(TokenRefused):
            guard.check_sync(forged)
        return True

    assert all(at_once(refused))
    assert issuer.count(KEYS) == 2


def test_old_keys_are_used_while_others_are_fetched(
    guard: Guard, issuer: FakeIssuer, clock: ManualClock
) -> None:
    """A key that was withdrawn is forgotten as soon as the new set is here."""
    guard.check_sync(issuer.token(APP))
    fetched = threading.Event()

    def answer() -> httpx.Response:
        fetched.set()
        return httpx.Response(200, json={"keys": [jwk("k2")]})

    issuer.keys = answer
    clock.advance(3601)

    guard.check_sync(issuer.token(APP))

    assert fetched.wait(10)
    issuer.key = "k2"
    guard.check_sync(issuer.token(APP))
    issuer.key = "k1"
    with pytest.raises(TokenRefused):
        guard.check_sync(issuer.token(APP))


def test_keys_that_cannot_be_read_are_no_verdict(guard: Guard, issuer: FakeIssuer) -> None:
    issuer.keys = lambda: httpx.Response(500)

    with pytest.raises(IssuerUnavailable):
        guard.check_sync(issuer.token(APP))


def test_what_it_reports_goes_to_the_log(
    guard: Guard, issuer: FakeIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker gets events instead."""
    with caplog.at_level("INFO", logger="worker.guard"):
        guard.check_sync(issuer.token(APP))

    assert f"keys.fetched issuer={URL} keys=1" in caplog.messages


def test_a_closed_guard_can_be_used_again(guard: Guard, issuer: FakeIssuer) -> None:
    guard.check_sync(issuer.token(APP))

    asyncio.run(guard.close())

    assert guard.check_sync(issuer.token(APP)).org_code == "org_a"
