"""Rollouts: which orgs get the new version of a handler, the version of each run, and alerts of a halt.

Expand first: workers of the previous release give every run the handler of its definition, and store no
version. The first rollout is started once all workers are of this release.

Revision ID: 0045
Revises: 0044
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0045"
down_revision = "0044"
# The oldest schema version whose workers run on this one: 0022 to 0045 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(), "postgresql")
ORG = "NULLIF(current_setting('app.org', true), '')::uuid"
# As in 0001: vacuum by count, and room for updates on each page.
UPDATED = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "5000",
    "autovacuum_vacuum_cost_delay": "0",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "20000",
    "fillfactor": "70",
}
SIDES = "side IN ('from', 'to')"
UNREAD, UNCOUNTED = "before IS NULL", "compared AND NOT counted"
BEFORE = (
    "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead', 'provisioning_failed', 'waiting', "
    "'files_opened', 'files_changeable', 'egress_denied', 'late', 'unpriced', 'forecast')"
)
NOW = (
    "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead', 'provisioning_failed', 'waiting', "
    "'files_opened', 'files_changeable', 'egress_denied', 'late', 'unpriced', 'forecast', 'rollout')"
)


def upgrade() -> None:
    op.create_table(
        "rollouts",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("definitions", sa.Text, nullable=False),
        sa.Column("from_handler", sa.Text, nullable=False),
        sa.Column("to_handler", sa.Text, nullable=False),
        sa.Column("orgs", JSON, nullable=False),
        sa.Column("flag", JSON),
        sa.Column("steps", JSON, nullable=False),
        sa.Column("auto", sa.Boolean, nullable=False),
        sa.Column("watch", JSON, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("step", sa.Integer, server_default="0", nullable=False),
        sa.Column("step_began_at", INSTANT),
        sa.Column("began_at", INSTANT),
        sa.Column("ready", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("stalled", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("judged_at", INSTANT),
        sa.Column("unjudged", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("verdict", JSON),
        sa.Column("halted_at", INSTANT),
        sa.Column("halted_by", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("evidence", JSON),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("updated_at", INSTANT, nullable=False),
        sa.Column("updated_by", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rollouts")),
        sa.UniqueConstraint("name", name=op.f("uq_rollouts_name")),
        sa.CheckConstraint(
            "state IN ('planned', 'running', 'halted', 'finished', 'undone')", name=op.f("ck_rollouts_state")
        ),
    )
    op.create_table(
        "rollout_orgs",
        sa.Column("rollout_id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("before", JSON),
        sa.Column("slow", sa.Float),
        sa.Column("from_sums", JSON),
        sa.Column("to_sums", JSON),
        sa.Column("moved_step", sa.Integer),
        sa.Column("moved_at", INSTANT),
        sa.PrimaryKeyConstraint("rollout_id", "org_id", name=op.f("pk_rollout_orgs")),
        postgresql_with=UPDATED,
    )
    op.create_index("ix_rollout_orgs_unread", "rollout_orgs", ["rollout_id", "org_id"], **where(UNREAD))
    op.create_index("ix_rollout_orgs_org_id", "rollout_orgs", ["org_id"])
    op.create_table(
        "rollout_days",
        sa.Column("rollout_id", ID, nullable=False),
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("side", sa.Text, nullable=False),
        sa.Column("sums", JSON, nullable=False),
        sa.PrimaryKeyConstraint("rollout_id", "day", "side", name=op.f("pk_rollout_days")),
        sa.CheckConstraint(SIDES, name=op.f("ck_rollout_days_side")),
        postgresql_with=UPDATED,
    )
    op.create_table(
        "run_versions",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("rollout_id", ID, nullable=False),
        sa.Column("handler", sa.Text, nullable=False),
        sa.Column("side", sa.Text, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("started_at", INSTANT, nullable=False),
        sa.Column("compared", sa.Boolean, nullable=False),
        sa.Column("counted", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_run_versions")),
        sa.CheckConstraint(SIDES, name=op.f("ck_run_versions_side")),
        postgresql_with=UPDATED,
    )
    op.create_index("ix_run_versions_uncounted", "run_versions", ["rollout_id", "run_id"], **where(UNCOUNTED))
    if op.get_bind().dialect.name == "postgresql":
        # Row-level security as in 0001.
        for table in ("rollout_orgs", "run_versions"):
            op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
            op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
            op.execute(f"CREATE POLICY one_org ON {table} USING (org_id = {ORG})")
            op.execute(f"CREATE POLICY owner ON {table} TO CURRENT_USER USING (true)")
    allow_kinds(BEFORE, NOW)


def downgrade() -> None:
    op.execute("DELETE FROM alert_strikes WHERE cause IN (SELECT cause FROM alerts WHERE kind = 'rollout')")
    op.execute("DELETE FROM alerts WHERE kind = 'rollout'")
    allow_kinds(NOW, BEFORE)
    for table in ("run_versions", "rollout_days", "rollout_orgs", "rollouts"):
        op.drop_table(table)


def where(condition: str) -> dict[str, sa.TextClause]:
    """Options that make an index a partial one on both databases."""
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


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
