"""Ids sort by age, and those of scheduled runs by the time at which they were due."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

from worker.ids import new_id, new_id_at

MINUTE = timedelta(minutes=1)


def time_of(id_: str) -> float:
    return (UUID(id_).int >> 80) / 1000


def test_new_ids_increase():
    made = [new_id() for _ in range(1000)]

    assert made == sorted(made)
    assert len(set(made)) == len(made)


def test_an_id_has_the_time_at_which_its_run_was_due():
    due_at = datetime.now(UTC) - MINUTE

    made = UUID(new_id_at(due_at))

    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert abs(time_of(str(made)) - due_at.timestamp()) < 0.002


def test_ids_of_one_due_time_increase_and_come_before_later_ones():
    due_at = datetime.now(UTC) - MINUTE
    first, second, later = new_id_at(due_at), new_id_at(due_at), new_id_at(due_at + timedelta(seconds=1))

    assert first[:19] < second[:19] or first != second
    assert max(first, second) < later < new_id()


def test_a_run_that_is_late_by_hours_or_due_in_the_future_gets_the_time_of_its_making():
    now = datetime.now(UTC)
    for due_at in (now - timedelta(hours=1), now + timedelta(hours=1), datetime(2030, 1, 1, tzinfo=UTC)):
        assert abs(time_of(new_id_at(due_at)) - now.timestamp()) < 5
