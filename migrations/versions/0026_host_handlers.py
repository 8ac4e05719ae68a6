"""Handlers of hosts apart from those of workers, and what administrators approve of them.

A host of the previous release, or one that reports to a worker of it, still has its rows in `catalogue`:
`of_worker` is null there. What hosts have declared so far is copied under their own pool; the rows that are
copied stay, as workers of the previous release read them.

Expand first: the workers of the previous release do not notice it.

Revision ID: 0026
Revises: 0025
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0026"
down_revision = "0025"
# The oldest schema version whose workers run on this one: 0022 to 0026 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
# Columns that a handler of a host has as one of a worker.
SHARED = (
    *("version", "entry_point", "isolation", "scopes", "params_schema", "settings_schema", "timeout"),
    *("max_attempts", "memory", "max_concurrent", "error", "state", "secrets"),
)
NOW = {
    "postgresql": "clock_timestamp()",
    "sqlite": "strftime('%Y-%m-%dT%H:%M:%f', 'now') || '000Z'",
}


def upgrade() -> None:
    op.add_column("workers", sa.Column("offers", JSON))
    op.add_column("catalogue", sa.Column("of_worker", sa.Boolean))
    handlers = op.create_table(
        "host_handlers",
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("distribution", sa.Text, nullable=False),
        sa.Column("host_id", ID, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("entry_point", sa.Text, nullable=False),
        sa.Column("isolation", sa.Text, nullable=False, server_default="child"),
        sa.Column("scopes", JSON, nullable=False),
        sa.Column("params_schema", JSON),
        sa.Column("settings_schema", JSON),
        sa.Column("timeout", sa.Text),
        sa.Column("max_attempts", sa.Integer),
        sa.Column("memory", sa.Text),
        sa.Column("max_concurrent", sa.Integer),
        sa.Column("error", sa.Text),
        sa.Column("state", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("secrets", JSON, nullable=False, server_default="[]"),
        sa.Column("bytes", sa.Integer, nullable=False),
        sa.Column("seen_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("pool", "name", "distribution", "host_id", name=op.f("pk_host_handlers")),
    )
    op.create_index("ix_host_handlers_host_id", "host_handlers", ["host_id"])
    op.create_table(
        "pool_approvals",
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("handler", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("ceiling", JSON, nullable=False),
        sa.Column("approved_at", INSTANT, nullable=False),
        sa.Column("approved_by", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("pool", "handler", name=op.f("pk_pool_approvals")),
    )
    copy_handlers(handlers)


def copy_handlers(handlers: sa.Table) -> None:
    """Copy what hosts have declared, under the pool of each: handlers that no worker lists."""
    connection = op.get_bind()
    workers = sa.table("workers", sa.column("host_id", ID), sa.column("handlers", JSON))
    hosts = sa.table("hosts", sa.column("id", ID), sa.column("pool"), sa.column("removed_at", INSTANT))
    shared = (handlers.c[name] for name in SHARED)
    columns = (sa.column(of.name, of.type) for of in (handlers.c.name, handlers.c.distribution, *shared))
    catalogue = sa.table("catalogue", *columns)
    of_workers: set[str] = set()
    of_hosts: dict[str, set[str]] = {}
    for host_id, names in connection.execute(sa.select(workers.c.host_id, workers.c.handlers)):
        (of_workers if host_id is None else of_hosts.setdefault(host_id, set())).update(names)
    kept = sa.select(hosts.c.id, hosts.c.pool).where(hosts.c.removed_at.is_(None))
    pools: dict[str, str] = {host_id: pool for host_id, pool in connection.execute(kept)}
    wanted = set[str]().union(*(of_hosts[host_id] for host_id in pools.keys() & of_hosts.keys())) - of_workers
    if not wanted:
        return
    found: dict[str, list[dict[str, Any]]] = {}
    for row in connection.execute(sa.select(catalogue)).mappings():
        if row["name"] in wanted:
            found.setdefault(row["name"], []).append(dict(row))
    seen_at = sa.literal_column(NOW[connection.dialect.name])
    for host_id, pool in pools.items():
        for row in (row for name in sorted(of_hosts.get(host_id, set())) for row in found.get(name, ())):
            own = {"pool": pool, "host_id": host_id, "bytes": len(json.dumps(row))}
            connection.execute(handlers.insert().values(**row, **own, seen_at=seen_at))


def downgrade() -> None:
    op.drop_table("pool_approvals")
    op.drop_table("host_handlers")
    op.drop_column("catalogue", "of_worker")
    op.drop_column("workers", "offers")
