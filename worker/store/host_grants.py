"""What incarnations of hosts may do with the handlers that they declare, and what waits for an approval.

An incarnation is offered a handler if what it declares is within the ceiling of its pool, or if the
definition of a run that is due sets all that goes beyond it (`handlers/ceiling.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, or_, select, tuple_, update

from worker.handlers.catalogue import HandlerEntry
from worker.handlers.ceiling import KEYS, Ceiling, Grant, Offered, allowed, digest, excess
from worker.ids import DefinitionId, RunId, WorkerId
from worker.model.definitions.units import format_duration
from worker.model.runs.outcome import NOT_APPROVED_WAIT
from worker.store import catalogue, host_handlers, tables
from worker.store.bulk import rows_among
from worker.store.dialect import Row, all_rows, chunks, database_now, first_row, hint, upsert
from worker.store.health import holds_lease
from worker.store.host_handlers import MAX_ROWS

_handlers, _workers, _approvals = tables.host_handlers, tables.workers, tables.pool_approvals
_live, _revisions = tables.live_runs, tables.definition_revisions
_hosts = tables.hosts
_REPLACED = ("digest", "ceiling", "approved_at", "approved_by")
# Runs that an approval lets start at once; others wait a little longer.
WOKEN = 10_000
# Definitions of due runs that one look reads, and runs that it marks.
LOOKED_AT = 200
MARKED = 500


@dataclass(frozen=True, slots=True)
class IncarnationRow:
    """A row of `workers`; `offers` is None for a worker, and for a host that registered at an older one."""

    id: WorkerId
    host_id: str | None
    pools: Sequence[str]
    handlers: Sequence[str]
    offers: Mapping[str, Any] | None


_INCARNATION = tuple(_workers.c[name] for name in ("id", "host_id", "pools", "handlers", "offers"))


def incarnation(connection: Connection, worker_id: WorkerId) -> IncarnationRow | None:
    """One incarnation, alive or not."""
    row = connection.execute(select(*_INCARNATION).where(_workers.c.id == worker_id)).first()
    return None if row is None else IncarnationRow(*row)


def live_incarnations(connection: Connection) -> list[IncarnationRow]:
    """The workers and hosts that hold their lease."""
    query = select(*_INCARNATION).where(holds_lease(database_now(connection)))
    rows = connection.execute(query.order_by(_workers.c.id).limit(MAX_ROWS))
    return [IncarnationRow(*row) for row in rows]


def declarations(
    connection: Connection, incarnations: Sequence[IncarnationRow]
) -> dict[WorkerId, dict[str, HandlerEntry]]:
    """What each of these incarnations of hosts declares, by handler, without schemas."""
    older = [one for one in incarnations if one.offers is None]
    stored: dict[str, dict[str, HandlerEntry]] = {}
    elsewhere: dict[str, HandlerEntry] = {}
    if older:
        columns = (_handlers.c.host_id, *(_handlers.c[name] for name in catalogue.DECLARED))
        query = select(*columns).where(_handlers.c.error.is_(None)).order_by(_handlers.c.seen_at)
        hosts = {one.host_id for one in older if one.host_id is not None}
        for row in rows_among(connection, query, _handlers.c.host_id, hosts):
            stored.setdefault(row.host_id, {})[row.name] = catalogue.entry_of(row._asdict())
        names = sorted({name for one in older for name in one.handlers})
        elsewhere = catalogue.reported_to_older(connection, names)
    found: dict[WorkerId, dict[str, HandlerEntry]] = {}
    for one in incarnations:
        if one.offers is not None:
            offers = one.offers.items()
            found[one.id] = {name: catalogue.entry_of({**row, "name": name}) for name, row in offers}
            continue
        own = stored.get(one.host_id or "", {})
        found[one.id] = {
            name: own.get(name) or elsewhere.get(name) or HandlerEntry(name, "", "", "")
            for name in one.handlers
        }
    return found


def grants(
    connection: Connection, incarnations: Sequence[IncarnationRow]
) -> dict[WorkerId, dict[str, Grant]]:
    """What each of these incarnations of hosts may do with the handlers that it declares."""
    declared = declarations(connection, incarnations)
    names = {name for handlers in declared.values() for name in handlers}
    of_workers = catalogue.of_workers(connection, names)
    approved = approved_in(connection, {pool for one in incarnations for pool in one.pools})
    found: dict[WorkerId, dict[str, Grant]] = {}
    for one in incarnations:
        pool = one.pools[0] if one.pools else ""
        found[one.id] = {
            name: Grant.of(
                pool,
                entry,
                workers_entry(of_workers.get(name, ()), entry.distribution),
                approved.get((pool, name)),
            )
            for name, entry in declared[one.id].items()
        }
    return found


def workers_entry(rows: Sequence[HandlerEntry], distribution: str) -> HandlerEntry | None:
    """The workers' declaration that a host's is compared with: of the same plug-in, else the newest."""
    usable = [entry for entry in rows if entry.error is None]
    same = [entry for entry in usable if entry.distribution == distribution]
    known = same or usable
    return known[-1] if known else None


def approved_in(connection: Connection, pools: Collection[str]) -> dict[tuple[str, str], Ceiling]:
    """The approved ceilings of these pools, by pool and handler."""
    query = select(_approvals.c.pool, _approvals.c.handler, _approvals.c.ceiling)
    rows = connection.execute(query.where(_approvals.c.pool.in_(sorted(pools))))
    return {(pool, handler): Ceiling.from_json(ceiling) for pool, handler, ceiling in rows}


def offered(connection: Connection, worker_id: WorkerId) -> Offered:
    """What an incarnation of a host may do; what needs a look at due runs is in `Offered.conditional`."""
    one = incarnation(connection, worker_id)
    if one is None or one.host_id is None:
        return Offered("", {})
    return Offered(one.pools[0] if one.pools else "", grants(connection, [one])[one.id])


# Who may run what


@dataclass(frozen=True, slots=True)
class Serving:
    """A live worker or host: the handlers that it may run for all, and those of a host with their grants."""

    pools: frozenset[str]
    names: frozenset[str]
    grants: Mapping[str, Grant] = field(default_factory=dict)

    def obstacle(self, handlers: Sequence[str], own: Mapping[str, Any]) -> str | None:
        """What keeps a run of these handlers from starting here; None if nothing does.

        The first is its definition's, the others are variants; `own` has the values of the definition.
        It is the command that approves a handler, or empty if one is not declared here.
        """
        command = None
        for place, name in enumerate(handlers):
            if name in self.names:
                continue
            grant = self.grants.get(name)
            if grant is None:
                return ""
            if not grant.may_run(own, is_variant=place > 0):
                command = grant.command
        return command


def serving(connection: Connection) -> list[Serving]:
    """Who serves which pools now, with what each may run."""
    live = live_incarnations(connection)
    hosts = [one for one in live if one.host_id is not None]
    granted = grants(connection, hosts) if hosts else {}
    found = []
    for one in live:
        own = granted.get(one.id, {})
        free = one.handlers if one.host_id is None else [name for name in own if not own[name].beyond]
        found.append(Serving(frozenset(one.pools), frozenset(free), own))
    return found


def obstacle(among: Iterable[Serving], handlers: Sequence[str], own: Mapping[str, Any]) -> str | None:
    """What keeps a run from starting at any of these, as `Serving.obstacle`; a command if there is one."""
    found = ""
    for one in among:
        here = one.obstacle(handlers, own)
        if here is None:
            return None
        found = here or found
    return found


def conditional(among: Iterable[Serving], handlers: Collection[str]) -> bool:
    """Whether it depends on a run's definition if one of these may run it."""
    return any(one.grants[name].beyond for one in among for name in handlers if name in one.grants)


