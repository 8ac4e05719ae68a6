"""One index for the unfinished runs of a definition, in place of two.

Each index costs every admission an entry, since what waits and what runs stand in different
parts of most of them. `(definition_id, started_at)` finds the runs of a definition and counts
those that run.

Expand first: the workers of the release before find all that they ask for by the new index.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
# The oldest schema version whose workers run on this one: the one before, unless this drops what they need.
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
