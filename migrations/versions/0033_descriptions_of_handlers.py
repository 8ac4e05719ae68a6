"""Descriptions of handlers: the first sentence of each docstring, of workers and of hosts.

Expand first: the workers of the previous release leave it as it is.

Revision ID: 0033
Revises: 0032
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0033"
down_revision = "0032"
# The oldest schema version whose workers run on this one: 0022 to 0033 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

TABLES = ("catalogue", "host_handlers")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("description", sa.Text))


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_column(table, "description")
