"""One index for the unfinished runs of a definition instead of two.

Each index costs every admission an entry, because waiting and running runs are in different parts of most
indexes. `(definition_id, started_at)` finds the runs of a definition and counts the running ones.

Expand first: the new index serves all queries of the previous release.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0001"
branch_labels = None
depends_on = None

RUNNING = "started_at IS NOT NULL"


def upgrade() -> None:
    op.create_index("ix_live_runs_definition_id_started_at", "live_runs", ["definition_id", "started_at"])
    op.drop_index("ix_live_runs_running_definition_id", "live_runs")
    op.drop_index("ix_live_runs_definition_id", "live_runs")


def downgrade() -> None:
    op.create_index("ix_live_runs_definition_id", "live_runs", ["definition_id"])
    op.create_index(
        "ix_live_runs_running_definition_id",
        "live_runs",
        ["definition_id"],
        postgresql_where=sa.text(RUNNING),
        sqlite_where=sa.text(RUNNING),
    )
    op.drop_index("ix_live_runs_definition_id_started_at", "live_runs")
