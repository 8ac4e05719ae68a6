"""The ends of runs in a separate table; drop an index of running runs.

On PostgreSQL an update stays on its page only if it changes no indexed column; any other update costs an
entry in every index of its table. So no index of `runs` contains the outcome: `run_ends` does, which triggers
maintain. On SQLite, where an update costs only the changed entries, it is a view. The running runs of a
handler are counted along the workers; on SQLite one index finds those of the one worker (the index used by
the previous release stays until the next).

Expand first: the workers of the previous release run on this schema. Their retention, and their count for a
handler with its own limit, are slower on it.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0002"
branch_labels = None
depends_on = None

RUNS = "worker_id IS NOT NULL"
VIEW = """
CREATE VIEW run_ends AS
SELECT state, finished_at, id AS run_id, org_id, definition_id FROM runs WHERE state IS NOT NULL
"""
TRIGGERS = (
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
)
# The runs that ended before; then, with the triggers in place, those that ended meanwhile.
FILL = """
INSERT INTO run_ends (state, finished_at, run_id, org_id, definition_id)
SELECT state, finished_at, id, org_id, definition_id FROM runs
WHERE state IN ({states}) {since} ON CONFLICT DO NOTHING
"""
STATES = "'succeeded', 'failed', 'cancelled', 'refused', 'skipped'"
SINCE = "AND finished_at > transaction_timestamp() - interval '1 hour'"


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute(VIEW)
        op.drop_index("ix_live_runs_running_handler", "live_runs")
        return
    op.create_table(
        "run_ends",
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("run_id", postgresql.UUID(as_uuid=False), nullable=False),
        sa.Column("org_id", postgresql.UUID(as_uuid=False), nullable=False),
        sa.Column("definition_id", postgresql.UUID(as_uuid=False), nullable=False),
        sa.PrimaryKeyConstraint("state", "finished_at", "run_id", name="pk_run_ends"),
    )
    part_rows_by_org()
    # The only slow statement, and no worker waits for it.
    op.execute(FILL.format(states=STATES, since=""))
    for statement in TRIGGERS:
        op.execute(statement)
    op.execute(FILL.format(states=STATES, since=SINCE))
    op.drop_index("ix_runs_state_finished_at", "runs")
    op.execute("ALTER TABLE runs SET (fillfactor = 50)")
    op.create_index(
        "ix_live_runs_running_worker_id_handler", "live_runs", ["worker_id", "handler"], **where(RUNS)
    )
    op.drop_index("ix_live_runs_running_worker_id", "live_runs")
    op.drop_index("ix_live_runs_running_handler", "live_runs")


def downgrade() -> None:
    op.create_index("ix_live_runs_running_handler", "live_runs", ["handler"], **where("reason IS NULL"))
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP VIEW run_ends")
        return
    op.drop_index("ix_live_runs_running_worker_id_handler", "live_runs")
    op.create_index("ix_live_runs_running_worker_id", "live_runs", ["worker_id"], **where(RUNS))
    op.execute("ALTER TABLE runs RESET (fillfactor)")
    op.create_index(
        "ix_runs_state_finished_at", "runs", ["state", "finished_at"], **where("state IS NOT NULL")
    )
    for trigger in ("runs_ended", "runs_put", "runs_forgotten"):
        op.execute(f"DROP TRIGGER {trigger} ON runs")
        op.execute(f"DROP FUNCTION {trigger}()")
    op.drop_table("run_ends")


def part_rows_by_org() -> None:
    """Row-level security as in 0001."""
    org = "NULLIF(current_setting('app.org', true), '')::uuid"
    op.execute("ALTER TABLE run_ends ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE run_ends FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY one_org ON run_ends USING (org_id = {org})")
    op.execute("CREATE POLICY owner ON run_ends TO CURRENT_USER USING (true)")


def where(predicate: str) -> dict[str, sa.TextClause]:
    """A partial index on both dialects."""
    return {"postgresql_where": sa.text(predicate), "sqlite_where": sa.text(predicate)}
