"""The runs that somebody has just changed, and how they go on."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, func, select

from worker.ids import OrgScope, RunId, lowest_id
from worker.store import orgs, tables
from worker.store.dialect import in_scope
from worker.store.lists.matching import shown_state

# Rows of the audit that are looked through, and runs that are found.
EXAMINED = 5_000
MAX_FOUND = 1_000

_audit, _runs, _live = tables.audit, tables.runs, tables.live_runs


class ChangedRuns(NamedTuple):
    """The states of the runs, newest change first, and the reason that was given for it."""

    states: Mapping[RunId, str]
    reason: str


def changed_runs(
    connection: Connection, scope: OrgScope, *, actor: str, action: str, since: datetime
) -> ChangedRuns:
    """The newest runs that the audit says were changed since then; of a retry, the new runs.

    Raises:
        NotFound: there is no org of the scope.
    """
    org_id = orgs.scope_of(connection, scope)
    newest = select(_audit).where(_audit.c.id >= lowest_id(since), *in_scope(_audit.c.org_id, org_id))
    row = newest.order_by(_audit.c.id.desc()).limit(EXAMINED).subquery("newest").c
    found = connection.execute(
        select(row.subject, row.detail)
        .where(row.actor == actor, row.action == action, row.at >= since)
        .order_by(row.id.desc())
        .limit(MAX_FOUND)
    ).all()
    ids = [RunId(subject) for subject, _ in found]
    state = func.coalesce(_runs.c.state, shown_state(_live.c.state))
    each = select(_runs.c.id, state).outerjoin(_live, _live.c.id == _runs.c.id).where(_runs.c.id.in_(ids))
    each = each.where(*in_scope(_runs.c.org_id, org_id))
    states = {RunId(row[0]): str(row[1]) for row in connection.execute(each.limit(MAX_FOUND))}
    reason = (found[0][1] or {}).get("reason", "") if found else ""
    return ChangedRuns({id_: states[id_] for id_ in ids if id_ in states}, reason)
