"""Sweeps: waiting runs that nothing else would touch, looked at now and then in small batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC

from sqlalchemy import Connection, and_, case, delete, select, update

from worker.ids import DefinitionId, OrgId, RunId
from worker.store import tables
from worker.store.chunks import chunks
from worker.store.connection import database_now
from worker.store.names import Names, names_for_all_orgs
from worker.store.sql import statements
from worker.store.sql.ending import Rollups

# Rows changed by one transaction.
BATCH = 500

_live = tables.live_runs
_runs = tables.runs
_workers = tables.workers


@dataclass(frozen=True, slots=True)
class Swept:
    """A waiting run that a sweep changed; `names` are those of its org and definition."""

    run_id: RunId
    org_id: OrgId
    definition_id: DefinitionId
    names: Names
    attempt: int
    state: str
    reason: str


def mark_no_handler(connection: Connection) -> int:
    """Give waiting runs that are due the reason `no_handler` while no worker offers theirs, and take it back.

    Returns how many rows changed. Admission does not read the reason: this is for people.
    """
    now = database_now(connection)
    live = (_workers.c.ended_at.is_(None), _workers.c.lease_until > now)
    offers = [set(names) for names in connection.execute(select(_workers.c.handlers).where(*live)).scalars()]
    due = and_(_live.c.state == "waiting", _live.c.available_at <= now)
    marked = _live.c.reason == "no_handler"
    needed = select(_live.c.handler, _live.c.variant_handlers, marked).where(due).distinct()
    changed = 0
    for handler, variants, is_marked in connection.execute(needed).all():
        offered = any({handler, *(variants or ())} <= names for names in offers)
        if offered != bool(is_marked):
            continue
        column = _live.c.variant_handlers
        same = column.is_(None) if variants is None else column == variants
        reason = case((_live.c.attempt == 0, "due"), else_="retry") if offered else "no_handler"
        rows = select(_live.c.id).where(due, _live.c.handler == handler, same, marked if offered else ~marked)
        ids = connection.execute(
            rows.order_by(_live.c.id).limit(BATCH).with_for_update(skip_locked=True)
        ).scalars()
        result = connection.execute(
            update(_live).where(_live.c.id.in_(ids.all()), _live.c.state == "waiting").values(reason=reason)
        )
        changed += result.rowcount
    return changed


def expire_overdue(connection: Connection) -> list[Swept]:
    """Skip waiting runs whose start deadline passed before their handler ever started."""
    query = (
        select(_live.c.id)
        .where(
            _live.c.state == "waiting",
            _live.c.start_by.is_not(None),
            _live.c.start_by < database_now(connection),
        )
        .limit(BATCH)
    )
    overdue = connection.execute(query).scalars().all()
    return end_waiting(connection, overdue, state="skipped", reason="expired")


def promote_held(connection: Connection) -> int:
    """Let held runs wait whose definition has nothing unfinished left; returns how many."""
    return statements(connection).promote(connection, None)


def end_waiting(
    connection: Connection,
    run_ids: Sequence[RunId],
    *,
    state: str,
    reason: str,
    detail: str | None = None,
) -> list[Swept]:
    """End those of the runs that wait or are held, without another attempt; the others stay as they are."""
    ended: list[Swept] = []
    for part in chunks(sorted(run_ids)):
        rows = connection.execute(
            select(_live)
            .where(_live.c.id.in_(part), _live.c.state.in_(("waiting", "held")))
            .order_by(_live.c.id)
            .with_for_update()
        ).all()
        if not rows:
            continue
        names = names_for_all_orgs(connection, (row.definition_id for row in rows))
        now = database_now(connection)
        connection.execute(delete(_live).where(_live.c.id.in_([row.id for row in rows])))
        for row in rows:
            connection.execute(
                update(_runs)
                .where(_runs.c.id == row.id, _runs.c.state.is_(None))
                .values(
                    state=state,
                    reason=reason,
                    detail=detail,
                    available_at=row.available_at,
                    finished_at=now,
                    attempt=row.attempt,
                    result_fencing_token=row.fencing_token,
                    progress=row.progress,
                )
            )
            called = names[row.definition_id]
            ended.append(Swept(row.id, row.org_id, row.definition_id, called, row.attempt, state, reason))
    if ended:
        hot = statements(connection)
        now = database_now(connection)
        counts: dict[OrgId, int] = {}
        for run in ended:
            counts[run.org_id] = counts.get(run.org_id, 0) + 1
        hour = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        hot.add_rollups(
            connection,
            Rollups(
                [(hour.date(), org_id, runs, 0, 0) for org_id, runs in sorted(counts.items())],
                [(hour, org_id, state, runs) for org_id, runs in sorted(counts.items())],
            ),
        )
        hot.promote(connection, [run.definition_id for run in ended])
    return ended
