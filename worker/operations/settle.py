"""Before a change of what is due: settle the past under the rules in force; after it: start from now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from worker.definitions.definition import from_spec
from worker.definitions.spread import spread_of
from worker.ids import DefinitionId, OrgId
from worker.operations.handlers import Handlers
from worker.runs.fire import decide
from worker.runs.firing import DueDefinition, NewSkip, NextFire
from worker.runs.run import NewRun
from worker.store import definitions, firing
from worker.store.chunks import chunks

Row = Mapping[str, Any]


@contextmanager
def settled_org(connection: Connection, org_id: OrgId, *, at: datetime) -> Iterator[list[dict[str, Any]]]:
    """Settle all definitions of an org, let the caller change the org, and start them from now.

    Yields their rows as they were. Within one transaction, the org's row locked first.
    """
    rows = definitions.lock_org(connection, org_id)
    settle(connection, rows, at=at)
    yield rows
    # Those that were closed in between as well: nothing of them is due any more.
    ours = {row["id"] for row in rows}
    now_are = definitions.lock_for_all_orgs(connection, [org_id])
    start(connection, [row for row in now_are if row["id"] in ours], at=at)


@contextmanager
def settled(connection: Connection, row: Row, *, at: datetime) -> Iterator[None]:
    """Settle one definition, locked already, let the caller change it, and start it from now."""
    settle(connection, [row], at=at)
    yield
    now_is = definitions.find(connection, row["org_id"], row["name"])
    start(connection, [now_is] if now_is else [], at=at)


def settle(connection: Connection, rows: Sequence[Row], *, at: datetime) -> None:
    """Decide every instant that these definitions, locked already, have named up to now.

    By the misfire rule of the revision in force. An instant that has come, but
    whose spread has not passed yet, becomes a run that is available when it has.
    """
    due = [row for row in rows if row["next_scheduled_for"] is not None and row["next_scheduled_for"] <= at]
    handlers = Handlers(connection)
    for part in chunks(due, 100):
        runs: list[NewRun] = []
        skips: list[NewSkip] = []
        nexts: list[NextFire] = []
        for row in part:
            nexts.append(_settle(row, at, handlers, runs, skips))
        firing.write(connection, runs, skips, nexts)


def _settle(row: Row, at: datetime, handlers: Handlers, runs: list[NewRun], skips: list[NewSkip]) -> NextFire:
    next_fire = NextFire(row["id"], row["next_scheduled_for"], row["next_fire_at"])
    while next_fire.next_scheduled_for is not None and next_fire.next_scheduled_for <= at:
        due = DueDefinition(
            definition_id=row["id"],
            org_id=row["org_id"],
            org_code=row["org"],
            org_timezone=row["org_timezone"],
            name=row["name"],
            revision=row["revision"],
            next_scheduled_for=next_fire.next_scheduled_for,
            spec=row["spec"],
        )
        decision = decide(due, max(at, next_fire.next_fire_at or at), handlers.isolation_of)
        runs.extend(decision.runs)
        skips.extend(decision.skips)
        next_fire = decision.next
    return next_fire


def start(connection: Connection, rows: Sequence[Row], *, at: datetime, inclusive: bool = False) -> None:
    """Set when these definitions are due next, counted from now; never, where they are not active.

    `inclusive` for new ones: an instant that is this very moment counts. What was
    decided already stays so, also where the clock has gone back since.
    """
    decided = (
        {}
        if inclusive
        else definitions.last_decided_for_all_orgs(connection, [row["id"] for row in rows if is_active(row)])
    )
    definitions.set_next_for_all_orgs(
        connection,
        [
            (row["org_id"], *next_of(row, max(at, decided.get(row["id"], at)), inclusive=inclusive))
            for row in rows
        ],
    )


def next_of(
    row: Row, at: datetime, *, inclusive: bool = False
) -> tuple[DefinitionId, datetime | None, datetime | None]:
    """A definition, its first instant after `at`, and that plus its spread."""
    if not is_active(row):
        return row["id"], None, None
    definition = from_spec(row["org"], row["name"], row["spec"])
    trigger = definition.trigger(row["org_timezone"])
    nominal = trigger.after(at, inclusive=inclusive)
    if nominal is None:
        return row["id"], None, None
    spread = spread_of(row["org"], row["name"], definition.schedule, trigger, definition.spread)
    return row["id"], nominal, nominal + spread


def is_active(row: Row) -> bool:
    """Whether instants of this definition are due at all: neither it nor its org is stopped."""
    return (
        row["org_state"] == "active"
        and row["enabled"]
        and row["paused_at"] is None
        and row["closed_at"] is None
    )
