"""The tables of the first release.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
# The oldest schema version whose workers run on this one.
works_with = "0001"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")

# Rows of these tables come and go all the time: vacuum by count, not by share of the table,
# and without pauses. Free room on each page lets an update stay on it.
HOT = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "5000",
    "autovacuum_vacuum_cost_delay": "0",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "20000",
}
UPDATED = HOT | {"fillfactor": "70"}

RUN_QUERY = """
SELECT r.id, r.org_id, o.code AS org, r.definition_id, d.name AS definition, r.handler, r.revision,
       r.scheduled_for, r.created_at, r.origin, r.retry_of, r.request_key, r.idempotency_key,
       COALESCE(r.state, CASE l.state WHEN 'held' THEN 'waiting' ELSE l.state END) AS state,
       CASE WHEN r.state IS NOT NULL THEN r.reason
            WHEN l.state = 'held' THEN 'held'
            WHEN l.state = 'waiting' THEN l.reason END AS reason,
       COALESCE(r.detail, l.detail) AS detail,
       COALESCE(r.available_at, l.available_at) AS available_at,
       COALESCE(r.attempt, l.attempt) AS attempt,
       COALESCE(r.result_fencing_token, l.fencing_token) AS fencing_token,
       r.result_fencing_token,
       COALESCE(r.worker_id, l.worker_id) AS worker,
       COALESCE(r.started_at, l.started_at) AS started_at,
       r.finished_at,
       COALESCE(r.progress, l.progress) AS progress,
       r.result, r.error, r.params, l.cancel_requested_at
