"""The breaker's rule: what opens it, who may ask while it is open, and what closes it."""

from __future__ import annotations

import contextlib

import pytest

from tests.fakes.clock import ManualClock
from worker.errors import CredentialsRejected, IssuerUnavailable, RequestRejected, WorkerError
from worker.tokens.breaker import CERTAIN, MAX_ORGS, RETURN_LAST, TURN_LAST, Breaker, IssuerPaused


class Requests:
    """A breaker whose requests a test ends by hand."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.breaker = Breaker("main", clock=self.clock)

    def ask(self, of: str, error: Exception | None = None) -> None:
        """One request of the org, which ends with this error, or well; it must be let through."""
        self.breaker.check(of)
        with contextlib.suppress(WorkerError), self.breaker.watch(of):
            if error is not None:
                raise error

    def fail(self, *orgs: str) -> None:
        for each in orgs:
            self.ask(each, IssuerUnavailable("no answer"))

    def answer(self, *orgs: str) -> None:
        for each in orgs:
            self.ask(each)

    def may_ask(self, of: str) -> bool:
        try:
            self.breaker.check(of)
        except IssuerPaused:
            return False
        return True


@pytest.fixture
def requests() -> Requests:
    return Requests()


def names(start: int, end: int) -> list[str]:
    return [f"org_{number}" for number in range(start, end)]


@pytest.mark.parametrize(
    ("failed", "answered", "opens"),
    [(1, 0, False), (2, 0, True), (2, 1, False), (3, 1, False), (3, 2, True), (5, 6, False), (5, 5, True)],
)
def test_the_share_of_failing_orgs_opens_it(
    requests: Requests, failed: int, answered: int, opens: bool
) -> None:
    """All of two to four, half of five or more; whichever came first."""
    requests.answer(*names(0, answered))
    requests.fail(*names(answered, answered + failed))

    assert requests.breaker.is_open is opens


def test_one_org_never_opens_it(requests: Requests) -> None:
    """However often it fails."""
    for _ in range(100):
        requests.fail("a")
        requests.clock.advance(0.1)

    assert not requests.breaker.is_open


def test_orgs_that_failed_before_do_not_open_it(requests: Requests) -> None:
    """Three broken ones go on failing; then a fourth breaks."""
    requests.answer("d")
    for each in ("a", "b", "c"):
        requests.fail(each)
        requests.clock.advance(11)
    requests.fail("a", "b", "c", "a", "b", "c", "d")

    assert not requests.breaker.is_open


def test_failures_further_apart_than_the_window_do_not_open_it(requests: Requests) -> None:
    """Two orgs that break with eleven seconds between them."""
    requests.fail("a")
    requests.clock.advance(11)
    requests.fail("b")

    assert not requests.breaker.is_open


def test_a_healthy_org_asks_at_once_and_one_request_at_a_time(requests: Requests) -> None:
    """A second run of the same org waits for what the first brings."""
    requests.fail("a", "b")
    with requests.breaker.watch("healthy"):
        with pytest.raises(IssuerPaused) as paused:
            requests.breaker.check("healthy")
        assert paused.value.retry_after == 1.0
        assert requests.may_ask("another")

    assert requests.may_ask("healthy")


def test_orgs_that_failed_take_turns_four_seconds_apart(requests: Requests) -> None:
    """Later fifteen; the one whose turn it is may hang as long as it wants."""
    requests.fail("a", "b")
    assert not requests.may_ask("a")
    requests.clock.advance(4)
    with pytest.raises(IssuerUnavailable), requests.breaker.watch("a"):
        assert not requests.may_ask("b")
        requests.clock.advance(4)
        assert requests.may_ask("b")
        assert not requests.may_ask("a")
        raise IssuerUnavailable("timeout")
    requests.clock.advance(100)
    requests.fail("b")
    requests.clock.advance(14.9)
    assert not requests.may_ask("a")
    requests.clock.advance(0.2)
    assert requests.may_ask("a")


def test_after_a_hundred_orgs_healthy_ones_take_turns_before_the_others(requests: Requests) -> None:
    """An outage costs no request for each of ten thousand orgs."""
    requests.fail(*names(0, CERTAIN))
    assert not requests.may_ask("healthy")
    requests.clock.advance(4)
    assert not requests.may_ask("org_0")  # the healthy one was told to come back, and is before it
    requests.fail("healthy")
    assert not requests.may_ask("another")
    requests.clock.advance(4)
    requests.answer("another")

    assert requests.may_ask("a third")


def test_a_healthy_org_that_comes_no_more_holds_up_no_turn(requests: Requests) -> None:
    """Its run was cancelled."""
    requests.fail(*names(0, CERTAIN))
    assert not requests.may_ask("healthy")
    requests.clock.advance(10)

    assert requests.may_ask("org_0")


@pytest.mark.parametrize("error", [None, CredentialsRejected("no"), RequestRejected("no")])
def test_an_answer_to_an_org_that_failed_closes_it(requests: Requests, error: Exception | None) -> None:
    """A rejection is an answer too, and what failed before counts no more."""
    requests.fail(*names(0, 10))
    requests.clock.advance(4)
    requests.ask("org_3", error)

    assert not requests.breaker.is_open
    assert not requests.breaker.doubts("org_4")


def test_answers_to_healthy_orgs_close_it_once_few_fail(requests: Requests) -> None:
    """Two that failed stay in doubt: they do not open it again."""
    requests.fail("a", "b")
    requests.answer(*names(0, 6))
    assert requests.breaker.is_open
    requests.answer("org_6")
    assert not requests.breaker.is_open
    requests.fail("a", "b")

    assert not requests.breaker.is_open


def test_a_request_from_before_the_recovery_counts_for_nothing(requests: Requests) -> None:
    """Requests that hang when an outage ends fail seconds after it."""
    requests.fail("a", "b")
    with pytest.raises(IssuerUnavailable), requests.breaker.watch("c"):
        requests.clock.advance(4)
        requests.answer("a")
        requests.clock.advance(1)
        raise IssuerUnavailable("timeout")

    assert not requests.breaker.doubts("c")


def test_an_org_that_fails_alone_may_try_again_at_once(requests: Requests) -> None:
    """Where another one failed as well, trying again would only add to an outage."""
    requests.fail("a")
    assert requests.breaker.fails_alone("a")
    requests.fail("b")

    assert not requests.breaker.fails_alone("a")


def test_many_orgs_that_wait_come_back_twenty_a_second(requests: Requests) -> None:
    """However many runs each has, and nobody later than after a minute."""
    requests.fail(*names(0, CERTAIN))
    back = [_returns(requests, each) for each in names(0, 4000) for _ in range(2)]

    assert back[0] == pytest.approx(4.0)
    assert back[::2] == back[1::2]
    assert back[400] == pytest.approx(14.0)
    assert max(back) == 60.0


def _returns(requests: Requests, of: str) -> float:
    with pytest.raises(IssuerPaused) as paused:
        requests.breaker.check(of)
    assert paused.value.retry_after is not None
    return paused.value.retry_after


def test_its_memory_is_bounded(requests: Requests) -> None:
    """It forgets the oldest failures, and the oldest times at which orgs return."""
    flood = names(0, 3 * MAX_ORGS)
    requests.fail(*flood[:CERTAIN])
    for each in flood[CERTAIN:]:
        requests.clock.advance(TURN_LAST)  # the breaker is open: now it is this org's turn
        requests.fail(each)
    assert sum(requests.breaker.doubts(each) for each in flood) == MAX_ORGS

    back = [_returns(requests, each) for each in flood]
    assert (back[0], back[-1]) == (pytest.approx(4.0), RETURN_LAST)
    assert _returns(requests, flood[0]) == RETURN_LAST
