"""On SQLite, indexes of the unfinished runs that an admission changes as little as it can.

SQLite writes an entry only where a column of its index changes, and each page that it
writes once more in the log: the runs of a definition stand in an index that no admission
changes, those of them that run in a small one beside it. Nobody names the index by worker
any more. On PostgreSQL, where an admission costs an entry in each index whatever it
changes, all stays as it is.

Expand first: the workers of the release before find all that they ask for.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
# The oldest schema version whose workers run on this one: the one before, unless this drops what they need.
works_with = "0003"
branch_labels = None
depends_on = None

RUNS = sa.text("started_at IS NOT NULL")


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.create_index("ix_live_runs_definition_id", "live_runs", ["definition_id"])
        op.create_index(
            "ix_live_runs_running_definition_id", "live_runs", ["definition_id"], sqlite_where=RUNS
        )
        op.drop_index("ix_live_runs_definition_id_started_at", "live_runs")
        op.drop_index("ix_live_runs_running_worker_id", "live_runs")


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.create_index(
            "ix_live_runs_running_worker_id",
            "live_runs",
            ["worker_id"],
            sqlite_where=sa.text("worker_id IS NOT NULL"),
        )
        op.create_index("ix_live_runs_definition_id_started_at", "live_runs", ["definition_id", "started_at"])
        op.drop_index("ix_live_runs_running_definition_id", "live_runs")
        op.drop_index("ix_live_runs_definition_id", "live_runs")
