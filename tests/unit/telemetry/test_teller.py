"""The teller writes down what strikes, and tries to deliver what there is to tell, a few times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.fakes.clock import ManualClock
from worker.errors import StoreUnavailable
from worker.telemetry.alerts import Alert, Strike, Strikes
from worker.telemetry.events import emit, listen
from worker.telemetry.teller import AGAIN, Teller


class Book:
    """A ledger in memory, and a receiver whose answers are settable."""

    def __init__(self, clock: ManualClock) -> None:
        self.noted: list[Strike] = []
        self.waiting: list[tuple[Alert, int]] = []
        self.later: list[tuple[Alert, float]] = []
        self.done: list[Alert] = []
        self.posted: list[Alert] = []
        self.away = False
        self.fault: str | None = None
        self.strikes = Strikes(clock, lambda: None)
        listen(self.strikes.hear)
        self.teller = Teller(self.strikes, self, self)

    def note(self, strikes: Sequence[Strike]) -> None:
        if self.away:
            raise StoreUnavailable("gone")
        self.noted += strikes

    def settle(self) -> None:
        self.settled = True

    def claim(self) -> tuple[Alert, int] | None:
        return self.waiting.pop(0) if self.waiting else None

    def told(self, alert: Alert) -> None:
        self.done.append(alert)

    def untold(self, alert: Alert, again: float) -> None:
        self.later.append((alert, again))

    def post(self, alert: Alert) -> str | None:
        self.posted.append(alert)
        return self.fault


@pytest.fixture
def book(clock: ManualClock) -> Book:
    return Book(clock)


@pytest.fixture
def alert(clock: ManualClock) -> Alert:
    at = clock.now()
    return Alert("c-1", "c", "failed", "firing", "it fails", at, at, 1, 1, {})


def test_what_struck_is_written_down_once(book):
    emit("schedule.overdue", org="org_a", definition="d", seconds=1.0)
    book.teller.round()
    book.teller.round()

    assert [strike.kind for strike in book.noted] == ["overdue"]


def test_what_struck_while_the_database_was_away_is_written_down_later(book):
    emit("schedule.overdue", org="org_a", definition="d", seconds=1.0)
    book.away = True
    with pytest.raises(StoreUnavailable):
        book.teller.round()
    book.away = False
    book.teller.round()

    assert [strike.kind for strike in book.noted] == ["overdue"]


def test_all_that_waits_is_delivered_in_order_and_said(book, alert, emitted):
    resolved = replace(alert, status="resolved")
    book.waiting = [(alert, 0), (resolved, 0)]
    book.teller.round()

    assert book.posted == book.done == [alert, resolved]
    assert [(one.event.name, one.fields["status"]) for one in emitted] == [
        ("alert.sent", "firing"),
        ("alert.sent", "resolved"),
    ]


def test_one_that_is_not_taken_is_tried_again_later_and_later_then_given_up(book, alert, emitted):
    book.fault = "status 503"
    for tries in range(len(AGAIN) + 1):
        book.waiting = [(alert, tries)]
        book.teller.round()

    assert [again for _, again in book.later] == list(AGAIN)
    assert book.done == [alert]
    assert [(one.event.name, one.fields["error"]) for one in emitted] == [("alert.undelivered", "status 503")]


def test_what_a_receiver_refuses_is_not_sent_twice(book, alert, emitted):
    book.fault, book.waiting = "refused with status 400", [(alert, 0)]
    book.teller.round()

    assert (book.later, book.done) == ([], [alert])
    assert [one.event.name for one in emitted] == ["alert.undelivered"]
