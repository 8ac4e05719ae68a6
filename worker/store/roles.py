"""Roles on PostgreSQL: their rights, and the rows that they see.

Row-level security protects every table with org data (migration 0001, and each that adds such a table): a
session sees the rows of the org in `app.org`, or none if that is not set. Only the owner and members of
`orgworker_worker` and `orgworker_operator` see all rows.

The web side runs every statement in `orgworker_web` for an org, with `app.org` set, or in
`orgworker_operator`, whatever its login is. Neither role reads a secret, changes the schema or alters an
audit row. They write only what the API and the console write: a new operation there extends `_WRITES`, or
`_OPERATOR_WRITES` if orgs may not do it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text
from sqlalchemy.exc import DBAPIError

from worker.errors import RolesMissing
from worker.ids import OrgId
from worker.store import tables

WORKER = "orgworker_worker"
WEB = "orgworker_web"
OPERATOR = "orgworker_operator"


@dataclass(frozen=True, slots=True)
class Scope:
    """The role that statements run in and, for `orgworker_web`, the org whose rows they see."""

    role: str
    org_id: OrgId | None = None

    @classmethod
    def of_org(cls, org_id: OrgId) -> Scope:
        """The rows of one org."""
        return cls(WEB, org_id)


# Sees no rows of orgs: for the schema's version and the lookup of callers.
NOBODY = Scope(WEB)
# Sees the rows of all orgs, but no secrets.
ALL_ORGS = Scope(OPERATOR)

# Tables with org data but without a column `org_id`.
_OF_ORGS = ("orgs", "definition_revisions", "alerts", "alert_strikes", "templates")
ORG_DATA = tuple(
    table.name for table in tables.metadata.sorted_tables if "org_id" in table.c or table.name in _OF_ORGS
)
ALL = (*tables.metadata.tables, "run_view", "alembic_version")

# Columns that the web side never reads.
SECRETS: Mapping[str, frozenset[str]] = {
    "credentials": frozenset({"sealed"}),
    "access_tokens": frozenset({"sealed"}),
    "org_secrets": frozenset({"sealed"}),
    "hosts": frozenset({"token_sha256"}),
    "placements": frozenset({"ticket_sha256"}),
    "batch_items": frozenset({"body", "result"}),
}
# Tables that no org reads: they name machines, or several orgs, or say who may log in.
_NOT_FOR_ORGS = frozenset(
    table.name for table in tables.metadata.sorted_tables if table.info["readers"] == "operators"
)
# Columns of those tables that an org reads after all: which handlers are the workers'.
_SHOWN_TO_ORGS: Mapping[str, Sequence[str]] = {"workers": ("host_id", "handlers")}
# No role changes or deletes these rows; triggers prevent the owner, too.
APPEND_ONLY = frozenset({"audit"})

# The API and the console make, cancel and retry runs, and pause and resume definitions.
_WRITES: Mapping[str, Sequence[str]] = {
    "runs": (
        "INSERT",
        "UPDATE (state, reason, detail, available_at, finished_at, attempt, result_fencing_token, progress)",
    ),
    "live_runs": (
        "INSERT",
        "DELETE",
        "UPDATE (state, reason, available_at, start_by, started_at)",
        "UPDATE (cancel_requested_at, cancel_reason)",
        # A retry takes up the children of the run that it continues.
        "UPDATE (parent_id, place)",
    ),
    # Children of `ctx.map_runs` that are started again wait for its window. A retry is the run at the top of
    # what is below the children that it takes up.
    "parents": ("INSERT", "UPDATE (windows, root_id, tree)"),
    "children": ("INSERT", "UPDATE (run_id, seen, root_id)"),
    "tree_spends": ("INSERT",),
    "run_ends": ("INSERT",),
    "checkpoints": ("INSERT",),
    # Answers.
    "waits": ("INSERT", "UPDATE (answered_at, answered_by, answer)"),
    "steps": ("INSERT",),
    "spends": ("INSERT",),
    "audit": ("INSERT",),
    "rollup_days": ("INSERT", "UPDATE (runs, attempts, handler_seconds)"),
    "rollup_hours": ("INSERT", "UPDATE (runs)"),
    "definitions": ("UPDATE (updated_at, paused_at, paused_by, pause_note, consecutive_failures)",),
    "schedule": ("INSERT", "UPDATE (next_scheduled_for, next_fire_at)"),
    "skips": ("INSERT", "UPDATE (skipped_until, count)"),
    "deadlines": ("INSERT", "UPDATE (scheduled_for)"),
    # For SELECT FOR UPDATE.
    "orgs": ("UPDATE (updated_at)",),
}
# For operators they also edit and backfill definitions, set their states, pause orgs, raise budgets, and add
# and retire credentials.
_OPERATOR_WRITES: Mapping[str, Sequence[str]] = {
    "orgs": ("UPDATE (state, state_by, state_at, state_note, templates_seen)",),
    # A secret comes in, sealed, and never goes out.
    "credentials": ("INSERT", "UPDATE (state, retired_at)"),
    "budget_raises": ("INSERT",),
    # With a credential that is retired, or an org that is suspended.
    "access_tokens": ("DELETE",),
    "definitions": ("UPDATE (enabled, revision, closed_at, template_id, template_revision, calendar)",),
    "definition_revisions": ("INSERT",),
    # With an edit, or an org that is suspended.
    "deadlines": ("DELETE",),
    "late_definitions": ("DELETE",),
    "definition_states": (
        "INSERT",
        "DELETE",
        "UPDATE (data, version, updated_at, updated_by, run_id)",
    ),
    "backfills": (
        "INSERT",
        "UPDATE (max_concurrent, next_scheduled_for, made, cancelled_at, finished_at)",
    ),
    # Logins are kept before a caller is known, in this role: an org's has no right to them, so nothing that
    # an org sends can read or open a session.
    "sessions": ("INSERT", "DELETE"),
    "login_transactions": ("INSERT", "DELETE"),
    "plans": ("INSERT", "DELETE"),
    "pool_approvals": ("INSERT", "UPDATE (digest, ceiling, approved_at, approved_by)"),
    "rollouts": (
        "UPDATE (state, step, step_began_at, began_at, ready, stalled, verdict, halted_at, halted_by)",
        "UPDATE (reason, updated_at, updated_by)",
    ),
    "rollout_orgs": ("INSERT", "UPDATE (from_sums, to_sums)"),
}

# A role may exist already, created manually or by a migration of another database.
_CREATE = """
DO $$ BEGIN CREATE ROLE {role} NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation OR insufficient_privilege THEN NULL; END $$
"""
# Since PostgreSQL 16 membership is not enough: the creator of a role may only administer it.
_MAY_SET = """
pg_has_role({who}, {role},
            CASE WHEN current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END)
