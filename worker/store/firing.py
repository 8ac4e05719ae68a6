"""Firing: what is due becomes runs and skips, each overlap settled by its rule, in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from sqlalchemy import Connection

from worker.runs.firing import Decision, DueDefinition, FireReport, NewSkip, NextFire
from worker.runs.run import NewRun
from worker.store import overlaps
from worker.store.sql import Specs, statements

Decide = Callable[[DueDefinition, datetime], Decision]


def fire(connection: Connection, decide: Decide, *, limit: int, specs: Specs) -> FireReport:
    """Lock what is due, let `decide` say what it makes, and write that: one transaction's work."""
    now, due = statements(connection).fire_lock(connection, limit=limit, specs=specs)
    decisions = [decide(definition, now) for definition in due]
    return write(
        connection,
        [run for decision in decisions for run in decision.runs],
        [skip for decision in decisions for skip in decision.skips],
        [decision.next for decision in decisions],
        now=now,
        more=len(due) == limit,
    )


def first_due(connection: Connection) -> tuple[datetime, datetime | None]:
    """What time the database has, and when a definition is due first."""
    return statements(connection).fire_first(connection)


def write(
    connection: Connection,
    runs: Sequence[NewRun],
    skips: Sequence[NewSkip] = (),
    next_fires: Sequence[NextFire] = (),
    *,
    now: datetime | None = None,
    more: bool = False,
) -> FireReport:
    """Insert runs and skips and set what is due next, under the definitions' locks.

    A serial run that finds another unfinished one of its definition gets the place
    that its overlap rule gives it, else becomes a skip (overlap); one that exists
    already is ignored. `now` and `more` only go into the report.
    """
    hot = statements(connection)
    made = hot.fire_write(connection, runs, next_fires)
    placed, left = overlaps.place_scheduled(connection, made.overlapped)
    skips = [*skips, *(_overlap(run) for run in left if run.origin == "schedule")]
    if skips:
        hot.fire_skips(connection, skips)
    return FireReport(
        [*made.inserted, *placed],
        left,
        skips,
        next_fire_at=made.next_fire_at,
        now=now or made.now,
        more=more,
    )


def _overlap(run: NewRun) -> NewSkip:
    at = run.scheduled_for
    return NewSkip(run.org_id, run.definition_id, run.revision, at, at, 1, "overlap")
