"""The tables, with named constraints; a column's meaning is its `doc`, and stands in the reference.

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
    Column("code", Text, nullable=False, unique=True, doc="As its tokens have it."),
    Column("name", Text, nullable=False, doc="For people."),
    Column("issuer", Text, nullable=False, doc="A table `[issuers.NAME]` of worker.toml."),
    Column(
        "state",
        Text,
        nullable=False,
        server_default="active",
        doc="`active`, `paused`, `suspended` or `removed`.",
    ),
    Column("state_by", Text, doc="Who put it into this state."),
    Column("state_at", Instant, doc="When."),
    Column("state_note", Text, doc="And why, in their words."),
    Column(
        "max_concurrent_runs",
        Integer,
        nullable=False,
        server_default="10",
        doc="Its runs at once, over all workers.",
    ),
    Column(
        "weight",
        Integer,
        nullable=False,
        server_default="1",
        doc="Its share of the slots beside other orgs'.",
    ),
    Column("tags", json_type(), nullable=False, doc="What templates select by."),
    Column("timezone", Text, doc="Of its definitions that name none; else UTC."),
    Column(
        "templates_seen",
        BigInteger,
        nullable=False,
        server_default="0",
        doc="The newest change of a template that it has taken up; 0: look at them all again.",
    ),
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Index("ix_orgs_templates_seen", "templates_seen", "id"),
    CheckConstraint(one_of("state", ORG_STATES), name="state"),
    CheckConstraint("max_concurrent_runs >= 1", name="max_concurrent_runs"),
    CheckConstraint("weight >= 1", name="weight"),
    info={"meaning": "The customer organisations."},
)

credentials = Table(
    "credentials",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    Column("generation", Integer, nullable=False, doc="1, then one more with each."),
    Column("client_id", Text, nullable=False, doc="The machine-to-machine application."),
    Column(
        "sealed",
        LargeBinary,
        doc="The secret or private key, sealed for this row; null where `reference` is used.",
    ),
    Column("reference", Text, doc="`file:NAME` in `secrets_dir`."),
    Column("key_id", Text, doc="The key of the key ring that seals it."),
    Column(
        "kind", Text, nullable=False, server_default="client_secret", doc="`client_secret` or `private_key`."
    ),
    Column("state", Text, nullable=False, server_default="active", doc="`active` or `retired`."),
    Column("created_at", Instant, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("retired_at", Instant, doc="When it was retired; `retire --now` also destroys the secret."),
    Column("last_used_at", Instant, doc="When a token was last asked for with it."),
    Column(
        "uses", BigInteger, nullable=False, server_default="0", doc="How many tokens were asked for with it."
    ),
    Column("last_error", Text, doc="The issuer's answer, where the last request failed."),
    UniqueConstraint("org_id", "generation"),
    CheckConstraint(one_of("state", ("active", "retired")), name="state"),
    CheckConstraint(one_of("kind", ("client_secret", "private_key")), name="kind"),
    info={"meaning": "An org's client ids and secrets at its issuer."},
)

templates = Table(
    "templates",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", Text, nullable=False, unique=True, doc="Also that of the definitions it makes."),
    Column("revision", Integer, nullable=False),
    Column("selector", json_type(), nullable=False, doc="Which orgs it means."),
    Column("spec", json_type(), nullable=False, doc="The keys of the definition."),
    Column("change", BigInteger, nullable=False, doc="Its place among the changes of all templates."),
    Column(
        "orgs_total",
        Integer,
        nullable=False,
        server_default="0",
        doc="How many orgs its last change concerns.",
    ),
    Column("orgs_done", Integer, nullable=False, server_default="0", doc="How many of them it has reached."),
    Column("materialised_at", Instant, doc="When it had reached all."),
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Column("updated_by", Text, nullable=False),
    Column("closed_at", Instant, doc="No definition is made of it any more."),
    info={"meaning": "One definition for many orgs."},
)

definitions = Table(
    "definitions",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    Column("name", Text, nullable=False, doc="Unique within the org."),
    Column("revision", Integer, nullable=False, doc="The one in force."),
    Column("enabled", Boolean, nullable=False, doc="While false nothing is due."),
    Column("paused_at", Instant, doc="Nothing is due from then on, until it is resumed."),
    Column("paused_by", Text, doc="Who paused it."),
    Column("pause_note", Text, doc="And why, in their words."),
    Column(
        "consecutive_failures",
        Integer,
        nullable=False,
        server_default="0",
        doc="Runs that failed or were refused, one after the other.",
    ),
    Column("template_id", Id, ForeignKey("templates.id"), doc="The template that made it."),
    Column("template_revision", Integer, doc="And which of its revisions."),
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Column("closed_at", Instant, doc="Nothing runs any more; a row is never deleted."),
    UniqueConstraint("org_id", "name"),
    Index(
        "ix_definitions_template_id",
        "template_id",
        postgresql_where=text("template_id IS NOT NULL"),
        sqlite_where=text("template_id IS NOT NULL"),
    ),
    info={"meaning": "What an org asked for. Its keys are in `definition_revisions`."},
)

definition_revisions = Table(
    "definition_revisions",
    metadata,
    Column("definition_id", Id, ForeignKey("definitions.id"), primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("spec", json_type(), nullable=False, doc="The keys of the definition, as `apply` reads them."),
    Column("at", Instant, nullable=False, doc="When it was changed."),
    Column("by", Text, nullable=False, doc="By whom."),
    info={"meaning": "Each change of a definition."},
)

schedule = Table(
    "schedule",
    metadata,
    Column("definition_id", Id, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("next_scheduled_for", Instant, doc="The nominal instant; null when nothing is due any more."),
    Column("next_fire_at", Instant, doc="The same plus spread: when it is fired."),
    Index(
        "ix_schedule_next_fire_at",
        "next_fire_at",
        postgresql_where=text("next_fire_at IS NOT NULL"),
        sqlite_where=text("next_fire_at IS NOT NULL"),
    ),
    Index("ix_schedule_org_id", "org_id"),
    postgresql_with=UPDATED,
    info={"meaning": "The next instant of each definition that is active."},
)

runs = Table(
    "runs",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("definition_id", Id, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("handler", Text, nullable=False, doc="The definition's; the attempt names a variant."),
    Column("origin", Text, nullable=False, doc="`schedule`, `manual`, `backfill` or `retry`."),
    Column("scheduled_for", Instant, nullable=False, doc="The nominal instant."),
    Column("created_at", Instant, nullable=False),
    Column("created_by", Text),
    Column("request_key", Text, doc="Of a run by hand: the same key makes one run only."),
    Column("backfill_id", Id, doc="The backfill that made it."),
    Column("retry_of", Id, doc="The run that it tries again."),
    Column("idempotency_key", Id, nullable=False, doc="The same on each attempt and on a retry by hand."),
    Column(
        "params", json_type(), doc="Of a run by hand: the definition's with those given laid over; else null."
    ),
    Column(
        "state",
        Text,
        doc="Null until it has ended: `succeeded`, `failed`, `cancelled`, `refused` or `skipped`.",
    ),
    Column("reason", Text, doc="Why, of a closed set."),
    Column("detail", Text, doc="Why, in particular."),
    Column("available_at", Instant, doc="From when its last attempt might start."),
    Column("started_at", Instant, doc="When its last attempt was admitted."),
    Column("finished_at", Instant, doc="When it ended."),
    Column("attempt", Integer, doc="How many attempts there were."),
    Column("result_fencing_token", BigInteger, doc="That under which it ended."),
    Column("worker_id", Id, doc="The worker that ended it."),
    Column("progress", json_type(), doc="What the handler said last: `done`, `total`, `note`."),
    Column("result", json_type(), doc="What the handler returned."),
    Column("error", json_type(), doc="`type` and `message` of the last error."),
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
    info={"meaning": "Identity and outcome of each run: written when it is fired and when it ends."},
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

live_runs = Table(
    "live_runs",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("definition_id", Id, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("handler", Text, nullable=False, doc="The definition's."),
    Column(
        "variant_handlers",
        json_type(),
        doc="All handlers that an attempt may choose, where there are variants.",
    ),
    Column("isolation", Text, nullable=False, doc="`child` or `inline`."),
    Column("origin", Text, nullable=False, doc="As in `runs`."),
    Column("scheduled_for", Instant, nullable=False, doc="As in `runs`."),
    Column("idempotency_key", Id, nullable=False, doc="As in `runs`."),
    Column("params", json_type(), doc="As in `runs`."),
    Column("backfill_id", Id, doc="As in `runs`."),
    Column("max_concurrent", Integer, doc="The definition's."),
    Column("priority", Integer, nullable=False, server_default="0", doc="The definition's."),
    Column(
        "serial",
        Boolean,
        nullable=False,
        doc="Whether it is the only unfinished run of its definition beside a held one.",
    ),
    Column("state", Text, nullable=False, doc="`waiting`, `held` or `running`."),
    Column("reason", Text, doc="What it waits for; null while it runs."),
    Column("detail", Text, doc="And more of that."),
    Column("available_at", Instant, nullable=False, doc="It may start from then on."),
    Column(
        "start_by", Instant, doc="A scheduled run whose handler never started by then is skipped (`expired`)."
    ),
    Column(
        "attempt", Integer, nullable=False, server_default="0", doc="The attempt that is on, or was last."
    ),
    Column(
        "failures",
        Integer,
        nullable=False,
        server_default="0",
        doc="Attempts that count against `max_attempts`.",
    ),
    Column(
        "recoveries",
        Integer,
        nullable=False,
        server_default="0",
        doc="Those that count against `max_recoveries`.",
    ),
    Column(
        "fencing_token",
        BigInteger,
        nullable=False,
        server_default="0",
        doc="Grows with each admission; every write compares it.",
    ),
    Column("worker_id", Id, doc="The worker that owns it, while it runs."),
    Column("started_at", Instant, doc="When it was admitted."),
    Column("progress", json_type(), doc="As in `runs`."),
    Column("cancel_requested_at", Instant, doc="It was asked to stop."),
    Column("cancel_reason", Text, doc="Why: `requested`, `replaced` or `closed`."),
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
    info={"meaning": "The unfinished runs only: what admission and running need, narrow and hot."},
)

attempts = Table(
    "attempts",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column(
        "attempt",
        Integer,
        primary_key=True,
        doc="1, then one more with each, whatever ended the ones before.",
    ),
    Column("org_id", Id, nullable=False),
    Column("worker_id", Id, nullable=False, doc="The worker that had it."),
    Column("fencing_token", BigInteger, nullable=False, doc="Under which it ran."),
    Column("handler", Text, nullable=False, doc="The one that was chosen."),
    Column("started_at", Instant, nullable=False, doc="When it was admitted."),
    Column("token_ready_at", Instant, doc="When it had its token."),
    Column("handler_started_at", Instant, doc="When its handler was called."),
    Column("ended_at", Instant, nullable=False, doc="When it ended."),
    Column("outcome", Text, nullable=False, doc="How: see the states of a run."),
    Column("error", json_type(), doc="`type` and `message`."),
    Column(
        "error_cause", Text, doc="The error without numbers, ids and quoted texts: the same for one cause."
    ),
    Column("claims", json_type(), doc="What its token said of the org, redacted."),
    Column("flags", json_type(), doc="The value of each feature flag in its token."),
    Column("jti", Text, doc="The token's own id."),
    Column("claims_hash", Text, doc="Tells equal claims."),
    Column("peak_memory", BigInteger, doc="The most that one process of it had in RAM, in bytes."),
    CheckConstraint(one_of("outcome", ATTEMPT_OUTCOMES), name="outcome"),
    Index(
        "ix_attempts_error_cause_ended_at",
        "error_cause",
        "ended_at",
        postgresql_where=text("error_cause IS NOT NULL"),
        sqlite_where=text("error_cause IS NOT NULL"),
    ),
    info={"meaning": "A row a try, written when it ends."},
)

skips = Table(
    "skips",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("definition_id", Id, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("skipped_from", Instant, nullable=False, doc="The first of them."),
    Column("skipped_until", Instant, nullable=False, doc="The last of them."),
    Column("count", Integer, nullable=False, doc="How many."),
    Column("reason", Text, nullable=False, doc="`missed` or `overlap`."),
    CheckConstraint(one_of("reason", ("missed", "overlap")), name="reason"),
    CheckConstraint("count >= 1", name="count"),
    UniqueConstraint("definition_id", "skipped_from"),
    Index("ix_skips_org_id_id", "org_id", "id"),
    Index("ix_skips_skipped_until", "skipped_until"),
    info={"meaning": "Consecutive instants that never became a run."},
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("attempt", Integer, nullable=False, doc="The attempt that saved it."),
    Column("fencing_token", BigInteger, nullable=False, doc="Under which it was saved."),
    Column("saved_at", Instant, nullable=False, doc="When."),
    Column("data", json_type(), nullable=False, doc="What `ctx.save` was given."),
    info={"meaning": "What an unfinished or retried run saved last."},
)

run_logs = Table(
    "run_logs",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column("attempt", Integer, primary_key=True, doc="The attempt that wrote it."),
    Column("seq", Integer, primary_key=True, doc="Its place in the attempt's log."),
    Column("org_id", Id, nullable=False),
    Column("at", Instant, nullable=False, doc="When it was written."),
    Column("level", Text, nullable=False, doc="`debug` to `critical`."),
    Column("source", Text, nullable=False, doc="`log`, `stdout` or `stderr`."),
    Column("text", Text, nullable=False, doc="Without the secrets that the worker knows."),
    Index("ix_run_logs_at", "at"),
    info={"meaning": "The lines of the runs' logs."},
)

workers = Table(
    "workers",
    metadata,
    Column("id", Id, primary_key=True),
    Column("host", Text, nullable=False, doc="The machine."),
    Column("pid", Integer, nullable=False, doc="The process."),
    Column("version", Text, nullable=False, doc="Of orgworker."),
    Column("started_at", Instant, nullable=False, doc="When it started."),
    Column("renewed_at", Instant, nullable=False, doc="When its lease was last renewed."),
    Column("lease_until", Instant, nullable=False, doc="Until when it owns its runs."),
    Column("ended_at", Instant, doc="When it stopped in order, or was found dead."),
    Column("handlers", json_type(), nullable=False, doc="What it offers."),
    Column("capacity", json_type(), nullable=False, doc="How many runs at once: `children`, `inline`."),
    Index(
        "ix_workers_lease_until",
        "lease_until",
        postgresql_where=text("ended_at IS NULL"),
        sqlite_where=text("ended_at IS NULL"),
    ),
    postgresql_with=UPDATED,
    info={
        "meaning": "A row an incarnation: each start of a worker. Its lease is its right to the runs it owns."
    },
)

backfills = Table(
    "backfills",
    metadata,
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    Column("definition_id", Id, ForeignKey("definitions.id"), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("range_from", Instant, nullable=False, doc="The first instant may be this."),
    Column("range_until", Instant, nullable=False, doc="The last is before this."),
    Column(
        "next_scheduled_for", Instant, doc="The first instant that has no run yet; null when each has one."
    ),
    Column(
        "max_concurrent",
        Integer,
        nullable=False,
        server_default="1",
        doc="How many of its runs may be unfinished at once.",
    ),
    Column("instants", BigInteger, nullable=False, doc="How many there are in the range."),
    Column("made", BigInteger, nullable=False, server_default="0", doc="How many have their run."),
    Column("created_at", Instant, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("cancelled_at", Instant, doc="It was stopped."),
    Column("finished_at", Instant, doc="All its runs have ended."),
    UniqueConstraint("definition_id", "range_from", "range_until"),
    Index(
        "ix_backfills_unfinished",
        "id",
        postgresql_where=text("finished_at IS NULL"),
        sqlite_where=text("finished_at IS NULL"),
    ),
    info={"meaning": "Ranges of the past that run again."},
)

audit = Table(
    "audit",
    metadata,
    Column("id", Id, primary_key=True),
    Column("at", Instant, nullable=False, doc="When."),
    Column("actor", Text, nullable=False, doc="The user of the operating system, or the caller of the API."),
    Column("action", Text, nullable=False, doc="What was done."),
    Column("org_id", Id),
    Column("subject", Text, nullable=False, doc="To what."),
    Column("detail", json_type(), doc="With which values; never a secret."),
    Index("ix_audit_org_id_id", "org_id", "id"),
    info={"meaning": "Who changed what. `org_id` is null for what concerns no org or all."},
)

catalogue = Table(
    "catalogue",
    metadata,
    Column("name", Text, primary_key=True, doc="The handler's."),
    Column("distribution", Text, primary_key=True, doc="The plug-in."),
    Column("version", Text, nullable=False, doc="And its version."),
    Column("entry_point", Text, nullable=False, doc="Where its code is."),
    Column(
        "isolation",
        Text,
        nullable=False,
        server_default="child",
        doc="`child` or `inline`, as `@job` says.",
    ),
    Column("scopes", json_type(), nullable=False, doc="Those that its token must have."),
    Column("params_schema", json_type(), doc="The JSON Schema of its params."),
    Column("settings_schema", json_type(), doc="And of its settings."),
    Column("timeout", Text, doc="How long an attempt may take."),
    Column("max_attempts", Integer, doc="Attempts that may fail."),
    Column("memory", Text, doc="The cap on a run's memory."),
    Column("max_concurrent", Integer, doc="The handler's runs at once, over all workers."),
    Column("error", Text, doc="Why it does not load."),
    Column("seen_at", Instant, nullable=False, doc="When a worker last looked."),
    info={"meaning": "What the installed plug-ins offer."},
)

rollup_days = Table(
    "rollup_days",
    metadata,
    Column("day", Date, primary_key=True, doc="The UTC day of the end."),
    Column("org_id", Id, primary_key=True),
    Column("runs", BigInteger, nullable=False, server_default="0", doc="Runs that ended."),
    Column("attempts", BigInteger, nullable=False, server_default="0", doc="Attempts that ended."),
    Column(
        "handler_seconds",
        BigInteger,
        nullable=False,
        server_default="0",
        doc="How long their handlers ran, all together.",
    ),
    postgresql_with=UPDATED,
    info={"meaning": "Sums by UTC day and org, which outlive the runs they count."},
)

rollup_hours = Table(
    "rollup_hours",
    metadata,
    Column("hour", Instant, primary_key=True, doc="The hour of the end."),
    Column("org_id", Id, primary_key=True),
    Column("state", Text, primary_key=True, doc="That they ended in."),
    Column("runs", BigInteger, nullable=False, server_default="0", doc="Runs that ended."),
    postgresql_with=UPDATED,
    info={"meaning": "Sums by hour, org and state, likewise."},
)

alerts = Table(
    "alerts",
    metadata,
    Column("cause", Text, primary_key=True, doc="Which trouble it is."),
    Column("id", Text, nullable=False, doc="That of its posts."),
    Column(
        "kind", Text, nullable=False, doc="`failed`, `refused`, `overdue`, `paused` or `credential_dead`."
    ),
    Column("summary", Text, nullable=False, doc="A sentence for people."),
    Column("fields", json_type(), nullable=False, doc="Those of the event that it was first told by."),
    Column("since", Instant, nullable=False, doc="When it first struck."),
    Column("struck_at", Instant, nullable=False, doc="When it last struck."),
    Column("count", BigInteger, nullable=False, doc="How often."),
    Column("over_at", Instant, doc="When it was over."),
    Column("over_how", Text, doc="And by what."),
    Column("told", Text, doc="What receivers know of: `firing`, or nothing yet."),
    Column("tries", Integer, nullable=False, server_default="0", doc="Posts that nobody took."),
    Column("try_at", Instant, doc="When there is something to tell; null while there is nothing."),
    CheckConstraint(one_of("kind", ALERT_KINDS), name="kind"),
    CheckConstraint("told IS NULL OR told = 'firing'", name="told"),
    CheckConstraint("(over_at IS NULL) = (over_how IS NULL)", name="over"),
    info={
        "meaning": "A row a cause of trouble, shared by all workers, until receivers know that it is over."
    },
)

alert_strikes = Table(
    "alert_strikes",
    metadata,
    Column("cause", Text, primary_key=True, doc="A row of `alerts`."),
    Column("subject_id", Id, primary_key=True, doc="A definition or an org."),
    Column("struck_at", Instant, nullable=False, doc="When it was last struck."),
    Column("well", Boolean, nullable=False, doc="Whether it has done well since."),
    info={"meaning": "Whom a cause has struck."},
)

facts = Table(
    "facts",
    metadata,
    Column("name", Text, primary_key=True, doc="Which."),
    Column("value", Text, nullable=False, doc="What it is."),
    info={"meaning": "Facts of the whole database, such as the tzdata release in use."},
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
