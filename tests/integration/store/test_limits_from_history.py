"""Limits proven from what the database kept: the intervals of all attempts, afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from tests.fakes.admitting import carry
from tests.fakes.stock import Stock
from worker.store import tables
from worker.store.database import Database

LIMIT, WORKERS, SLOTS, ORGS = 3, 4, 60, 50
HANDLERS = tuple(f"acme.h{number}" for number in range(10))
# Handlers with a limit of their own; the others would keep that of orgs and definitions from showing.
LIMITED = HANDLERS[:5]
# Orgs with room for any number of runs, and one definition with a limit.
WIDE = 10
SECONDS = 4.0

Row = dict[str, Any]
Interval = tuple[datetime, datetime]


def test_no_limit_was_ever_exceeded_by_what_history_says(postgres: Database, migrated_postgres_url: str):
    most = crowd(postgres, migrated_postgres_url)

    assert most == {"org": LIMIT, "definition": LIMIT, "handler": LIMIT}


def test_the_same_history_shows_it_where_nobody_waits_for_the_admission_lock(
    postgres: Database, migrated_postgres_url: str
):
    most = crowd(postgres, migrated_postgres_url, locked=False)

    assert min(most.values()) >= LIMIT
    assert max(most.values()) > LIMIT


def crowd(database: Database, url: str, *, locked: bool = True) -> dict[str, int]:
    """Four worker processes on 50 orgs, and the most that ever ran of one org, definition and handler."""
    stock = Stock(database)
    narrow = [stock.org(limit=LIMIT) for _ in range(ORGS - WIDE)]
    stock.put(*(stock.run(org, handler=handler) for org in narrow for handler in HANDLERS))
    wide = [stock.org(limit=1000) for _ in range(WIDE)]
    free = [handler for handler in HANDLERS if handler not in LIMITED]
    for number, org in enumerate(wide):
        definition = stock.definition(org)
        keys = {"handler": free[number % len(free)], "max_concurrent": LIMIT}
        stock.put(*(stock.run(org, definition, **keys) for _ in range(8)))
    offered = {handler: LIMIT if handler in LIMITED else None for handler in HANDLERS}

    carry(url, workers=WORKERS, slots=SLOTS, offered=offered, seconds=SECONDS, locked=locked)

    rows = stock.all(tables.attempts)
    outcomes = Counter(row["outcome"] for row in rows)
    assert set(outcomes) == {"retry", "handed_back", "lost"}
    assert min(outcomes.values()) > 20
    assert len({row["worker_id"] for row in rows}) >= WORKERS
    definition_of = {row["id"]: row["definition_id"] for row in stock.all(tables.runs)}
    return {
        "org": most_at_once((row for row in rows if row["org_id"] in narrow), lambda row: row["org_id"]),
        "definition": most_at_once(
            (row for row in rows if row["org_id"] in wide), lambda row: definition_of[row["run_id"]]
        ),
        "handler": most_at_once(
            (row for row in rows if row["handler"] in LIMITED), lambda row: row["handler"]
        ),
    }


def most_at_once(rows: Iterable[Row], of: Callable[[Row], str]) -> int:
    """The most attempts of one kind whose intervals share an instant."""
    intervals: dict[str, list[Interval]] = {}
    for row in rows:
        intervals.setdefault(of(row), []).append((row["started_at"], row["ended_at"]))
    return max(overlapping(of_one) for of_one in intervals.values())


def overlapping(intervals: Iterable[Interval]) -> int:
    steps = sorted(step for start, end in intervals for step in ((start, 1), (end, -1)))
    running = most = 0
    for _, change in steps:
        running += change
        most = max(most, running)
    return most
