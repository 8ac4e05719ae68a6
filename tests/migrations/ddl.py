"""Views, triggers and functions that the migrations make, in their current form.

A migration that changes one of these changes it here, too.
"""

from __future__ import annotations

RUN_ENDS = {
    "sqlite": (
        "CREATE VIEW run_ends AS "
        "SELECT state, finished_at, id AS run_id, org_id, definition_id FROM runs "
        "WHERE state IS NOT NULL AND origin <> 'child'",
        *(
            f"""
            CREATE TRIGGER {name} AFTER {event} ON runs
            WHEN NEW.state IN ('failed', 'refused') AND NEW.origin NOT IN ('backfill', 'child') BEGIN
              INSERT INTO failing_definitions (definition_id, org_id, run_id)
              VALUES (NEW.definition_id, NEW.org_id, NEW.id)
              ON CONFLICT (definition_id) DO UPDATE SET run_id = excluded.run_id;
            END
            """
            for name, event in (("runs_failing", "UPDATE OF state"), ("runs_failing_put", "INSERT"))
        ),
    ),
    "postgresql": (
        """
        CREATE FUNCTION runs_ended() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
          INSERT INTO run_ends (state, finished_at, run_id, org_id, definition_id)
          SELECT state, finished_at, id, org_id, definition_id FROM changed
          WHERE state IS NOT NULL AND origin <> 'child';
          IF EXISTS (SELECT 1 FROM changed
                     WHERE state IN ('failed', 'refused') AND origin NOT IN ('backfill', 'child')) THEN
            INSERT INTO failing_definitions (definition_id, org_id, run_id)
            SELECT DISTINCT ON (definition_id) definition_id, org_id, id FROM changed
            WHERE state IN ('failed', 'refused') AND origin NOT IN ('backfill', 'child')
            ORDER BY definition_id, id DESC
            ON CONFLICT (definition_id) DO UPDATE SET run_id = excluded.run_id;
          END IF;
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
          SELECT NEW.state, NEW.finished_at, NEW.id, NEW.org_id, NEW.definition_id
          WHERE true AND NEW.origin <> 'child' ON CONFLICT DO NOTHING;
          IF NEW.state IN ('failed', 'refused') AND NEW.origin NOT IN ('backfill', 'child') THEN
            INSERT INTO failing_definitions (definition_id, org_id, run_id)
            VALUES (NEW.definition_id, NEW.org_id, NEW.id)
            ON CONFLICT (definition_id) DO UPDATE SET run_id = excluded.run_id;
          END IF;
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
       COALESCE(r.state, CASE WHEN l.state IN ('held', 'parked') THEN 'waiting' ELSE l.state END) AS state,
       CASE WHEN r.state IS NOT NULL THEN r.reason
            WHEN l.state = 'held' THEN 'held'
            WHEN l.state IN ('waiting', 'parked') THEN l.reason END AS reason,
       COALESCE(r.detail, l.detail) AS detail,
       COALESCE(r.available_at,
                CASE WHEN l.state <> 'parked' OR l.available_at < '9999-01-01T00:00:00.000000Z'
                     THEN l.available_at END) AS available_at,
       COALESCE(r.attempt, l.attempt) AS attempt,
       COALESCE(r.result_fencing_token, l.fencing_token) AS fencing_token,
       r.result_fencing_token,
       COALESCE(r.worker_id, l.worker_id) AS worker,
       COALESCE(r.started_at, CASE WHEN l.state <> 'parked' THEN l.started_at END) AS started_at,
       r.finished_at,
       COALESCE(r.progress, l.progress) AS progress,
       r.result, r.error, r.params, l.cancel_requested_at, r.pool
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

# Final states are absorbing: a row of `runs` that has ended never changes again.
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

# Looks up whose token a request shows, for a role that sees no rows of orgs yet.
FIND_CALLER = {
    "sqlite": (),
    "postgresql": (
        """
        CREATE FUNCTION find_caller(code text, client_id text, OUT id uuid, OUT issuer text, OUT state text,
                                    OUT is_credential boolean)
        RETURNS SETOF record LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
          SELECT o.id, o.issuer, o.state,
                 EXISTS (SELECT 1 FROM credentials c
                         WHERE c.org_id = o.id AND c.client_id = $2 AND c.client_id <> ''
                           AND c.state = 'active')
          FROM orgs o WHERE o.code = $1
        $$
        """,
        "REVOKE ALL ON FUNCTION find_caller(text, text) FROM PUBLIC",
    ),
}

# The words of a renamed org are added again by whoever renames it, or by a chore.
ORGS_RENAMED = {
    "sqlite": (
        "CREATE TRIGGER orgs_renamed AFTER UPDATE OF name ON orgs WHEN NEW.name <> OLD.name "
        "BEGIN DELETE FROM org_words WHERE org_id = NEW.id; END",
    ),
    "postgresql": (
        "CREATE FUNCTION orgs_renamed() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN DELETE FROM org_words WHERE org_id = NEW.id; RETURN NULL; END $$",
        "CREATE TRIGGER orgs_renamed AFTER UPDATE OF name ON orgs FOR EACH ROW "
        "WHEN (NEW.name <> OLD.name) EXECUTE FUNCTION orgs_renamed()",
    ),
}

# An audit row never changes and is never deleted, whatever the role. SQLite's REPLACE does not fire
# the DELETE trigger.
APPEND_ONLY = {
    "sqlite": (
        "CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'an audit row never changes'); END",
        "CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'an audit row is never deleted'); END",
        "CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit "
        "WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id) "
        "BEGIN SELECT RAISE(ABORT, 'an audit row never changes'); END",
    ),
    "postgresql": (
        "CREATE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'an audit row is never changed or deleted'; END $$",
        "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only()",
    ),
}
