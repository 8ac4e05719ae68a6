"""The orgs: looked up by code, changed by operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, delete, exists, select, text, update

from worker.errors import NotFound
from worker.ids import AllOrgs, OrgId, OrgScope, Scope
from worker.model.search import words_of
from worker.store import tables
from worker.store.bulk import insert_many, rows_among
from worker.store.dialect import Row, above, all_rows, first_row, is_postgresql

_orgs = tables.orgs
_credentials = tables.credentials
_words = tables.org_words
# Orgs in one page of `without_words`.
FILLED = 500
_FIND_CALLER = text("SELECT id, issuer, state, is_credential FROM find_caller(:code, :client_id)")


def find(connection: Connection, code: str, *, lock: bool = False) -> Row | None:
    """The org of that code; `lock` keeps other changes out until the transaction ends."""
    query = select(_orgs).where(_orgs.c.code == code)
    return first_row(connection, query.with_for_update() if lock else query)


class Scheduling(NamedTuple):
    """What schedules and runs of an org depend on."""

    state: str
    timezone: str | None
    pool: str | None


def scheduling_of(connection: Connection, org_ids: Iterable[OrgId]) -> dict[OrgId, Scheduling]:
    """The state, time zone and pool of these orgs."""
    query = select(_orgs.c.id, _orgs.c.state, _orgs.c.timezone, _orgs.c.pool)
    return {id_: Scheduling(*rest) for id_, *rest in rows_among(connection, query, _orgs.c.id, org_ids)}


class OrgCaller(NamedTuple):
    """The org whose token a web request shows."""

    id: OrgId
    issuer: str
    state: str
    is_credential: bool
    """Whether the token's client is one of the org's active credentials."""


def find_caller(connection: Connection, code: str, client_id: str) -> OrgCaller | None:
    """The org of that code, and whether the client is one of its active credentials; None if unknown.

    The only lookup before the caller of a request is known. On PostgreSQL a function of the
    tables' owner does it, because the role of the request sees no org.
    """
    if is_postgresql(connection):
        found = connection.execute(_FIND_CALLER, {"code": code, "client_id": client_id}).first()
        return None if found is None else OrgCaller(OrgId(str(found[0])), *found[1:])
    is_credential = exists().where(
        _credentials.c.org_id == _orgs.c.id,
        _credentials.c.client_id == client_id,
        _credentials.c.client_id != "",
        _credentials.c.state == "active",
    )
    query = select(_orgs.c.id, _orgs.c.issuer, _orgs.c.state, is_credential).where(_orgs.c.code == code)
    row = connection.execute(query).first()
    return None if row is None else OrgCaller(row[0], row[1], row[2], bool(row[3]))


def require(connection: Connection, code: str, *, lock: bool = False) -> Row:
    """As `find`.

    Raises:
        NotFound: there is no such org.
    """
    org = find(connection, code, lock=lock)
    if org is None:
        raise NotFound(
            f"there is no org {code}",
            fix="`orgs list` lists the orgs, `orgs add` makes one",
            sought=("org", code, None),
        )
    return org


def lock(connection: Connection, org_id: OrgId) -> None:
    """Keep other changes of an org out until the transaction ends."""
    connection.execute(select(_orgs.c.id).where(_orgs.c.id == org_id).with_for_update())


def scope_of(connection: Connection, org: OrgScope) -> Scope:
    """The id of the org whose rows a list shows; raises as `require`."""
    return org if isinstance(org, AllOrgs) else OrgId(require(connection, org)["id"])


def by_code(connection: Connection, codes: Iterable[str], *, lock: bool = False) -> dict[str, Row]:
    """The existing orgs of these codes, by code; locked in the order of codes."""
    query = select(_orgs).order_by(_orgs.c.code)
    query = query.with_for_update() if lock else query
    return {row.code: row._asdict() for row in rows_among(connection, query, _orgs.c.code, codes)}


def of_issuer(connection: Connection, _: AllOrgs, issuer: str) -> list[Row]:
    """All orgs of an issuer, in any state."""
    return all_rows(connection, select(_orgs).where(_orgs.c.issuer == issuer).order_by(_orgs.c.code))


def active(connection: Connection, _: AllOrgs, *, after: str | None = None, limit: int = 500) -> list[Row]:
    """Active and paused orgs by code, those after `after`."""
    names = ("id", "code", "issuer", "timezone", "state", "max_concurrent_runs", "pool")
    query = select(*(_orgs.c[name] for name in names)).where(_orgs.c.state.in_(("active", "paused")))
    query = query.where(*above(_orgs.c.code, after)).order_by(_orgs.c.code).limit(limit)
    return all_rows(connection, query)


def add(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert new orgs; each row has every column except those of `state`."""
    insert_many(connection, _orgs, rows)
    insert_many(connection, _words, _words_of(rows))


def without_words(connection: Connection, _: AllOrgs, after: OrgId | None = None) -> Sequence[OrgId]:
    """Up to `FILLED` orgs after `after` that the search does not find by a word.

    Workers of an older release add and rename orgs without their words.
    """
    has_words = exists().where(_words.c.org_id == _orgs.c.id)
    query = select(_orgs.c.id).where(~has_words, *above(_orgs.c.id, after))
    return connection.execute(query.order_by(_orgs.c.id).limit(FILLED)).scalars().all()


def add_words(connection: Connection, org_ids: Sequence[OrgId]) -> None:
    """Add the words of these orgs; another worker may have added them meanwhile."""
    query = select(_orgs.c.id, _orgs.c.code, _orgs.c.name).where(_orgs.c.id.in_(org_ids))
    # Locked, so that a rename waits until its words are there.
    rows = all_rows(connection, query.order_by(_orgs.c.id).with_for_update())
    insert_many(connection, _words, _words_of(rows), key=("word", "org_id"))


def _words_of(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of `org_words` of orgs; a code of accents alone has none."""
    return [
        {"word": word, "org_id": row["id"]}
        for row in rows
        for word in sorted(words_of(row["code"], row["name"]))
    ]


def change(connection: Connection, org_id: OrgId, values: Mapping[str, Any], *, at: datetime) -> None:
    """Change columns of one org; changed tags or issuer make all templates apply again."""
    if values.keys() & {"tags", "issuer"}:
        values = {**values, "templates_seen": 0}
    connection.execute(update(_orgs).where(_orgs.c.id == org_id).values(**values, updated_at=at))
    if "name" in values:
        code = connection.execute(select(_orgs.c.code).where(_orgs.c.id == org_id)).scalar_one()
        connection.execute(delete(_words).where(_words.c.org_id == org_id))
        words = _words_of([{"id": org_id, "code": code, "name": values["name"]}])
        insert_many(connection, _words, words, key=("word", "org_id"))


def set_state(
    connection: Connection, org_id: OrgId, state: str, *, by: str, at: datetime, note: str | None
) -> None:
    """Set the org's state, with who, when and why; all templates apply again to one that becomes active."""
    values = {"state": state, "state_by": by, "state_at": at, "state_note": note}
    if state == "active":
        values["templates_seen"] = 0
    change(connection, org_id, values, at=at)
