"""Roles on PostgreSQL: who may do what, and which rows the web side may see.

Row-level security is in force on every table with org data (migration 0001): a session
sees the rows of the org in `app.org`, and none where that is not set. Only the owner and
members of `orgworker_worker` see all. The web side acts as `orgworker_web`, also where
its login is the worker's: a query that forgets its org then finds nothing.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

from worker.ids import OrgId
from worker.store import tables

WORKER = "orgworker_worker"
WEB = "orgworker_web"

# What has rows of orgs; all else is the same for every org, or nobody's.
_OF_ORGS = ("orgs", "definition_revisions", "alerts", "alert_strikes")
ORG_DATA = tuple(
    table.name for table in tables.metadata.sorted_tables if "org_id" in table.c or table.name in _OF_ORGS
)
_ALL = ", ".join([*tables.metadata.tables, "run_view", "alembic_version"])
_GRANTS = {
    WORKER: (f"GRANT SELECT, INSERT, UPDATE, DELETE ON {_ALL} TO {WORKER}",),
    WEB: (
        f"GRANT SELECT ON {_ALL} TO {WEB}",
        f"GRANT INSERT, UPDATE, DELETE ON {', '.join(ORG_DATA)} TO {WEB}",
    ),
}

# A role may exist already: made by hand, or by a migration of another database.
_CREATE = """
DO $$ BEGIN CREATE ROLE {role} NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation OR insufficient_privilege THEN NULL; END $$
"""
_JOIN = """
DO $$ BEGIN IF NOT pg_has_role('{role}', 'MEMBER') THEN GRANT {role} TO CURRENT_USER; END IF;
EXCEPTION WHEN insufficient_privilege OR invalid_grant_operation THEN NULL; END $$
"""
_EXISTS = text("SELECT 1 FROM pg_roles WHERE rolname = :role")
_POLICIES = text("SELECT tablename FROM pg_policies WHERE schemaname = current_schema AND policyname = :name")

_MAY_ACT = text(
    "SELECT COALESCE((SELECT pg_has_role(oid, 'MEMBER') FROM pg_roles WHERE rolname = :web), false)"
)
_WHO = text("""
SELECT current_user, r.rolsuper OR r.rolbypassrls,
       EXISTS (SELECT 1 FROM pg_class c WHERE c.oid = to_regclass('runs') AND c.relowner = r.oid)
FROM pg_roles r WHERE r.rolname = current_user
""")


def grant(connection: Connection) -> None:
    """Make the roles where this login may, and let them do what they are for; again, it changes nothing."""
    for role in (WORKER, WEB):
        connection.execute(text(_CREATE.format(role=role)))
        if connection.execute(_EXISTS, {"role": role}).first() is None:
            continue
        connection.execute(text(_JOIN.format(role=role)))
        for statement in _GRANTS[role]:
            connection.execute(text(statement))
        if role == WORKER:
            _let_see_all(connection, role)


def _let_see_all(connection: Connection, role: str) -> None:
    done = set(connection.execute(_POLICIES, {"name": role}).scalars())
    for table in ORG_DATA:
        if table not in done:
            connection.execute(text(f"CREATE POLICY {role} ON {table} TO {role} USING (true)"))


def may_act_as_web(connection: Connection) -> bool:
    """Whether this login can take the web role."""
    return bool(connection.execute(_MAY_ACT, {"web": WEB}).scalar_one())


def act_as_web(connection: Connection, org_id: OrgId) -> None:
    """For the rest of this transaction: the web role, and this org's rows only."""
    connection.execute(text(f"SET LOCAL ROLE {WEB}"))
    connection.execute(text("SELECT set_config('app.org', :org, true)"), {"org": org_id})


def warnings(connection: Connection) -> list[str]:
    """What about this login leaves the web side with more rights than it needs."""
    user, is_above, is_owner = connection.execute(_WHO).one()
    said = []
    if is_above:
        said.append(f"the login {user} is a superuser or bypasses row-level security: use an ordinary one")
    if is_owner:
        said.append(f"the login {user} owns the tables: name the owner in database.owner_url only")
    if not may_act_as_web(connection):
        said.append(
            f"the login {user} is no member of {WEB}: GRANT {WORKER}, {WEB} TO {user}, after `db upgrade` "
            "by a role that may create roles"
        )
    return said
