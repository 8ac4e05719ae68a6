"""What the tries of runs leave behind, and the instants that never became a run."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from worker.store.tables.columns import Id, Instant, json_type, metadata, one_of

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
