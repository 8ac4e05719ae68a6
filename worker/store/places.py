"""Places: handlers that only hosts offer, as the pool of a run decides which declaration counts.

An org's role may read all of it: nothing here joins `hosts`. Declarations go with their token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from sqlalchemy import ColumnElement, Connection, func, select

from worker.ids import AllOrgs, Scope
from worker.store import catalogue, tables
from worker.store.definitions import in_force, newest_open, reveals_token
from worker.store.dialect import Row, all_rows, chunks

_handlers, _orgs, _approvals = tables.host_handlers, tables.orgs, tables.pool_approvals
_catalogue = tables.catalogue
_revisions = tables.definition_revisions
# Declarations of one handler in one pool that are looked at, the newest.
DECLARATIONS = 20
# Broken handlers that are counted.
BROKEN = 100
# Pools that a message names.
NAMED = 5
# Names of one pool that a misspelt one is compared with, and orgs that are read at a time.
NAMES = 500
PAGE = 1_000
# Definitions with a revealed token that are counted.
REVEALING = 100
# More approvals, and handlers, than any installation has.
MAX_ROWS = 10_000


def declared_in(connection: Connection, name: str, pool: str) -> list[Row]:
    """What hosts of a pool declare of a handler, the newest first; with schemas, broken ones too."""
    mine = (_handlers.c.name == name, _handlers.c.pool == pool)
    order = (_handlers.c.seen_at.desc(), _handlers.c.host_id, _handlers.c.distribution)
    return all_rows(connection, select(_handlers).where(*mine).order_by(*order).limit(DECLARATIONS))


def pools_with(connection: Connection, name: str) -> list[str]:
    """The first pools by name whose hosts offer a handler."""
    usable = (_handlers.c.name == name, _handlers.c.error.is_(None))
    query = select(_handlers.c.pool).where(*usable).distinct().order_by(_handlers.c.pool)
    return list(connection.execute(query.limit(NAMED)).scalars())


def names_in(connection: Connection, pool: str) -> list[str]:
    """Handlers that hosts of a pool declare."""
    query = select(_handlers.c.name).where(_handlers.c.pool == pool).distinct().order_by(_handlers.c.name)
    return list(connection.execute(query.limit(NAMES)).scalars())


def broken(connection: Connection) -> list[Row]:
    """Name, pool, distribution, version and error of hosts' handlers that do not load, by name; the first."""
    columns = (_handlers.c[name] for name in ("name", "pool", "distribution", "version", "error"))
    query = select(*columns).where(_handlers.c.error.is_not(None), _handlers.c.name.not_in(catalogue.names()))
    return all_rows(connection, query.order_by(_handlers.c.name, _handlers.c.pool).limit(BROKEN))


def approved_secrets(connection: Connection) -> set[str]:
    """The names of the secrets that an administrator approved for handlers of hosts."""
    query = select(_approvals.c.ceiling).limit(MAX_ROWS)
    return {name for ceiling in connection.execute(query).scalars() for name in ceiling.get("secrets", ())}


def undeclared_egress(connection: Connection) -> tuple[int, list[str]]:
    """How many handlers load, on workers or hosts, and the names of those that declare no egress.

    A handler that workers have is theirs. One that several hosts declare counts if any declares nothing.
    """
    of_workers = select(_catalogue.c.name, _catalogue.c.egress).where(
        catalogue.OF_WORKERS, _catalogue.c.error.is_(None)
    )
    of_hosts = select(_handlers.c.name, _handlers.c.egress).where(
        _handlers.c.error.is_(None), _handlers.c.name.not_in(catalogue.names())
    )
    declared: dict[str, bool] = {}
    for query in (of_workers, of_hosts):
        for name, egress in connection.execute(query.limit(MAX_ROWS)):
            declared[name] = declared.get(name, True) and egress is not None
    return len(declared), sorted(name for name, is_declared in declared.items() if not is_declared)


def revealing(connection: Connection, scope: Scope) -> list[Row]:
    """Org and handler of definitions with `reveal_token`, among the newest open ones; the first of them."""
    return _using(connection, scope, reveals_token())


def batching(connection: Connection, scope: Scope) -> list[Row]:
    """The same of definitions whose model requests go into batches."""
    return _using(connection, scope, _revisions.c.spec["model_requests"].as_string() == "batch")


def _using(connection: Connection, scope: Scope, key: ColumnElement[bool]) -> list[Row]:
    newest = newest_open(scope)
    query = (
        select(_orgs.c.code.label("org"), _revisions.c.spec["handler"].as_string().label("handler"))
        .select_from(newest)
        .join(_orgs, _orgs.c.id == newest.c.org_id)
        .join(_revisions, in_force(newest))
        .where(_orgs.c.state != "removed", key)
        .order_by(newest.c.id.desc())
    )
    return all_rows(connection, query.limit(REVEALING))


def orgs(connection: Connection, _: AllOrgs) -> Iterator[Row]:
    """Code, issuer, tags and pool of every org that is not removed."""
    columns = (_orgs.c[name] for name in ("code", "issuer", "tags", "pool"))
    query = select(*columns).where(_orgs.c.state != "removed").order_by(_orgs.c.code).limit(PAGE)
    rows = all_rows(connection, query)
    while rows:
        yield from rows
        rows = all_rows(connection, query.where(_orgs.c.code > rows[-1]["code"])) if len(rows) == PAGE else []


def uses(connection: Connection, scope: Scope, handlers: Collection[str]) -> list[Row]:
    """Open definitions of these handlers of hosts: org, name, handler, spec, `template_id` and pool, if any.

    The newest first, among the newest definitions.
    """
    handler, pool = (_revisions.c.spec[key].as_string() for key in ("handler", "pool"))
    place = func.coalesce(func.nullif(pool, ""), _orgs.c.pool).label("pool")
    newest = newest_open(scope)
    own = (newest.c.name, newest.c.template_id, handler.label("handler"), _revisions.c.spec)
    query = (
        select(_orgs.c.code.label("org"), place, *own)
        .select_from(newest)
        .join(_orgs, _orgs.c.id == newest.c.org_id)
        .join(_revisions, in_force(newest))
        .where(_orgs.c.state != "removed")
        .order_by(newest.c.id.desc())
    )
    return [
        row
        for part in chunks(sorted(handlers))
        for row in all_rows(connection, query.where(handler.in_(part)))
    ]


def only_of_hosts(connection: Connection) -> set[str]:
    """The handlers that hosts of any pool offer and no worker has."""
    query = select(_handlers.c.name).where(
        _handlers.c.error.is_(None), _handlers.c.name.not_in(catalogue.names())
    )
    return set(connection.execute(query.distinct().limit(MAX_ROWS)).scalars())
