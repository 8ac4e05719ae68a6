"""Org states and what each stops."""

from __future__ import annotations

from worker.orgs import MOVES, STOPS, may_move
from worker.store.tables import ORG_STATES


def test_every_state_of_the_table_says_what_it_stops_and_where_it_may_move():
    assert set(STOPS) == set(MOVES) == set(ORG_STATES)


def test_each_state_stops_more_than_the_one_before():
    """active stops nothing, paused firing only, suspended all that runs, removed the secrets too."""
    stopped = [
        {name for name in stops.__slots__ if getattr(stops, name)}
        for stops in (STOPS[state] for state in ("active", "paused", "suspended", "removed"))
    ]

    assert stopped[0] == set()
    assert stopped[1] == {"firing"}
    assert stopped[2] == {"firing", "waiting", "running", "tokens"}
    assert stopped[3] == stopped[2] | {"secrets"}


def test_removal_is_final():
    assert not any(may_move("removed", state) for state in ("active", "paused", "suspended"))
    assert may_move("removed", "removed")
    assert may_move("suspended", "active")
