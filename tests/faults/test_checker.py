"""The checker objects to each kind of broken promise, and to nothing else."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.faults.checker import Fault, History, judge

START = datetime(2030, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def attempt(number: int, started: float, ended: float, outcome: str, **changes: Any) -> dict[str, Any]:
    return {
        "run_id": "r1",
        "attempt": number,
        "worker_id": f"w{number}",
        "fencing_token": number,
        "started_at": at(started),
        "ended_at": at(ended),
        "outcome": outcome,
    } | changes


def line(who: str, number: int, seconds: float, **fields: Any) -> dict[str, Any]:
    stamped = {"run": "r1", "attempt": number, "fencing_token": number, "at": at(seconds)}
    return {"who": who, **stamped, **fields}


def run(**changes: Any) -> dict[str, Any]:
    return {
        "id": "r1",
        "definition": "d1",
        "origin": "schedule",
        "scheduled_for": START,
        "state": "succeeded",
        "reason": None,
        "detail": None,
        "attempt": 2,
        "result_fencing_token": 2,
    } | changes


def history(**changes: Any) -> History:
    """A worker is killed at 1 s; another, up since the start, has its run at 4 s and ends it."""
    told = History(
        runs=[run()],
        attempts=[attempt(1, 0, 3.9, "lost"), attempt(2, 4, 5, "succeeded")],
        skips=[],
        workers=[
            {"id": "w1", "started_at": at(-60), "ended_at": at(3.9)},
            {"id": "w2", "started_at": at(-60), "ended_at": None},
        ],
        checkpoints=[{"run_id": "r1", "fencing_token": 2, "data": {"step": 2}}],
        journal=[
            line("start", 1, 0.1, first=0),
            line("saving", 1, 0.2, step=1),
            line("saved", 1, 0.3, step=1),
            line("start", 2, 4.1, first=1),
            line("saving", 2, 4.2, step=2),
            line("saved", 2, 4.3, step=2),
            line("end", 2, 4.4),
        ],
        lease=timedelta(seconds=3),
        poll=timedelta(seconds=0.5),
        faults=(Fault("kill", "worker", "w1", at(1)),),
        periods={"d1": 60.0},
    )
    return replace(told, **changes)


def test_a_history_that_keeps_every_promise_is_not_objected_to() -> None:
    assert judge(history()) == []


def test_a_save_whose_answer_was_lost_may_count() -> None:
    told = history()
    journal = [entry for entry in told.journal if (entry["who"], entry["attempt"]) != ("saved", 1)]

    assert judge(replace(told, journal=journal)) == []


@pytest.mark.parametrize(
    ("changes", "objection"),
    [
        ({"runs": [run(state="running", result_fencing_token=None)]}, "is left running"),
        ({"runs": [run(state="failed", reason="lost")]}, "ended failed"),
        ({"runs": [run(attempt=3)]}, "has attempts [1, 2]"),
        ({"runs": [run(result_fencing_token=1)]}, "has a result under 1"),
        (
            {"attempts": [attempt(1, 0, 3.9, "lost"), attempt(2, 4, 5, "succeeded", fencing_token=1)]},
            "do not rise",
        ),
        ({"attempts": [attempt(1, 0, 4.5, "lost"), attempt(2, 4, 5, "succeeded")]}, "began before"),
        (
            {"attempts": [attempt(1, 0, 3.9, "lost"), attempt(2, 6, 7, "succeeded")]},
            "started again 1.50 s late",
        ),
        ({"attempts": [attempt(1, 0, 3, "succeeded"), attempt(2, 4, 5, "succeeded")]}, "went on after"),
        ({"faults": ()}, "nothing had happened"),
        ({"checkpoints": [{"run_id": "r1", "fencing_token": 1, "data": {"step": 1}}]}, "overwritten late"),
        ({"checkpoints": [{"run_id": "r1", "fencing_token": 2, "data": {"step": 1}}]}, "is kept"),
        ({"runs": [run(), run(id="r2", attempt=0, result_fencing_token=None)]}, "came twice"),
        (
            {"runs": [run(), run(id="r2", attempt=0, result_fencing_token=None, scheduled_for=at(120))]},
            "nothing between",
        ),
        ({"periods": {"d2": 60.0}}, "nothing was ever due"),
    ],
)
def test_a_broken_promise_is_objected_to(changes: dict[str, Any], objection: str) -> None:
    assert any(objection in found for found in judge(history(**changes))), judge(history(**changes))


@pytest.mark.parametrize(
    ("extra", "objection"),
    [
        (line("saved", 1, 4.6, step=2), "saved after the next one had begun"),
        (line("grandchild", 1, 4.6), "still acted"),
        (line("start", 2, 4.6, first=0), "began from step 0"),
    ],
)
def test_a_line_too_many_in_the_journal_is_objected_to(extra: dict[str, Any], objection: str) -> None:
    told = history()

    found = judge(replace(told, journal=[*told.journal, extra]))

    assert any(objection in words for words in found), found


def outage(start: float, end: float) -> Fault:
    return Fault("outage", "database", "", at(start), at(end))


def test_a_database_that_is_away_costs_no_run_and_delays_a_recovery_by_as_long() -> None:
    killed = history().faults
    late = [attempt(1, 0, 7.9, "lost"), attempt(2, 8, 9, "succeeded")]
    told = replace(history(), attempts=late, journal=history().journal[:3], checkpoints=[])
    told.workers[0]["ended_at"] = at(7.9)

    assert any("nothing had happened" in words for words in judge(replace(told, faults=(outage(1, 4),))))
    assert any("was found" in words for words in judge(replace(told, faults=killed)))
    assert judge(replace(told, faults=(*killed, outage(1, 4)))) == []


def test_a_database_that_goes_after_a_run_was_found_delays_its_next_start() -> None:
    found_at_once = [attempt(1, 0, 1.1, "lost"), attempt(2, 8.2, 9, "succeeded")]
    told = replace(history(), attempts=found_at_once, journal=history().journal[:3], checkpoints=[])
    killed = Fault("kill", "zygote", "w1", at(1))

    assert any("started again" in words for words in judge(replace(told, faults=(killed,))))
    assert judge(replace(told, faults=(killed, outage(1.5, 6)))) == []


def test_a_partition_may_cost_a_run_and_the_end_of_a_session_may_not() -> None:
    parted = Fault("partition", "worker", "w1", at(1), at(4))
    terminated = Fault("terminate", "session", "w1", at(1))

    assert judge(history(faults=(parted,))) == []
    assert any("nothing had happened" in words for words in judge(history(faults=(terminated,))))


def test_an_instant_may_stand_in_a_skip_and_only_there() -> None:
    skip = {"definition": "d1", "skipped_from": at(60), "skipped_until": at(120), "count": 2}

    assert judge(history(skips=[skip])) == []
    assert judge(history(skips=[skip | {"count": 3}])) != []
    assert judge(history(skips=[skip, skip])) != []


def test_a_recovery_is_counted_from_the_start_of_the_survivors_contact() -> None:
    late = [attempt(1, 0, 8.3, "lost"), attempt(2, 8.4, 9, "succeeded")]
    journal = [entry for entry in history().journal if entry["attempt"] == 1]

    def survivor(started: float) -> list[dict[str, Any]]:
        first, second = history().workers
        return [first | {"ended_at": at(8.3)}, second | {"started_at": at(started)}]

    told = history(attempts=late, journal=journal, checkpoints=[])
    assert judge(replace(told, workers=survivor(5))) == []
    assert judge(replace(told, workers=survivor(-60))) != []


def test_an_engine_may_give_a_run_to_one_host_that_hangs_after_another() -> None:
    late = [attempt(1, 0, 3.9, "lost"), attempt(2, 20, 21, "succeeded")]
    worker = {"id": "w3", "started_at": at(-60), "ended_at": None}
    workers = [*(row | {"host_id": row["id"]} for row in history().workers), worker]
    told = history(attempts=late, journal=[], checkpoints=[], workers=workers, runs=[run(pool="gpu")])
    hung = Fault("partition", "worker", "w2", at(5), at(12))

    for faults, placing, kept in (
        ((hung,), 7, True),
        ((hung,), 0, False),
        ((replace(hung, until=at(22)),), 7, True),
        ((replace(hung, at=at(21), until=at(22)),), 7, False),
        ((), 7, False),
    ):
        placed = replace(told, faults=(*told.faults, *faults), placing={"gpu": timedelta(seconds=placing)})
        assert any("started again" in words for words in judge(placed)) is not kept


def test_what_a_worker_starts_for_a_host_while_it_dies_may_be_lost() -> None:
    late = [attempt(1, 1.8, 4.9, "lost"), attempt(2, 5, 6, "succeeded")]
    first, second = history().workers
    first["ended_at"] = at(4.9)
    told = history(attempts=late, journal=[], checkpoints=[])

    assert judge(replace(told, workers=[first | {"host_id": "h1"}, second])) == []
    found = judge(replace(told, workers=[first, second]))
    assert any("nothing had happened" in words for words in found), found


def test_a_run_of_a_pool_waits_until_one_of_its_hosts_is_back() -> None:
    late = [attempt(1, 0, 3.9, "lost"), attempt(2, 7.9, 9, "succeeded", worker_id="w4")]
    third = {"id": "w3", "started_at": at(-60), "ended_at": None}
    fourth = {"id": "w4", "started_at": at(3.6), "ended_at": None}
    hosts = [row | {"host_id": row["id"], "pool": "eu"} for row in (*history().workers, fourth)]
    parted = Fault("partition", "worker", "w2", at(3.95), at(12))
    told = history(attempts=late, journal=[], checkpoints=[], workers=[*hosts, third], runs=[run(pool="eu")])

    assert judge(replace(told, faults=(*told.faults, parted))) == []
    assert any("started again" in words for words in judge(told))
