"""Reading for a caller: an org's own token sees its rows only, by PostgreSQL's own rules as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection

from worker.ids import OrgId
from worker.store.database import Database
from worker.web.access import Caller

T = TypeVar("T")


async def read_for(database: Database, caller: Caller, work: Callable[[Connection], T]) -> T:
    """Run `work` in a thread of the database, on rows that this caller may see.

    For an org on PostgreSQL under row-level security: a query that forgot its org finds
    nothing. Elsewhere without a transaction, which on SQLite would hold up the writers.
    """
    if caller.org_id is None or database.dialect == "sqlite":
        return await database.call_autocommit(work)
    return await database.run(_as_org, database, caller.org_id, work)


def _as_org(database: Database, org_id: OrgId, work: Callable[[Connection], T]) -> T:
    with database.as_org(org_id) as connection:
        return work(connection)
