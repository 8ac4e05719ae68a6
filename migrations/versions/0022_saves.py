"""Saves: which save of its attempt a checkpoint is, so that a late request overwrites no later one.

Expand first: the workers of the previous release save without a number.

Revision ID: 0022
Revises: 0021
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("checkpoints", sa.Column("number", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("checkpoints", "number")
