"""How far into each org's line the free slots can reach."""

from __future__ import annotations

import heapq

from hypothesis import given
from hypothesis import strategies as st

from worker.store.sql.contract import OrgQueue, reach

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
