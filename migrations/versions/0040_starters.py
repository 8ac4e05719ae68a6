"""Operators with the role starter, which starts runs over the API and reads those.

Expand first, but add starters only after the deployment: a process of the previous release does not know
the role, and lets its token read.

Revision ID: 0040
Revises: 0039
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0040"
down_revision = "0039"
# The oldest schema version whose workers run on this one: 0022 to 0040 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

BEFORE = "role IN ('viewer', 'operator', 'admin')"
NOW = "role IN ('starter', 'viewer', 'operator', 'admin')"


def upgrade() -> None:
    allow_roles(BEFORE, NOW)


def downgrade() -> None:
    op.execute("DELETE FROM operators WHERE role = 'starter'")
    allow_roles(NOW, BEFORE)


def allow_roles(before: str, now: str) -> None:
    """Replace the condition on the roles of operators; on SQLite in the stored schema, as in 0014."""
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        op.drop_constraint(op.f("ck_operators_role"), "operators", type_="check")
        op.create_check_constraint(op.f("ck_operators_role"), "operators", now)
        return
    version = connection.execute(sa.text("PRAGMA schema_version")).scalar_one()
    op.execute("PRAGMA writable_schema = ON")
    of_operators = "FROM sqlite_master WHERE type = 'table' AND name = 'operators'"
    text = connection.execute(sa.text(f"SELECT sql {of_operators}")).scalar_one()
    old, new = f"CONSTRAINT ck_operators_role CHECK ({before})", f"CONSTRAINT ck_operators_role CHECK ({now})"
    if old not in text:
        raise RuntimeError(f"operators lacks the condition {old}")
    connection.execute(
        sa.text("UPDATE sqlite_master SET sql = :sql WHERE type = 'table' AND name = 'operators'"),
        {"sql": text.replace(old, new)},
    )
    op.execute(f"PRAGMA schema_version = {version + 1}")
    # Reads the schema again in this connection, too.
    op.execute("PRAGMA writable_schema = RESET")
