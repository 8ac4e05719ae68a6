"""Cancel unfinished runs by what they have in common: each in a transaction of its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from worker.errors import Conflict
from worker.ids import RunId
from worker.operations.cancel import cancel
from worker.store import cancellable, orgs
from worker.store.cancellable import Which
from worker.store.database import Database

Row = dict[str, Any]

# Runs read at a time.
PAGE = 100


def matching(database: Database, which: Which, *, org: str | None, limit: int) -> Iterator[Row]:
    """The runs that are unfinished by now as `which` says and that nobody has asked to stop, oldest first.

    Read page by page as they are taken, at most `limit`.

    Raises:
        NotFound: there is no such org.
    """
    return islice(_matching(database, which, org), limit)


def cancel_many(
    database: Database, which: Which, *, actor: str, org: str | None = None, limit: int
) -> Iterator[Row]:
    """Cancel each run that `matching` gives as it is taken, and give what became of it.

    `state` is `cancelled` where it had not started, and `running` where it was asked to
    stop; where it was let be, `left` says why, and its state is what it had become.
    """
    for run in matching(database, which, org=org, limit=limit):
        kept = {name: run[name] for name in ("id", "org", "definition", "scheduled_for")}
        try:
            row = cancel(database, run["id"], actor=actor, org=org, state=which.state)
            yield kept | {"state": row["state"], "left": None}
        except Conflict as error:
            yield kept | {"state": None, "left": error.message}


def _matching(database: Database, which: Which, org: str | None) -> Iterator[Row]:
    with database.autocommit() as connection:
        org_id = None if org is None else orgs.require(connection, org)["id"]
        until = cancellable.newest_for_all_orgs(connection)
    after: RunId | None = None
    while until is not None:
        with database.autocommit() as connection:
            if org_id is None:
                page = cancellable.page_for_all_orgs(connection, which, until=until, after=after, limit=PAGE)
            else:
                page = cancellable.page(connection, org_id, which, until=until, after=after, limit=PAGE)
        yield from page
        if len(page) < PAGE:
            return
        after = RunId(page[-1]["id"])
