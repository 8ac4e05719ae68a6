"""How far into the queue of each org the free slots reach; and specs that are kept share what is the same."""

from __future__ import annotations

import heapq
import json
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from worker.model.definitions.definition import from_spec
from worker.store.sql.contract import OrgQueue, reach, shared_spec

LINES = st.lists(
    st.builds(OrgQueue, running=st.integers(0, 6), most=st.integers(1, 9), weight=st.integers(1, 4)),
    max_size=8,
)


def test_equal_orgs_share_the_slots() -> None:
    assert reach([OrgQueue(0, 10, 1)] * 4, 8) == [2, 2, 2, 2]


def test_whoever_holds_many_waits() -> None:
    assert reach([OrgQueue(5, 10, 1), OrgQueue(0, 10, 1)], 4) == [0, 4]


def test_a_full_org_has_no_line() -> None:
    assert reach([OrgQueue(3, 3, 1), OrgQueue(4, 3, 1)], 5) == [0, 0]


@given(LINES, st.integers(0, 40))
def test_no_run_among_the_best_is_left_out(lines: list[OrgQueue], free: int) -> None:
    counts = reach(lines, free)

    everything = sorted(line.rank(place) for line in lines for place in range(1, max(0, line.room) + 1))
    best = everything[:free]
    considered = heapq.nsmallest(
        free, (line.rank(place) for line, n in zip(lines, counts, strict=True) for place in range(1, n + 1))
    )
    assert considered == best
    assert all(n <= max(0, line.room) for line, n in zip(lines, counts, strict=True))


def spec(number: int) -> str:
    dates = [f"2030-12-{day:02}" for day in range(1, 32)]
    keys = {"handler": "acme.note", "schedule": "@daily", "params": {"number": number}}
    return json.dumps(keys | {"calendar": "holidays", "calendar_dates": dates})


def test_the_definitions_of_a_calendar_hold_its_dates_once():
    """A worker keeps thousands of specs; an org's own params make each another one."""
    first, second = shared_spec(spec(1)), shared_spec(spec(2))

    assert first["params"] != second["params"]
    assert first["calendar_dates"] is second["calendar_dates"]
    read = [from_spec("org_acme", "digest", each).calendar_dates for each in (first, second)]
    assert read[0] is read[1]
    assert len(read[0]) == 31


def test_a_command_that_lists_does_not_load_the_triggers():
    """They take longer to import than a list takes to read."""
    code = "import sys, worker.store.lists.read; sys.exit('apscheduler' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], timeout=50).returncode == 0
