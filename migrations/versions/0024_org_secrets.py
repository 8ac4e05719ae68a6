"""Secrets of orgs, sealed with the key ring, and which handlers get them.

Expand first: the workers of the previous release know no handler that declares a secret.

Revision ID: 0024
Revises: 0023
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0024"
down_revision = "0023"
# The oldest schema version whose workers run on this one: 0022 to 0024 only add what these do not use.
works_with = "0021"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(), "postgresql")
ORG = "NULLIF(current_setting('app.org', true), '')::uuid"


def upgrade() -> None:
    op.create_table(
        "org_secrets",
        sa.Column("id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("rotated_at", INSTANT),
        sa.Column("rotated_by", sa.Text),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_org_secrets")),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_org_secrets_org_id_orgs")),
        sa.UniqueConstraint("org_id", "name", name=op.f("uq_org_secrets_org_id_name")),
    )
    op.create_index("ix_org_secrets_key_id", "org_secrets", ["key_id"])
    op.add_column("catalogue", sa.Column("secrets", JSON, nullable=False, server_default="[]"))
    if op.get_bind().dialect.name == "postgresql":
        # Row-level security as in 0001.
        op.execute("ALTER TABLE org_secrets ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE org_secrets FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY one_org ON org_secrets USING (org_id = {ORG})")
        op.execute("CREATE POLICY owner ON org_secrets TO CURRENT_USER USING (true)")


def downgrade() -> None:
    op.drop_table("org_secrets")
    op.drop_column("catalogue", "secrets")
