"""Calendars: dates on which nothing runs. What is due then is a skip with the reason `calendar`.

A worker of the previous release cannot read a definition that names a calendar, and leaves it to those that
can: use calendars only once all workers have this release.

On PostgreSQL the skips are read once to check the new condition. On SQLite it changes in the stored schema,
as SQLite's documentation of ALTER TABLE says: no row is written again.

Expand first: the workers of the previous release do not notice it.

Revision ID: 0023
Revises: 0022
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0023"
down_revision = "0022"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0022"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
INSTANT = sa.String(27).with_variant(sa.DateTime(timezone=True), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(), "postgresql")

NAME = "ck_skips_reason"
BEFORE = "reason IN ('missed', 'overlap')"
NOW = "reason IN ('missed', 'overlap', 'calendar')"


def upgrade() -> None:
    op.create_table(
        "calendars",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("dates", JSON, nullable=False),
        sa.Column("days", sa.Integer, nullable=False),
        sa.Column("first_date", sa.Date),
        sa.Column("last_date", sa.Date),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("updated_at", INSTANT, nullable=False),
        sa.Column("updated_by", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_calendars")),
        sa.UniqueConstraint("name", name=op.f("uq_calendars_name")),
    )
    op.add_column("definitions", sa.Column("calendar", sa.Text))
    where = sa.text("calendar IS NOT NULL")
    op.create_index(
        "ix_definitions_calendar", "definitions", ["calendar"], postgresql_where=where, sqlite_where=where
    )
    allow_reasons(BEFORE, NOW)


def downgrade() -> None:
    op.execute("UPDATE skips SET reason = 'missed' WHERE reason = 'calendar'")
    allow_reasons(NOW, BEFORE)
    op.drop_index("ix_definitions_calendar", "definitions")
    op.drop_column("definitions", "calendar")
    op.drop_table("calendars")


def allow_reasons(before: str, now: str) -> None:
    """Replace the condition on the reasons of skips."""
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        op.drop_constraint(op.f(NAME), "skips", type_="check")
        op.create_check_constraint(op.f(NAME), "skips", now, postgresql_not_valid=True)
        op.execute(f"ALTER TABLE skips VALIDATE CONSTRAINT {NAME}")
        return
    version = connection.execute(sa.text("PRAGMA schema_version")).scalar_one()
    op.execute("PRAGMA writable_schema = ON")
    stored = "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = 'skips'"
    text = connection.execute(sa.text(stored)).scalar_one()
    old, new = f"CONSTRAINT {NAME} CHECK ({before})", f"CONSTRAINT {NAME} CHECK ({now})"
    if old not in text:
        raise RuntimeError(f"skips lacks the condition {old}")
    connection.execute(
        sa.text("UPDATE sqlite_master SET sql = :sql WHERE type = 'table' AND name = 'skips'"),
        {"sql": text.replace(old, new)},
    )
    op.execute(f"PRAGMA schema_version = {version + 1}")
    # Reads the schema again in this connection, too.
    op.execute("PRAGMA writable_schema = RESET")
