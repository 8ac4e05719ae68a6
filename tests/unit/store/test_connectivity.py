"""The loss of the database is told once, and once that it is back."""

from __future__ import annotations

from worker.store.database import QUIET, Connectivity


def test_a_loss_and_a_return_are_told_once_each(clock, emitted):
    connectivity = Connectivity(clock)

    connectivity.failed("refused", connectivity.started())
    clock.advance(30)
    connectivity.failed("refused", connectivity.started())
    clock.advance(12)
    connectivity.answered(connectivity.started())
    connectivity.answered(connectivity.started())

    assert [event.event.name for event in emitted] == ["database.lost", "database.back"]
    assert emitted[1].fields == {"seconds": 42.0}


def test_sessions_that_break_again_and_again_are_told_now_and_then(clock, emitted):
    connectivity = Connectivity(clock)

    for _ in range(20):
        connectivity.failed("terminated", connectivity.started())
        connectivity.answered(connectivity.started())
        clock.advance(QUIET / 10)

    assert [event.event.name for event in emitted] == ["database.lost", "database.back"] * 2


def test_a_question_that_fails_late_is_no_new_loss(clock, emitted):
    """Put before the outage, it hangs until after the return."""
    connectivity = Connectivity(clock)
    hanging = connectivity.started()
    connectivity.failed("refused", connectivity.started())
    clock.advance(60)
    connectivity.answered(connectivity.started())

    connectivity.failed("cut off", hanging)

    assert [event.event.name for event in emitted] == ["database.lost", "database.back"]
