"""Pools: what hosts of one declare beyond what they may, approved by its digest; their list and rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict, Diagnostic, NotFound
from worker.handlers.ceiling import Ceiling, digest, may_run
from worker.ids import ALL_ORGS
from worker.model.definitions.pools import DEFAULT_POOL
from worker.model.runs.next_steps import NextStep
from worker.store import audit, host_grants, places, pools
from worker.store.database import Database
from worker.store.dialect import Row

# What an administrator decides on, besides pool, handler and digest.
DECLARED = ("secrets", "scopes", "timeout", "max_attempts", "max_concurrent")


def list_approvals(database: Database, pool: str | None = None) -> list[Row]:
    """What hosts declare beyond the defaults and what workers declare, approved or not; pending first.

    Raises:
        NotFound: no host is of this pool.
    """
    with database.autocommit() as connection:
        if pool is not None:
            _require_pool(connection, pool)
        return declared(connection, pool)


def declared(connection: Connection, pool: str | None = None) -> list[Row]:
    """As `list_approvals`, without a check of the pool."""
    rows = [row for row in host_grants.declared_by_hosts(connection, pool) if row["beyond"]]
    return sorted(rows, key=lambda row: row["approved"])


def pending(connection: Connection, pool: str | None = None) -> list[Row]:
    """What hosts declare that nothing approved covers: they are not offered these handlers as they are."""
    return [row for row in declared(connection, pool) if not row["approved"]]


def command_of(row: Mapping[str, Any]) -> str:
    """The command that approves a row."""
    return step_of(row).command


def step_of(row: Mapping[str, Any]) -> NextStep:
    """What approves a row."""
    ceiling = Ceiling.from_json(row)
    subject = {name: row[name] for name in ("pool", "handler")}
    return NextStep("approve", {**subject, "digest": digest(row["pool"], row["handler"], ceiling)})


def what_of(row: Mapping[str, Any]) -> str:
    """What a row declares of each key that is not approved, in words."""
    return ", ".join(f"{key} {_in_words(row[key])}" for key in row["pending"])


def approve(database: Database, pool: str, handler: str, digest: str, *, actor: str) -> Row:
    """Approve what hosts of a pool declare of a handler, in place of an earlier approval; returns it.

    Runs that wait for it can start at once. The same again changes nothing.

    Raises:
        NotFound: no host is of this pool, or none of them declares the handler.
        Conflict: they declare something else than what has this digest.
    """
    with database.transaction() as connection:
        _require_pool(connection, pool)
        before = host_grants.approved(connection, pool, handler)
        if before is not None and before["digest"] == digest:
            return _shown(before)
        now = database.now(connection)
        given = host_grants.approve(connection, pool, handler, digest, by=actor, at=now)
        if given is None:
            raise _not_declared(pool, handler, host_grants.declared_by_hosts(connection, pool))
        replaced = {"replaces": before["digest"]} if before is not None else {}
        detail = {"digest": digest, "ceiling": given["ceiling"], **replaced}
        audit.note(connection, None, "pool.approve", f"{pool} {handler}", detail, at=now, actor=actor)
        return _shown(given)


def revoke(database: Database, pool: str, handler: str, *, actor: str) -> Row:
    """Withdraw an approval and return it: runs that need it wait from now on, running ones go on.

    Raises:
        NotFound: nothing is approved for it.
    """
    with database.transaction() as connection:
        before = host_grants.approved(connection, pool, handler)
        if before is None or not host_grants.revoke(connection, pool, handler):
            raise NotFound(
                f"nothing is approved for {handler} in pool {pool}", fix="`pools approvals` lists approvals"
            )
        detail, now = {"digest": before["digest"], "ceiling": before["ceiling"]}, database.now(connection)
        audit.note(connection, None, "pool.revoke", f"{pool} {handler}", detail, at=now, actor=actor)
        return _shown(before)


def diagnostic(connection: Connection, rows: Iterable[Row]) -> Diagnostic:
    """What waits for an administrator; a warning unless a definition's runs wait, too.

    Names keys and not their values, which hosts choose.
    """
    waiting = [row for row in rows if not row["approved"]]
    if not waiting:
        return Diagnostic("approvals", True, "all that hosts declare is approved")
    uses = places.uses(connection, ALL_ORGS, {row["handler"] for row in waiting})
    blocking = [row for row in waiting if any(map(partial(_waits, row), uses))]
    first = (blocking or waiting)[0]
    more = f"; and {len(waiting) - 1} more" if len(waiting) > 1 else ""
    runs = "; its runs wait" if blocking else ""
    return Diagnostic(
        "approvals",
        not blocking,
        f"hosts of pool {first['pool']} declare {', '.join(first['pending'])} for {first['handler']} beyond "
        f"what is approved{runs}{more}",
        f"look at it with `pools approvals`; `{command_of(first)}` approves it",
    )


def check(database: Database) -> Diagnostic:
    """As `diagnostic`, of all that hosts declare."""
    with database.autocommit() as connection:
        return diagnostic(connection, declared(connection))


def _waits(row: Row, use: Row) -> bool:
    """Whether runs of a definition wait for the approval of a row."""
    if (use["handler"], use["pool"] or DEFAULT_POOL) != (row["handler"], row["pool"]):
        return False
    return not may_run(row["pending"], use["spec"], scopes=row["scopes"])


def _shown(approval: Row) -> Row:
    """An approval with its ceiling as columns."""
    ceiling = approval["ceiling"]
    named = {key: approval[key] for key in ("pool", "handler", "digest")}
    decided = {key: ceiling.get(key) for key in DECLARED}
    return named | decided | {key: approval[key] for key in ("approved_at", "approved_by")}


def _require_pool(connection: Connection, pool: str) -> None:
    if pool not in pools.of_hosts(connection):
        raise NotFound(f"there is no host of pool {pool}", fix="`hosts list` shows the pools of hosts")


def _not_declared(pool: str, handler: str, rows: Iterable[Row]) -> NotFound | Conflict:
    now = [row for row in rows if row["handler"] == handler]
    if not now:
        return NotFound(
            f"no host of pool {pool} declares a handler {handler}",
            fix=f"`pools approvals {pool}` lists what they declare",
        )
    known = next((row for row in now if not row["approved"]), now[0])
    return Conflict(
        f"no host of pool {pool} declares for {handler} what has this digest",
        fix=f"look at `pools approvals {pool}`; `{command_of(known)}` approves what one declares now",
    )


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value) or "none"
    return "unlimited" if value is None else str(value)


def list_pools(database: Database) -> list[Row]:
    """Every pool that is served, waited for or has rules, by name; see `store.pools.overview`."""
    with database.autocommit() as connection:
        return pools.overview(connection)


def forget_rules(database: Database, name: str, *, actor: str) -> Row:
    """Delete the stored rules of a pool, and return them.

    A worker with `[pools.NAME] requires` stores its own again when it starts.

    Raises:
        NotFound: no rules are stored for it.
    """
    with database.transaction() as connection:
        required = pools.forget_rules(connection, name)
        if required is None:
            raise NotFound(f"no rules are stored for pool {name}", fix="`pools list` shows the pools")
        detail, now = {"requires": dict(required)}, database.now(connection)
        audit.note(connection, None, "pool.forget_rules", name, detail, at=now, actor=actor)
    return {"name": name, **detail}
