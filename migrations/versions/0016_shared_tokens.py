"""Access tokens that workers share, sealed with the key ring.

Expand first: the workers of the previous release do not notice it.

Revision ID: 0016
Revises: 0015
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0016"
down_revision = "0015"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0015"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
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
        "access_tokens",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("issuer", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("credential_id", ID),
        sa.Column("sealed", sa.LargeBinary),
        sa.Column("key_id", sa.Text),
        sa.Column("received_at", INSTANT),
        sa.Column("expires_at", INSTANT),
        sa.Column("reserved_by", sa.Text),
        sa.Column("reserved_until", INSTANT),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_access_tokens")),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_access_tokens_org_id_orgs")),
        postgresql_with=UPDATED,
    )
    op.create_index("ix_access_tokens_org_id", "access_tokens", ["org_id"])
    op.create_index("ix_access_tokens_expires_at", "access_tokens", ["expires_at"])
    if op.get_bind().dialect.name == "postgresql":
        # Row-level security as in 0001.
        op.execute("ALTER TABLE access_tokens ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE access_tokens FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY one_org ON access_tokens USING (org_id = {ORG})")
        op.execute("CREATE POLICY owner ON access_tokens TO CURRENT_USER USING (true)")


def downgrade() -> None:
    op.drop_table("access_tokens")
