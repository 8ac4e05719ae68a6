"""Plans of changes that MCP clients make and a person confirms; tokens of such clients.

Expand first: a process of the previous release refuses the token of an MCP client.

Revision ID: 0042
Revises: 0041
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0042"
down_revision = "0041"
# The oldest schema version whose workers run on this one: 0022 to 0042 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "plans",
        sa.Column("id", ID, nullable=False),
        sa.Column("operator", sa.Text, nullable=False),
        sa.Column("token_sha256", sa.Text, nullable=False),
        sa.Column("change", sa.Text, nullable=False),
        sa.Column("arguments", sa.Text, nullable=False),
        sa.Column("shown", sa.Text, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("until", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_plans")),
    )
    op.create_index("ix_plans_operator_created_at", "plans", ["operator", "created_at"])
    op.create_index("ix_plans_until", "plans", ["until"])
    op.add_column("operators", sa.Column("mcp_token_sha256", sa.Text))
    op.create_index("uq_operators_mcp_token_sha256", "operators", ["mcp_token_sha256"], unique=True)


def downgrade() -> None:
    op.drop_index("uq_operators_mcp_token_sha256", "operators")
    op.drop_column("operators", "mcp_token_sha256")
    op.drop_table("plans")
