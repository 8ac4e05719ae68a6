"""Model requests in batches: requests of runs, the batches that they are in, and who sends those of a pool.

Expand first: the workers of the previous release know no wait for a batch. A run that parks for one is woken
by a worker of this release only.

Revision ID: 0044
Revises: 0043
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0044"
down_revision = "0043"
# The oldest schema version whose workers run on this one: 0022 to 0044 change nothing that these need.
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
CHECKS = (
    (
        "waits",
        "ck_waits_kind",
        "kind IN ('sleep', 'answer', 'budget', 'children')",
        "kind IN ('sleep', 'answer', 'budget', 'children', 'batch')",
    ),
)
ITEM_STATES = "state IN ('pending', 'sent', 'done', 'sync', 'over')"
BATCH_STATES = "state IN ('new', 'uploaded', 'creating', 'sent', 'read', 'done', 'failed')"


def upgrade() -> None:
    op.create_table(
        "batch_items",
        sa.Column("id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("run_id", ID, nullable=False),
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("occurrence", sa.Integer, nullable=False),
        sa.Column("api", sa.Text, nullable=False),
        sa.Column("own_key", sa.Boolean, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("betas", sa.Text, nullable=False),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("batch_id", ID),
        sa.Column("apart", sa.Boolean, nullable=False),
        sa.Column("opened_at", INSTANT, nullable=False),
        sa.Column("sent_at", INSTANT),
        sa.Column("fall_back_at", INSTANT),
        sa.Column("ended_at", INSTANT),
        sa.Column("body", sa.LargeBinary),
        sa.Column("result", sa.LargeBinary),
        sa.Column("meter", sa.Text),
        sa.Column("reserved", sa.BigInteger, server_default="0", nullable=False),
        sa.Column("tokens", sa.BigInteger, server_default="0", nullable=False),
        sa.Column("seen", sa.Text, server_default="", nullable=False),
        sa.Column("late", sa.Integer, server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batch_items")),
        sa.UniqueConstraint(
            *("run_id", "name", "key", "occurrence"), name=op.f("uq_batch_items_run_id_name_key_occurrence")
        ),
        sa.CheckConstraint(ITEM_STATES, name=op.f("ck_batch_items_state")),
        postgresql_with=UPDATED,
    )
    pending, open_ = "state = 'pending'", "state IN ('pending', 'sent')"
    op.create_index("ix_batch_items_pool_pending", "batch_items", ["pool", "opened_at"], **where(pending))
    op.create_index("ix_batch_items_batch_id", "batch_items", ["batch_id"])
    op.create_index("ix_batch_items_fall_back_at", "batch_items", ["fall_back_at"], **where(open_))
    op.create_index("ix_batch_items_org_id", "batch_items", ["org_id"])
    op.create_table(
        "batches",
        sa.Column("id", ID, nullable=False),
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("api", sa.Text, nullable=False),
        sa.Column("org_id", ID),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("betas", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("requests", sa.Integer, nullable=False),
        sa.Column("apart", sa.Boolean, nullable=False),
        sa.Column("file_id", sa.Text),
        sa.Column("provider_id", sa.Text),
        sa.Column("results", sa.Text),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("creating_at", INSTANT),
        sa.Column("tries", sa.Integer, server_default="0", nullable=False),
        sa.Column("sent_at", INSTANT),
        sa.Column("ended_at", INSTANT),
        sa.Column("next_at", INSTANT, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("late", sa.Integer, server_default="0", nullable=False),
        sa.Column("fencing_token", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
        sa.CheckConstraint(BATCH_STATES, name=op.f("ck_batches_state")),
        postgresql_with=UPDATED,
    )
    op.create_index(
        "ix_batches_open", "batches", ["pool", "next_at"], **where("state NOT IN ('done', 'failed')")
    )
    for column in ("provider_id", "ended_at", "org_id"):
        op.create_index(f"ix_batches_{column}", "batches", [column])
    op.create_table(
        "batch_leases",
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("worker_id", ID, nullable=False),
        sa.Column("fencing_token", sa.BigInteger, nullable=False),
        sa.Column("until", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("pool", name=op.f("pk_batch_leases")),
        postgresql_with=UPDATED,
    )
    if op.get_bind().dialect.name == "postgresql":
        # Row-level security as in 0001; a row that an org writes refers to a run of it, as in 0010.
        of_run = "EXISTS (SELECT 1 FROM runs r WHERE r.id = batch_items.run_id AND r.org_id = {org})"
        for table, check in (("batch_items", f" AND {of_run.format(org=ORG)}"), ("batches", "")):
            op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
            op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
            op.execute(
                f"CREATE POLICY one_org ON {table} USING (org_id = {ORG}) WITH CHECK (org_id = {ORG}{check})"
            )
            op.execute(f"CREATE POLICY owner ON {table} TO CURRENT_USER USING (true)")
    for check in CHECKS:
        change_check(*check)


def downgrade() -> None:
    op.execute(
        "UPDATE live_runs SET state = 'waiting', reason = 'due', started_at = NULL "
        "WHERE state = 'parked' AND reason = 'batch'"
    )
    op.execute("DELETE FROM waits WHERE kind = 'batch'")
    for table, name, before, now in CHECKS:
        change_check(table, name, now, before)
    for table in ("batch_leases", "batches", "batch_items"):
        op.drop_table(table)


def where(condition: str) -> dict[str, sa.TextClause]:
    """Options that make an index a partial one on both databases."""
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def change_check(table: str, name: str, before: str, now: str) -> None:
    """Replace a condition; on SQLite in the stored schema, as in 0014."""
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        op.drop_constraint(op.f(name), table, type_="check")
        op.create_check_constraint(op.f(name), table, now)
        return
    version = connection.execute(sa.text("PRAGMA schema_version")).scalar_one()
    op.execute("PRAGMA writable_schema = ON")
    named = "type = 'table' AND name = :table"
    stored = sa.text(f"SELECT sql FROM sqlite_master WHERE {named}")
    text = connection.execute(stored, {"table": table}).scalar_one()
    old, new = f"CONSTRAINT {name} CHECK ({before})", f"CONSTRAINT {name} CHECK ({now})"
    if old not in text:
        raise RuntimeError(f"{table} lacks the condition {old}")
    connection.execute(
        sa.text(f"UPDATE sqlite_master SET sql = :sql WHERE {named}"),
        {"sql": text.replace(old, new), "table": table},
    )
    op.execute(f"PRAGMA schema_version = {version + 1}")
    # Reads the schema again in this connection, too.
    op.execute("PRAGMA writable_schema = RESET")
