"""The dispatcher stores what events report, and retries the delivery of each alert for a day."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import pytest

from tests.fakes.clock import ManualClock
from worker.errors import StoreUnavailable
from worker.process import monitoring
from worker.process.monitoring import LATE, MAX_ATTEMPTS, RETRY_DELAYS, AlertDispatcher
from worker.store.database import Database
from worker.telemetry.alerts import Alert, Strike, Webhook
from worker.telemetry.events import Emitted, emit, listen

LAST = RETRY_DELAYS[-1]


class Book:
    """A dispatcher with alerts in memory and a receiver whose answers are settable."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.noted: list[Strike] = []
        self.waiting: list[tuple[Alert, int]] = []
        self.later: list[tuple[Alert, float]] = []
        self.done: list[Alert] = []
        self.posted: list[Alert] = []
        self.away = False
        self.fault: str | None = None
        self.dispatcher = AlertDispatcher(cast(Database, self), cast(Webhook, self), clock, overdue=10.0)
        listen(self.dispatcher.strikes.hear)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        if self.away:
            raise StoreUnavailable("gone")
        yield

    autocommit = transaction

    def note(self, connection: None, strikes: Sequence[Strike]) -> None:
        self.noted += strikes

    def is_any(self, connection: None) -> bool:
        return bool(self.waiting)

    def resolve_ended(self, connection: None, *, overdue: float) -> None:
        self.settled = True

    def claim(self, connection: None) -> tuple[Alert, int] | None:
        return self.waiting.pop(0) if self.waiting else None

    def mark_delivered(self, connection: None, alert: Alert) -> None:
        self.done.append(alert)

    def retry_later(self, connection: None, alert: Alert, again: float) -> None:
        self.later.append((alert, again))

    def post(self, alert: Alert) -> str | None:
        self.posted.append(alert)
        return self.fault


@pytest.fixture
def book(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> Book:
    book = Book(clock)
    monkeypatch.setattr(monitoring, "alerts", book)
    return book


@pytest.fixture
def alert(clock: ManualClock) -> Alert:
    at = clock.now()
    return Alert("c-1", "c", "failed", "firing", "it fails", at, at, 1, 1, {})


def test_what_struck_is_written_down_once(book):
    emit("schedule.overdue", org="org_a", definition="d", seconds=1.0)
    book.dispatcher.round()
    book.dispatcher.round()

    assert [strike.kind for strike in book.noted] == ["overdue"]


def test_what_struck_while_the_database_was_away_is_written_down_later(book):
    emit("schedule.overdue", org="org_a", definition="d", seconds=1.0)
    book.away = True
    with pytest.raises(StoreUnavailable):
        book.dispatcher.round()
    book.away = False
    book.dispatcher.round()

    assert [strike.kind for strike in book.noted] == ["overdue"]


def test_all_that_waits_is_delivered_in_order_and_said(book, alert, emitted):
    resolved = replace(alert, status="resolved")
    book.waiting = [(alert, 0), (resolved, 0)]
    book.dispatcher.round()

    assert book.posted == book.done == [alert, resolved]
    assert [(one.event.name, one.fields["status"]) for one in emitted] == [
        ("alert.sent", "firing"),
        ("alert.sent", "resolved"),
    ]


def names(emitted: Sequence[Emitted]) -> list[str]:
    return [one.event.name for one in emitted]


def test_one_that_is_not_taken_is_tried_later_and_later_and_said_to_be_late_once(book, alert, emitted):
    book.fault = "status 404"
    for tries in range(8):
        book.waiting = [(alert, tries)]
        book.dispatcher.round()
        book.clock.advance(LAST)

    assert [again for _, again in book.later] == [*RETRY_DELAYS, LAST, LAST, LAST]
    assert book.done == []
    assert names(emitted) == ["alert.late"]
    assert emitted[0].fields["error"] == "status 404"


def test_one_that_nobody_takes_for_a_day_is_given_up(book, alert, emitted):
    book.fault, book.waiting = "ConnectError", [(alert, MAX_ATTEMPTS - 1)]
    book.dispatcher.round()

    assert (book.later, book.done) == ([], [alert])
    assert names(emitted) == ["alert.undelivered"]
    assert sum(RETRY_DELAYS) + (MAX_ATTEMPTS - len(RETRY_DELAYS)) * LAST == pytest.approx(24 * 3600, rel=0.01)
    assert sum(RETRY_DELAYS[: LATE - 1]) == 156


def test_a_receiver_that_takes_nothing_is_not_flooded_with_all_that_waits(book, alert):
    waiting = [(replace(alert, id=f"c-{number}"), 0) for number in range(100)]
    book.fault, book.waiting = "status 503", list(waiting)
    for pause in RETRY_DELAYS:
        book.dispatcher.round()
        book.dispatcher.round()
        assert len(book.posted) == RETRY_DELAYS.index(pause) + 1
        book.clock.advance(pause)

    book.fault = None
    book.dispatcher.round()
    assert len(book.done) == 100 - len(RETRY_DELAYS)


def test_one_alert_that_a_receiver_dislikes_holds_up_the_others_for_a_second_only(book, alert):
    other = replace(alert, id="c-2")
    book.post = lambda one: "status 400" if one is alert else None
    for _ in range(3):
        book.waiting, book.done = [(alert, 0), (other, 0)], []
        book.dispatcher.round()
        book.clock.advance(RETRY_DELAYS[0])
        book.dispatcher.round()
        assert book.done == [other]


def test_what_strikes_during_the_last_delivery_is_written_down(book, alert, monkeypatch: pytest.MonkeyPatch):
    """A run fails at the end of a drain, while the receiver takes its time for another alert."""
    monkeypatch.setattr(monitoring, "COLLECT", 0.0)

    def post(one: Alert) -> None:
        emit("schedule.overdue", org="org_a", definition="d", seconds=1.0)
        book.dispatcher.stop()

    book.post, book.waiting = post, [(alert, 0)]
    book.dispatcher._awake.set()

    book.dispatcher._run()

    assert [strike.kind for strike in book.noted] == ["overdue"]
