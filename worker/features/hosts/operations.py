"""Hosts: add a machine that runs handlers over the attempt API, with a new token; list them, remove one."""

from __future__ import annotations

import re
import secrets

from worker.errors import Conflict, NotFound, UsageError
from worker.ids import new_id
from worker.model.definitions.pools import parse_pool
from worker.model.runs import worker_ends
from worker.operations import approvals
from worker.store import audit, hosts, sign_in
from worker.store.database import Database
from worker.store.dialect import Row

# Distinguishes them from other tokens, and lets scanners of source code find them.
TOKEN_PREFIX = "orgworker_host_"  # noqa: S105 - not a secret
MAX_HOSTS = 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def add_host(database: Database, name: str, pool: str, *, actor: str) -> Row:
    """Add a host and return its row with the `token`, which is not stored and not shown again.

    Raises:
        UsageError: an invalid name or pool.
        Conflict: there is a host of that name.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a host's name",
            fix="write 1 to 63 letters, digits and . _ -, beginning with a letter or digit",
        )
    try:
        parse_pool(pool)
    except ValueError as error:
        raise UsageError(f"--pool: {error}", fix="name the pool as definitions do") from None
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    with database.transaction() as connection:
        if hosts.named(connection, name) is not None:
            raise Conflict(
                f"there is a host {name} already", fix=f"`hosts remove {name}` first; the token then changes"
            )
        now = database.now(connection)
        row = {"id": new_id(), "name": name, "pool": pool, "created_at": now, "created_by": actor}
        hosts.add(connection, row | {"token_sha256": sign_in.sha256(token)})
        audit.note(connection, None, "host.add", name, {"pool": pool}, at=now, actor=actor)
    return row | {"token": token}


def list_hosts(database: Database) -> list[Row]:
    """The hosts by name; `state` of the newest incarnation: ready, late, absent or as `worker_ends.end_of`.

    `end` says in words how that ended, and who recovered how many of its runs; None while it has not.
    `pending` are the handlers of which they declare more than is approved.
    """
    with database.autocommit() as connection:
        now = database.now(connection)
        rows = hosts.listed(connection, limit=MAX_HOSTS)
        unapproved = approvals.pending(connection)
    for row in rows:
        row["pending"] = sorted({one["handler"] for one in unapproved if row["name"] in one["hosts"]})
        lease_until, end = row.pop("lease_until"), None
        if row["ended_at"] is not None:
            end = worker_ends.end_in_words(row, now)
        row["machine"] = row.pop("host")
        row["seen_at"] = max(filter(None, (row["seen_at"], row.pop("renewed_at"))), default=None)
        if row["worker"] is None:
            row["state"] = "absent"
        else:
            alive = "ready" if lease_until > now else "late"
            row["state"] = worker_ends.end_of(row) or alive
        row["end"] = end
        del row["outcome"], row["host_id"]
    return rows


def remove_host(database: Database, name: str, *, actor: str) -> Row:
    """Remove a host, end its incarnations and return its row. Their runs are recovered.

    Raises:
        NotFound: there is no such host.
    """
    with database.transaction() as connection:
        row = hosts.named(connection, name)
        if row is None:
            raise NotFound(f"there is no host {name}", fix="`hosts list` lists them")
        now = database.now(connection)
        ended = hosts.remove(connection, row["id"], at=now)
        detail = {"pool": row["pool"], "incarnations_ended": ended}
        audit.note(connection, None, "host.remove", name, detail, at=now, actor=actor)
    return row
