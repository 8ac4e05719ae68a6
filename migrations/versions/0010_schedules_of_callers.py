"""Row-level security for three more tables that an org's request writes, as in 0005.

A row of `schedule` or `skips` that an org writes refers to a definition of that org, and one of `run_ends` to
a run of it. Before, only the row's own `org_id` was checked: a statement that named another org's definition
could give it a scheduled time. The operators' role may also pause orgs and add credentials; its grants are in
worker/store/roles.py, which runs after every upgrade.

Expand first: the workers of the previous release can read and write as before.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0009"
branch_labels = None
depends_on = None

ORG = "NULLIF(current_setting('app.org', true), '')::uuid"
OWN = "EXISTS (SELECT 1 FROM definitions d WHERE d.id = definition_id AND d.org_id = {org})"
# In the permissive policy, as in 0005: a worker's own policy is `true`, so the planner drops this one.
WRITTEN = {
    "schedule": OWN,
    "skips": OWN,
    "run_ends": """
      EXISTS (SELECT 1 FROM runs r WHERE r.id = run_ends.run_id AND r.org_id = {org}
              AND r.definition_id = run_ends.definition_id)
    """,
}


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for table, condition in WRITTEN.items():
            check = condition.format(org=ORG)
            op.execute(f"ALTER POLICY one_org ON {table} WITH CHECK (org_id = {ORG} AND {check})")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for table in WRITTEN:
            op.execute(f"ALTER POLICY one_org ON {table} WITH CHECK (org_id = {ORG})")
