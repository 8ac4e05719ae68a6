"""Applications that this installation makes at providers: what is about to be made is a row first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, delete, insert, select, update

from worker.ids import AllOrgs, OrgId, Scope, new_id
from worker.model.provider import ApplicationName
from worker.store import tables
from worker.store.bulk import rows_among
from worker.store.dialect import Row, above, all_rows, first_row, in_scope

_applications, _orgs, _credentials = tables.applications, tables.orgs, tables.credentials
UNFINISHED = ("making", "made", "announced")
USED = (*UNFINISHED, "active", "overlapping", "retired")


def _with_what_belongs() -> Select[Any]:
    other, newer = _applications.alias("other"), _credentials.alias("newer")
    replaces = (
        select(other.c.client_id)
        .where(other.c.org_id == _applications.c.org_id, other.c.state.in_(("active", "overlapping")))
        .where(other.c.id < _applications.c.id)
        .order_by(other.c.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    replaced_by = (
        select(newer.c.client_id)
        .where(newer.c.org_id == _applications.c.org_id, newer.c.state == "active")
        .where(newer.c.generation > _credentials.c.generation)
        .order_by(newer.c.generation.desc())
        .limit(1)
        .scalar_subquery()
    )
    return (
        select(
            _applications,
            _orgs.c.code.label("org"),
            _orgs.c.state.label("org_state"),
            _credentials.c.generation,
            _credentials.c.state.label("credential_state"),
            _credentials.c.retired_at,
            _credentials.c.last_used_at,
            replaces.label("replaces"),
            replaced_by.label("replaced_by"),
        )
        .join(_orgs, _orgs.c.id == _applications.c.org_id)
        .outerjoin(_credentials, _credentials.c.id == _applications.c.credential_id)
    )


_WITH_ORG = _with_what_belongs()


def add(
    connection: Connection,
    orgs: Sequence[tuple[OrgId, str]],
    *,
    issuer: str,
    installation: str,
    actor: str,
    at: datetime,
) -> list[str]:
    """Insert a row in state `making` for each org (id and code); returns their ids in the same order."""
    rows = [
        {
            "id": (row_id := new_id()),
            "org_id": org_id,
            "issuer": issuer,
            "name": str(ApplicationName(installation, row_id, code)),
            "state": "making",
            "created_at": at,
            "created_by": actor,
            "updated_at": at,
        }
        for org_id, code in orgs
    ]
    if rows:
        connection.execute(insert(_applications), rows)
    return [str(row["id"]) for row in rows]


def find(connection: Connection, row_id: str, *, lock: bool = False) -> Row | None:
    """One row, with what belongs to it.

    The org's code is `org`, its state `org_state`. The `generation` of its credential, and that one's
    `credential_state`, `retired_at`, `last_used_at`. `replaces` is the client of the org's application
    that was in use before it, `replaced_by` that of the org's newest active credential, if that is newer.
    """
    query = _WITH_ORG.where(_applications.c.id == row_id)
    return first_row(connection, query.with_for_update(of=_applications) if lock else query)


def by_name(connection: Connection, name: str) -> Row | None:
    """The row of an application of that name."""
    return first_row(connection, _WITH_ORG.where(_applications.c.name == name))


def in_states(
    connection: Connection,
    scope: Scope,
    issuer: str,
    states: Sequence[str],
    *,
    after: str = "",
    limit: int = 500,
) -> list[Row]:
    """A page of the rows in these states, as `find`, by id after `after`."""
    query = _WITH_ORG.where(_applications.c.issuer == issuer, _applications.c.state.in_(states))
    query = query.where(*in_scope(_applications.c.org_id, scope), *above(_applications.c.id, after or None))
    return all_rows(connection, query.order_by(_applications.c.id).limit(limit))


def of_orgs(connection: Connection, org_ids: Sequence[OrgId], states: Sequence[str]) -> list[Row]:
    """The rows of these orgs in these states, oldest first."""
    query = _WITH_ORG.where(_applications.c.state.in_(states)).order_by(_applications.c.id)
    return [row._asdict() for row in rows_among(connection, query, _applications.c.org_id, org_ids)]


def known_ids(connection: Connection, issuer: str, application_ids: Sequence[str]) -> set[str]:
    """Those of the provider's ids that a row has which is not deleted."""
    its = _applications.c.application_id
    query = select(its).where(_applications.c.issuer == issuer, _applications.c.state != "deleted")
    return {id_ for (id_,) in rows_among(connection, query, its, application_ids)}


