"""Backfill: let every instant of a range of the past run once more, a few at a time; and stop that."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from worker.definitions.definition import from_spec
from worker.errors import Conflict, NotFound, UsageError
from worker.ids import new_id
from worker.operations.by_hand import refuse_what_is_not_active
from worker.operations.fill_backfills import fill
from worker.store import audit, backfills, definitions, orgs
from worker.store.database import Database

Row = dict[str, Any]

MOST_AT_ONCE = 1000
_INSTANT = timedelta(microseconds=1)


def backfill(
    database: Database,
    org: str,
    name: str,
    *,
    start: datetime,
    until: datetime,
    limit: int = 1,
    actor: str,
) -> Row:
    """Make a run for each instant from `start` until before `until`, and return the backfill.

    At most `limit` of them are unfinished at once, whatever the definition's overlap;
    its `starts_at` and misfire rules do not count. The same range again adds
    nothing; one that was cancelled goes on where it was.

    Raises:
        NotFound: there is no such org or definition.
        Conflict: the definition is closed, or its org is not active.
        UsageError: a range that is empty or has not passed, or a limit out of range.
    """
    start, until = start.astimezone(UTC), until.astimezone(UTC)
    if not 1 <= limit <= MOST_AT_ONCE:
        raise UsageError(
            f"limit {limit} is not between 1 and {MOST_AT_ONCE}",
            fix="it is how many may be unfinished at once",
        )
    with database.transaction() as connection:
        org_id = orgs.require(connection, org, lock=True)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        now = database.now(connection)
        _check(row, start, until, now)
        there = backfills.find(connection, org_id, row["id"], start, until)
        if there is None:
            definition = replace(from_spec(org, name, row["spec"]), starts_at=None)
            trigger = definition.trigger(row["org_timezone"])
            instants = trigger.count(start, until - _INSTANT)
            if not instants:
                raise UsageError(
                    f"no instant of {org}/{name} lies in that range",
                    fix=f"`definitions next {org} {name} --from T` shows where they are",
                )
            backfill_id = new_id()
            values = {
                "id": backfill_id,
                "org_id": org_id,
                "definition_id": row["id"],
                "revision": row["revision"],
                "range_from": start,
                "range_until": until,
                "next_scheduled_for": trigger.after(start, inclusive=True),
                "max_concurrent": limit,
                "instants": instants,
                "created_at": now,
                "created_by": actor,
            }
            backfills.add(connection, values)
            detail: Row = {"from": start.isoformat(), "until": until.isoformat(), "instants": instants}
        elif there["cancelled_at"] is not None or there["max_concurrent"] != limit:
            backfill_id = there["id"]
            detail = {"from": start.isoformat(), "until": until.isoformat(), "limit": limit}
            values = {"max_concurrent": limit}
            if there["cancelled_at"] is not None:
                values |= {"cancelled_at": None, "finished_at": None}
            backfills.change(connection, org_id, backfill_id, values)
        else:
            return backfills.backfill(connection, org_id, there["id"])
        audit.record(
            connection,
            [audit.Entry(org_id, "definition.backfill", f"{org} {name}", detail)],
            at=now,
            actor=actor,
        )
        fill(connection, at=now)
        return backfills.backfill(connection, org_id, backfill_id)


def cancel_backfill(
    database: Database, org: str, name: str, *, start: datetime, until: datetime, actor: str
) -> Row:
    """Stop a backfill and return it: what waits of it is cancelled, what runs goes on.

    Raises:
        NotFound: there is no such org, definition or backfill.
        Conflict: it has ended.
    """
    with database.transaction() as connection:
        org_id = orgs.require(connection, org, lock=True)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        there = backfills.find(connection, org_id, row["id"], start.astimezone(UTC), until.astimezone(UTC))
        if there is None:
            raise NotFound(
                f"{org}/{name} has no backfill of exactly that range",
                fix=f"`definitions backfills --org {org} --definition {name}` names those it has",
            )
        if there["finished_at"] is not None:
            raise Conflict(
                f"that backfill of {org}/{name} has ended",
                fix=f"nothing is left to stop; `runs list --org {org} --definition {name}` lists its runs",
            )
        now = database.now(connection)
        backfills.change(connection, org_id, there["id"], {"cancelled_at": now, "finished_at": now})
        ended = backfills.end_waiting(connection, org_id, there["id"])
        entry = audit.Entry(org_id, "definition.cancel_backfill", f"{org} {name}", {"cancelled": ended})
        audit.record(connection, [entry], at=now, actor=actor)
        return backfills.backfill(connection, org_id, there["id"])


def _check(row: Row, start: datetime, until: datetime, now: datetime) -> None:
    refuse_what_is_not_active(row)
    if start >= until:
        raise UsageError(
            "the range is empty: --until is not after --from", fix="--until is the first instant left out"
        )
    if until > now:
        raise UsageError(
            "the range has not passed yet: what is still to come runs by its schedule",
            fix="--until now, or earlier",
        )
