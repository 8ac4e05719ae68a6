"""Bulk changes: retry or cancel the runs that match a filter, oldest first, some in each step.

The filter is the verb: `Retryable` runs are retried, `Cancellable` ones cancelled. A process that
serves others at the same time takes steps, and a client continues where the last call stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, cast

from worker.clock import from_text, to_text
from worker.errors import AccessDenied, Conflict, DefinitionError, NotFound, UsageError
from worker.ids import ALL_ORGS
from worker.operations import runs
from worker.store import edit_runs, orgs
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.edit_runs import Cancellable, Retryable
from worker.store.lists import checked_id
from worker.store.lists.rows import BulkRow

# Matching runs read at a time.
PAGE = 100


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
    """The place before the first run, None if there is no run at all; with `org`, only its runs match.

    Raises:
        NotFound: no such org.
    """
    with database.autocommit() as connection:
        scope = orgs.scope_of(connection, ALL_ORGS if org is None else org)
        until = edit_runs.last_match(connection, scope, which)
    return None if until is None else BulkCursor(until)


def matching(
    database: Database, which: Cancellable | Retryable, *, org: str | None, limit: int
) -> Iterator[Row]:
    """The runs that match now, oldest first, read in pages as they are taken, at most `limit`.

    Runs that were asked to stop or were retried already do not match.

    Raises:
        NotFound: no such org.
    """
    place = begin(database, which, org=org)
    while place is not None and limit > 0:
        found, place = _page(database, which, place, org=org, most=min(PAGE, limit))
        limit -= len(found)
        yield from found


def change_many(
    database: Database,
    which: Cancellable | Retryable,
    found: Iterable[Row],
    *,
    actor: str,
    org: str | None = None,
    reason: str | None = None,
    from_checkpoint: bool = False,
) -> Iterator[BulkRow]:
    """Change each of the runs that were found as it is taken; repeating it changes those that were left.

    `state` is `cancelled`, or `running` for a run that was asked to stop. With `org`, that org asks.
    """
    change = partial(runs.retry, from_checkpoint=from_checkpoint)
    if isinstance(which, Cancellable):
        change = partial(runs.cancel, states=which.states)
    for run in found:
        row = _unchanged(run)
        try:
            new = change(database, run["id"], actor=actor, org=org, reason=reason)
        except (AccessDenied, Conflict, DefinitionError) as error:
            row["left"] = error.message
        else:
            row |= {"retried_as": new["id"]} if isinstance(which, Retryable) else {"state": new["state"]}
        yield row


def step(
    database: Database,
    which: Cancellable | Retryable,
    place: BulkCursor,
    *,
    actor: str,
    org: str | None,
    most: int,
    reason: str | None = None,
    dry_run: bool = False,
) -> tuple[list[BulkRow], BulkCursor | None]:
    """Change at most `most` of the runs that match; returns them and where to continue.

    With `dry_run` it only says which they are. With `org`, that org asks: only its runs match.

    Raises:
        NotFound: no such org.
    """
    found, following = _page(database, which, place, org=org, most=most)
    if dry_run:
        return list(map(_unchanged, found)), following
    return list(change_many(database, which, found, actor=actor, org=org, reason=reason)), following


def _page(
    database: Database, which: Cancellable | Retryable, place: BulkCursor, *, org: str | None, most: int
) -> tuple[list[Row], BulkCursor | None]:
    """The next `most` runs that match, and where to continue."""
    with database.autocommit() as connection:
        scope = orgs.scope_of(connection, ALL_ORGS if org is None else org)
        found = edit_runs.page(connection, scope, which, until=place.until, after=place.after, limit=most)
    return found, BulkCursor(place.until, found[-1]) if len(found) == most else None


def _unchanged(run: Row) -> BulkRow:
    kept = {name: run[name] for name in ("id", "org", "definition", "scheduled_for", "state")}
    return cast(BulkRow, kept | {"retried_as": None, "left": None})
