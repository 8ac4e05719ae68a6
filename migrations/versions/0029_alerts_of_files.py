"""Alerts of files with secrets: one was opened to other accounts, or handlers could open it.

Expand first: the workers of the previous release run on this schema, and deliver such alerts too.

Revision ID: 0029
Revises: 0027
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0029"
down_revision = "0027"
# The oldest schema version whose workers run on this one: 0022 to 0029 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

BEFORE = (
    "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead', 'provisioning_failed', 'waiting')"
)
NOW = (
    "kind IN ('failed', 'refused', 'overdue', 'paused', 'credential_dead', 'provisioning_failed', 'waiting', "
    "'files_opened', 'files_changeable')"
)


def upgrade() -> None:
    allow_kinds(BEFORE, NOW)


def downgrade() -> None:
    op.execute(
        "DELETE FROM alert_strikes WHERE cause IN "
        "(SELECT cause FROM alerts WHERE kind IN ('files_opened', 'files_changeable'))"
    )
    op.execute("DELETE FROM alerts WHERE kind IN ('files_opened', 'files_changeable')")
    allow_kinds(NOW, BEFORE)


def allow_kinds(before: str, now: str) -> None:
    """Replace the condition on the kinds of alerts; on SQLite in the stored schema, as in 0014."""
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        op.drop_constraint(op.f("ck_alerts_kind"), "alerts", type_="check")
        op.create_check_constraint(op.f("ck_alerts_kind"), "alerts", now)
        return
    version = connection.execute(sa.text("PRAGMA schema_version")).scalar_one()
    op.execute("PRAGMA writable_schema = ON")
    of_alerts = "FROM sqlite_master WHERE type = 'table' AND name = 'alerts'"
    text = connection.execute(sa.text(f"SELECT sql {of_alerts}")).scalar_one()
    old, new = f"CONSTRAINT ck_alerts_kind CHECK ({before})", f"CONSTRAINT ck_alerts_kind CHECK ({now})"
    if old not in text:
        raise RuntimeError(f"alerts lacks the condition {old}")
    connection.execute(
        sa.text("UPDATE sqlite_master SET sql = :sql WHERE type = 'table' AND name = 'alerts'"),
        {"sql": text.replace(old, new)},
    )
    op.execute(f"PRAGMA schema_version = {version + 1}")
    # Reads the schema again in this connection, too.
    op.execute("PRAGMA writable_schema = RESET")
