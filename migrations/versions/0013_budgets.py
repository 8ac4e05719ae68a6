"""Budgets of orgs, and what their runs spend.

Expand first: the workers of the previous release do not notice it.

Revision ID: 0013
Revises: 0012
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0013"
down_revision = "0012"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0012"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(), "postgresql")
ORG = "NULLIF(current_setting('app.org', true), '')::uuid"
PER = "per IN ('run', 'day', 'month')"
# As in 0001: vacuum by count, and room for updates on each page.
UPDATED = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "5000",
    "autovacuum_vacuum_cost_delay": "0",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "20000",
    "fillfactor": "70",
}
TABLES = ("budgets", "budget_raises", "meters", "meter_days", "spends", "org_properties")


def upgrade() -> None:
    create_budgets()
    create_spends()
    if op.get_bind().dialect.name == "postgresql":
        # Row-level security as in 0001.
        for table in TABLES:
            op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
            op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
            op.execute(f"CREATE POLICY one_org ON {table} USING (org_id = {ORG})")
            op.execute(f"CREATE POLICY owner ON {table} TO CURRENT_USER USING (true)")


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table)
    op.execute("UPDATE live_runs SET reason = 'due' WHERE reason = 'budget'")


def create_budgets() -> None:
    op.create_table(
        "budgets",
        sa.Column("id", ID, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("org_id", ID),
        sa.Column("selector", JSON),
        sa.Column("meter", sa.Text, nullable=False),
        sa.Column("limit", sa.BigInteger),
        sa.Column("property", sa.Text),
        sa.Column("per", sa.Text, nullable=False),
        sa.Column("zone", sa.Text),
        sa.Column("at_limit", sa.Text, nullable=False),
        sa.Column("warn_at", sa.Float, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("updated_at", INSTANT, nullable=False),
        sa.Column("updated_by", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_budgets")),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_budgets_org_id_orgs")),
        sa.UniqueConstraint("target", "meter", "per", name=op.f("uq_budgets_target_meter_per")),
        sa.CheckConstraint("(org_id IS NULL) <> (selector IS NULL)", name=op.f("ck_budgets_target")),
        sa.CheckConstraint('("limit" IS NULL) <> (property IS NULL)', name=op.f("ck_budgets_limit")),
        sa.CheckConstraint(PER, name=op.f("ck_budgets_per")),
        sa.CheckConstraint("at_limit IN ('wait', 'fail', 'ask')", name=op.f("ck_budgets_at_limit")),
    )
    op.create_index("ix_budgets_org_id", "budgets", ["org_id"])
    op.create_table(
        "budget_raises",
        sa.Column("id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("meter", sa.Text, nullable=False),
        sa.Column("per", sa.Text, nullable=False),
        sa.Column("run_id", ID),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.Column("until", INSTANT, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_budget_raises")),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_budget_raises_org_id_orgs")),
        sa.CheckConstraint(PER, name=op.f("ck_budget_raises_per")),
    )
    op.create_index("ix_budget_raises_org_id_meter", "budget_raises", ["org_id", "meter"])
    of_runs = sa.text("run_id IS NOT NULL")
    op.create_index(
        "ix_budget_raises_run_id",
        "budget_raises",
        ["run_id"],
        postgresql_where=of_runs,
        sqlite_where=of_runs,
    )
    op.create_table(
        "org_properties",
        sa.Column("org_id", ID, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("value", sa.BigInteger),
        sa.Column("issued_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("org_id", "name", name=op.f("pk_org_properties")),
    )


def create_spends() -> None:
    op.create_table(
        "meters",
        sa.Column("org_id", ID, nullable=False),
        sa.Column("meter", sa.Text, nullable=False),
        sa.Column("per", sa.Text, nullable=False),
        sa.Column("starts_at", INSTANT, nullable=False),
        sa.Column("used", sa.BigInteger, nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("org_id", "meter", "per", "starts_at", name=op.f("pk_meters")),
        postgresql_with=UPDATED,
    )
    op.create_index("ix_meters_starts_at", "meters", ["starts_at"])
    op.create_table(
        "meter_days",
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("meter", sa.Text, nullable=False),
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("used", sa.BigInteger, nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("day", "org_id", "meter", "definition_id", name=op.f("pk_meter_days")),
        postgresql_with=UPDATED,
    )
    op.create_index("ix_meter_days_org_id_day", "meter_days", ["org_id", "day"])
    op.create_index("ix_meter_days_definition_id_meter", "meter_days", ["definition_id", "meter"])
    op.create_table(
        "spends",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("meter", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "meter", "key", name=op.f("pk_spends")),
    )
    op.create_index("ix_spends_org_id_meter_at", "spends", ["org_id", "meter", "at"])
