"""Placements: admitted runs that an engine offers to the hosts of a pool.

Expand first: the workers of the previous release do not notice it.

Revision ID: 0021
Revises: 0020
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0021"
down_revision = "0020"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0020"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
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
        "placements",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("fencing_token", sa.BigInteger, nullable=False),
        sa.Column("worker_id", ID, nullable=False),
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("ticket_sha256", sa.Text, nullable=False),
        sa.Column("placed_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_placements")),
        postgresql_with=UPDATED,
    )


def downgrade() -> None:
    op.drop_table("placements")
