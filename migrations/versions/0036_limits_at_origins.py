"""Limits of calls to other services, by origin: the limits, what workers use of them, and pauses.

Expand first: the workers of the previous release do not notice it.

Revision ID: 0036
Revises: 0035
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0036"
down_revision = "0035"
# The oldest schema version whose workers run on this one: 0022 to 0036 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(), "postgresql")

ORG = "NULLIF(current_setting('app.org', true), '')::uuid"
# As in 0001: vacuum by count, and room for updates on each page.
UPDATED = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "5000",
    "autovacuum_vacuum_cost_delay": "0",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "20000",
    "fillfactor": "70",
}


def upgrade() -> None:
    op.create_table(
        "limits",
        sa.Column("id", ID, nullable=False),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("per", sa.Text, nullable=False),
        sa.Column("rate", sa.Text),
        sa.Column("burst", sa.Integer),
        sa.Column("concurrent", sa.Integer),
        sa.Column("max_wait", sa.Text, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("updated_at", INSTANT, nullable=False),
        sa.Column("updated_by", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_limits")),
        sa.UniqueConstraint("origin", "per", name=op.f("uq_limits_origin_per")),
        sa.CheckConstraint("per IN ('org', 'all')", name=op.f("ck_limits_per")),
        sa.CheckConstraint("rate IS NOT NULL OR concurrent IS NOT NULL", name=op.f("ck_limits_limits")),
        sa.CheckConstraint("(rate IS NULL) = (burst IS NULL)", name=op.f("ck_limits_burst")),
    )
    op.create_table(
        "limit_shares",
        sa.Column("id", ID, nullable=False),
        sa.Column("limit_id", ID, nullable=False),
        sa.Column("org_id", ID),
        sa.Column("bucket", JSON, nullable=False),
        sa.Column("idle_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_limit_shares")),
        postgresql_with=UPDATED,
    )
    op.create_index("ix_limit_shares_idle_at", "limit_shares", ["idle_at"])
    op.create_index("ix_limit_shares_limit_id", "limit_shares", ["limit_id"])
    op.create_index("ix_limit_shares_org_id", "limit_shares", ["org_id"])
    op.create_table(
        "origin_pauses",
        sa.Column("org_id", ID, nullable=False),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("until", INSTANT, nullable=False),
        sa.Column("paused_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("org_id", "origin", name=op.f("pk_origin_pauses")),
        postgresql_with=UPDATED,
    )
    op.create_index("ix_origin_pauses_until", "origin_pauses", ["until"])
    if op.get_bind().dialect.name == "postgresql":
        # Row-level security as in 0001.
        for table in ("limit_shares", "origin_pauses"):
            op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
            op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
            op.execute(f"CREATE POLICY one_org ON {table} USING (org_id = {ORG})")
            op.execute(f"CREATE POLICY owner ON {table} TO CURRENT_USER USING (true)")


def downgrade() -> None:
    for table in ("origin_pauses", "limit_shares", "limits"):
        op.drop_table(table)
