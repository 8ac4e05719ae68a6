"""When the next broker starts after one has ended, and whether that none is up is a fault."""

from __future__ import annotations

from tests.fakes.clock import ManualClock
from worker.features.egress.restarts import (
    DOWN,
    LONGEST_AFTER_UP,
    LONGEST_RESTART,
    RESTART,
    STABLE,
    WAITING,
    Restarts,
)


def lives(restarts: Restarts, clock: ManualClock, seconds: float) -> float:
    """A broker that comes up and dies after that; the seconds until the next one."""
    restarts.came_up()
    clock.advance(seconds)
    return restarts.ended("signal SIGSEGV")


def test_brokers_that_do_not_come_up_are_started_less_and_less_often():
    restarts = Restarts(ManualClock())

    pauses = [restarts.ended("exit code 1") for _ in range(10)]

    assert pauses[:3] == [RESTART, 2 * RESTART, 4 * RESTART]
    assert pauses[-1] == LONGEST_RESTART


def test_one_that_dies_again_and_again_is_back_within_a_second_but_not_at_once():
    clock = ManualClock()
    restarts = Restarts(clock)

    pauses = [lives(restarts, clock, 0.1) for _ in range(10)]

    assert pauses[0] == RESTART
    assert pauses[-1] == LONGEST_AFTER_UP
    assert lives(restarts, clock, STABLE) == RESTART


def test_a_fault_begins_with_the_second_start_that_fails_and_ends_with_one_that_does_not():
    restarts = Restarts(ManualClock())

    restarts.ended("exit code 1")
    assert restarts.fault is None
    restarts.ended("OSError: no memory")
    assert restarts.fault == "OSError: no memory"

    restarts.came_up()
    assert restarts.fault is None
    restarts.ended("signal SIGKILL")
    restarts.ended("exit code 1")
    assert restarts.fault is None


def test_one_that_never_answers_is_a_fault_too():
    clock = ManualClock()
    restarts = Restarts(clock)

    clock.advance(DOWN - 0.1)
    assert restarts.fault is None
    clock.advance(0.1)
    assert restarts.fault == WAITING


def test_brokers_that_die_after_they_were_up_are_no_fault():
    """What a run sends may be the cause: one org must not stop the runs of others."""
    clock = ManualClock()
    restarts = Restarts(clock)

    for _ in range(20):
        clock.advance(lives(restarts, clock, 0.1))
        assert restarts.fault is None


def test_one_that_retires_is_replaced_at_once():
    clock = ManualClock()
    restarts = Restarts(clock)
    restarts.came_up()

    assert restarts.retired() == RESTART
    assert restarts.fault is None
