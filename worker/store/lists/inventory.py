"""Credentials by risk, and the runs of each worker."""

from __future__ import annotations

from sqlalchemy import Connection, func, literal_column, select

from worker.ids import OrgScope, Scope, WorkerId
from worker.store import orgs, tables
from worker.store.dialect import above, all_rows, in_scope, rows_as
from worker.store.lists import checked_id
from worker.store.lists.redaction import Shown
from worker.store.lists.rows import CredentialRow

# Running runs that are counted.
MAX_COUNTED = 10_000

_credentials, _orgs, _live = tables.credentials, tables.orgs, tables.live_runs


class CredentialWithOrg(CredentialRow):
    """A credential with its org's name and state."""

    org_name: Shown[str]
    org_state: Shown[str]


def credentials(
    connection: Connection, org: OrgScope, risk: str, *, after: str | None, limit: int
) -> list[CredentialWithOrg]:
    """Active credentials by risk, those that the issuer rejected (`dead`), or `all`, oldest first.

    `old` leaves out the rejected ones. `after` is the id of the last row of the page before.

    Raises:
        NotFound: no such org, or `after` is not an id.
    """
    names = [column for column in CredentialRow.__annotations__ if column != "org"]
    is_active = _credentials.c.state == literal_column("'active'")
    # By the org's key: as a join, PostgreSQL would read all orgs.
    code, name, state = (
        select(_orgs.c[column]).where(_orgs.c.id == _credentials.c.org_id).limit(1).scalar_subquery()
        for column in ("code", "name", "state")
    )
    query = select(
        code.label("org"),
        *(_credentials.c[column] for column in names),
        name.label("org_name"),
        state.label("org_state"),
    ).where(is_active)
    if risk == "dead":
        query = query.where(_credentials.c.last_error.is_not(None))
    elif risk == "old":
        query = query.where(_credentials.c.last_error.is_(None))
    query = query.where(*in_scope(_credentials.c.org_id, orgs.scope_of(connection, org)))
    query = query.where(*above(_credentials.c.id, after and checked_id(after)))
    return rows_as(CredentialWithOrg, connection, query.order_by(_credentials.c.id).limit(limit))


def running_by_worker(connection: Connection, scope: Scope) -> dict[WorkerId, int]:
    """The number of running runs of each worker, up to MAX_COUNTED in all."""
    mine = (_live.c.state == "running", *in_scope(_live.c.org_id, scope))
    some = select(_live.c.worker_id).where(*mine).limit(MAX_COUNTED).subquery()
    count = func.count()
    query = select(some.c.worker_id, count.label("runs")).group_by(some.c.worker_id).limit(MAX_COUNTED)
    return {row["worker_id"]: row["runs"] for row in all_rows(connection, query)}
