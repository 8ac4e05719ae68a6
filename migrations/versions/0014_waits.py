"""Runs that wait without a process: for a time, or for a person's answer.

Such a run is `parked` in `live_runs` until one of its rows in `waits` is over. A worker of the previous
release never selects a parked run: it admits `waiting` ones. It would let a held run wait behind a parked one
of the same definition; the unique index rejects that, and the worker tries again.

On PostgreSQL the attempts are read once to check the new condition. On SQLite the conditions of tables change
in the stored schema, as SQLite's documentation of ALTER TABLE says: no row is written again.

Expand first: the workers of the previous release do not notice it.

Revision ID: 0014
Revises: 0013
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0014"
down_revision = "0013"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0013"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(), "postgresql")
ORG = "NULLIF(current_setting('app.org', true), '')::uuid"

# Each condition: its table and name, before and now.
CHECKS = (
    (
        "live_runs",
        "ck_live_runs_state",
        "state IN ('waiting', 'running', 'held')",
        "state IN ('waiting', 'running', 'held', 'parked')",
    ),
    (
        "live_runs",
        "ck_live_runs_started",
        "(state = 'running') = (started_at IS NOT NULL)",
        "state = 'parked' OR (state = 'running') = (started_at IS NOT NULL)",
    ),
    (
        "alerts",
        "ck_alerts_kind",
        "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead', 'provisioning_failed')",
        "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead', 'provisioning_failed', "
        "'waiting')",
    ),
    # The largest table last: PostgreSQL keeps it locked from here to the end.
    (
        "attempts",
        "ck_attempts_outcome",
        "outcome IN ('succeeded', 'failed', 'retry', 'snoozed', 'cancelled', 'timed_out', 'lost', "
        "'handed_back', 'refused', 'no_token', 'gated')",
        "outcome IN ('succeeded', 'failed', 'retry', 'snoozed', 'cancelled', 'timed_out', 'lost', "
        "'handed_back', 'refused', 'no_token', 'gated', 'parked')",
    ),
)
SERIAL = "serial AND state IN ('waiting', 'running')"
SERIAL_NOW = "serial AND state IN ('waiting', 'running', 'parked')"
PARKED = "state = 'parked'"
COUNTED = "state = 'parked' AND started_at IS NOT NULL"
OPEN = "answered_at IS NULL AND timed_out_at IS NULL"

STATE_BEFORE = "CASE l.state WHEN 'held' THEN 'waiting' ELSE l.state END"
STATE_NOW = "CASE WHEN l.state IN ('held', 'parked') THEN 'waiting' ELSE l.state END"
REASON_BEFORE = "WHEN l.state = 'waiting' THEN l.reason"
REASON_NOW = "WHEN l.state IN ('waiting', 'parked') THEN l.reason"
AVAILABLE_BEFORE = "l.available_at"
# A parked run without a deadline has one that never comes.
AVAILABLE_NOW = (
    "CASE WHEN l.state <> 'parked' OR l.available_at < '9999-01-01T00:00:00.000000Z' THEN l.available_at END"
)
STARTED_BEFORE = "l.started_at"
STARTED_NOW = "CASE WHEN l.state <> 'parked' THEN l.started_at END"

RUN_QUERY = """
SELECT r.id, r.org_id, o.code AS org, r.definition_id, d.name AS definition, r.handler, r.revision,
       r.scheduled_for, r.created_at, r.origin, r.retry_of, r.request_key, r.idempotency_key,
       COALESCE(r.state, {state}) AS state,
       CASE WHEN r.state IS NOT NULL THEN r.reason
            WHEN l.state = 'held' THEN 'held'
            {reason} END AS reason,
       COALESCE(r.detail, l.detail) AS detail,
       COALESCE(r.available_at, {available}) AS available_at,
       COALESCE(r.attempt, l.attempt) AS attempt,
       COALESCE(r.result_fencing_token, l.fencing_token) AS fencing_token,
       r.result_fencing_token,
       COALESCE(r.worker_id, l.worker_id) AS worker,
       COALESCE(r.started_at, {started}) AS started_at,
       r.finished_at,
       COALESCE(r.progress, l.progress) AS progress,
       r.result, r.error, r.params, l.cancel_requested_at
