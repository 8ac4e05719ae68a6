"""How workers and hosts ended: stopped or crashed, and who recovered how many of their runs.

Expand first: the workers of the previous release end rows without saying how, which reads as stopped.

Revision ID: 0031
Revises: 0030
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0031"
down_revision = "0030"
# The oldest schema version whose workers run on this one: 0022 to 0031 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")


def upgrade() -> None:
    op.add_column("workers", sa.Column("outcome", sa.Text))
    op.add_column("workers", sa.Column("recovered_runs", sa.Integer, nullable=False, server_default="0"))
    op.add_column("workers", sa.Column("recovered_by", ID))
    crashed = sa.text("outcome = 'crashed'")
    op.create_index(
        "ix_workers_crashed", "workers", ["ended_at"], postgresql_where=crashed, sqlite_where=crashed
    )


def downgrade() -> None:
    op.drop_index("ix_workers_crashed", "workers")
    op.drop_column("workers", "recovered_by")
    op.drop_column("workers", "recovered_runs")
    op.drop_column("workers", "outcome")
