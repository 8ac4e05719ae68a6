"""Pools: where a run may execute, what a worker serves, and the rules of pools.

A worker of the previous release serves every pool: it does not read these columns. Use a pool only once all
workers have this release.

Expand first: the workers of the previous release do not notice it.

Revision ID: 0019
Revises: 0018
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0019"
down_revision = "0018"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0018"
branch_labels = None
depends_on = None

INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(), "postgresql")

RUN_QUERY = """
SELECT r.id, r.org_id, o.code AS org, r.definition_id, d.name AS definition, r.handler, r.revision,
       r.scheduled_for, r.created_at, r.origin, r.retry_of, r.request_key, r.idempotency_key,
       COALESCE(r.state, CASE WHEN l.state IN ('held', 'parked') THEN 'waiting' ELSE l.state END) AS state,
       CASE WHEN r.state IS NOT NULL THEN r.reason
            WHEN l.state = 'held' THEN 'held'
            WHEN l.state IN ('waiting', 'parked') THEN l.reason END AS reason,
       COALESCE(r.detail, l.detail) AS detail,
       COALESCE(r.available_at,
                CASE WHEN l.state <> 'parked' OR l.available_at < '9999-01-01T00:00:00.000000Z'
                     THEN l.available_at END) AS available_at,
       COALESCE(r.attempt, l.attempt) AS attempt,
       COALESCE(r.result_fencing_token, l.fencing_token) AS fencing_token,
       r.result_fencing_token,
       COALESCE(r.worker_id, l.worker_id) AS worker,
       COALESCE(r.started_at, CASE WHEN l.state <> 'parked' THEN l.started_at END) AS started_at,
       r.finished_at,
       COALESCE(r.progress, l.progress) AS progress,
       r.result, r.error, r.params, l.cancel_requested_at{pool}
FROM runs r
JOIN orgs o ON o.id = r.org_id
JOIN definitions d ON d.id = r.definition_id
LEFT JOIN live_runs l ON l.id = r.id
"""


def upgrade() -> None:
    for table in ("runs", "live_runs"):
        op.add_column(table, sa.Column("pool", sa.Text, nullable=False, server_default="default"))
    op.add_column("orgs", sa.Column("pool", sa.Text))
    op.add_column("catalogue", sa.Column("pool", sa.Text))
    op.add_column("workers", sa.Column("pools", JSON, nullable=False, server_default='["default"]'))
    op.create_table(
        "pools",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("requires", JSON, nullable=False),
        sa.Column("changed_at", INSTANT, nullable=False),
        sa.Column("changed_by", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_pools")),
    )
    show_runs(RUN_QUERY.format(pool=", r.pool"))


def downgrade() -> None:
    op.execute("DROP VIEW run_view")
    for table, column in (
        ("runs", "pool"),
        ("live_runs", "pool"),
        ("orgs", "pool"),
        ("catalogue", "pool"),
        ("workers", "pools"),
    ):
        op.drop_column(table, column)
    op.drop_table("pools")
    show_runs(RUN_QUERY.format(pool=""), again=True)


def show_runs(query: str, *, again: bool = False) -> None:
    """Make the view of runs again; on PostgreSQL it keeps its privileges unless it was dropped."""
    if op.get_bind().dialect.name == "sqlite":
        if not again:
            op.execute("DROP VIEW run_view")
        op.execute(f"CREATE VIEW run_view AS {query}")
        return
    op.execute(f"CREATE OR REPLACE VIEW run_view WITH (security_invoker = true) AS {query}")