Revision = tuple[DefinitionId, int]


def specs(connection: Connection, wanted: Collection[Revision]) -> dict[Revision, Mapping[str, Any]]:
    """The specs of these revisions."""
    found: dict[Revision, Mapping[str, Any]] = {}
    key = (_revisions.c.definition_id, _revisions.c.revision)
    for part in chunks(sorted(wanted)):
        rows = connection.execute(select(*key, _revisions.c.spec).where(tuple_(*key).in_(part)))
        found |= {(id_, revision): spec for id_, revision, spec in rows}
    return found


def handlers_of(spec: Mapping[str, Any], handler: str) -> tuple[str, ...]:
    """The handlers that a run of this spec may be of, the definition's first."""
    return (handler, *(variant["handler"] for variant in spec.get("variants") or ()))


def look(connection: Connection, offered: Offered, others: Sequence[Serving]) -> frozenset[str]:
    """Of the conditional handlers of an incarnation those that runs of its pool may start with now.

    A handler that one of `others` in the pool may run for all is left to it. Marks due runs that no worker
    or host of the pool may start (`not_approved`), so that they are not admitted. Looks at `LOOKED_AT`
    definitions.
    """
    pool = offered.pool
    in_pool = [one for one in others if pool in one.pools]
    names = {name for name in offered.conditional if not any(name in one.names for one in in_pool)}
    if not names:
        return frozenset()
    now = database_now(connection)
    due = (
        _live.c.state.not_in(("running", "held", "parked")),
        _live.c.pool == pool,
        _live.c.available_at <= now,
    )
    either = or_(_live.c.handler.in_(sorted(names)), _live.c.variant_handlers.is_not(None))
    columns = (_live.c.definition_id, _live.c.revision, _live.c.handler)
    rows = connection.execute(select(*columns).where(*due, either).distinct().limit(LOOKED_AT)).all()
    found = specs(connection, [(row.definition_id, row.revision) for row in rows])
    mine = Serving(frozenset([pool]), frozenset(offered.free), offered.grants)
    admitted: set[str] = set()
    wrong: dict[str, list[Revision]] = {}
    for row in rows:
        key = (row.definition_id, row.revision)
        own = found.get(key, {})
        handlers = handlers_of(own, row.handler)
        if not names.intersection(handlers):
            continue
        if mine.obstacle(handlers, own) is None:
            admitted.update(names.intersection(handlers))
        elif command := obstacle([mine, *in_pool], handlers, own):
            wrong.setdefault(command, []).append(key)
    for command, keys in wrong.items():
        _hold(connection, command, tuple_(_live.c.definition_id, _live.c.revision).in_(keys), *due)
    return frozenset(admitted)