FROM runs r
JOIN orgs o ON o.id = r.org_id
JOIN definitions d ON d.id = r.definition_id
LEFT JOIN live_runs l ON l.id = r.id
"""


def upgrade() -> None:
    op.create_table(
        "waits",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("occurrence", sa.Integer, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("ask", JSON),
        sa.Column("opened_at", INSTANT),
        sa.Column("until", INSTANT),
        sa.Column("pending_attempt", sa.Integer),
        sa.Column("answered_at", INSTANT),
        sa.Column("answered_by", sa.Text),
        sa.Column("answer", JSON),
        sa.Column("timed_out_at", INSTANT),
        sa.PrimaryKeyConstraint("run_id", "name", "occurrence", name=op.f("pk_waits")),
        sa.CheckConstraint("kind IN ('sleep', 'answer', 'budget')", name=op.f("ck_waits_kind")),
        sa.CheckConstraint("answered_at IS NULL OR timed_out_at IS NULL", name=op.f("ck_waits_over")),
    )
    op.create_index("ix_waits_open_org_id", "waits", ["org_id", "run_id"], **where(OPEN))
    if op.get_bind().dialect.name == "postgresql":
        # Row-level security as in 0001; a row that an org writes refers to a run of it, as in 0010.
        op.execute("ALTER TABLE waits ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE waits FORCE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY one_org ON waits USING (org_id = {ORG}) WITH CHECK (org_id = {ORG} AND "
            f"EXISTS (SELECT 1 FROM runs r WHERE r.id = waits.run_id AND r.org_id = {ORG}))"
        )
        op.execute("CREATE POLICY owner ON waits TO CURRENT_USER USING (true)")
    op.drop_index("uq_live_runs_serial", "live_runs")
    show_runs(STATE_NOW, REASON_NOW, AVAILABLE_NOW, STARTED_NOW)
    change_checks([(table, name, before, now) for table, name, before, now in CHECKS])
    op.create_index("uq_live_runs_serial", "live_runs", ["definition_id"], unique=True, **where(SERIAL_NOW))
    op.create_index("ix_live_runs_parked_available_at", "live_runs", ["available_at"], **where(PARKED))
    op.create_index("ix_live_runs_parked_handler", "live_runs", ["handler"], **where(COUNTED))


def downgrade() -> None:
    # They start again, with their answers lost.
    op.execute(
        "UPDATE live_runs SET state = 'waiting', reason = 'due', started_at = NULL WHERE state = 'parked'"
    )
    op.execute("UPDATE attempts SET outcome = 'snoozed' WHERE outcome = 'parked'")
    op.execute("DELETE FROM alerts WHERE kind = 'waiting'")
    op.drop_index("ix_live_runs_parked_handler", "live_runs")
    op.drop_index("ix_live_runs_parked_available_at", "live_runs")
    op.drop_index("uq_live_runs_serial", "live_runs")
    show_runs(STATE_BEFORE, REASON_BEFORE, AVAILABLE_BEFORE, STARTED_BEFORE)
    change_checks([(table, name, now, before) for table, name, before, now in CHECKS])
    op.create_index("uq_live_runs_serial", "live_runs", ["definition_id"], unique=True, **where(SERIAL))
    op.drop_table("waits")


def show_runs(state: str, reason: str, available: str, started: str) -> None:
    """Make the view of runs again."""
    query = RUN_QUERY.format(state=state, reason=reason, available=available, started=started)
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP VIEW run_view")
        op.execute(f"CREATE VIEW run_view AS {query}")
        return
    op.execute(f"CREATE OR REPLACE VIEW run_view WITH (security_invoker = true) AS {query}")


def change_checks(checks: list[tuple[str, str, str, str]]) -> None:
    """Replace conditions of tables: of each the table, the name, the old text and the new one."""
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        for table, name, _, condition in checks:
            op.drop_constraint(op.f(name), table, type_="check")
            op.create_check_constraint(op.f(name), table, condition, postgresql_not_valid=True)
            op.execute(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")
        return
    version = connection.execute(sa.text("PRAGMA schema_version")).scalar_one()
    op.execute("PRAGMA writable_schema = ON")
    for table, name, before, condition in checks:
        stored = "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = :table"
        text = connection.execute(sa.text(stored), {"table": table}).scalar_one()
        old, new = f"CONSTRAINT {name} CHECK ({before})", f"CONSTRAINT {name} CHECK ({condition})"
        if old not in text:
            raise RuntimeError(f"{table} lacks the condition {old}")
        connection.execute(
            sa.text("UPDATE sqlite_master SET sql = :sql WHERE type = 'table' AND name = :table"),
            {"sql": text.replace(old, new), "table": table},
        )
    op.execute(f"PRAGMA schema_version = {version + 1}")
    # Reads the schema again in this connection, too.
    op.execute("PRAGMA writable_schema = RESET")


def where(predicate: str) -> dict[str, sa.TextClause]:
    """A partial index on both dialects."""
    return {"postgresql_where": sa.text(predicate), "sqlite_where": sa.text(predicate)}
