"""Calendars: their dates, and which open definitions and templates name them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import date, datetime
from typing import Any

from sqlalchemy import Connection, delete, func, insert, or_, select, text, update

from worker.ids import AllOrgs, new_id
from worker.store import tables
from worker.store.bulk import rows_among
from worker.store.dialect import Row, all_rows, is_postgresql

_calendars, _definitions, _orgs = tables.calendars, tables.definitions, tables.orgs
_templates = tables.templates

# Definitions that are counted for people; of more, the number is this one.
COUNTED = 10_000
_LOCK = 6_070_318
_SHARED, _EXCLUSIVE = (text(f"SELECT pg_advisory_xact_lock{how}({_LOCK})") for how in ("_shared", ""))


def lock(connection: Connection, *, exclusive: bool = False) -> None:
    """Keep calendars as they are until the transaction ends; `exclusive` also keeps out who uses them.

    Taken before any lock of an org or a definition. Without it a definition could take the dates of a
    calendar that another transaction changes, and keep them.
    """
    if is_postgresql(connection):
        connection.execute(_EXCLUSIVE if exclusive else _SHARED)


def find(connection: Connection, names: Iterable[str]) -> dict[str, Row]:
    """The existing calendars of these names, by name."""
    rows = rows_among(connection, select(_calendars), _calendars.c.name, names)
    return {row.name: row._asdict() for row in rows}


def write(
    connection: Connection, name: str, dates: Collection[date], *, at: datetime, actor: str, new: bool
) -> None:
    """Insert a calendar, or replace its dates."""
    days = sorted(dates)
    values: dict[str, Any] = {
        "dates": [day.isoformat() for day in days],
        "days": len(days),
        "first_date": days[0] if days else None,
        "last_date": days[-1] if days else None,
        "updated_at": at,
        "updated_by": actor,
    }
    if new:
        connection.execute(insert(_calendars).values(id=new_id(), name=name, created_at=at, **values))
    else:
        connection.execute(update(_calendars).where(_calendars.c.name == name).values(**values))


def remove(connection: Connection, name: str) -> None:
    """Delete a calendar."""
    connection.execute(delete(_calendars).where(_calendars.c.name == name))


def orgs_with(connection: Connection, _: AllOrgs, names: Iterable[str]) -> set[str]:
    """The codes of the orgs with an open definition of their own that names one of these calendars."""
    query = (
        select(_orgs.c.code)
        .join(_definitions, _definitions.c.org_id == _orgs.c.id)
        .where(
            # The condition of the index, too.
            _definitions.c.calendar.is_not(None),
            _definitions.c.closed_at.is_(None),
            _definitions.c.template_id.is_(None),
        )
        .distinct()
    )
    return {code for (code,) in rows_among(connection, query, _definitions.c.calendar, names)}


def uses(connection: Connection, _: AllOrgs, name: str) -> tuple[int, list[str]]:
    """How many open definitions name it, and the names of the open templates that do."""
    some = (
        select(_definitions.c.id)
        .where(_definitions.c.calendar == name, _definitions.c.closed_at.is_(None))
        .limit(COUNTED)
        .subquery()
    )
    count = connection.execute(select(func.count()).select_from(some)).scalar_one()
    named = select(_templates.c.name).where(
        _templates.c.closed_at.is_(None), _templates.c.spec["calendar"].as_string() == name
    )
    return count, list(connection.execute(named.order_by(_templates.c.name)).scalars())


def ending(connection: Connection, until: date) -> list[Row]:
    """The calendars that an open definition names and that have no date after `until`."""
    used = (
        select(_definitions.c.id)
        .where(_definitions.c.calendar == _calendars.c.name, _definitions.c.closed_at.is_(None))
        .exists()
    )
    query = select(_calendars.c.name, _calendars.c.last_date).where(
        used, or_(_calendars.c.last_date.is_(None), _calendars.c.last_date <= until)
    )
    return all_rows(connection, query.order_by(_calendars.c.name))
