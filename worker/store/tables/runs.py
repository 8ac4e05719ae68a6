"""Runs: identity and outcome, live state, attempts, logs and skips, and the view over them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Index,
    Integer,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from worker.store.tables.columns import HOT, Id, Instant, json_type, metadata, one_of

ORIGINS = ("schedule", "manual", "backfill", "retry")

FINAL_STATES = ("succeeded", "failed", "cancelled", "refused", "skipped")

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
    # On PostgreSQL no index mentions how a run ended: its update then stays on its page.
    Index("ix_runs_state_finished_at", "state", "finished_at", sqlite_where=text("state IS NOT NULL")).ddl_if(
        dialect="sqlite"
    ),
    postgresql_with={"fillfactor": "50"},
    info={"meaning": "Identity and outcome of each run: written when it is fired and when it ends."},
)

run_ends = Table(
    "run_ends",
    metadata,
    Column("state", Text, primary_key=True, doc="As in `runs`."),
    Column("finished_at", Instant, primary_key=True, doc="As in `runs`."),
    Column("run_id", Id, primary_key=True),
    Column("org_id", Id, nullable=False),
    Column("definition_id", Id, nullable=False),
    info={"meaning": "The runs that have ended, by how and when: triggers keep it; a view on SQLite."},
)

RUN_ENDS = {
    "sqlite": (
        "CREATE VIEW run_ends AS "
        "SELECT state, finished_at, id AS run_id, org_id, definition_id FROM runs WHERE state IS NOT NULL",
    ),
    "postgresql": (
        """
        CREATE FUNCTION runs_ended() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
          INSERT INTO run_ends (state, finished_at, run_id, org_id, definition_id)
          SELECT state, finished_at, id, org_id, definition_id FROM changed WHERE state IS NOT NULL;
          RETURN NULL;
        END $$
        """,
        """
        CREATE TRIGGER runs_ended AFTER UPDATE ON runs REFERENCING NEW TABLE AS changed
        FOR EACH STATEMENT EXECUTE FUNCTION runs_ended()
        """,
        """
        CREATE FUNCTION runs_put() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
          INSERT INTO run_ends (state, finished_at, run_id, org_id, definition_id)
          VALUES (NEW.state, NEW.finished_at, NEW.id, NEW.org_id, NEW.definition_id) ON CONFLICT DO NOTHING;
          RETURN NULL;
        END $$
        """,
        """
        CREATE TRIGGER runs_put AFTER INSERT ON runs FOR EACH ROW WHEN (NEW.state IS NOT NULL)
        EXECUTE FUNCTION runs_put()
        """,
        """
        CREATE FUNCTION runs_forgotten() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
          DELETE FROM run_ends e USING gone g
          WHERE e.state = g.state AND e.finished_at = g.finished_at AND e.run_id = g.id;
          RETURN NULL;
        END $$
        """,
        """
        CREATE TRIGGER runs_forgotten AFTER DELETE ON runs REFERENCING OLD TABLE AS gone
        FOR EACH STATEMENT EXECUTE FUNCTION runs_forgotten()
        """,
    ),
}

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

# How running rows are counted: those of an org, those of a definition, and on PostgreSQL those of a
# worker and along the workers those of a handler; on SQLite all are the one worker's. The words for
# running mean the same, as the constraints say; they differ so that PostgreSQL's planner, whose idea
# of this table is always old, cannot take one index for another.
# An admission costs an entry in each index on PostgreSQL, so there are as few as can be. On SQLite it
# costs those that change: what runs of a definition is parted from what does not.
ON_POSTGRESQL = (
    Index(
        "ix_live_runs_running_worker_id_handler",
        "worker_id",
        "handler",
        postgresql_where=text("worker_id IS NOT NULL"),
    ),
    Index("ix_live_runs_definition_id_started_at", "definition_id", "started_at"),
)
ON_SQLITE = (
    Index("ix_live_runs_definition_id", "definition_id"),
    Index("ix_live_runs_running_definition_id", "definition_id", sqlite_where=text("started_at IS NOT NULL")),
)

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
    Index(
        "ix_live_runs_running_org_id",
        "org_id",
        postgresql_where=text("state = 'running'"),
        sqlite_where=text("state = 'running'"),
    ),
    *(index.ddl_if(dialect="postgresql") for index in ON_POSTGRESQL),
    *(index.ddl_if(dialect="sqlite") for index in ON_SQLITE),
    Index(
        "ix_live_runs_start_by",
        "start_by",
        postgresql_where=text("state = 'waiting' AND start_by IS NOT NULL"),
        sqlite_where=text("state = 'waiting' AND start_by IS NOT NULL"),
    ),
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
