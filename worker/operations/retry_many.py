"""Retry runs that have ended, by what they have in common: each in a transaction of its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from worker.errors import Conflict, DefinitionError
from worker.operations.retry import retry
from worker.store import orgs, retryable
from worker.store.database import Database
from worker.store.retryable import Key, Which

Row = dict[str, Any]

# Runs read at a time.
PAGE = 100


def matching(database: Database, which: Which, *, org: str | None, limit: int) -> Iterator[Row]:
    """The runs that have ended by now as `which` says and that nobody has retried, the oldest end first.

    Read page by page as they are taken, at most `limit`.

    Raises:
        NotFound: there is no such org.
    """
    return islice(_matching(database, which, org), limit)


def retry_many(
    database: Database,
    which: Which,
    *,
    actor: str,
    org: str | None = None,
    from_checkpoint: bool = False,
    limit: int,
) -> Iterator[Row]:
    """Retry each run that `matching` gives as it is taken, and give what became of it.

    `id` is the new run and `state` its state; where it could not be made, `id` is None
    and `left` says why. Called again it goes on with those that were left.
    """
    for old in matching(database, which, org=org, limit=limit):
        made: Row = {"id": None, "state": None, "left": None}
        try:
            new = retry(database, old["id"], actor=actor, org=org, from_checkpoint=from_checkpoint, once=True)
            made |= {"id": new["id"], "state": new["state"]}
        except (Conflict, DefinitionError) as error:
            made["left"] = error.message
        kept = {name: old[name] for name in ("org", "definition", "scheduled_for")}
        yield made | {"retry_of": old["id"]} | kept


def _matching(database: Database, which: Which, org: str | None) -> Iterator[Row]:
    with database.autocommit() as connection:
        org_id = None if org is None else orgs.require(connection, org)["id"]
        until = database.now(connection)
    after: Key | None = None
    while True:
        with database.autocommit() as connection:
            if org_id is None:
                page = retryable.page_for_all_orgs(connection, which, until=until, after=after, limit=PAGE)
            else:
                page = retryable.page(connection, org_id, which, until=until, after=after, limit=PAGE)
        yield from page
        if len(page) < PAGE:
            return
        after = (page[-1]["finished_at"], page[-1]["id"])