def common(connection: Connection, pool: str, hosts: Collection[WorkerId]) -> dict[str, int | None]:
    """The handlers that all of these hosts of a pool may run, with their limits."""
    query = select(*_INCARNATION).where(_workers.c.id.in_(sorted(hosts))).order_by(_workers.c.id)
    found = [IncarnationRow(*row) for row in connection.execute(query)]
    granted = list(grants(connection, found).values())
    merged: dict[str, Grant] = {}
    for name in sorted(set.intersection(*(set(own) for own in granted)) if granted else ()):
        merged[name] = _merged([own[name] for own in granted])
    offered = Offered(pool, merged)
    admitted = look(connection, offered, ()) if offered.conditional else frozenset[str]()
    return {name: merged[name].entry.max_concurrent for name in sorted(admitted.union(offered.free))}


def _merged(granted: Sequence[Grant]) -> Grant:
    """What all of these have of one handler."""
    limits = [grant.entry.max_concurrent for grant in granted if grant.entry.max_concurrent is not None]
    return Grant(
        replace(granted[0].entry, max_concurrent=min(limits, default=None)),
        frozenset[str]().union(*(grant.beyond for grant in granted)),
        frozenset[str]().union(*(grant.scopes for grant in granted)),
        next((grant.command for grant in granted if grant.beyond), ""),
    )


def _hold(connection: Connection, command: str, *which: Any) -> None:
    """Let runs wait for an approval before anyone looks at them again."""
    query = select(_live.c.id).where(*which).order_by(_live.c.id).limit(MARKED)
    ids: Sequence[RunId] = connection.execute(query.with_for_update(skip_locked=True)).scalars().all()
    later = {"available_at": database_now(connection) + NOT_APPROVED_WAIT}
    for part in chunks(ids):
        waiting = (_live.c.id.in_(part), _live.c.state == "waiting")
        values = {"reason": "not_approved", "detail": command, **later}
        connection.execute(update(_live).where(*waiting).values(values))


# What waits for an approval


def declared_by_hosts(connection: Connection, pool: str | None = None) -> list[Row]:
    """What hosts declare of each handler, by pool and handler; one row for each content.

    `hosts` are the names of those that declare it. `beyond` are the keys in which it goes beyond what needs
    no approval, empty if it needs none; `pending` those that nothing approved covers. `approved_at` and
    `approved_by` are of the approval of that pool and handler, whatever it covers.
    """
    found: dict[tuple[str, str, str], Row] = {}
    for of_pool, host, entry in _declarations(connection, pool):
        ceiling = Ceiling.of(entry)
        key = (of_pool, entry.name, digest(of_pool, entry.name, ceiling))
        row = found.setdefault(key, {"ceiling": ceiling, "entry": entry, "hosts": set()})
        row["hosts"].add(host)
    of_workers = catalogue.of_workers(connection, {name for _, name, _ in found})
    known = {(row["pool"], row["handler"]): row for row in approvals(connection)}
    return [
        _shown(key, row, of_workers.get(key[1], []), known.get(key[:2])) for key, row in sorted(found.items())
    ]


