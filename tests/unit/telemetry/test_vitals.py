"""One line says how a worker is, what is amiss first."""

from __future__ import annotations

from typing import Any

from worker.telemetry.vitals import Vitals


def vitals(**changes: Any) -> Vitals:
    given: dict[str, Any] = {
        "ages": dict,
        "stalled": list,
        "lease_remaining": lambda: 27.4,
        "admitting": lambda: True,
        "draining": lambda: False,
        "slots": {"child": 50, "inline": 1000},
        "used": {"child": 3, "inline": 0}.__getitem__,
    }
    return Vitals(**given | changes)


def test_a_healthy_worker_tells_its_runs_and_its_lease():
    assert vitals().in_words() == "runs: 3 of 50 child, 0 of 1000 inline; lease: 27 s"


def test_what_is_amiss_stands_before_all_else():
    ill = vitals(
        stalled=lambda: ["scheduler"],
        broker_fault=lambda: "exit code 1",
        admitting=lambda: False,
        lease_remaining=lambda: -1.0,
    )

    assert ill.in_words() == (
        "the loop scheduler stands still; no broker: exit code 1; nothing admitted; "
        "runs: 3 of 50 child, 0 of 1000 inline; lease lost"
    )


def test_a_drain_is_told_and_that_it_admits_nothing_is_no_news():
    draining = vitals(draining=lambda: True, admitting=lambda: False, slots={"child": 3, "inline": 0})

    assert draining.in_words() == "draining; runs: 3 of 3 child; lease: 27 s"
