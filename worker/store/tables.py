"""The tables, with named constraints; the documented columns of the database.

`runs` holds identity and outcome and is written twice, at fire and at finish: its
`state` is null until the run has ended and never changes after. `live_runs` holds
the unfinished runs only, narrow and hot. The view `run_view` joins both for
screens. Hot tables carry no foreign keys: one module writes them, and `doctor`
checks that a live row exists exactly for each run without a final state.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID
from sqlalchemy.engine import Dialect
from sqlalchemy.types import JSON, TypeEngine

from worker.clock import from_text, to_text

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Id(TypeDecorator[str]):
    """A UUIDv7: `uuid` on PostgreSQL, 36 characters on SQLite, text in Python on both."""

    impl = String(36)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(UUID(as_uuid=False))
        return dialect.type_descriptor(String(36))


class Instant(TypeDecorator[datetime]):
    """An aware UTC instant: `timestamptz` on PostgreSQL, sortable RFC 3339 text on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(DateTime(timezone=True))
        return dialect.type_descriptor(String(27))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None or dialect.name == "postgresql":
            return value
        return to_text(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return from_text(value) if isinstance(value, str) else value


def json_type() -> TypeEngine[Any]:
    """JSON text on SQLite, `jsonb` on PostgreSQL."""
    return JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


ORG_STATES = ("active", "paused", "suspended", "removed")
ORIGINS = ("schedule", "manual", "backfill", "retry")
FINAL_STATES = ("succeeded", "failed", "cancelled", "refused", "skipped")
LIVE_STATES = ("waiting", "running", "held")
WAITING_REASONS = (
    "due",
    "held",
    "retry",
    "snoozed",
    "handed_back",
    "recovered",
    "no_token",
    "no_handler",
)
ALERT_KINDS = ("failed", "refused", "overdue", "paused", "credential_dead")
ATTEMPT_OUTCOMES = (
    "succeeded",
    "failed",
    "retry",
    "snoozed",
    "cancelled",
    "timed_out",
    "lost",
    "handed_back",
    "refused",
    "no_token",
    "gated",
)


def one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


# Rows of these come and go all the time: vacuum by count, not by share of the table,
# and do not pause. Free room on each page lets an update stay on it.
HOT = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "5000",
    "autovacuum_vacuum_cost_delay": "0",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "20000",
}
UPDATED = HOT | {"fillfactor": "70"}


