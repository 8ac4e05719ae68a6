"""Runs that runs start: who started which, what they may have, and what a parent waits for.

Expand first: the workers of the previous release start none. They would run a child without the cap of its
parent, so the first handler that starts others is applied once all workers are of this release.

Revision ID: 0041
Revises: 0040
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0041"
down_revision = "0040"
# The oldest schema version whose workers run on this one: 0022 to 0041 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(), "postgresql")
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
        "runs",
        "ck_runs_origin",
        "origin IN ('schedule', 'manual', 'backfill', 'retry')",
        "origin IN ('schedule', 'manual', 'backfill', 'retry', 'child')",
    ),
    (
        "waits",
        "ck_waits_kind",
        "kind IN ('sleep', 'answer', 'budget')",
        "kind IN ('sleep', 'answer', 'budget', 'children')",
    ),
)
IS_CHILD = "parent_id IS NOT NULL"
WAITS = "state = 'parked' AND reason = 'children'"
# What the ends of runs leave out: with the first release of children, these too.
BEFORE = ("'backfill'", "")
NOW = ("'backfill', 'child'", " AND origin <> 'child'")


def upgrade() -> None:
    op.create_table(
        "parents",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("root_id", ID, nullable=False),
        sa.Column("depth", sa.Integer, nullable=False),
        sa.Column("cap", JSON, nullable=False),
        sa.Column("keep", sa.Boolean, nullable=False),
        sa.Column("started", sa.Integer, server_default="0", nullable=False),
        sa.Column("seen", sa.Integer, server_default="0", nullable=False),
        sa.Column("tree", sa.Integer, server_default="0", nullable=False),
        sa.Column("windows", JSON),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_parents")),
        postgresql_with=UPDATED,
    )
    op.create_table(
        "children",
        sa.Column("parent_id", ID, nullable=False),
        sa.Column("place", sa.Integer, nullable=False),
        sa.Column("run_id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("root_id", ID, nullable=False),
        sa.Column("depth", sa.Integer, nullable=False),
        sa.Column("handler", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("occurrence", sa.Integer, nullable=False),
        sa.Column("seen", sa.Integer),
        sa.Column("map", sa.Integer),
        sa.PrimaryKeyConstraint("parent_id", "place", name=op.f("pk_children")),
        sa.UniqueConstraint(
            *("parent_id", "handler", "key", "occurrence"),
            name=op.f("uq_children_parent_id_handler_key_occurrence"),
        ),
    )
    op.create_table(
        "tree_spends",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("meter", sa.Text, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("used", sa.BigInteger, server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("run_id", "meter", name=op.f("pk_tree_spends")),
        postgresql_with=UPDATED,
    )
    op.create_index("ix_children_run_id", "children", ["run_id"])
    op.create_index("ix_children_root_id_depth", "children", ["root_id", "depth"])
    op.add_column("live_runs", sa.Column("parent_id", ID))
    op.add_column("live_runs", sa.Column("place", sa.Integer))
    op.create_index("ix_live_runs_parent_id_place", "live_runs", ["parent_id", "place"], **where(IS_CHILD))
    op.create_index("ix_live_runs_parked_children", "live_runs", ["id"], **where(WAITS))
    op.create_index("ix_runs_listed_id", "runs", ["id"], **where("origin <> 'child'"))
    op.add_column("waits", sa.Column("children", JSON))
    for table in ("catalogue", "host_handlers"):
        op.add_column(table, sa.Column("children", JSON, server_default="[]", nullable=False))
    if op.get_bind().dialect.name == "postgresql":
        # Row-level security as in 0001; a row that an org writes refers to a run of it, as in 0010.
        for table in ("parents", "children", "tree_spends"):
            op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
            op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
            op.execute(
                f"CREATE POLICY one_org ON {table} USING (org_id = {ORG}) WITH CHECK (org_id = {ORG} AND "
                f"EXISTS (SELECT 1 FROM runs r WHERE r.id = {table}.run_id AND r.org_id = {ORG}))"
            )
            op.execute(f"CREATE POLICY owner ON {table} TO CURRENT_USER USING (true)")
    for check in CHECKS:
        change_check(*check)
    leave_out(*NOW)


def downgrade() -> None:
    # No release before this one knows what to do with a child.
    op.execute("DELETE FROM live_runs WHERE parent_id IS NOT NULL")
    op.execute("DELETE FROM runs WHERE origin = 'child'")
    op.execute(
        "UPDATE live_runs SET state = 'waiting', reason = 'due', started_at = NULL "
        "WHERE state = 'parked' AND reason IN ('children', 'window')"
    )
    op.execute("DELETE FROM waits WHERE kind = 'children'")
    leave_out(*BEFORE)
    for table, name, before, now in CHECKS:
        change_check(table, name, now, before)
    for table in ("host_handlers", "catalogue"):
        op.drop_column(table, "children")
    op.drop_column("waits", "children")
    op.drop_index("ix_runs_listed_id", "runs")
    op.drop_index("ix_live_runs_parked_children", "live_runs")
    op.drop_index("ix_live_runs_parent_id_place", "live_runs")
    op.drop_column("live_runs", "place")
    op.drop_column("live_runs", "parent_id")
    op.drop_table("tree_spends")
    op.drop_table("children")
    op.drop_table("parents")


def where(condition: str) -> dict[str, sa.TextClause]:
    """Options that make an index a partial one on both databases."""
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def leave_out(origins: str, listed: str) -> None:
    """Which runs count as failures of their definition, and which ended ones `run_ends` lists."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            f"""
            CREATE OR REPLACE FUNCTION runs_ended() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
              INSERT INTO run_ends (state, finished_at, run_id, org_id, definition_id)
              SELECT state, finished_at, id, org_id, definition_id FROM changed
              WHERE state IS NOT NULL{listed};
              IF EXISTS (SELECT 1 FROM changed
                         WHERE state IN ('failed', 'refused') AND origin NOT IN ({origins})) THEN
                INSERT INTO failing_definitions (definition_id, org_id, run_id)
                SELECT DISTINCT ON (definition_id) definition_id, org_id, id FROM changed
                WHERE state IN ('failed', 'refused') AND origin NOT IN ({origins})
                ORDER BY definition_id, id DESC
                ON CONFLICT (definition_id) DO UPDATE SET run_id = excluded.run_id;
              END IF;
              RETURN NULL;
            END $$
            """
        )
        op.execute(
            f"""
            CREATE OR REPLACE FUNCTION runs_put() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
              INSERT INTO run_ends (state, finished_at, run_id, org_id, definition_id)
              SELECT NEW.state, NEW.finished_at, NEW.id, NEW.org_id, NEW.definition_id
              WHERE true{listed.replace("origin", "NEW.origin")} ON CONFLICT DO NOTHING;
              IF NEW.state IN ('failed', 'refused') AND NEW.origin NOT IN ({origins}) THEN
                INSERT INTO failing_definitions (definition_id, org_id, run_id)
                VALUES (NEW.definition_id, NEW.org_id, NEW.id)
                ON CONFLICT (definition_id) DO UPDATE SET run_id = excluded.run_id;
              END IF;
              RETURN NULL;
            END $$
            """
        )
        return
    for name, event in (("runs_failing", "UPDATE OF state"), ("runs_failing_put", "INSERT")):
        op.execute(f"DROP TRIGGER {name}")
        op.execute(
            f"""
            CREATE TRIGGER {name} AFTER {event} ON runs
            WHEN NEW.state IN ('failed', 'refused') AND NEW.origin NOT IN ({origins}) BEGIN
              INSERT INTO failing_definitions (definition_id, org_id, run_id)
              VALUES (NEW.definition_id, NEW.org_id, NEW.id)
              ON CONFLICT (definition_id) DO UPDATE SET run_id = excluded.run_id;
            END
            """
        )
    op.execute("DROP VIEW run_ends")
    op.execute(
        "CREATE VIEW run_ends AS SELECT state, finished_at, id AS run_id, org_id, definition_id FROM runs "
        f"WHERE state IS NOT NULL{listed}"
    )


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
