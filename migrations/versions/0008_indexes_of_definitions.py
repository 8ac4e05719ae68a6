"""Indexes of definitions for the console: the paused ones, which are few, and definitions by name.

Expand first: the previous release does not notice it.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0007"
branch_labels = None
depends_on = None

PAUSED = "paused_at IS NOT NULL AND closed_at IS NULL"


def upgrade() -> None:
    op.create_index(
        "ix_definitions_paused_id",
        "definitions",
        ["id"],
        postgresql_where=sa.text(PAUSED),
        sqlite_where=sa.text(PAUSED),
    )
    op.create_index("ix_definitions_name_id", "definitions", ["name", "id"])


def downgrade() -> None:
    op.drop_index("ix_definitions_name_id", "definitions")
    op.drop_index("ix_definitions_paused_id", "definitions")
