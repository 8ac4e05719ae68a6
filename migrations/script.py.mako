"""${message}.

Expand first: the workers of the previous release must be able to use this schema. What they need is dropped
one release later, in a separate revision. A new table with org data gets its row-level security here, as in
0001. Changed views, triggers and functions go into tests/migrations/ddl.py, too.

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