def _shown(key: tuple[str, str, str], row: Row, of_workers: list[HandlerEntry], approval: Row | None) -> Row:
    (pool, handler, of_digest), entry, ceiling = key, row["entry"], row["ceiling"]
    theirs = workers_entry(of_workers, entry.distribution)
    free = None if theirs is None else Ceiling.of(theirs)
    approved = None if approval is None else Ceiling.from_json(approval["ceiling"])
    beyond, pending = excess(ceiling, allowed(free)), excess(ceiling, allowed(free, approved))
    return {
        "pool": pool,
        "handler": handler,
        "distribution": entry.distribution,
        "version": entry.version,
        "digest": of_digest,
        "secrets": sorted(ceiling.secrets),
        "scopes": sorted(ceiling.scopes),
        "egress": None if ceiling.egress is None else sorted(ceiling.egress),
        "audiences": sorted(ceiling.audiences),
        "children": sorted(ceiling.children),
        "timeout": format_duration(ceiling.timeout),
        "max_attempts": ceiling.max_attempts,
        "max_concurrent": ceiling.max_concurrent,
        "hosts": sorted(row["hosts"]),
        "of_workers": bool(of_workers),
        "beyond": [name for name in KEYS if name in beyond],
        "pending": [name for name in KEYS if name in beyond & pending],
        "approved": not beyond & pending,
        "approved_at": approval and approval["approved_at"],
        "approved_by": approval and approval["approved_by"],
    }


def _declarations(connection: Connection, pool: str | None) -> Iterator[tuple[str, str, HandlerEntry]]:
    """Pool, host and handler of all that is stored, and of what live incarnations declare otherwise."""
    columns = (_handlers.c[name] for name in ("pool", *catalogue.DECLARED))
    query = select(_hosts.c.name.label("host"), *columns).join(_hosts, host_handlers.VALID)
    query = query.where(_handlers.c.error.is_(None))
    if pool is not None:
        query = query.where(_handlers.c.pool == pool)
    for row in all_rows(connection, query.order_by(_handlers.c.seen_at).limit(host_handlers.MAX_ROWS)):
        yield row["pool"], row["host"], catalogue.entry_of(row)
    # Of two versions under one token, as in a rolling update, the table has the one that reported last.
    names = {
        id_: name for id_, name in connection.execute(select(_hosts.c.id, _hosts.c.name).limit(MAX_ROWS))
    }
    live = [one for one in live_incarnations(connection) if one.host_id in names]
    live = [one for one in live if one.pools and pool in (None, one.pools[0])]
    declared = declarations(connection, live)
    for one in live:
        for entry in declared[one.id].values():
            if entry.distribution:
                yield one.pools[0], names[one.host_id or ""], entry


def approvals(connection: Connection) -> list[Row]:
    """All approvals, by pool and handler; `ceiling` is JSON."""
    query = select(_approvals).order_by(_approvals.c.pool, _approvals.c.handler)
    return all_rows(connection, query.limit(MAX_ROWS))


def approve(
    connection: Connection, pool: str, handler: str, of_digest: str, *, by: str, at: datetime
) -> Row | None:
    """Approve what hosts of the pool declare with this digest, in place of an earlier approval.

    Returns the approval. None, and nothing changes, if no host declares that (any more).
    """
    for of_pool, _, entry in _declarations(connection, pool):
        ceiling = Ceiling.of(entry)
        if entry.name == handler and digest(of_pool, handler, ceiling) == of_digest:
            break
    else:
        return None
    key = {"pool": pool, "handler": handler}
    given = {"digest": of_digest, "ceiling": ceiling.as_json(), "approved_at": at, "approved_by": by}
    connection.execute(upsert(connection, _approvals, tuple(key), _REPLACED), key | given)
    _wake(connection, pool)
    return key | given


def approved(connection: Connection, pool: str, handler: str) -> Row | None:
    """The approval of a handler in a pool."""
    query = select(_approvals).where(_approvals.c.pool == pool, _approvals.c.handler == handler)
    return first_row(connection, query)


def revoke(connection: Connection, pool: str, handler: str) -> bool:
    """Delete the approval of a handler in a pool; returns whether there was one."""
    mine = (_approvals.c.pool == pool, _approvals.c.handler == handler)
    return bool(connection.execute(delete(_approvals).where(*mine)).rowcount)


def _wake(connection: Connection, pool: str) -> None:
    """Make the runs of a pool due that wait for an approval."""
    now = database_now(connection)
    waiting = (_live.c.state == "waiting", _live.c.reason == "not_approved", _live.c.pool == pool)
    query = select(_live.c.id).where(*waiting, _live.c.available_at > now).order_by(_live.c.id).limit(WOKEN)
    ids = connection.execute(query.with_for_update(skip_locked=True)).scalars().all()
    for part in chunks(ids):
        connection.execute(update(_live).where(_live.c.id.in_(part)).values(available_at=now))
    hint(connection)
