"""The loss of the database is told once, and once that it is back."""

from __future__ import annotations

from worker.store.database import QUIET, Connectivity


def test_a_loss_and_a_return_are_told_once_each(clock, emitted):
    contact = Connectivity(clock)

    contact.failed("refused", contact.asked())
    clock.advance(30)
    contact.failed("refused", contact.asked())
    clock.advance(12)
    contact.answered(contact.asked())
    contact.answered(contact.asked())

    assert [event.event.name for event in emitted] == ["database.lost", "database.back"]
    assert emitted[1].fields == {"seconds": 42.0}


def test_sessions_that_break_again_and_again_are_told_now_and_then(clock, emitted):
    contact = Connectivity(clock)

    for _ in range(20):
        contact.failed("terminated", contact.asked())
        contact.answered(contact.asked())
        clock.advance(QUIET / 10)

    assert [event.event.name for event in emitted] == ["database.lost", "database.back"] * 2


def test_a_question_that_fails_late_is_no_new_loss(clock, emitted):
    """Put before the outage, it hangs until after the return."""
    contact = Connectivity(clock)
    hanging = contact.asked()
    contact.failed("refused", contact.asked())
    clock.advance(60)
    contact.answered(contact.asked())

    contact.failed("cut off", hanging)

    assert [event.event.name for event in emitted] == ["database.lost", "database.back"]
