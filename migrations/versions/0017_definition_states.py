"""State of definitions, and which handlers declare it.

Expand first: the workers of the previous release know no handler that declares state, and do not notice it.

Revision ID: 0017
Revises: 0016
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0017"
down_revision = "0016"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0016"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(), "postgresql")
ORG = "NULLIF(current_setting('app.org', true), '')::uuid"
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
        "definition_states",
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("updated_at", INSTANT, nullable=False),
        sa.Column("updated_by", sa.Text, nullable=False),
        sa.Column("run_id", ID),
        sa.PrimaryKeyConstraint("definition_id", name=op.f("pk_definition_states")),
        postgresql_with=UPDATED,
    )
    op.create_index("ix_definition_states_org_id", "definition_states", ["org_id"])
    op.add_column("catalogue", sa.Column("state", sa.Boolean, nullable=False, server_default=sa.false()))
    if op.get_bind().dialect.name == "postgresql":
        # Row-level security as in 0001.
        op.execute("ALTER TABLE definition_states ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE definition_states FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY one_org ON definition_states USING (org_id = {ORG})")
        op.execute("CREATE POLICY owner ON definition_states TO CURRENT_USER USING (true)")


def downgrade() -> None:
    op.drop_table("definition_states")
    op.drop_column("catalogue", "state")
