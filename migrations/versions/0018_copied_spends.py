"""Check the spends that the web side copies: they name a run and a definition of the same org.

A retry from the checkpoint copies what its steps spent, also in the role of an org.

Expand first: the workers of the previous release do not notice it.

Revision ID: 0018
Revises: 0017
"""

from __future__ import annotations

from alembic import op

revision = "0018"
down_revision = "0017"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0017"
branch_labels = None
depends_on = None

ORG = "NULLIF(current_setting('app.org', true), '')::uuid"
CHECK = (
    f"org_id = {ORG} AND EXISTS (SELECT 1 FROM runs r WHERE r.id = run_id AND r.org_id = {ORG}) "
    f"AND EXISTS (SELECT 1 FROM definitions d WHERE d.id = definition_id AND d.org_id = {ORG})"
)


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(f"ALTER POLICY one_org ON spends WITH CHECK ({CHECK})")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(f"ALTER POLICY one_org ON spends WITH CHECK (org_id = {ORG})")
