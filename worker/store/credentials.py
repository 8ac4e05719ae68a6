"""Credentials of orgs, by generation; secrets stay sealed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, func, insert, or_, select, update

from worker.ids import OrgId
from worker.store import access_tokens, tables
from worker.store.bulk import among, insert_many
from worker.store.dialect import Row, chunks, driver, first_row, is_postgresql
from worker.store.edit_runs import in_order
from worker.store.sql.postgresql.arrays import plain, texts, words

_credentials = tables.credentials

# `(SELECT …)` hides the length of an array, so that each row is looked up, in the order of ids.
USED = """
UPDATE credentials c SET last_used_at = %s, uses = c.uses + u.times, last_error = u.error
FROM unnest((SELECT %s::uuid[]), (SELECT %s::uuid[]), (SELECT %s::integer[]), (SELECT %s::text[]))
  AS u(id, org_id, times, error)
WHERE c.id = u.id AND c.org_id = u.org_id
"""

ACTIVE_IDS = """
SELECT c.org_id, c.id FROM unnest((SELECT %s::uuid[])) AS w(org_id)
CROSS JOIN LATERAL (
  SELECT c.org_id, c.id FROM credentials c WHERE c.org_id = w.org_id AND c.state = 'active'
  ORDER BY c.generation DESC) c
"""


def add(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert credentials with a sealed secret or a reference to one.

    Runs that wait for a token try again at once, since the last secret may have been wrong.
    """
    if not rows:
        return
    insert_many(connection, _credentials, rows)
    try_again(connection, {row["org_id"] for row in rows}, at=rows[0]["created_at"])


def insert_pending(connection: Connection, row: Mapping[str, Any]) -> None:
    """Insert a credential that workers do not use yet."""
    connection.execute(insert(_credentials), {**row, "state": "pending"})


def activate(connection: Connection, org_id: OrgId, credential_id: str, *, at: datetime) -> bool:
    """Let workers use a pending credential from now on; False if it is not pending."""
    activated = connection.execute(
        update(_credentials)
        .where(_credentials.c.org_id == org_id, _credentials.c.id == credential_id)
        .where(_credentials.c.state == "pending")
        .values(state="active")
    )
    try_again(connection, {org_id}, at=at)
    return activated.rowcount == 1


def try_again(connection: Connection, org_ids: Iterable[OrgId], *, at: datetime) -> None:
    """Let runs of these orgs that wait for a token try again now."""
    live = tables.live_runs
    for part in chunks(sorted(set(org_ids))):
        waiting = (
            among(connection, live.c.org_id, part),
            live.c.state == "waiting",
            live.c.reason == "no_token",
            live.c.available_at > at,
        )
        connection.execute(update(live).where(in_order(*waiting)).values(available_at=at))


def last_generations(connection: Connection, org_ids: Sequence[OrgId]) -> Counter[OrgId]:
    """The newest generation of each of these orgs, 0 of one that never had a credential."""
    newest = select(_credentials.c.org_id, func.max(_credentials.c.generation))
    found = newest.where(among(connection, _credentials.c.org_id, org_ids)).group_by(_credentials.c.org_id)
    return Counter({org_id: generation for org_id, generation in connection.execute(found)})


def active(connection: Connection, org_id: OrgId) -> list[Row]:
    """The org's active credentials, newest first, with the sealed secret and the org's code as `org`."""
    return active_of(connection, [org_id]).get(org_id, [])


def active_of(connection: Connection, org_ids: Sequence[OrgId]) -> dict[OrgId, list[Row]]:
    """As `active`, by org; orgs without credentials are left out."""
    query = (
        select(_credentials, tables.orgs.c.code.label("org"))
        .join(tables.orgs, tables.orgs.c.id == _credentials.c.org_id)
        .where(among(connection, _credentials.c.org_id, org_ids), _credentials.c.state == "active")
        .order_by(_credentials.c.generation.desc())
    )
    found: dict[OrgId, list[Row]] = {}
    for row in connection.execute(query).mappings().all():
        found.setdefault(row["org_id"], []).append(dict(row))
    return found


