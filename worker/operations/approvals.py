"""Pools: what hosts of one declare beyond what they may, approved by its digest; and their rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection

from worker.errors import Conflict, NotFound
from worker.handlers.ceiling import Ceiling, digest
from worker.model.runs.next_steps import NextStep
from worker.store import audit, host_grants, pools
from worker.store.database import Database
from worker.store.dialect import Row

# What an administrator decides on, besides pool, handler and digest.
DECLARED = (
    "secrets",
    "scopes",
    "egress",
    "audiences",
    "children",
    "timeout",
    "max_attempts",
    "max_concurrent",
)


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


def _shown(approval: Row) -> Row:
    """An approval with its ceiling as columns."""
    ceiling = approval["ceiling"]
    named = {key: approval[key] for key in ("pool", "handler", "digest")}
    decided = {key: ceiling.get(key) for key in DECLARED}
    decided |= {key: ceiling.get(key, []) for key in ("audiences", "children")}
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
