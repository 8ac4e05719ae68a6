"""What the web side's two roles need: a lookup of callers, and row-level security for what they write.

`find_caller` looks up whose token a request shows, for a role that sees no rows of orgs yet. Templates get
row-level security: an org sees those that made one of its definitions. A row that an org writes refers to
definitions and runs of that org only. Audit rows are never changed or deleted, on SQLite too. The roles, with
their grants and policies, are in worker/store/roles.py, which runs after every upgrade.

Expand first: the workers of the previous release can read and write as before.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
# The oldest schema version whose workers run on this one: the previous, unless this drops what they need.
works_with = "0004"
branch_labels = None
depends_on = None

# As the tables' owner, which row-level security does not restrict. Only the web role may call it.
FIND_CALLER = (
    """
    CREATE FUNCTION find_caller(code text, client_id text, OUT id uuid, OUT issuer text, OUT state text,
                                OUT is_credential boolean)
    RETURNS SETOF record LANGUAGE sql STABLE SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
      SELECT o.id, o.issuer, o.state,
             EXISTS (SELECT 1 FROM credentials c
                     WHERE c.org_id = o.id AND c.client_id = $2 AND c.client_id <> ''
                           AND c.state = 'active')
      FROM orgs o WHERE o.code = $1
    $$
    """,
    "REVOKE ALL ON FUNCTION find_caller(text, text) FROM PUBLIC",
    # The migrator may be a member of the role that owns the tables.
    """
    DO $$ DECLARE owner name := (SELECT tableowner FROM pg_tables
                                 WHERE schemaname = current_schema AND tablename = 'orgs'); BEGIN
      IF owner <> current_user THEN
        EXECUTE format('ALTER FUNCTION find_caller(text, text) OWNER TO %I', owner);
      END IF;
    END $$
    """,
)

ORG = "NULLIF(current_setting('app.org', true), '')::uuid"
# Part of the permissive policy, not a separate restrictive one: a worker's own policy is `true`, so the
# planner drops this one. A restrictive policy would be evaluated for each fired run.
WRITTEN = {
    "runs": "EXISTS (SELECT 1 FROM definitions d WHERE d.id = definition_id AND d.org_id = {org})",
    "live_runs": """
      EXISTS (SELECT 1 FROM runs r WHERE r.id = live_runs.id AND r.org_id = {org}
              AND r.definition_id = live_runs.definition_id)
    """,
    "checkpoints": "EXISTS (SELECT 1 FROM runs r WHERE r.id = run_id AND r.org_id = {org})",
}

APPEND_ONLY = {
    "sqlite": (
        "CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'an audit row never changes'); END",
        "CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'an audit row is never deleted'); END",
        "CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit "
        "WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id) "
        "BEGIN SELECT RAISE(ABORT, 'an audit row never changes'); END",
    ),
    "postgresql": (
        "CREATE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'an audit row is never changed or deleted'; END $$",
        "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only()",
    ),
}


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    for statement in APPEND_ONLY[dialect]:
        op.execute(statement)
    if dialect == "postgresql":
        schema = op.get_bind().execute(sa.text("SELECT quote_ident(current_schema())")).scalar_one()
        for statement in FIND_CALLER:
            op.execute(statement.format(schema=schema))
        part_templates_by_org()
        for table, condition in WRITTEN.items():
            check = condition.format(org=ORG)
            op.execute(f"ALTER POLICY one_org ON {table} WITH CHECK (org_id = {ORG} AND {check})")


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for trigger in ("audit_no_update", "audit_no_delete", "audit_no_replace"):
            op.execute(f"DROP TRIGGER {trigger}")
        return
    op.execute("DROP TRIGGER audit_append_only ON audit")
    op.execute("DROP FUNCTION audit_append_only()")
    op.execute("DROP FUNCTION find_caller(text, text)")
    for table in WRITTEN:
        op.execute(f"ALTER POLICY one_org ON {table} WITH CHECK (org_id = {ORG})")
    op.execute("ALTER TABLE templates DISABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE templates NO FORCE ROW LEVEL SECURITY")
    for policy in ("one_org", "owner", "orgworker_worker", "orgworker_operator"):
        op.execute(f"DROP POLICY IF EXISTS {policy} ON templates")


def part_templates_by_org() -> None:
    """Row-level security as in 0001: the templates that made a definition of the org in `app.org`."""
    made = f"EXISTS (SELECT 1 FROM definitions d WHERE d.template_id = templates.id AND d.org_id = {ORG})"
    op.execute("ALTER TABLE templates ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE templates FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY one_org ON templates USING ({made})")
    op.execute("CREATE POLICY owner ON templates TO CURRENT_USER USING (true)")