def active_ids(connection: Connection, org_ids: Sequence[OrgId]) -> dict[OrgId, list[str]]:
    """The ids of the active credentials of these orgs, newest first."""
    if is_postgresql(connection):
        # Nearly every run needs this: by SQLAlchemy it takes twice as long.
        rows = driver(connection).execute(ACTIVE_IDS, (words(org_ids),)).fetchall()
    else:
        query = (
            select(_credentials.c.org_id, _credentials.c.id)
            .where(_credentials.c.org_id.in_(org_ids), _credentials.c.state == "active")
            .order_by(_credentials.c.generation.desc())
        )
        rows = connection.execute(query).all()
    found: dict[OrgId, list[str]] = {}
    for org_id, credential_id in rows:
        found.setdefault(org_id, []).append(credential_id)
    return found


def has_generation(connection: Connection, org_id: OrgId, generation: int) -> bool:
    """Whether the org ever had a credential of this generation."""
    query = select(_credentials.c.id).where(
        _credentials.c.org_id == org_id, _credentials.c.generation == generation
    )
    return connection.execute(query).first() is not None


def by_id(connection: Connection, org_id: OrgId, credential_id: str) -> Row | None:
    """One of the org's credentials."""
    query = select(_credentials).where(_credentials.c.org_id == org_id, _credentials.c.id == credential_id)
    return first_row(connection, query)


def retire(connection: Connection, org_id: OrgId, generation: int, *, at: datetime) -> bool:
    """Retire one generation, keep its secret and delete its tokens; False if nothing was to retire."""
    retired = connection.execute(
        update(_credentials)
        .where(
            _credentials.c.org_id == org_id,
            _credentials.c.generation == generation,
            _credentials.c.state != "retired",
        )
        .values(state="retired", retired_at=at)
        .returning(_credentials.c.id)
    ).scalar()
    if retired is None:
        return False
    access_tokens.drop_of_org(connection, org_id, retired)
    return True


def destroy_one(connection: Connection, org_id: OrgId, generation: int) -> bool:
    """Delete the secret of one generation; False if it has none."""
    has_secret = or_(_credentials.c.sealed.is_not(None), _credentials.c.reference.is_not(None))
    destroyed = connection.execute(
        update(_credentials)
        .where(_credentials.c.org_id == org_id, _credentials.c.generation == generation, has_secret)
        .values(sealed=None, reference=None, key_id=None)
    )
    return destroyed.rowcount == 1


def destroy(connection: Connection, org_id: OrgId, *, at: datetime) -> int:
    """Retire all credentials of an org, delete their secrets and its tokens; returns how many secrets."""
    access_tokens.drop_of_org(connection, org_id)
    mine = _credentials.c.org_id == org_id
    connection.execute(
        update(_credentials)
        .where(mine, _credentials.c.state != "retired")
        .values(state="retired", retired_at=at)
    )
    destroyed = connection.execute(
        update(_credentials).where(mine).values(sealed=None, reference=None, key_id=None)
    )
    return destroyed.rowcount


class Use(NamedTuple):
    """One use of a credential; `error` is the issuer's code, or None."""

    credential_id: str
    org_id: OrgId
    error: str | None


def used(connection: Connection, uses: Sequence[Use], *, at: datetime) -> None:
    """Count uses of credentials; of several the last error is kept."""
    times = Counter(use.credential_id for use in uses)
    last = {use.credential_id: use for use in uses}
    ids = sorted(last)
    if is_postgresql(connection):
        columns = plain(ids), plain(last[id_].org_id for id_ in ids), plain(times[id_] for id_ in ids)
        driver(connection).execute(USED, (at, *columns, texts(last[id_].error for id_ in ids)))
        return
    statement = (
        update(_credentials)
        .where(_credentials.c.org_id == bindparam("of"), _credentials.c.id == bindparam("used"))
        .values(last_used_at=at, uses=_credentials.c.uses + bindparam("times"), last_error=bindparam("error"))
    )
    if ids:
        connection.execute(
            statement,
            [
                {"of": last[id_].org_id, "used": id_, "times": times[id_], "error": last[id_].error}
                for id_ in ids
            ],
        )
