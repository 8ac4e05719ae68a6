"""What runs use of models and what it costs, and the price list of the installation.

Expand first: the workers of the previous release count the tokens of a spend that names a model, and not what
it costs.

Revision ID: 0043
Revises: 0042
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0043"
down_revision = "0042"
# The oldest schema version whose workers run on this one: 0022 to 0043 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
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
BEFORE = (
    "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead', 'provisioning_failed', 'waiting', "
    "'files_opened', 'files_changeable', 'egress_denied', 'late')"
)
NOW = (
    "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead', 'provisioning_failed', 'waiting', "
    "'files_opened', 'files_changeable', 'egress_denied', 'late', 'unpriced', 'forecast')"
)
UNPRICED = {"postgresql_where": sa.text("unpriced > 0"), "sqlite_where": sa.text("unpriced > 0")}


def upgrade() -> None:
    op.create_table(
        "model_spends",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("place", sa.Integer, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("provider", sa.Text),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("tariff", sa.Text, nullable=False),
        sa.Column("units", sa.BigInteger, nullable=False),
        sa.Column("money", sa.BigInteger),
        sa.Column("price_since", sa.Date),
        sa.Column("price_source", sa.Text),
        sa.Column("at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "key", "place", "kind", name=op.f("pk_model_spends")),
    )
    op.create_table(
        "model_days",
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("tariff", sa.Text, nullable=False),
        sa.Column("units", sa.BigInteger, server_default="0", nullable=False),
        sa.Column("money", sa.BigInteger, server_default="0", nullable=False),
        sa.Column("unpriced", sa.BigInteger, server_default="0", nullable=False),
        sa.PrimaryKeyConstraint(
            *("day", "org_id", "definition_id", "provider", "model", "kind", "tariff"),
            name=op.f("pk_model_days"),
        ),
        postgresql_with=UPDATED,
    )
    op.create_index("ix_model_days_org_id_day", "model_days", ["org_id", "day"])
    op.create_index("ix_model_days_org_id_model", "model_days", ["org_id", "model"], **UNPRICED)
    op.create_table(
        "price_lists",
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.Column("models", sa.Integer, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_price_lists")),
    )
    if op.get_bind().dialect.name == "postgresql":
        for table in ("model_spends", "model_days"):
            # Row-level security as in 0001; the web side writes neither.
            op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
            op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
            op.execute(f"CREATE POLICY one_org ON {table} USING (org_id = {ORG}) WITH CHECK (org_id = {ORG})")
            op.execute(f"CREATE POLICY owner ON {table} TO CURRENT_USER USING (true)")
    allow_kinds(BEFORE, NOW)


def downgrade() -> None:
    added = "kind IN ('unpriced', 'forecast')"
    op.execute(f"DELETE FROM alert_strikes WHERE cause IN (SELECT cause FROM alerts WHERE {added})")
    op.execute(f"DELETE FROM alerts WHERE {added}")
    allow_kinds(NOW, BEFORE)
    op.drop_table("price_lists")
    op.drop_table("model_days")
    op.drop_table("model_spends")


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
