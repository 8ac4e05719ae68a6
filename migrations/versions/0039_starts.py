"""Starts: runs that a product starts in its own transactions, and the logins that may.

Expand first: workers of the previous release make no runs of starts; those of this one do.

Revision ID: 0039
Revises: 0038
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0039"
down_revision = "0038"
# The oldest schema version whose workers run on this one: 0022 to 0039 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
AT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
ORG = "NULLIF(current_setting('app.org', true), '')::uuid"
# Rows come and go: vacuum by count and without pauses; free room on each page.
UPDATED = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "5000",
    "autovacuum_vacuum_cost_delay": "0",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "20000",
    "fillfactor": "70",
}
TABLES = ("starts", "product_logins")
# `start_functions.install` makes them at the end of each upgrade, owned by a role that can do nothing else.
FUNCTIONS = (
    "orgworker_start(text, text, jsonb, text, timestamptz)",
    "orgworker_start_many(jsonb)",
)


def where(condition: str) -> dict[str, sa.TextClause]:
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        "starts",
        sa.Column("id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("login", sa.Text, nullable=False),
        sa.Column("created_at", AT, nullable=False),
        sa.Column("not_before", AT),
        sa.Column("params", JSON),
        sa.Column("made_at", AT),
        sa.PrimaryKeyConstraint("id", name="pk_starts"),
        sa.UniqueConstraint("org_id", "definition_id", "key", name="uq_starts_org_id_definition_id_key"),
        sa.CheckConstraint("state IN ('later', 'due', 'made')", name=op.f("ck_starts_state")),
        sa.CheckConstraint("(state = 'made') = (made_at IS NOT NULL)", name=op.f("ck_starts_made")),
        postgresql_with=UPDATED,
    )
    op.create_index("ix_starts_due", "starts", ["definition_id", "id"], **where("state = 'due'"))
    op.create_index("ix_starts_later", "starts", ["not_before"], **where("state = 'later'"))
    op.create_index("ix_starts_made_at", "starts", ["made_at"], **where("state = 'made'"))
    op.create_table(
        "product_logins",
        sa.Column("id", ID, nullable=False),
        sa.Column("login", sa.Text, nullable=False),
        sa.Column("org_id", ID),
        sa.Column("created_at", AT, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_product_logins"),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name="fk_product_logins_org_id_orgs"),
        sa.UniqueConstraint("login", "org_id", name="uq_product_logins_login_org_id"),
    )
    unique = {"unique": True, **where("org_id IS NULL")}
    op.create_index("uq_product_logins_all", "product_logins", ["login"], **unique)
    op.create_index("ix_product_logins_org_id", "product_logins", ["org_id"])
    if op.get_bind().dialect.name == "postgresql":
        for table in TABLES:
            op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
            op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
            op.execute(f"CREATE POLICY one_org ON {table} USING (org_id = {ORG})")
            op.execute(f"CREATE POLICY owner ON {table} TO CURRENT_USER USING (true)")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for function in FUNCTIONS:
            op.execute(f"DROP FUNCTION IF EXISTS {function}")
        # They let the functions read names: see `start_functions.install`.
        for table in ("orgs", "definitions"):
            op.execute(f"DROP POLICY IF EXISTS orgworker_starts ON {table}")
    for table in reversed(TABLES):
        op.drop_table(table)
