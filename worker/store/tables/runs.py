"""Identity and outcome of the runs, and the view that shows them with what is live."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Column, Index, Integer, Table, Text, text

from worker.store.tables.columns import Id, Instant, json_type, metadata, one_of

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
