"""Declarations of egress: what handlers of workers and hosts may reach, and audiences of their tokens.

Expand first: the workers of the previous release leave both as they are.

Revision ID: 0035
Revises: 0034
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0035"
down_revision = "0034"
# The oldest schema version whose workers run on this one: 0022 to 0035 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(), "postgresql")
TABLES = ("catalogue", "host_handlers")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("egress", JSON))
        op.add_column(table, sa.Column("audiences", JSON, nullable=False, server_default="[]"))


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_column(table, "audiences")
        op.drop_column(table, "egress")
