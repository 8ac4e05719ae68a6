"""The state of a definition, set or cleared by hand while none of its runs is running."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict, UsageError
from worker.handlers.given import to_state_text
from worker.handlers.json_text import NotStorable
from worker.store import audit, definitions, orgs, states
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.lists import read as lists
from worker.store.lists.read import DefinitionState

# Keys of a state that an audit row names.
KEYS = 50


def set_state(
    database: Database, org: str, name: str, data: Mapping[str, Any], *, actor: str
) -> DefinitionState:
    """Replace the state of a definition, and return it; the next attempt of its runs loads it.

    Raises:
        NotFound: no such org or definition.
        Conflict: a run of it is running.
        UsageError: it is not a JSON object of at most 64 KiB.
    """
    try:
        size = len(to_state_text(data).encode())
    except NotStorable as error:
        raise UsageError(str(error), fix='a state is a JSON object, such as {"cursor": 5}') from None

    def put(connection: Connection, row: Row, now: datetime) -> Row:
        states.put(connection, row["org_id"], row["id"], dict(data), at=now, by=actor)
        return {"keys": sorted(data)[:KEYS], "bytes": size}

    return _change(database, org, name, put, action="definition.set_state", actor=actor)


def clear_state(database: Database, org: str, name: str, *, actor: str) -> DefinitionState:
    """Clear the state of a definition, and return it; the next attempt of its runs loads an empty one.

    Raises:
        NotFound: no such org or definition.
        Conflict: a run of it is running.
    """

    def clear(connection: Connection, row: Row, now: datetime) -> Row | None:
        before = states.find(connection, row["org_id"], row["id"])
        if before is None:
            return None
        states.clear(connection, row["org_id"], row["id"])
        return {"keys": sorted(before["data"])[:KEYS]}

    return _change(database, org, name, clear, action="definition.clear_state", actor=actor)


def _change(
    database: Database,
    org: str,
    name: str,
    change: Callable[[Connection, Row, datetime], Row | None],
    *,
    action: str,
    actor: str,
) -> DefinitionState:
    """Change the state of a locked definition.

    `change` returns the audit row's detail, or None if it changed nothing.
    """
    with database.transaction() as connection:
        org_id = orgs.require(connection, org)["id"]
        row = definitions.require(connection, org_id, org, name, lock=True)
        running = states.running(connection, org_id, row["id"])
        if running is not None:
            raise Conflict(
                f"run {running} of definition {org}/{name} is running, and may change the state itself",
                fix=f"wait for its end, or `runs cancel {running}`",
            )
        now = database.now(connection)
        detail = change(connection, row, now)
        if detail is not None:
            entry = audit.Entry(org_id, action, f"{org} {name}", detail)
            audit.record(connection, [entry], at=now, actor=actor)
        return lists.state(connection, org, name)
