"""Hosts: machines that run handlers over the attempt API, each with a token; their incarnations are workers.

Expand first: the workers of the previous release do not notice it.

Revision ID: 0020
Revises: 0019
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0020"
down_revision = "0019"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0019"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "hosts",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("token_sha256", sa.Text, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("removed_at", INSTANT),
        sa.Column("seen_at", INSTANT),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hosts")),
        sa.UniqueConstraint("token_sha256", name=op.f("uq_hosts_token_sha256")),
    )
    kept = sa.text("removed_at IS NULL")
    op.create_index("ix_hosts_name", "hosts", ["name"], unique=True, postgresql_where=kept, sqlite_where=kept)
    op.add_column("workers", sa.Column("host_id", ID))


def downgrade() -> None:
    op.drop_column("workers", "host_id")
    op.drop_table("hosts")
