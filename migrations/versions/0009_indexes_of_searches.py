"""Indexes in the order of ids for the search: ends in the states that are few, and attempts by cause.

Successes, which are most ends, are in none of them. On PostgreSQL no index of `runs` contains the outcome, so
the one of ends is on `run_ends`, which on SQLite is a view.

Expand first: the previous release does not notice it.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0008"
branch_labels = None
depends_on = None

RARE = sa.text("state <> 'succeeded'")
HAS_CAUSE = sa.text("error_cause IS NOT NULL")


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.create_index("ix_runs_rare_state_id", "runs", ["state", "id"], sqlite_where=RARE)
    else:
        op.create_index(
            "ix_run_ends_rare_state_run_id", "run_ends", ["state", "run_id"], postgresql_where=RARE
        )
    op.create_index(
        "ix_attempts_error_cause_run_id",
        "attempts",
        ["error_cause", "run_id"],
        postgresql_where=HAS_CAUSE,
        sqlite_where=HAS_CAUSE,
    )


def downgrade() -> None:
    op.drop_index("ix_attempts_error_cause_run_id", "attempts")
    if op.get_bind().dialect.name == "sqlite":
        op.drop_index("ix_runs_rare_state_id", "runs")
    else:
        op.drop_index("ix_run_ends_rare_state_run_id", "run_ends")
