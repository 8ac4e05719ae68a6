"""Logins as rows: operators, sessions and logins that have begun, so that all processes share them.

No column holds a token or a key: rows are found by SHA-256. No org reads these tables, so they need no
row-level security; worker/store/roles.py gives `orgworker_web` no right to them.

Expand first: the workers of the previous release keep their own sessions in memory.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0005"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "operators",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("token_sha256", sa.Text, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operators")),
        sa.UniqueConstraint("name", name=op.f("uq_operators_name")),
        sa.UniqueConstraint("token_sha256", name=op.f("uq_operators_token_sha256")),
        sa.CheckConstraint("role IN ('viewer', 'operator', 'admin')", name=op.f("ck_operators_role")),
    )
    op.create_table(
        "sessions",
        sa.Column("key_sha256", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("caller", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("org", sa.Text),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("home", sa.Text, nullable=False),
        sa.Column("issuer", sa.Text, nullable=False),
        sa.Column("client_id", sa.Text, nullable=False),
        sa.Column("has_org_scope", sa.Boolean, nullable=False),
        sa.Column("basis", sa.Text, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("until", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("key_sha256", name=op.f("pk_sessions")),
        sa.CheckConstraint("kind IN ('operator', 'org', 'person', 'link')", name=op.f("ck_sessions_kind")),
        sa.CheckConstraint(
            "role IN ('viewer', 'operator', 'admin', 'member', 'manager')", name=op.f("ck_sessions_role")
        ),
    )
    op.create_index("ix_sessions_caller_created_at", "sessions", ["caller", "created_at"])
    op.create_index("ix_sessions_home", "sessions", ["home"])
    op.create_index("ix_sessions_until", "sessions", ["until"])
    op.create_table(
        "login_transactions",
        sa.Column("key_sha256", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("client", sa.Text, nullable=False),
        sa.Column("browser_sha256", sa.Text, nullable=False),
        sa.Column("nonce", sa.Text, nullable=False),
        sa.Column("verifier", sa.Text, nullable=False),
        sa.Column("return_to", sa.Text, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("until", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("key_sha256", name=op.f("pk_login_transactions")),
        sa.CheckConstraint("kind IN ('provider', 'link')", name=op.f("ck_login_transactions_kind")),
    )
    op.create_index("ix_login_transactions_client_created_at", "login_transactions", ["client", "created_at"])
    op.create_index("ix_login_transactions_until", "login_transactions", ["until"])


def downgrade() -> None:
    for table in ("login_transactions", "sessions", "operators"):
        op.drop_table(table)
