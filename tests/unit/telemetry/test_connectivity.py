"""The loss of a service is reported once, and once that it is back."""

from __future__ import annotations

from worker.telemetry.connectivity import QUIET, Connectivity
from worker.telemetry.events import emit


def watching(clock) -> Connectivity:
    def lost(error: str) -> None:
        emit("database.lost", error=error)

    def back(seconds: float) -> None:
        emit("database.back", seconds=seconds)

    return Connectivity(clock, on_lost=lost, on_back=back)


def test_a_loss_and_a_return_are_told_once_each(clock, emitted):
    connectivity = watching(clock)

    connectivity.failed("refused", connectivity.started())
    clock.advance(30)
    connectivity.failed("refused", connectivity.started())
    clock.advance(12)
    connectivity.answered(connectivity.started())
    connectivity.answered(connectivity.started())

    assert [event.event.name for event in emitted] == ["database.lost", "database.back"]
    assert emitted[1].fields == {"seconds": 42.0}


def test_sessions_that_break_again_and_again_are_told_now_and_then(clock, emitted):
    connectivity = watching(clock)

    for _ in range(20):
        connectivity.failed("terminated", connectivity.started())
        connectivity.answered(connectivity.started())
        clock.advance(QUIET / 10)

    assert [event.event.name for event in emitted] == ["database.lost", "database.back"] * 2


def test_a_question_that_fails_late_is_no_new_loss(clock, emitted):
    """Put before the outage, it hangs until after the return."""
    connectivity = watching(clock)
    hanging = connectivity.started()
    connectivity.failed("refused", connectivity.started())
    clock.advance(60)
    connectivity.answered(connectivity.started())

    connectivity.failed("cut off", hanging)

    assert [event.event.name for event in emitted] == ["database.lost", "database.back"]
