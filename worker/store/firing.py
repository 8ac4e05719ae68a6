"""Firing: due definitions make runs and skips, by their overlap policy, in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Text, cast, select, tuple_

from worker.ids import DefinitionId, OrgId, Scope
from worker.model.runs.run import (
    Decision,
    DueDefinition,
    FireReport,
    NewDeadline,
    NewRun,
    NewSkip,
    NextFire,
    Upcoming,
)
from worker.store import deadlines, edit_runs, tables
from worker.store.dialect import database_now, in_scope
from worker.store.sql import statements
from worker.store.sql.contract import Specs, shares
from worker.store.sweeps import EndCounts

_live = tables.live_runs


def place(
    connection: Connection, run: NewRun, *, at: datetime, counts: EndCounts | None = None
) -> Mapping[str, Any] | None:
    """Insert a run whose definition is locked: waiting, held, or in place of others.

    Returns the unfinished run that keeps it out by the overlap policy, else None. With `counts`, the caller
    writes the sums.
    """
    others = edit_runs.unfinished(connection, run.org_id, run.definition_id) if run.serial else []
    held = next((other for other in others if other["state"] == "held"), None)
    if not others:
        edit_runs.insert_run(connection, run, at=at)
    elif run.overlap == "queue_one" and held is None:
        edit_runs.insert_run(connection, run, at=at, held=True)
    elif run.overlap == "replace":
        ours = edit_runs.is_of(run.definition_id)
        # In this order: who has locked the sums of an org, to count ends, locks no run after that.
        serial = edit_runs.is_serial()
        edit_runs.ask_to_stop(connection, run.org_id, ours, serial, reason="replaced", at=at)
        edit_runs.end_waiting(connection, run.org_id, ours, serial, reason="replaced", counts=counts)
        # It starts once the running one has ended, which promotes the held one.
        running = any(other["state"] == "running" for other in others)
        edit_runs.insert_run(connection, run, at=at, held=running)
    else:
        return held if held is not None and run.overlap == "queue_one" else others[0]
    return None


def place_scheduled(
    connection: Connection, overlapped: Sequence[NewRun], counts: EndCounts | None = None
) -> tuple[list[NewRun], list[NewRun]]:
    """Place scheduled runs that overlap an unfinished one; returns those placed, and those left out.

    The fire that made them has locked their definitions.
    """
    placed: list[NewRun] = []
    left = [run for run in overlapped if run.overlap == "skip"]
    wanting = sorted(
        (run for run in overlapped if run.overlap != "skip"),
        key=lambda run: (run.org_id, run.definition_id, run.scheduled_for),
    )
    if wanting:
        # Lock all of them first, in the order of ids, as every batch that locks runs does.
        definitions = {run.definition_id for run in wanting}
        rows = select(_live.c.id).where(_live.c.definition_id.in_(definitions), _live.c.serial)
        connection.execute(rows.order_by(_live.c.id).with_for_update()).all()
        now = database_now(connection)
        for run in wanting:
            (placed if place(connection, run, at=now, counts=counts) is None else left).append(run)
    return placed, left


Decide = Callable[[DueDefinition, datetime], Decision]


def fire(connection: Connection, decide: Decide, *, limit: int, specs: Specs) -> FireReport:
    """Lock due definitions, let `decide` turn each into runs and skips, and write those."""
    now, due = statements(connection).fire_lock(connection, limit=limit, specs=specs)
    decisions = [decide(definition, now) for definition in due]
    runs = [run for decision in decisions for run in decision.runs]
    skips = [skip for decision in decisions for skip in decision.skips]
    until = [each for decision in decisions for each in decision.deadlines]
    report = write(connection, runs, skips, [decision.next for decision in decisions], until)
    return replace(report, now=now, more=len(due) >= shares(limit)[0])


def write(
    connection: Connection,
    runs: Sequence[NewRun],
    skips: Sequence[NewSkip] = (),
    next_fires: Sequence[NextFire] = (),
    until: Sequence[NewDeadline] = (),
    counts: EndCounts | None = None,
) -> FireReport:
    """Insert runs, skips and deadlines and set the next fire times, under the definitions' locks.

    A serial run that overlaps an unfinished one is placed by its policy, or becomes a skip
    (overlap); an existing run is ignored. With `counts`, the caller writes the sums.
    """
    hot = statements(connection)
    made = hot.fire_write(connection, runs, next_fires)
    placed, left = place_scheduled(connection, made.overlapped, counts)
    skips = [*skips, *(_overlap(run) for run in left if run.origin == "schedule")]
    if skips:
        hot.fire_skips(connection, skips)
    if until:
        deadlines.add(connection, until)
    return FireReport([*made.inserted, *placed], left, skips, made.next_fire_at, made.now)


def write_of_org(
    connection: Connection,
    org_id: OrgId,
    runs: Sequence[NewRun],
    skips: Sequence[NewSkip],
    until: Sequence[NewDeadline] = (),
    counts: EndCounts | None = None,
) -> None:
    """As `write`, in the role of one org: it sees a run before its row of `live_runs` is checked.

    So each run is inserted by statements of its own.
    """
    at = database_now(connection)
    new = [run for run in runs if not edit_runs.is_fired(connection, org_id, run)]
    left = [run for run in new if place(connection, run, at=at, counts=counts) is not None]
    if skips := [*skips, *(_overlap(run) for run in left)]:
        statements(connection).fire_skips(connection, skips)
    if until:
        deadlines.add(connection, until)


def _overlap(run: NewRun) -> NewSkip:
    at = run.scheduled_for
    return NewSkip(run.org_id, run.definition_id, run.revision, at, at, 1, "overlap")


Place = tuple[datetime, DefinitionId]


def upcoming(
    connection: Connection, scope: Scope, after: Place, until: datetime, limit: int
) -> Sequence[Upcoming]:
    """Definitions of active orgs that are due next after this place, until `until` inclusive, in order."""
    schedule, definitions = tables.schedule, tables.definitions
    orgs, revisions = tables.orgs, tables.definition_revisions

    # By their keys: as joins, PostgreSQL would read all definitions for each page.
    def of_org(name: str) -> Any:
        query = select(orgs.c[name]).where(orgs.c.id == schedule.c.org_id, orgs.c.state == "active")
        return query.correlate(schedule).scalar_subquery()

    revision = select(definitions.c.revision).where(definitions.c.id == schedule.c.definition_id)
    spec = select(cast(revisions.c.spec, Text)).where(
        revisions.c.definition_id == schedule.c.definition_id,
        revisions.c.revision == revision.correlate(schedule).scalar_subquery(),
    )
    query = (
        select(
            schedule.c.definition_id,
            schedule.c.org_id,
            of_org("code"),
            of_org("issuer"),
            schedule.c.next_fire_at,
            spec.correlate(schedule).scalar_subquery(),
            schedule.c.next_scheduled_for,
            of_org("timezone"),
        )
        .where(schedule.c.next_fire_at >= after[0], schedule.c.next_fire_at <= until)
        .where(tuple_(schedule.c.next_fire_at, schedule.c.definition_id) > after)
        .where(*in_scope(schedule.c.org_id, scope))
        .order_by(schedule.c.next_fire_at, schedule.c.definition_id)
        .limit(limit)
    )
    return [Upcoming(*row) for row in connection.execute(query)]
