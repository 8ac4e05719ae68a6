"""On SQLite, indexes of the unfinished runs that an admission changes as little as possible.

SQLite writes an index entry only if its columns change, and writes each changed page to the log again. So no
admission changes the index of a definition's runs, and a small separate one contains the running ones. No
query uses the index by worker any more. On PostgreSQL an admission costs an entry in each index anyway:
nothing changes there.

Expand first: the indexes serve all queries of the previous release.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
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
