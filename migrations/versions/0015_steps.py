"""Steps: the stored results of the steps of each run, and the handler that stored progress first.

Expand first: the workers of the previous release do not notice it.

Revision ID: 0015
Revises: 0014
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0015"
down_revision = "0014"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0014"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
ORG = "NULLIF(current_setting('app.org', true), '')::uuid"


def upgrade() -> None:
    add_handler()
    op.create_table(
        "steps",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("key", sa.Text),
        sa.Column("occurrence", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("fencing_token", sa.BigInteger, nullable=False),
        sa.Column("handler", sa.Text, nullable=False),
        sa.Column("started_at", INSTANT, nullable=False),
        sa.Column("ended_at", INSTANT, nullable=False),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "seq", name=op.f("pk_steps")),
    )
    if op.get_bind().dialect.name == "postgresql":
        # Row-level security as in 0001, and as for checkpoints in 0005: the run is of the same org.
        of_org = f"EXISTS (SELECT 1 FROM runs r WHERE r.id = run_id AND r.org_id = {ORG})"
        op.execute("ALTER TABLE steps ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE steps FORCE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY one_org ON steps USING (org_id = {ORG}) WITH CHECK (org_id = {ORG} AND {of_org})"
        )
        op.execute("CREATE POLICY owner ON steps TO CURRENT_USER USING (true)")


def downgrade() -> None:
    op.drop_table("steps")
    op.drop_column("checkpoints", "handler")


def add_handler() -> None:
    """Add the handler to checkpoints; SQLite has a column before the constraints only in a new table."""
    handler = sa.Column("handler", sa.Text)
    if op.get_bind().dialect.name == "postgresql":
        op.add_column("checkpoints", handler)
        return
    op.rename_table("checkpoints", "checkpoints_before")
    op.create_table(
        "checkpoints",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("fencing_token", sa.BigInteger, nullable=False),
        sa.Column("saved_at", INSTANT, nullable=False),
        sa.Column("data", sa.JSON(none_as_null=True), nullable=False),
        handler,
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_checkpoints")),
    )
    op.execute("INSERT INTO checkpoints SELECT *, NULL FROM checkpoints_before")
    op.drop_table("checkpoints_before")
