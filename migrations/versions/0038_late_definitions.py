"""Deadlines of scheduled times, definitions that are late, and alerts of them.

Expand first: workers of the previous release cannot read a definition with `done_by` or `done_within`, and
leave its scheduled times to those of this one.

Revision ID: 0038
Revises: 0037
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0038"
down_revision = "0037"
# The oldest schema version whose workers run on this one: 0022 to 0038 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
ORG = "NULLIF(current_setting('app.org', true), '')::uuid"
OWN = f"EXISTS (SELECT 1 FROM definitions d WHERE d.id = definition_id AND d.org_id = {ORG})"
TABLES = ("deadlines", "late_definitions")
HOT = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "5000",
    "autovacuum_vacuum_cost_delay": "0",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "20000",
}
BEFORE = (
    "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead', 'provisioning_failed', 'waiting', "
    "'files_opened', 'files_changeable', 'egress_denied')"
)
NOW = (
    "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead', 'provisioning_failed', 'waiting', "
    "'files_opened', 'files_changeable', 'egress_denied', 'late')"
)


def upgrade() -> None:
    op.create_table(
        "deadlines",
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("deadline_at", INSTANT, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("scheduled_for", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("definition_id", "deadline_at", name="pk_deadlines"),
        postgresql_with=HOT,
    )
    op.create_index("ix_deadlines_deadline_at", "deadlines", ["deadline_at"])
    op.create_index("ix_deadlines_org_id", "deadlines", ["org_id"])
    op.create_table(
        "late_definitions",
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("scheduled_for", INSTANT, nullable=False),
        sa.Column("late_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("definition_id", name="pk_late_definitions"),
    )
    op.create_index("ix_late_definitions_org_id", "late_definitions", ["org_id"])
    if op.get_bind().dialect.name == "postgresql":
        for table in TABLES:
            op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
            op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
            op.execute(f"CREATE POLICY one_org ON {table} USING (org_id = {ORG})")
            op.execute(f"CREATE POLICY owner ON {table} TO CURRENT_USER USING (true)")
        # Pages settle what is due, so an org's request writes deadlines: as in 0010, of its own definitions.
        op.execute(f"ALTER POLICY one_org ON deadlines WITH CHECK (org_id = {ORG} AND {OWN})")
    allow_kinds(BEFORE, NOW)


def downgrade() -> None:
    op.execute("DELETE FROM alert_strikes WHERE cause IN (SELECT cause FROM alerts WHERE kind = 'late')")
    op.execute("DELETE FROM alerts WHERE kind = 'late'")
    allow_kinds(NOW, BEFORE)
    for table in reversed(TABLES):
        op.drop_table(table)


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