def owner_of_client(connection: Connection, issuer: str, client_id: str, *, but: OrgId) -> str | None:
    """The code of another org of the issuer that has a credential of this client, or None."""
    query = (
        select(_orgs.c.code)
        .join(_credentials, _credentials.c.org_id == _orgs.c.id)
        .where(_orgs.c.issuer == issuer, _orgs.c.id != but, _credentials.c.client_id == client_id)
        .where(_credentials.c.state != "retired")
    )
    return connection.execute(query.limit(1)).scalar_one_or_none()


def change(connection: Connection, row_id: str, values: Mapping[str, Any], *, at: datetime) -> None:
    """Change columns of one row; a new state sets `updated_at`, and a row that goes on has no error."""
    if "state" in values:
        values = {"last_error": None, "not_before": None, **values, "updated_at": at}
    connection.execute(update(_applications).where(_applications.c.id == row_id).values(**values))


def orgs_without_credential(
    connection: Connection, issuer: str, *, org: str | None = None, after: str = "", limit: int = 500
) -> list[Row]:
    """A page of active orgs without a working credential, by code: id and code.

    A credential works if it is active and its last use was not rejected; no token is requested to find out.
    """
    works = (
        select(_credentials.c.id)
        .where(_credentials.c.org_id == _orgs.c.id, _credentials.c.state == "active")
        .where(_credentials.c.last_error.is_(None))
        .exists()
    )
    query = select(_orgs.c.id, _orgs.c.code).where(
        _orgs.c.issuer == issuer, _orgs.c.state.in_(("active", "paused")), ~works
    )
    if org is not None:
        query = query.where(_orgs.c.code == org)
    return all_rows(connection, query.where(_orgs.c.code > after).order_by(_orgs.c.code).limit(limit))


def rotatable(
    connection: Connection,
    issuer: str,
    *,
    before: datetime,
    org_ids: Sequence[OrgId] | None = None,
    after: str = "",
    limit: int = 500,
) -> list[Row]:
    """A page of the newest active credentials that were made before that time, oldest first.

    Of orgs that may run something. `id` is the credential's, to continue after; `application_id` that of the
    row of its application, null if a person added it. `begun` if the org has an application that is not in
    use yet.
    """
    newer, unfinished = _credentials.alias("newer"), _applications.alias("unfinished")
    is_newest = (
        ~select(newer.c.id)
        .where(newer.c.org_id == _credentials.c.org_id, newer.c.state == "active")
        .where(newer.c.generation > _credentials.c.generation)
        .exists()
    )
    begun = (
        select(unfinished.c.id)
        .where(unfinished.c.org_id == _credentials.c.org_id, unfinished.c.state.in_(UNFINISHED))
        .exists()
    )
    query = (
        select(
            _credentials.c.id,
            _credentials.c.org_id,
            _orgs.c.code.label("org"),
            _credentials.c.client_id,
            _credentials.c.created_at,
            _applications.c.id.label("application_id"),
            begun.label("begun"),
        )
        .join(_orgs, _orgs.c.id == _credentials.c.org_id)
        .outerjoin(
            _applications,
            (_applications.c.org_id == _credentials.c.org_id)
            & (_applications.c.credential_id == _credentials.c.id)
            & _applications.c.state.in_(("active", "overlapping")),
        )
        .where(_credentials.c.state == "active", _credentials.c.created_at <= before, is_newest)
        .where(_orgs.c.issuer == issuer, _orgs.c.state.in_(("active", "paused")))
    )
    if org_ids is not None:
        query = query.where(_credentials.c.org_id.in_(org_ids))
    query = query.where(*above(_credentials.c.id, after or None))
    return all_rows(connection, query.order_by(_credentials.c.id).limit(limit))


def has_running(connection: Connection, org_id: OrgId, before: datetime) -> bool:
    """Whether a run of the org is running that began before that time."""
    live = tables.live_runs
    query = select(live.c.id).where(live.c.org_id == org_id, live.c.state == "running")
    return connection.execute(query.where(live.c.started_at < before).limit(1)).first() is not None


def forget(connection: Connection, _: AllOrgs, *, at: datetime) -> int:
    """Delete all rows, and retire the credentials that were to be used next; returns how many rows."""
    pending = select(_applications.c.credential_id).where(_applications.c.state.in_(UNFINISHED))
    connection.execute(
        update(_credentials)
        .where(_credentials.c.id.in_(pending), _credentials.c.state == "pending")
        .values(state="retired", retired_at=at)
    )
    return connection.execute(delete(_applications)).rowcount
