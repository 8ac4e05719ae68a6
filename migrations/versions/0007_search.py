"""Search for orgs by the beginnings of words, and find what is broken.

`org_words` has the words of each org's name and code. `failing_definitions` has the definitions that may be
broken: triggers on `runs` add one when a run of it fails or is refused, and a chore of the worker removes
those that work again, so that a success costs nothing. A partial index finds credentials that the issuer
rejected.

Expand first: the workers of the previous release run on this schema. An org that they add has no words
until its name changes; its code still finds it.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

import re
import unicodedata

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0006"
branch_labels = None
depends_on = None

REJECTED = "last_error IS NOT NULL AND state = 'active'"
ORG = "NULLIF(current_setting('app.org', true), '')::uuid"

ON_SQLITE = tuple(
    f"""
    CREATE TRIGGER {name} AFTER {event} ON runs
    WHEN NEW.state IN ('failed', 'refused') AND NEW.origin <> 'backfill' BEGIN
      INSERT INTO failing_definitions (definition_id, org_id, run_id)
      VALUES (NEW.definition_id, NEW.org_id, NEW.id)
      ON CONFLICT (definition_id) DO UPDATE SET run_id = excluded.run_id;
    END
    """
    for name, event in (("runs_failing", "UPDATE OF state"), ("runs_failing_put", "INSERT"))
)
# In the order of ids: two batches cannot deadlock. The check comes first, because the web side, which
# cancels runs, may not write this table.
ENDED = """
CREATE OR REPLACE FUNCTION runs_ended() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO run_ends (state, finished_at, run_id, org_id, definition_id)
  SELECT state, finished_at, id, org_id, definition_id FROM changed WHERE state IS NOT NULL;
  IF EXISTS (SELECT 1 FROM changed WHERE state IN ('failed', 'refused') AND origin <> 'backfill') THEN
    INSERT INTO failing_definitions (definition_id, org_id, run_id)
    SELECT DISTINCT ON (definition_id) definition_id, org_id, id FROM changed
    WHERE state IN ('failed', 'refused') AND origin <> 'backfill' ORDER BY definition_id, id DESC
    ON CONFLICT (definition_id) DO UPDATE SET run_id = excluded.run_id;
  END IF;
  RETURN NULL;
END $$
"""
PUT = """
CREATE OR REPLACE FUNCTION runs_put() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO run_ends (state, finished_at, run_id, org_id, definition_id)
  VALUES (NEW.state, NEW.finished_at, NEW.id, NEW.org_id, NEW.definition_id) ON CONFLICT DO NOTHING;
  IF NEW.state IN ('failed', 'refused') AND NEW.origin <> 'backfill' THEN
    INSERT INTO failing_definitions (definition_id, org_id, run_id)
    VALUES (NEW.definition_id, NEW.org_id, NEW.id)
    ON CONFLICT (definition_id) DO UPDATE SET run_id = excluded.run_id;
  END IF;
  RETURN NULL;
END $$
"""
ENDED_BEFORE = """
CREATE OR REPLACE FUNCTION runs_ended() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO run_ends (state, finished_at, run_id, org_id, definition_id)
  SELECT state, finished_at, id, org_id, definition_id FROM changed WHERE state IS NOT NULL;
  RETURN NULL;
END $$
"""
PUT_BEFORE = """
CREATE OR REPLACE FUNCTION runs_put() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO run_ends (state, finished_at, run_id, org_id, definition_id)
  VALUES (NEW.state, NEW.finished_at, NEW.id, NEW.org_id, NEW.definition_id) ON CONFLICT DO NOTHING;
  RETURN NULL;
