"""Options of waits: the only answers that a wait takes, and one that came before them and is not among them.

Expand first: the workers of the previous release run on this schema. They take any answer; one that is no
option is refused when the handler waits for it again, which only this release's handlers do.

Revision ID: 0030
Revises: 0029
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0030"
down_revision = "0029"
# The oldest schema version whose workers run on this one: 0022 to 0030 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("waits", sa.Column("options", JSON))
    op.add_column("waits", sa.Column("refused", JSON))


def downgrade() -> None:
    op.drop_column("waits", "refused")
    op.drop_column("waits", "options")