"""
_JOIN = f"""
DO $$ BEGIN IF NOT {_MAY_SET.format(who="current_user", role="'{role}'")} THEN
  GRANT {{role}} TO CURRENT_USER;
END IF;
EXCEPTION WHEN insufficient_privilege OR invalid_grant_operation THEN NULL; END $$
"""
# Workers serve pages too. Members of the worker's role have all rights of this role anyway.
_JOIN_WORKERS = f"""
DO $$ DECLARE login name; BEGIN
  FOR login IN
    SELECT r.rolname FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member
    WHERE m.roleid = '{WORKER}'::regrole AND r.rolname <> current_user
      AND NOT {_MAY_SET.format(who="r.oid", role="'{role}'::regrole")}
  LOOP
    EXECUTE format('GRANT {{role}} TO %I', login);
  END LOOP;
EXCEPTION WHEN insufficient_privilege OR invalid_grant_operation THEN NULL; END $$
"""
_EXISTS = text("SELECT 1 FROM pg_roles WHERE rolname = :role")
_POLICIES = text("SELECT tablename FROM pg_policies WHERE schemaname = current_schema AND policyname = :name")

# SET LOCAL ROLE and SET LOCAL in one round trip; both end with the transaction.
_ACT = text("SELECT set_config('role', :role, true), set_config('app.org', :org, true)")
_LACKING = text(f"""
SELECT wanted FROM unnest(CAST(:roles AS text[])) AS wanted
WHERE NOT COALESCE((SELECT {_MAY_SET.format(who="current_user", role="oid")} FROM pg_roles
                    WHERE rolname = wanted), false)
ORDER BY wanted
""")
# SQLSTATEs: the role does not exist, or the login may not take it.
_NO_ROLE = ("22023", "42501")

_WHO = text(f"""
SELECT current_user AS login, r.rolsuper OR r.rolbypassrls AS is_above, r.rolinherit AS inherits,
       EXISTS (SELECT 1 FROM pg_class c WHERE c.oid = to_regclass('runs') AND c.relowner = r.oid) AS is_owner,
       COALESCE((SELECT pg_has_role(oid, 'MEMBER') FROM pg_roles WHERE rolname = '{WORKER}'), false)
         AS is_worker,
       ARRAY(SELECT g.rolname::text FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid
             WHERE m.member = r.oid AND g.rolname NOT IN ('{WEB}', '{OPERATOR}') ORDER BY 1) AS others