FROM runs r
JOIN orgs o ON o.id = r.org_id
JOIN definitions d ON d.id = r.definition_id
LEFT JOIN live_runs l ON l.id = r.id
"""
RUN_VIEW = {
    "sqlite": f"CREATE VIEW run_view AS {RUN_QUERY}",
    # With the row-level security of the role that queries, not of the view's owner.
    "postgresql": f"CREATE VIEW run_view WITH (security_invoker = true) AS {RUN_QUERY}",
}

# The column with the org of a row; for other tables a condition.
ORG_DATA = {
    "orgs": "id",
    "credentials": "org_id",
    "definitions": "org_id",
    "schedule": "org_id",
    "runs": "org_id",
    "live_runs": "org_id",
    "attempts": "org_id",
    "skips": "org_id",
    "checkpoints": "org_id",
    "run_logs": "org_id",
    "backfills": "org_id",
    "audit": "org_id",
    "rollup_days": "org_id",
    "rollup_hours": "org_id",
}

ABSORBING = {
    "sqlite": (
        "CREATE TRIGGER runs_absorbing BEFORE UPDATE ON runs WHEN OLD.state IS NOT NULL "
        "BEGIN SELECT RAISE(ABORT, 'a run that has ended never changes'); END",
    ),
    "postgresql": (
        "CREATE FUNCTION runs_absorbing() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'a run that has ended never changes'; END $$",
        "CREATE TRIGGER runs_absorbing BEFORE UPDATE ON runs FOR EACH ROW "
        "WHEN (OLD.state IS NOT NULL) EXECUTE FUNCTION runs_absorbing()",
    ),
}


def upgrade() -> None:
    create_orgs()
    create_definitions()
    create_runs()
    create_records()
    dialect = op.get_bind().dialect.name
    op.execute(RUN_VIEW[dialect])
    for statement in ABSORBING[dialect]:
        op.execute(statement)
    if dialect == "postgresql":
        part_rows_by_org()


def downgrade() -> None:
    op.execute("DROP VIEW run_view")
    for table in (
        "facts",
        "alert_strikes",
        "alerts",
        "rollup_hours",
        "rollup_days",
        "catalogue",
        "audit",
        "backfills",
        "workers",
        "run_logs",
        "checkpoints",
        "skips",
        "attempts",
        "live_runs",
        "runs",
        "schedule",
        "definition_revisions",
        "definitions",
        "templates",
        "credentials",
        "orgs",
    ):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION runs_absorbing()")


def part_rows_by_org() -> None:
    """Row-level security: the org in `app.org`, or nothing; for the owner, who carries all runs, all.

    Other roles that are to see all get a policy of their own (worker/store/roles.py).
    """
    org = "NULLIF(current_setting('app.org', true), '')::uuid"
    conditions = {table: f"{column} = {org}" for table, column in ORG_DATA.items()}
    conditions["definition_revisions"] = (
        f"EXISTS (SELECT 1 FROM definitions d WHERE d.id = definition_id AND d.org_id = {org})"
    )
    # They name many orgs at once, and no page for an org shows them.
    conditions |= {"alerts": "false", "alert_strikes": "false"}
    for table, condition in conditions.items():
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY one_org ON {table} USING ({condition})")
        op.execute(f"CREATE POLICY owner ON {table} TO CURRENT_USER USING (true)")


def where(predicate: str) -> dict[str, sa.TextClause]:
    """A partial index on both dialects."""
    return {"postgresql_where": sa.text(predicate), "sqlite_where": sa.text(predicate)}


def create_orgs() -> None:
    op.create_table(
        "orgs",
        sa.Column("id", ID, nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("issuer", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="active", nullable=False),
        sa.Column("state_by", sa.Text()),
        sa.Column("state_at", INSTANT),
        sa.Column("state_note", sa.Text()),
        sa.Column("max_concurrent_runs", sa.Integer(), server_default="10", nullable=False),
        sa.Column("weight", sa.Integer(), server_default="1", nullable=False),
        sa.Column("tags", JSON, nullable=False),
        sa.Column("timezone", sa.Text()),
        sa.Column("templates_seen", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("updated_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_orgs")),
        sa.UniqueConstraint("code", name=op.f("uq_orgs_code")),
        sa.CheckConstraint(
            "state IN ('active', 'paused', 'suspended', 'removed')",
            name=op.f("ck_orgs_state"),
        ),
        sa.CheckConstraint("weight >= 1", name=op.f("ck_orgs_weight")),
        sa.CheckConstraint("max_concurrent_runs >= 1", name=op.f("ck_orgs_max_concurrent_runs")),
    )
    op.create_index("ix_orgs_templates_seen", "orgs", ["templates_seen", "id"])

    op.create_table(
        "credentials",
        sa.Column("id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("client_id", sa.Text(), nullable=False),
        sa.Column("sealed", sa.LargeBinary()),
        sa.Column("reference", sa.Text()),
        sa.Column("key_id", sa.Text()),
        sa.Column("kind", sa.Text(), server_default="client_secret", nullable=False),
        sa.Column("state", sa.Text(), server_default="active", nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("retired_at", INSTANT),
        sa.Column("last_used_at", INSTANT),
        sa.Column("uses", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("last_error", sa.Text()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_credentials")),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_credentials_org_id_orgs")),
        sa.UniqueConstraint("org_id", "generation", name=op.f("uq_credentials_org_id_generation")),
        sa.CheckConstraint("kind IN ('client_secret', 'private_key')", name=op.f("ck_credentials_kind")),
        sa.CheckConstraint("state IN ('active', 'retired')", name=op.f("ck_credentials_state")),
    )


def create_definitions() -> None:
    op.create_table(
        "templates",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("selector", JSON, nullable=False),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("change", sa.BigInteger(), nullable=False),
        sa.Column("orgs_total", sa.Integer(), server_default="0", nullable=False),
        sa.Column("orgs_done", sa.Integer(), server_default="0", nullable=False),
        sa.Column("materialised_at", INSTANT),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("updated_at", INSTANT, nullable=False),
        sa.Column("updated_by", sa.Text(), nullable=False),
        sa.Column("closed_at", INSTANT),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_templates")),
        sa.UniqueConstraint("name", name=op.f("uq_templates_name")),
    )

    op.create_table(
        "definitions",
        sa.Column("id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("paused_at", INSTANT),
        sa.Column("paused_by", sa.Text()),
        sa.Column("pause_note", sa.Text()),
        sa.Column("consecutive_failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("template_id", ID),
        sa.Column("template_revision", sa.Integer()),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("updated_at", INSTANT, nullable=False),
        sa.Column("closed_at", INSTANT),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_definitions")),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_definitions_org_id_orgs")),
        sa.ForeignKeyConstraint(
            ["template_id"], ["templates.id"], name=op.f("fk_definitions_template_id_templates")
        ),
        sa.UniqueConstraint("org_id", "name", name=op.f("uq_definitions_org_id_name")),
    )
    op.create_index(
        "ix_definitions_template_id", "definitions", ["template_id"], **where("template_id IS NOT NULL")
    )

    op.create_table(
        "definition_revisions",
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("definition_id", "revision", name=op.f("pk_definition_revisions")),
        sa.ForeignKeyConstraint(
            ["definition_id"],
            ["definitions.id"],
            name=op.f("fk_definition_revisions_definition_id_definitions"),
        ),
    )

    op.create_table(
        "schedule",
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("next_scheduled_for", INSTANT),
        sa.Column("next_fire_at", INSTANT),
        sa.PrimaryKeyConstraint("definition_id", name=op.f("pk_schedule")),
        postgresql_with=UPDATED,
    )
    op.create_index(
        "ix_schedule_next_fire_at", "schedule", ["next_fire_at"], **where("next_fire_at IS NOT NULL")
    )
    op.create_index("ix_schedule_org_id", "schedule", ["org_id"])


def create_runs() -> None:
    op.create_table(
        "runs",
        sa.Column("id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("handler", sa.Text(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("scheduled_for", INSTANT, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("created_by", sa.Text()),
        sa.Column("request_key", sa.Text()),
        sa.Column("backfill_id", ID),
        sa.Column("retry_of", ID),
        sa.Column("idempotency_key", ID, nullable=False),
        sa.Column("params", JSON),
        sa.Column("state", sa.Text()),
        sa.Column("reason", sa.Text()),
        sa.Column("detail", sa.Text()),
        sa.Column("available_at", INSTANT),
        sa.Column("started_at", INSTANT),
        sa.Column("finished_at", INSTANT),
        sa.Column("attempt", sa.Integer()),
        sa.Column("result_fencing_token", sa.BigInteger()),
        sa.Column("worker_id", ID),
        sa.Column("progress", JSON),
        sa.Column("result", JSON),
        sa.Column("error", JSON),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.CheckConstraint("(state IS NULL) = (finished_at IS NULL)", name=op.f("ck_runs_finished")),
        sa.CheckConstraint(
            "origin IN ('schedule', 'manual', 'backfill', 'retry')",
            name=op.f("ck_runs_origin"),
        ),
        sa.CheckConstraint(
            "state IS NULL OR state IN ('succeeded', 'failed', 'cancelled', 'refused', 'skipped')",
            name=op.f("ck_runs_state"),
        ),
    )
    op.create_index("ix_runs_definition_id_id", "runs", ["definition_id", "id"])
    op.create_index("ix_runs_org_id_id", "runs", ["org_id", "id"])
    op.create_index("ix_runs_retry_of", "runs", ["retry_of"], **where("retry_of IS NOT NULL"))
    op.create_index(
        "ix_runs_state_finished_at", "runs", ["state", "finished_at"], **where("state IS NOT NULL")
    )
    op.create_index(
        "uq_runs_backfill_id_scheduled_for",
        "runs",
        ["backfill_id", "scheduled_for"],
        unique=True,
        **where("backfill_id IS NOT NULL"),
    )
    op.create_index(
        "uq_runs_definition_id_request_key",
        "runs",
        ["definition_id", "request_key"],
        unique=True,
        **where("request_key IS NOT NULL"),
    )
    op.create_index(
        "uq_runs_definition_id_scheduled_for",
        "runs",
        ["definition_id", "scheduled_for"],
        unique=True,
        **where("origin = 'schedule'"),
    )

    op.create_table(
        "live_runs",
        sa.Column("id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("handler", sa.Text(), nullable=False),
        sa.Column("variant_handlers", JSON),
        sa.Column("isolation", sa.Text(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("scheduled_for", INSTANT, nullable=False),
        sa.Column("idempotency_key", ID, nullable=False),
        sa.Column("params", JSON),
        sa.Column("backfill_id", ID),
        sa.Column("max_concurrent", sa.Integer()),
        sa.Column("priority", sa.Integer(), server_default="0", nullable=False),
        sa.Column("serial", sa.Boolean(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("detail", sa.Text()),
        sa.Column("available_at", INSTANT, nullable=False),
        sa.Column("start_by", INSTANT),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("recoveries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("fencing_token", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("worker_id", ID),
        sa.Column("started_at", INSTANT),
        sa.Column("progress", JSON),
        sa.Column("cancel_requested_at", INSTANT),
        sa.Column("cancel_reason", sa.Text()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_live_runs")),
        sa.CheckConstraint("state IN ('waiting', 'running', 'held')", name=op.f("ck_live_runs_state")),
        sa.CheckConstraint("isolation IN ('child', 'inline')", name=op.f("ck_live_runs_isolation")),
        sa.CheckConstraint(
            "(state = 'running') = (worker_id IS NOT NULL)",
            name=op.f("ck_live_runs_owner"),
        ),
        sa.CheckConstraint(
            "(state = 'running') = (started_at IS NOT NULL)",
            name=op.f("ck_live_runs_started"),
        ),
        sa.CheckConstraint("(state = 'running') = (reason IS NULL)", name=op.f("ck_live_runs_reason")),
        postgresql_with=HOT,
    )
    op.create_index("ix_live_runs_definition_id", "live_runs", ["definition_id"])
    op.create_index(
        "ix_live_runs_backfill_id", "live_runs", ["backfill_id"], **where("backfill_id IS NOT NULL")
    )
    op.create_index(
        "ix_live_runs_running_definition_id",
        "live_runs",
        ["definition_id"],
        **where("started_at IS NOT NULL"),
    )
    op.create_index("ix_live_runs_running_handler", "live_runs", ["handler"], **where("reason IS NULL"))
    op.create_index("ix_live_runs_running_org_id", "live_runs", ["org_id"], **where("state = 'running'"))
    op.create_index(
        "ix_live_runs_running_worker_id", "live_runs", ["worker_id"], **where("worker_id IS NOT NULL")
    )
    op.create_index(
        "ix_live_runs_start_by",
        "live_runs",
        ["start_by"],
        **where("state = 'waiting' AND start_by IS NOT NULL"),
    )
    op.create_index(
        "ix_live_runs_waiting",
        "live_runs",
        ["org_id", sa.text("priority DESC"), "available_at", "id"],
        **where("state = 'waiting'"),
    )
    op.create_index(
        "uq_live_runs_held", "live_runs", ["definition_id"], unique=True, **where("state = 'held'")
    )
    op.create_index(
        "uq_live_runs_serial",
        "live_runs",
        ["definition_id"],
        unique=True,
        **where("serial AND state IN ('waiting', 'running')"),
    )

    op.create_table(
        "attempts",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("worker_id", ID, nullable=False),
        sa.Column("fencing_token", sa.BigInteger(), nullable=False),
        sa.Column("handler", sa.Text(), nullable=False),
        sa.Column("started_at", INSTANT, nullable=False),
        sa.Column("token_ready_at", INSTANT),
        sa.Column("handler_started_at", INSTANT),
        sa.Column("ended_at", INSTANT, nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("error", JSON),
        sa.Column("error_cause", sa.Text()),
        sa.Column("claims", JSON),
        sa.Column("flags", JSON),
        sa.Column("jti", sa.Text()),
        sa.Column("claims_hash", sa.Text()),
        sa.Column("peak_memory", sa.BigInteger()),
        sa.PrimaryKeyConstraint("run_id", "attempt", name=op.f("pk_attempts")),
        sa.CheckConstraint(
            "outcome IN ('succeeded', 'failed', 'retry', 'snoozed', 'cancelled', 'timed_out', "
            "'lost', 'handed_back', 'refused', 'no_token', 'gated')",
            name=op.f("ck_attempts_outcome"),
        ),
    )
    op.create_index(
        "ix_attempts_error_cause_ended_at",
        "attempts",
        ["error_cause", "ended_at"],
        **where("error_cause IS NOT NULL"),
    )


def create_records() -> None:
    op.create_table(
        "skips",
        sa.Column("id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("skipped_from", INSTANT, nullable=False),
        sa.Column("skipped_until", INSTANT, nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_skips")),
        sa.UniqueConstraint(
            "definition_id", "skipped_from", name=op.f("uq_skips_definition_id_skipped_from")
        ),
        sa.CheckConstraint("reason IN ('missed', 'overlap')", name=op.f("ck_skips_reason")),
        sa.CheckConstraint("count >= 1", name=op.f("ck_skips_count")),
    )
    op.create_index("ix_skips_org_id_id", "skips", ["org_id", "id"])
    op.create_index("ix_skips_skipped_until", "skips", ["skipped_until"])

    op.create_table(
        "checkpoints",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("fencing_token", sa.BigInteger(), nullable=False),
        sa.Column("saved_at", INSTANT, nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_checkpoints")),
    )

    op.create_table(
        "run_logs",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("level", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "attempt", "seq", name=op.f("pk_run_logs")),
    )
    op.create_index("ix_run_logs_at", "run_logs", ["at"])

    op.create_table(
        "workers",
        sa.Column("id", ID, nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("started_at", INSTANT, nullable=False),
        sa.Column("renewed_at", INSTANT, nullable=False),
        sa.Column("lease_until", INSTANT, nullable=False),
        sa.Column("ended_at", INSTANT),
        sa.Column("handlers", JSON, nullable=False),
        sa.Column("capacity", JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
        postgresql_with=UPDATED,
    )
    op.create_index("ix_workers_lease_until", "workers", ["lease_until"], **where("ended_at IS NULL"))

    op.create_table(
        "backfills",
        sa.Column("id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("definition_id", ID, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("range_from", INSTANT, nullable=False),
        sa.Column("range_until", INSTANT, nullable=False),
        sa.Column("next_scheduled_for", INSTANT),
        sa.Column("max_concurrent", sa.Integer(), server_default="1", nullable=False),
        sa.Column("instants", sa.BigInteger(), nullable=False),
        sa.Column("made", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("cancelled_at", INSTANT),
        sa.Column("finished_at", INSTANT),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_backfills")),
        sa.ForeignKeyConstraint(
            ["definition_id"], ["definitions.id"], name=op.f("fk_backfills_definition_id_definitions")
        ),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name=op.f("fk_backfills_org_id_orgs")),
        sa.UniqueConstraint(
            "definition_id",
            "range_from",
            "range_until",
            name=op.f("uq_backfills_definition_id_range_from_range_until"),
        ),
    )
    op.create_index("ix_backfills_unfinished", "backfills", ["id"], **where("finished_at IS NULL"))

    op.create_table(
        "audit",
        sa.Column("id", ID, nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("org_id", ID),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("detail", JSON),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index("ix_audit_org_id_id", "audit", ["org_id", "id"])

    op.create_table(
        "catalogue",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("distribution", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("entry_point", sa.Text(), nullable=False),
        sa.Column("isolation", sa.Text(), server_default="child", nullable=False),
        sa.Column("scopes", JSON, nullable=False),
        sa.Column("params_schema", JSON),
        sa.Column("settings_schema", JSON),
        sa.Column("timeout", sa.Text()),
        sa.Column("max_attempts", sa.Integer()),
        sa.Column("memory", sa.Text()),
        sa.Column("max_concurrent", sa.Integer()),
        sa.Column("error", sa.Text()),
        sa.Column("seen_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("name", "distribution", name=op.f("pk_catalogue")),
    )

    op.create_table(
        "rollup_days",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("runs", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("attempts", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("handler_seconds", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("day", "org_id", name=op.f("pk_rollup_days")),
        postgresql_with=UPDATED,
    )

    op.create_table(
        "rollup_hours",
        sa.Column("hour", INSTANT, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("runs", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("hour", "org_id", "state", name=op.f("pk_rollup_hours")),
        postgresql_with=UPDATED,
    )

    op.create_table(
        "alerts",
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("summary", sa.Text(), nullable=False),
        sa.Column("fields", JSON, nullable=False),
        sa.Column("since", INSTANT, nullable=False),
        sa.Column("struck_at", INSTANT, nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("over_at", INSTANT),
        sa.Column("over_how", sa.Text()),
        sa.Column("told", sa.Text()),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("try_at", INSTANT),
        sa.PrimaryKeyConstraint("cause", name=op.f("pk_alerts")),
        sa.CheckConstraint(
            "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead')",
            name=op.f("ck_alerts_kind"),
        ),
        sa.CheckConstraint("told IS NULL OR told = 'firing'", name=op.f("ck_alerts_told")),
        sa.CheckConstraint("(over_at IS NULL) = (over_how IS NULL)", name=op.f("ck_alerts_over")),
    )

    op.create_table(
        "alert_strikes",
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("subject_id", ID, nullable=False),
        sa.Column("struck_at", INSTANT, nullable=False),
        sa.Column("well", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("cause", "subject_id", name=op.f("pk_alert_strikes")),
    )

    op.create_table(
        "facts",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_facts")),
    )