orgs = Table(
    "orgs",
    metadata,
    Column("id", Id, primary_key=True),
    Column("code", Text, nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("issuer", Text, nullable=False),
    Column("state", Text, nullable=False, server_default="active"),
    Column("state_by", Text),
    Column("state_at", Instant),
    Column("state_note", Text),
    Column("max_concurrent_runs", Integer, nullable=False, server_default="10"),
    Column("weight", Integer, nullable=False, server_default="1"),
    Column("tags", json_type(), nullable=False),
    Column("timezone", Text),
    # The newest change of a template that this org has taken up; 0: look at them all again.
    Column("templates_seen", BigInteger, nullable=False, server_default="0"),
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Index("ix_orgs_templates_seen", "templates_seen", "id"),
    CheckConstraint(one_of("state", ORG_STATES), name="state"),
    CheckConstraint("max_concurrent_runs >= 1", name="max_concurrent_runs"),
    CheckConstraint("weight >= 1", name="weight"),
)

credentials = Table(
    "credentials",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("client_id", Text, nullable=False),
    # One of the two: a secret or private key sealed in this row, or `file:name` in secrets_dir.
    Column("sealed", LargeBinary),
    Column("reference", Text),
    Column("key_id", Text),
    Column("kind", Text, nullable=False, server_default="client_secret"),
    Column("state", Text, nullable=False, server_default="active"),
    Column("created_at", Instant, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("retired_at", Instant),
    Column("last_used_at", Instant),
    Column("uses", BigInteger, nullable=False, server_default="0"),
    Column("last_error", Text),
    UniqueConstraint("org_id", "generation"),
    CheckConstraint(one_of("state", ("active", "retired")), name="state"),
    CheckConstraint(one_of("kind", ("client_secret", "private_key")), name="kind"),
)

templates = Table(
    "templates",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("revision", Integer, nullable=False),
    Column("selector", json_type(), nullable=False),
    Column("spec", json_type(), nullable=False),
    # Its place among the changes of all templates, and how far its last one has got.
    Column("change", BigInteger, nullable=False),
    Column("orgs_total", Integer, nullable=False, server_default="0"),
    Column("orgs_done", Integer, nullable=False, server_default="0"),
    Column("materialised_at", Instant),
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Column("updated_by", Text, nullable=False),
    Column("closed_at", Instant),
)

definitions = Table(
    "definitions",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("paused_at", Instant),
    Column("paused_by", Text),
    Column("pause_note", Text),
    Column("consecutive_failures", Integer, nullable=False, server_default="0"),
    Column("template_id", Id, ForeignKey("templates.id")),
    Column("template_revision", Integer),
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Column("closed_at", Instant),
    UniqueConstraint("org_id", "name"),
    Index(
        "ix_definitions_template_id",
        "template_id",
        postgresql_where=text("template_id IS NOT NULL"),
        sqlite_where=text("template_id IS NOT NULL"),
    ),
)

definition_revisions = Table(
    "definition_revisions",
    metadata,
    Column("definition_id", Id, ForeignKey("definitions.id"), primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("spec", json_type(), nullable=False),
    Column("at", Instant, nullable=False),
    Column("by", Text, nullable=False),
)

# The next instant of a definition that is active: `next_scheduled_for` is nominal,
# `next_fire_at` the same plus spread. Both null when nothing is due any more.
schedule = Table(
    "schedule",
    metadata,
    Column("definition_id", Id, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("next_scheduled_for", Instant),
    Column("next_fire_at", Instant),
    Index(
        "ix_schedule_next_fire_at",
        "next_fire_at",
        postgresql_where=text("next_fire_at IS NOT NULL"),
        sqlite_where=text("next_fire_at IS NOT NULL"),
    ),
    Index("ix_schedule_org_id", "org_id"),
    postgresql_with=UPDATED,
)

runs = Table(
    "runs",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("definition_id", Id, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("handler", Text, nullable=False),
    Column("origin", Text, nullable=False),
    Column("scheduled_for", Instant, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("created_by", Text),
    Column("request_key", Text),
    Column("backfill_id", Id),
    Column("retry_of", Id),
    Column("idempotency_key", Id, nullable=False),
    Column("params", json_type()),
    # The outcome, written once.
    Column("state", Text),
    Column("reason", Text),
    Column("detail", Text),
    Column("available_at", Instant),
    Column("started_at", Instant),
    Column("finished_at", Instant),
    Column("attempt", Integer),
    Column("result_fencing_token", BigInteger),
    Column("worker_id", Id),
    Column("progress", json_type()),
    Column("result", json_type()),
    Column("error", json_type()),
    CheckConstraint(one_of("origin", ORIGINS), name="origin"),
    CheckConstraint(f"state IS NULL OR {one_of('state', FINAL_STATES)}", name="state"),
    CheckConstraint("(state IS NULL) = (finished_at IS NULL)", name="finished"),
    Index(
        "uq_runs_definition_id_scheduled_for",
        "definition_id",
        "scheduled_for",
        unique=True,
        postgresql_where=text("origin = 'schedule'"),
        sqlite_where=text("origin = 'schedule'"),
    ),
    Index(
        "uq_runs_backfill_id_scheduled_for",
        "backfill_id",
        "scheduled_for",
        unique=True,
        postgresql_where=text("backfill_id IS NOT NULL"),
        sqlite_where=text("backfill_id IS NOT NULL"),
    ),
    Index(
        "uq_runs_definition_id_request_key",
        "definition_id",
        "request_key",
        unique=True,
        postgresql_where=text("request_key IS NOT NULL"),
        sqlite_where=text("request_key IS NOT NULL"),
    ),
    Index("ix_runs_org_id_id", "org_id", "id"),
    Index("ix_runs_definition_id_id", "definition_id", "id"),
    Index(
        "ix_runs_retry_of",
        "retry_of",
        postgresql_where=text("retry_of IS NOT NULL"),
        sqlite_where=text("retry_of IS NOT NULL"),
    ),
    Index(
        "ix_runs_state_finished_at",
        "state",
        "finished_at",
        postgresql_where=text("state IS NOT NULL"),
        sqlite_where=text("state IS NOT NULL"),
    ),
)

# By which columns running rows are counted, and the words of each index for running.
# All mean the same, as the constraints say; they differ so that PostgreSQL's planner,
# whose idea of this table is always old, cannot take one index for another.
RUNNING = {
    "org_id": "state = 'running'",
    "worker_id": "worker_id IS NOT NULL",
    "definition_id": "started_at IS NOT NULL",
    "handler": "reason IS NULL",
}

# What admission and the running run need, so that neither reads `runs`.
live_runs = Table(
    "live_runs",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("definition_id", Id, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("handler", Text, nullable=False),
    # All handlers that an attempt may choose, where the definition has variants.
    Column("variant_handlers", json_type()),
    Column("isolation", Text, nullable=False),
    Column("origin", Text, nullable=False),
    Column("scheduled_for", Instant, nullable=False),
    Column("idempotency_key", Id, nullable=False),
    Column("params", json_type()),
    Column("backfill_id", Id),
    Column("max_concurrent", Integer),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("serial", Boolean, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("detail", Text),
    Column("available_at", Instant, nullable=False),
    # A scheduled run whose handler never started by then is skipped (expired).
    Column("start_by", Instant),
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("recoveries", Integer, nullable=False, server_default="0"),
    Column("fencing_token", BigInteger, nullable=False, server_default="0"),
    Column("worker_id", Id),
    Column("started_at", Instant),
    Column("progress", json_type()),
    Column("cancel_requested_at", Instant),
    Column("cancel_reason", Text),
    CheckConstraint(one_of("state", LIVE_STATES), name="state"),
    CheckConstraint(one_of("isolation", ("child", "inline")), name="isolation"),
    CheckConstraint("(state = 'running') = (worker_id IS NOT NULL)", name="owner"),
    CheckConstraint("(state = 'running') = (started_at IS NOT NULL)", name="started"),
    CheckConstraint("(state = 'running') = (reason IS NULL)", name="reason"),
    Index(
        "ix_live_runs_waiting",
        "org_id",
        text("priority DESC"),
        "available_at",
        "id",
        postgresql_where=text("state = 'waiting'"),
        sqlite_where=text("state = 'waiting'"),
    ),
    *(
        Index(
            f"ix_live_runs_running_{column}",
            column,
            postgresql_where=text(predicate),
            sqlite_where=text(predicate),
        )
        for column, predicate in RUNNING.items()
    ),
    Index(
        "ix_live_runs_start_by",
        "start_by",
        postgresql_where=text("state = 'waiting' AND start_by IS NOT NULL"),
        sqlite_where=text("state = 'waiting' AND start_by IS NOT NULL"),
    ),
    Index("ix_live_runs_definition_id", "definition_id"),
    Index(
        "ix_live_runs_backfill_id",
        "backfill_id",
        postgresql_where=text("backfill_id IS NOT NULL"),
        sqlite_where=text("backfill_id IS NOT NULL"),
    ),
    Index(
        "uq_live_runs_serial",
        "definition_id",
        unique=True,
        postgresql_where=text("serial AND state IN ('waiting', 'running')"),
        sqlite_where=text("serial AND state IN ('waiting', 'running')"),
    ),
    Index(
        "uq_live_runs_held",
        "definition_id",
        unique=True,
        postgresql_where=text("state = 'held'"),
        sqlite_where=text("state = 'held'"),
    ),
    postgresql_with=HOT,
)

# A row a try, written when the try ends.
attempts = Table(
    "attempts",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("worker_id", Id, nullable=False),
    Column("fencing_token", BigInteger, nullable=False),
    Column("handler", Text, nullable=False),
    Column("started_at", Instant, nullable=False),
    Column("token_ready_at", Instant),
    Column("handler_started_at", Instant),
    Column("ended_at", Instant, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("error", json_type()),
    Column("error_cause", Text),
    Column("claims", json_type()),
    Column("flags", json_type()),
    Column("jti", Text),
    Column("claims_hash", Text),
    Column("peak_memory", BigInteger),
    CheckConstraint(one_of("outcome", ATTEMPT_OUTCOMES), name="outcome"),
    Index(
        "ix_attempts_error_cause_ended_at",
        "error_cause",
        "ended_at",
        postgresql_where=text("error_cause IS NOT NULL"),
        sqlite_where=text("error_cause IS NOT NULL"),
    ),
)

# Consecutive instants that never became a run; both ends inclusive.
skips = Table(
    "skips",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("definition_id", Id, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("skipped_from", Instant, nullable=False),
    Column("skipped_until", Instant, nullable=False),
    Column("count", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    CheckConstraint(one_of("reason", ("missed", "overlap")), name="reason"),
    CheckConstraint("count >= 1", name="count"),
    UniqueConstraint("definition_id", "skipped_from"),
    Index("ix_skips_org_id_id", "org_id", "id"),
    Index("ix_skips_skipped_until", "skipped_until"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("fencing_token", BigInteger, nullable=False),
    Column("saved_at", Instant, nullable=False),
    Column("data", json_type(), nullable=False),
)

run_logs = Table(
    "run_logs",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("at", Instant, nullable=False),
    Column("level", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("text", Text, nullable=False),
    Index("ix_run_logs_at", "at"),
)

# One row an incarnation; its lease is its right to the runs it owns.
workers = Table(
    "workers",
    metadata,
    Column("id", Id, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("version", Text, nullable=False),
    Column("started_at", Instant, nullable=False),
    Column("renewed_at", Instant, nullable=False),
    Column("lease_until", Instant, nullable=False),
    Column("ended_at", Instant),
    Column("handlers", json_type(), nullable=False),
    Column("capacity", json_type(), nullable=False),
    Index(
        "ix_workers_lease_until",
        "lease_until",
        postgresql_where=text("ended_at IS NULL"),
        sqlite_where=text("ended_at IS NULL"),
    ),
    postgresql_with=UPDATED,
)

backfills = Table(
    "backfills",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    Column("definition_id", Id, ForeignKey("definitions.id"), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("range_from", Instant, nullable=False),
    Column("range_until", Instant, nullable=False),
    # The first instant that has no run yet; null when each has one.
    Column("next_scheduled_for", Instant),
    Column("max_concurrent", Integer, nullable=False, server_default="1"),
    Column("instants", BigInteger, nullable=False),
    Column("made", BigInteger, nullable=False, server_default="0"),
    Column("created_at", Instant, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("cancelled_at", Instant),
    Column("finished_at", Instant),
    UniqueConstraint("definition_id", "range_from", "range_until"),
    Index(
        "ix_backfills_unfinished",
        "id",
        postgresql_where=text("finished_at IS NULL"),
        sqlite_where=text("finished_at IS NULL"),
    ),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Id, primary_key=True),
    Column("at", Instant, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("org_id", Id),
    Column("subject", Text, nullable=False),
    Column("detail", json_type()),
    Index("ix_audit_org_id_id", "org_id", "id"),
)

catalogue = Table(
    "catalogue",
    metadata,
    Column("name", Text, primary_key=True),
    Column("distribution", Text, primary_key=True),
    Column("version", Text, nullable=False),
    Column("entry_point", Text, nullable=False),
    Column("isolation", Text, nullable=False, server_default="child"),
    Column("scopes", json_type(), nullable=False),
    Column("params_schema", json_type()),
    Column("settings_schema", json_type()),
    Column("timeout", Text),
    Column("max_attempts", Integer),
    Column("memory", Text),
    Column("max_concurrent", Integer),
    Column("error", Text),
    Column("seen_at", Instant, nullable=False),
)

# Sums that outlive the runs they count.
rollup_days = Table(
    "rollup_days",
    metadata,
    Column("day", Date, primary_key=True),
    Column("org_id", Id, primary_key=True),
    Column("runs", BigInteger, nullable=False, server_default="0"),
    Column("attempts", BigInteger, nullable=False, server_default="0"),
    Column("handler_seconds", BigInteger, nullable=False, server_default="0"),
    postgresql_with=UPDATED,
)

rollup_hours = Table(
    "rollup_hours",
    metadata,
    Column("hour", Instant, primary_key=True),
    Column("org_id", Id, primary_key=True),
    Column("state", Text, primary_key=True),
    Column("runs", BigInteger, nullable=False, server_default="0"),
    postgresql_with=UPDATED,
)

# One row a cause of trouble, shared by all workers, until receivers know that it is over.
# `told` is what they know of; `try_at` is when there is something to tell.
alerts = Table(
    "alerts",
    metadata,
    Column("cause", Text, primary_key=True),
    Column("id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("summary", Text, nullable=False),
    Column("fields", json_type(), nullable=False),
    Column("since", Instant, nullable=False),
    Column("struck_at", Instant, nullable=False),
    Column("count", BigInteger, nullable=False),
    Column("over_at", Instant),
    Column("over_how", Text),
    Column("told", Text),
    Column("tries", Integer, nullable=False, server_default="0"),
    Column("try_at", Instant),
    CheckConstraint(one_of("kind", ALERT_KINDS), name="kind"),
    CheckConstraint("told IS NULL OR told = 'firing'", name="told"),
    CheckConstraint("(over_at IS NULL) = (over_how IS NULL)", name="over"),
)

# Whom a cause has struck, a definition or an org, and whether that has done well since.
alert_strikes = Table(
    "alert_strikes",
    metadata,
    Column("cause", Text, primary_key=True),
    Column("subject_id", Id, primary_key=True),
    Column("struck_at", Instant, nullable=False),
    Column("well", Boolean, nullable=False),
)

# Facts of the whole database, such as the tzdata version that schedules were computed with.
facts = Table(
    "facts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

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
    # Row by row as whoever asks may see them, not as the view's owner may.
    "postgresql": f"CREATE VIEW run_view WITH (security_invoker = true) AS {RUN_QUERY}",
}

# Absorbing terminal states: a row of `runs` that has ended never changes again.
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