FROM pg_roles r WHERE r.rolname = current_user
""")


def grant(connection: Connection) -> None:
    """Create the roles if this login may, and grant their rights; can be repeated.

    Revokes rights that only an earlier release granted.
    """
    for role in (WORKER, WEB, OPERATOR):
        if not make(connection, role):
            continue
        for statement in _grants(role):
            connection.execute(text(statement))
        if role != WEB:
            done = set(connection.execute(_POLICIES, {"name": role}).scalars())
            for table in (table for table in ORG_DATA if table not in done):
                connection.execute(text(f"CREATE POLICY {role} ON {table} TO {role} USING (true)"))
        if role != WORKER and connection.execute(_EXISTS, {"role": WORKER}).first() is not None:
            connection.execute(text(_JOIN_WORKERS.format(role=role)))


def make(connection: Connection, role: str) -> bool:
    """Create a role without login, and join it, as far as this login may; returns whether the role exists."""
    connection.execute(text(_CREATE.format(role=role)))
    if connection.execute(_EXISTS, {"role": role}).first() is None:
        return False
    connection.execute(text(_JOIN.format(role=role)))
    return True


def _grants(role: str) -> list[str]:
    """Statements that leave the role with exactly its rights."""
    statements = [f"REVOKE ALL ON {', '.join(ALL)} FROM {role}"]
    if role == WORKER:
        kept = APPEND_ONLY | {"run_view", "alembic_version"}
        changed = ", ".join(name for name in ALL if name not in kept)
        statements += [
            f"GRANT SELECT ON {', '.join(ALL)} TO {role}",
            f"GRANT INSERT, UPDATE, DELETE ON {changed} TO {role}",
            f"GRANT INSERT ON {', '.join(sorted(APPEND_ONLY))} TO {role}",
        ]
        return statements
    hidden = _NOT_FOR_ORGS if role == WEB else frozenset[str]()
    whole = ", ".join(name for name in ALL if name not in hidden | SECRETS.keys())
    statements.append(f"GRANT SELECT ON {whole} TO {role}")
    for name, secret in SECRETS.items():
        if name in hidden:
            continue
        shown = ", ".join(
            column.name for column in tables.metadata.tables[name].c if column.name not in secret
        )
        statements.append(f"GRANT SELECT ({shown}) ON {name} TO {role}")
    for name, columns in _SHOWN_TO_ORGS.items() if role == WEB else ():
        statements.append(f"GRANT SELECT ({', '.join(columns)}) ON {name} TO {role}")
    for writes in (_WRITES, _OPERATOR_WRITES if role == OPERATOR else {}):
        statements += [f"GRANT {', '.join(rights)} ON {name} TO {role}" for name, rights in writes.items()]
    if role == WEB:
        statements.append(f"GRANT EXECUTE ON FUNCTION find_caller(text, text) TO {role}")
    return statements


def act(connection: Connection, scope: Scope) -> None:
    """Take the scope's role and org for the rest of this transaction.

    Raises:
        RolesMissing: the login may not take the role, or the role does not exist.
    """
    try:
        connection.execute(_ACT, {"role": scope.role, "org": scope.org_id or ""})
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) in _NO_ROLE:
            raise RolesMissing(f"this process may not act as {scope.role} in the database") from error
        raise


def lacking(connection: Connection) -> list[str]:
    """The web side's roles that this login cannot take."""
    return list(connection.execute(_LACKING, {"roles": [WEB, OPERATOR]}).scalars())


def require(connection: Connection) -> None:
    """Check that the login can take both roles of the web side.

    Raises:
        RolesMissing: names the login, the roles and the statement that fixes it.
    """
    if names := lacking(connection):
        login = _who(connection).login
        raise RolesMissing(
            f"the login {login} may not act as {' and '.join(names)} in the database", fix=_fix(login)
        )


def missing(connection: Connection) -> str:
    """The web side's roles that this login lacks, and the statement that fixes it; empty if none."""
    names = lacking(connection)
    if not names:
        return ""
    login = _who(connection).login
    return f"the login {login} is not a member of {' and '.join(names)}: {_fix(login)}"


def warnings(connection: Connection) -> list[str]:
    """How this login gives the web side too many rights, or too few."""
    who = _who(connection)
    found = []
    if who.is_above:
        found.append(
            f"the login {who.login} is a superuser or bypasses row-level security: use an ordinary one"
        )
    if who.is_owner:
        found.append(f"the login {who.login} owns the tables: name the owner in database.owner_url only")
    if lacks := missing(connection):
        found.append(lacks)
    if not (who.is_above or who.is_owner or who.is_worker):
        # A login for `serve`.
        if who.inherits:
            found.append(f"the login {who.login} inherits its roles: ALTER ROLE {who.login} NOINHERIT")
        if who.others:
            found.append(
                f"the login {who.login} is also a member of {', '.join(who.others)}: "
                f"`serve` needs only {WEB} and {OPERATOR}"
            )
    return found


def serve_warnings(connection: Connection) -> list[str]:
    """As `warnings`, for `serve`, which needs no rights of a worker."""
    who = _who(connection)
    found = warnings(connection)
    if who.is_worker and not (who.is_above or who.is_owner):
        found.append(
            f"the login {who.login} is a member of {WORKER}, which `serve` does not need: "
            "give `serve` a separate login (the documentation's page Many workers on one PostgreSQL)"
        )
    return found


def _who(connection: Connection) -> Row[Any]:
    return connection.execute(_WHO).one()


def _fix(login: str) -> str:
    return f"GRANT {WEB}, {OPERATOR} TO {login}, after `db upgrade` by a role that may create roles"
