"""Calendars: what `apply` changes, the definitions and templates that follow, and their removal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict
from worker.model.definitions import CALENDAR_DATES
from worker.model.definitions.calendars import CalendarEntry, read_dates
from worker.model.definitions.definition import Definition, keys_of
from worker.model.definitions.fields import refusal
from worker.operations.changes import CalendarChange, Dates, DefinitionChange, TemplateChange
from worker.store import audit, calendars, templates
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.lists import read as lists
from worker.store.lists.rows import CalendarDetail


def calendar_changes(
    connection: Connection, entries: Sequence[CalendarEntry], named: Collection[str]
) -> tuple[list[CalendarChange], Dates]:
    """What a file changes, and the dates of its calendars and of the stored ones that are `named`.

    They are locked until the transaction ends; call it before orgs and definitions are locked.
    """
    wanted = {entry.name: entry.dates for entry in entries}
    if not (wanted or named):
        return [], {}
    calendars.lock(connection, exclusive=bool(wanted))
    stored = calendars.find(connection, {*wanted, *named})
    dates = {name: read_dates(row["dates"]) for name, row in stored.items()}
    changes = [
        CalendarChange(name, stored.get(name), new)
        for name, new in sorted(wanted.items())
        if dates.get(name) != new
    ]
    return changes, {**dates, **wanted}


def dated(definition: Definition, dates: Dates, entry: str) -> Definition:
    """The definition with the dates of its calendar; raises DefinitionError if there is no such calendar."""
    if definition.calendar is None:
        return definition
    if definition.calendar not in dates:
        fix = f'apply [[calendar]] name = "{definition.calendar}"; `calendars list` lists those that exist'
        raise refusal(f"there is no calendar {definition.calendar}", entry, "calendar", fix=fix)
    return replace(definition, calendar_dates=dates[definition.calendar])


def with_calendar(connection: Connection, definition: Definition, entry: str) -> Definition:
    """The definition with the stored dates of its calendar, which the caller has locked.

    Raises:
        DefinitionError: there is no such calendar.
    """
    if definition.calendar is None:
        return definition
    stored = calendars.find(connection, [definition.calendar])
    return dated(definition, {name: read_dates(row["dates"]) for name, row in stored.items()}, entry)


def following(row: Row, dates: Mapping[str, list[str]]) -> DefinitionChange:
    """The change that gives a stored definition the dates that its calendar now has."""
    spec = _dated_spec(row["spec"], dates)
    return DefinitionChange("change", row["org_id"], row["org"], row["name"], row, spec, row["enabled"])


def following_templates(
    connection: Connection, changed: Mapping[str, list[str]], in_file: Collection[str]
) -> list[TemplateChange]:
    """The changes of open templates that name a changed calendar, besides those of the file."""
    if not changed:
        return []
    open_ones = [row["name"] for row in templates.every(connection) if row["closed_at"] is None]
    changes = []
    for name in open_ones:
        row = None if name in in_file else templates.find(connection, name)
        if row is not None and row["spec"].get("calendar") in changed:
            spec = _dated_spec(row["spec"], changed)
            changes.append(TemplateChange("change", row["id"], name, row, row["selector"], spec))
    return changes


def _dated_spec(spec: Mapping[str, Any], dates: Mapping[str, list[str]]) -> dict[str, Any]:
    # The specs of all definitions have one list.
    new = dates[spec["calendar"]]
    return keys_of(spec) | ({CALENDAR_DATES: new} if new else {})


def write_calendars(
    connection: Connection, changes: Sequence[CalendarChange], *, actor: str, at: datetime
) -> None:
    """Write calendars that are added or have other dates."""
    for change in changes:
        if change.dates is not None:
            calendars.write(
                connection, change.name, change.dates, at=at, actor=actor, new=change.before is None
            )


def remove_calendar(database: Database, name: str, *, actor: str) -> CalendarDetail:
    """Delete a calendar, and return what it was.

    Raises:
        NotFound: there is no such calendar.
        Conflict: an open definition or template names it.
    """
    with database.transaction() as connection:
        calendars.lock(connection, exclusive=True)
        row = lists.calendar(connection, name)
        if row["definitions"] or row["templates"]:
            by = [f"template {template}" for template in row["templates"][:3]]
            count = row["definitions"]
            by += [f"{count} definition{'s' if count > 1 else ''}"] if count else []
            raise Conflict(
                f"calendar {name} is in use by {' and '.join(by)}",
                fix="`apply` or `definitions edit ORG NAME calendar=null` takes it out of them",
            )
        calendars.remove(connection, name)
        entry = CalendarChange(name, None, None).audit_entry()
        audit.record(connection, [entry], at=database.now(connection), actor=actor)
        return row
