"""Bound secrets: the origin that a secret of an org may go to, and the header that the broker sets.

Expand first: the workers of the previous release do not open a bound secret, and its runs wait.

Revision ID: 0034
Revises: 0033
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0034"
down_revision = "0033"
# The oldest schema version whose workers run on this one: 0022 to 0034 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

COLUMNS = ("origin", "header")


def upgrade() -> None:
    for name in COLUMNS:
        op.add_column("org_secrets", sa.Column(name, sa.Text))


def downgrade() -> None:
    for name in reversed(COLUMNS):
        op.drop_column("org_secrets", name)
