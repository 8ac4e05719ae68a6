"""The words of errors and names of runs that failed, were refused or wait, for the search.

Expand first: workers of the previous release write none, so the search finds their runs by keys alone, as
it does those that ended before.

Revision ID: 0032
Revises: 0031
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0032"
down_revision = "0031"
# The oldest schema version whose workers run on this one: 0022 to 0032 change nothing that these need.
works_with = "0021"
branch_labels = None
depends_on = None

ID = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
ORG = "NULLIF(current_setting('app.org', true), '')::uuid"


def upgrade() -> None:
    op.create_table(
        "run_words",
        sa.Column("word", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("run_id", ID, nullable=False),
        sa.Column("org_id", ID, nullable=False),
        sa.Column("shown", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("word", "run_id", name="pk_run_words"),
    )
    op.create_index("ix_run_words_org_id_word_run_id", "run_words", ["org_id", "word", "run_id"])
    op.create_index("ix_run_words_run_id", "run_words", ["run_id"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE run_words ENABLE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE run_words FORCE ROW LEVEL SECURITY")
        # What an org may not read it may not search for either.
        op.execute(f"CREATE POLICY one_org ON run_words USING (org_id = {ORG} AND shown)")
        op.execute("CREATE POLICY owner ON run_words TO CURRENT_USER USING (true)")


def downgrade() -> None:
    op.drop_table("run_words")
