"""Pages of a run's log from its end, by key: the newest lines, or those before one."""

from __future__ import annotations

from typing import cast

from sqlalchemy import Connection, select, tuple_

from worker.ids import AllOrgs, OrgScope, RunId
from worker.store import orgs, tables
from worker.store.dialect import all_rows
from worker.store.lists import LogLine, columns_of

_logs = tables.run_logs


def newest_lines(
    connection: Connection,
    org: OrgScope,
    run_id: RunId,
    *,
    before: tuple[int, int] | None = None,
    limit: int,
) -> list[LogLine]:
    """The last `limit` lines of a run, or the last ones before (attempt, seq); oldest first.

    Raises:
        NotFound: there is no such org.
    """
    scope = orgs.scope_of(connection, org)
    query = select(*(_logs.c[name] for name in columns_of(LogLine))).where(_logs.c.run_id == run_id)
    if not isinstance(scope, AllOrgs):
        query = query.where(_logs.c.org_id == scope)
    if before is not None:
        query = query.where(tuple_(_logs.c.attempt, _logs.c.seq) < tuple_(*before))
    query = query.order_by(_logs.c.attempt.desc(), _logs.c.seq.desc()).limit(limit)
    return cast(list[LogLine], all_rows(connection, query)[::-1])