END $$
"""
FILL = {
    "sqlite": """
    INSERT INTO failing_definitions (definition_id, org_id, run_id)
    SELECT definition_id, org_id, max(run_id) FROM run_ends WHERE state IN ('failed', 'refused')
    GROUP BY definition_id
    """,
    "postgresql": """
    INSERT INTO failing_definitions (definition_id, org_id, run_id)
    SELECT DISTINCT ON (definition_id) definition_id, org_id, run_id FROM run_ends
    WHERE state IN ('failed', 'refused') {since} ORDER BY definition_id, run_id DESC
    ON CONFLICT (definition_id) DO NOTHING
    """,
}
SINCE = "AND finished_at > transaction_timestamp() - interval '1 hour'"
# Words longer than this are cut.
MAX_WORD = 64
# Orgs whose words are written at a time.
BATCH = 1000


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    id_ = postgresql.UUID(as_uuid=False) if dialect == "postgresql" else sa.String(36)
    word = sa.Text(collation="C") if dialect == "postgresql" else sa.Text()
    op.create_table(
        "org_words",
        sa.Column("word", word, nullable=False),
        sa.Column("org_id", id_, nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["orgs.id"], name="fk_org_words_org_id_orgs"),
        sa.PrimaryKeyConstraint("word", "org_id", name="pk_org_words"),
    )
    op.create_index("ix_org_words_org_id_word", "org_words", ["org_id", "word"])
    op.create_table(
        "failing_definitions",
        sa.Column("definition_id", id_, nullable=False),
        sa.Column("org_id", id_, nullable=False),
        sa.Column("run_id", id_, nullable=False),
        sa.PrimaryKeyConstraint("definition_id", name="pk_failing_definitions"),
    )
    op.create_index("ix_failing_definitions_org_id", "failing_definitions", ["org_id"])
    op.create_index(
        "ix_credentials_rejected_org_id",
        "credentials",
        ["org_id"],
        postgresql_where=sa.text(REJECTED),
        sqlite_where=sa.text(REJECTED),
    )
    fill_words(op.get_bind())
    if dialect == "sqlite":
        op.execute(FILL[dialect])
        for trigger in ON_SQLITE:
            op.execute(trigger)
        return
    for table in ("org_words", "failing_definitions"):
        part_rows_by_org(table)
    # The slow statement first, and no worker waits for it. Then the runs that ended meanwhile.
    op.execute(FILL[dialect].format(since=""))
    op.execute("LOCK TABLE runs IN SHARE ROW EXCLUSIVE MODE")
    op.execute(ENDED)
    op.execute(PUT)
    op.execute(FILL[dialect].format(since=SINCE))


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER runs_failing")
        op.execute("DROP TRIGGER runs_failing_put")
    else:
        op.execute(ENDED_BEFORE)
        op.execute(PUT_BEFORE)
    op.drop_index("ix_credentials_rejected_org_id", "credentials")
    op.drop_table("failing_definitions")
    op.drop_table("org_words")


def fill_words(connection: sa.Connection) -> None:
    """The words of the orgs that are there."""
    page = sa.text("SELECT id, code, name FROM orgs WHERE code > :after ORDER BY code LIMIT :limit")
    put = sa.text("INSERT INTO org_words (word, org_id) VALUES (:word, :org_id)")
    after = ""
    while rows := connection.execute(page, {"after": after, "limit": BATCH}).all():
        words = [
            {"word": word, "org_id": row.id} for row in rows for word in sorted(words_of(row.code, row.name))
        ]
        connection.execute(put, words)
        after = rows[-1].code


def words_of(*texts: str) -> set[str]:
    """As `worker.model.search.words_of`."""
    found: set[str] = set()
    for text in texts:
        plain = unicodedata.normalize("NFKD", text.casefold())
        for part in "".join(letter for letter in plain if not unicodedata.combining(letter)).split():
            found |= {part, *re.findall(r"[^\W_]+", part)}
    return {word[:MAX_WORD] for word in found}


def part_rows_by_org(table: str) -> None:
    """Row-level security as in 0001."""
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY one_org ON {table} USING (org_id = {ORG})")
    op.execute(f"CREATE POLICY owner ON {table} TO CURRENT_USER USING (true)")
