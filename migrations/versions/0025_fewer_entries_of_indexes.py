"""Fewer entries of indexes for each run.

No statement looks for the schedules of an org, so their index goes. On PostgreSQL a page of `runs` keeps more
room: the end of a run makes its row larger by half, and with 50 % a quarter of the ends moved their rows to
other pages, which costs an entry in every index. The table grows no faster: it had as many pages for those.

Expand first: the workers of the previous release run on this schema.

Revision ID: 0025
Revises: 0024
"""

from __future__ import annotations

from alembic import op

revision = "0025"
down_revision = "0024"
# The oldest schema version whose workers run on this one: 0022 to 0025 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_schedule_org_id", "schedule")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE runs SET (fillfactor = 40)")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE runs SET (fillfactor = 50)")
    op.create_index("ix_schedule_org_id", "schedule", ["org_id"])
