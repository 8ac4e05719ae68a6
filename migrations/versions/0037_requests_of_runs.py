"""The requests of runs: totals by origin, and alerts of origins that handlers may not reach.

Expand first: workers of the previous release record none, and deliver such alerts too.

Revision ID: 0037
Revises: 0036
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0037"
down_revision = "0036"
# The oldest schema version whose workers run on this one: 0022 to 0037 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
ORG = "NULLIF(current_setting('app.org', true), '')::uuid"
NUMBERS = ("requests", "bytes_out", "bytes_in", "denied")
BEFORE = (
    "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead', 'provisioning_failed', 'waiting', "
    "'files_opened', 'files_changeable')"
)
NOW = (
    "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead', 'provisioning_failed', 'waiting', "
    "'files_opened', 'files_changeable', 'egress_denied')"
)


def upgrade() -> None:
    op.create_table(
        "run_egress",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        *(sa.Column(name, sa.BigInteger, server_default="0", nullable=False) for name in NUMBERS),
        sa.Column("statuses", JSON, nullable=False),
        sa.Column("waited_seconds", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "origin", name="pk_run_egress"),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE run_egress ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE run_egress FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY one_org ON run_egress USING (org_id = {ORG})")
        op.execute("CREATE POLICY owner ON run_egress TO CURRENT_USER USING (true)")
    allow_kinds(BEFORE, NOW)


def downgrade() -> None:
    op.execute(
        "DELETE FROM alert_strikes WHERE cause IN (SELECT cause FROM alerts WHERE kind = 'egress_denied')"
    )
    op.execute("DELETE FROM alerts WHERE kind = 'egress_denied'")
    allow_kinds(NOW, BEFORE)
    op.drop_table("run_egress")


def allow_kinds(before: str, now: str) -> None:
    """Replace the condition on the kinds of alerts; on SQLite in the stored schema, as in 0014."""
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        op.drop_constraint(op.f("ck_alerts_kind"), "alerts", type_="check")
        op.create_check_constraint(op.f("ck_alerts_kind"), "alerts", now)
        return
    version = connection.execute(sa.text("PRAGMA schema_version")).scalar_one()
    op.execute("PRAGMA writable_schema = ON")
    of_alerts = "FROM sqlite_master WHERE type = 'table' AND name = 'alerts'"
    text = connection.execute(sa.text(f"SELECT sql {of_alerts}")).scalar_one()
    old, new = f"CONSTRAINT ck_alerts_kind CHECK ({before})", f"CONSTRAINT ck_alerts_kind CHECK ({now})"
    if old not in text:
        raise RuntimeError(f"alerts lacks the condition {old}")
    connection.execute(
        sa.text("UPDATE sqlite_master SET sql = :sql WHERE type = 'table' AND name = 'alerts'"),
        {"sql": text.replace(old, new)},
    )
    op.execute(f"PRAGMA schema_version = {version + 1}")
    # Reads the schema again in this connection, too.
    op.execute("PRAGMA writable_schema = RESET")
