"""Bulk changes in steps: retry or cancel the runs that match a search, some in each step.

`operations.runs` does the same in one go, for the command line. A process that serves
others at the same time takes steps, and a client continues where the last call stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from worker.clock import from_text, to_text
from worker.errors import AccessDenied, Conflict, DefinitionError, NotFound, UsageError
from worker.ids import ALL_ORGS
from worker.store import edit_runs, orgs
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.edit_runs import Cancellable, Retryable
from worker.store.lists import checked_id
from worker.store.lists.rows import BulkRow, Run

# Changes one run, by its id.
Change = Callable[[str], Run]


@dataclass(frozen=True, slots=True)
class BulkCursor:
    """Where a bulk change is: the last run that it has passed, and how far it goes.

    Runs that are made or end after its begin are not its own.
    """

    until: Any
    after: Row | None = None

    def __str__(self) -> str:
        until = to_text(self.until) if isinstance(self.until, datetime) else self.until
        if self.after is None:
            return f"{until}~"
        ended = self.after.get("finished_at")
        return f"{until}~{self.after['id']}{'' if ended is None else f'~{to_text(ended)}'}"

    @classmethod
    def read(cls, which: Cancellable | Retryable, text: str) -> BulkCursor:
        """The place that a client gives back; raises UsageError if it is not one of this kind."""
        parts = text.split("~")
        try:
            if isinstance(which, Retryable):
                until, id_, ended = parts
                return cls(from_text(until), {"id": checked_id(id_), "finished_at": from_text(ended)})
            until, id_ = parts
            return cls(checked_id(until), {"id": checked_id(id_)})
        except (ValueError, NotFound):
            raise UsageError("after is not `next` of such a change", fix="give `next` as it came") from None


def begin(database: Database, which: Cancellable | Retryable, *, org: str | None) -> BulkCursor | None:
    """The place before the first run, None if there is no run at all; raises as `step`."""
    with database.autocommit() as connection:
        scope = orgs.scope_of(connection, ALL_ORGS if org is None else org)
        until = edit_runs.last_match(connection, scope, which)
    return None if until is None else BulkCursor(until)


def step(
    database: Database,
    which: Cancellable | Retryable,
    place: BulkCursor,
    *,
    org: str | None,
    most: int,
    change: Change | None = None,
) -> tuple[list[BulkRow], BulkCursor | None]:
    """Change at most `most` of the runs that match, oldest first; returns them and where to continue.

    Without `change` it only says which they are. With `org`, only its runs match.

    Raises:
        NotFound: no such org.
    """
    with database.autocommit() as connection:
        scope = orgs.scope_of(connection, ALL_ORGS if org is None else org)
        found = edit_runs.page(connection, scope, which, until=place.until, after=place.after, limit=most)
    done = [_changed(row, which, change) for row in found]
    return done, BulkCursor(place.until, found[-1]) if len(found) == most else None


def _changed(row: Row, which: Cancellable | Retryable, change: Change | None) -> BulkRow:
    result: BulkRow = {
        "id": row["id"],
        "org": row["org"],
        "definition": row["definition"],
        "scheduled_for": row["scheduled_for"],
        "state": row["state"],
        "retried_as": None,
        "left": None,
    }
    if change is None:
        return result
    try:
        new = change(row["id"])
    except (AccessDenied, Conflict, DefinitionError) as error:
        return {**result, "left": error.message}
    if isinstance(which, Retryable):
        return {**result, "retried_as": new["id"]}
    return {**result, "state": new["state"]}
