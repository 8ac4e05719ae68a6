"""Row-level security and rights: an org sees and writes its rows only, operators all but no secret.

Which tables there are, and what stands in them, is read from the metadata: a table that
is new with an org's rows is tried here without a change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from sqlalchemy import Connection, Table, select, text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from tests.fakes.clock import ManualClock
from tests.fakes.one_row_each import Owner, fill, row
from tests.fakes.postgres import Server, kept_session
from tests.fakes.rows import reading, within
from worker.errors import RolesMissing
from worker.ids import OrgId, new_id
from worker.operations.installation import adopt
from worker.store import installation, orgs, roles, schema, tables
from worker.store.database import Database
from worker.store.dialect import database_now
from worker.store.roles import Scope

NOT_OF_ORGS = {
    "hosts",
    "workers",
    "catalogue",
    "facts",
    "pools",
    "placements",
    "operators",
    "sessions",
    "login_transactions",
    "plans",
    "calendars",
    "limits",
    "price_lists",
    "rollouts",
    "rollout_days",
    "host_handlers",
    "batch_leases",
    "pool_approvals",
}
# Rows that name machines or many orgs at once; nobody who acts for one org may read them.
NOT_FOR_ORGS = {
    *("workers", "hosts", "alerts", "alert_strikes", "applications", "access_tokens", "pools", "calendars"),
    *("pool_approvals", "limits", "limit_shares", "origin_pauses", "product_logins"),
    *("batches", "batch_leases", "rollouts", "rollout_orgs", "rollout_days"),
}
# All that API and console write, and no right more: by table, the columns of its UPDATE.
WRITES = {
    "runs": (
        "INSERT",
        "UPDATE attempt available_at detail finished_at progress reason result_fencing_token state",
    ),
    "live_runs": (
        "DELETE",
        "INSERT",
        "UPDATE available_at cancel_reason cancel_requested_at parent_id place reason start_by started_at "
        "state",
    ),
    "parents": ("INSERT", "UPDATE root_id tree windows"),
    "children": ("INSERT", "UPDATE root_id run_id seen"),
    "tree_spends": ("INSERT",),
    "run_ends": ("INSERT",),
    "checkpoints": ("INSERT",),
    "waits": ("INSERT", "UPDATE answer answered_at answered_by"),
    "steps": ("INSERT",),
    "spends": ("INSERT",),
    "audit": ("INSERT",),
    "rollup_days": ("INSERT", "UPDATE attempts handler_seconds runs"),
    "rollup_hours": ("INSERT", "UPDATE runs"),
    "definitions": ("UPDATE consecutive_failures pause_note paused_at paused_by updated_at",),
    "schedule": ("INSERT", "UPDATE next_fire_at next_scheduled_for"),
    "skips": ("INSERT", "UPDATE count skipped_until"),
    "deadlines": ("INSERT", "UPDATE scheduled_for"),
    "orgs": ("UPDATE updated_at",),
}
# For operators it also edits and backfills definitions, pauses orgs, and adds and retires credentials.
OPERATOR_WRITES = WRITES | {
    "orgs": ("UPDATE state state_at state_by state_note templates_seen updated_at",),
    "credentials": ("INSERT", "UPDATE retired_at state"),
    "budget_raises": ("INSERT",),
    "access_tokens": ("DELETE",),
    "definitions": (
        "UPDATE calendar closed_at consecutive_failures enabled pause_note paused_at paused_by revision "
        "template_id template_revision updated_at",
    ),
    "definition_revisions": ("INSERT",),
    "deadlines": ("INSERT", "DELETE", "UPDATE scheduled_for"),
    "late_definitions": ("DELETE",),
    "definition_states": ("INSERT", "DELETE", "UPDATE data run_id updated_at updated_by version"),
    "backfills": ("INSERT", "UPDATE cancelled_at finished_at made max_concurrent next_scheduled_for"),
    # Logins are kept before a caller is known, in this role; an org's role has no right to them.
    "sessions": ("INSERT", "DELETE"),
    "login_transactions": ("INSERT", "DELETE"),
    "plans": ("INSERT", "DELETE"),
    "pool_approvals": ("INSERT", "UPDATE approved_at approved_by ceiling digest"),
    "rollouts": (
        "UPDATE began_at halted_at halted_by ready reason stalled state step step_began_at updated_at "
        "updated_by verdict",
    ),
    "rollout_orgs": ("INSERT", "UPDATE from_sums to_sums"),
}
ORG_COLUMNS = """
SELECT c.relname, c.relrowsecurity AND c.relforcerowsecurity AND EXISTS (
  SELECT 1 FROM pg_policy WHERE polrelid = c.oid AND polname = 'one_org') AS parted
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
WHERE c.relkind IN ('r', 'p') AND c.relnamespace = current_schema::regnamespace
  AND a.attname = 'org_id' AND NOT a.attisdropped
"""
DENIED = psycopg.errors.InsufficientPrivilege


# Owns the tables of each database here; a role of the server, as all roles are.
OWNER = "owner_of_tables"


@pytest.fixture
def logins(postgres_server: Server) -> Iterator[dict[str, str]]:
    """URLs of a database with two orgs, by login: its owner, a worker, that of `serve`; none a superuser.

    Its owner made the schema, and the logins have the rights that the documentation gives them.
    """
    names = {"owner": OWNER} | {role: f"{role}_{new_id()[-12:]}" for role in ("worker", "serve")}
    template = postgres_server.template("with_two_orgs", make_two_orgs)
    with postgres_server.new_database(template, owner=OWNER) as url:
        superuser = kept_session(postgres_server.url())
        superuser.execute(f"CREATE ROLE {names['worker']} LOGIN")
        superuser.execute(f"CREATE ROLE {names['serve']} LOGIN NOINHERIT")
        superuser.execute(f"GRANT {roles.WORKER}, {roles.WEB}, {roles.OPERATOR} TO {names['worker']}")
        superuser.execute(f"GRANT {roles.WEB}, {roles.OPERATOR} TO {names['serve']}")
        yield {role: url.replace("postgres@", f"{login}@") for role, login in names.items()}
        superuser.execute(f"DROP ROLE {names['worker']}, {names['serve']}")


def make_two_orgs(url: str) -> None:
    """Let the owner make the schema, and two orgs with a row in every table."""
    with psycopg.connect(url, autocommit=True) as superuser:
        for role in (roles.WORKER, roles.WEB, roles.OPERATOR):
            superuser.execute(
                f"DO $$ BEGIN CREATE ROLE {role} NOLOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$"
            )
        superuser.execute(f"CREATE ROLE {OWNER} LOGIN")
        superuser.execute(f"ALTER DATABASE {superuser.info.dbname} OWNER TO {OWNER}")
    owner_url = url.replace("postgres@", f"{OWNER}@")
    schema.upgrade(owner_url)
    both = Owner(), Owner()
    with acting(owner_url) as connection:
        fill(connection, both)
        for owner in both:
            # Each org's template is the one that made its definition.
            connection.execute(
                text("UPDATE definitions SET template_id = :template WHERE id = :id"),
                {"template": template_of(connection, owner), "id": owner.definition},
            )
        # An org sees no others.
        connection.execute(text("UPDATE run_words SET shown = true"))
        connection.commit()


@pytest.fixture
def owners(logins: dict[str, str]) -> tuple[Owner, Owner]:
    """The two orgs."""
    runs = select(tables.runs.c.org_id, tables.runs.c.definition_id, tables.runs.c.id)
    with acting(logins["owner"]) as connection:
        mine, other = (Owner(*found) for found in connection.execute(runs))
    return mine, other


def template_of(connection: Connection, owner: Owner) -> str:
    named = tables.templates.c.name == f"of {owner.org}"
    return connection.execute(select(tables.templates.c.id).where(named)).scalar_one()


def test_every_table_with_org_data_is_parted(postgres: Database):
    assert set(roles.ORG_DATA) == set(tables.metadata.tables) - NOT_OF_ORGS
    with postgres.transaction() as connection:
        assert set(roles.ORG_DATA) == parted(connection)
        assert unparted(connection) == []

        connection.execute(text("CREATE TABLE newcomers (id uuid, org_id uuid)"))

        assert unparted(connection) == ["newcomers"]


def test_with_no_org_set_the_web_role_sees_no_row_of_any(logins):
    with acting(logins["worker"]) as worker, acting(logins["serve"], roles.NOBODY) as web:
        for name in (*sorted(set(roles.ORG_DATA) - NOT_FOR_ORGS), "run_view"):
            assert count(worker, name) == 2, name
            assert count(web, name) == 0, name


def test_with_no_org_set_the_web_role_writes_nothing(logins, owners):
    with acting(logins["serve"], roles.NOBODY) as web:
        for table, rights in written():
            assert lockable(web, table, rights) == 0, table.name
            assert deleted(web, table, rights) == 0, table.name
            if "INSERT" in rights:
                for owner in (*owners, Owner()):
                    with pytest.raises(ProgrammingError, match="violates row-level security"):
                        insert(web, table, owner)


def test_an_org_reads_no_word_that_it_may_not_read(logins, owners):
    mine, _ = owners
    with acting(logins["owner"]) as owner:
        owner.execute(text("UPDATE run_words SET shown = false"))
        owner.commit()
    with acting(logins["worker"]) as worker:
        assert count(worker, "run_words") == 2
    with acting(logins["serve"], of(mine)) as web:
        assert count(web, "run_words") == 0


def test_with_an_org_set_the_web_role_sees_its_rows_only(logins, owners):
    mine, _ = owners
    with acting(logins["serve"], of(mine)) as web:
        for table in org_tables():
            if table.name in NOT_FOR_ORGS:
                assert refused(web, f"SELECT count(*) FROM {table.name}"), table.name
                continue
            assert count(web, table.name) == 1, table.name
            whose = table.c.get("id" if table.name == "orgs" else "org_id")
            if whose is not None:
                assert set(web.execute(select(whose)).scalars()) <= {mine.org}, table.name
        assert web.execute(text("SELECT org_id::text FROM run_view")).scalars().all() == [mine.org]
        (revision,) = web.execute(select(tables.definition_revisions)).mappings()
        assert revision["definition_id"] == mine.definition
        assert web.execute(text("SELECT name FROM templates")).scalars().all() == [f"of {mine.org}"]


def test_with_an_org_set_the_web_role_writes_its_rows_only(logins, owners):
    mine, other = owners
    with acting(logins["serve"], of(mine)) as web:
        for table, rights in written():
            assert lockable(web, table, rights) == (1 if has_update(rights) else 0), table.name
            assert deleted(web, table, rights) == (1 if "DELETE" in rights else 0), table.name
            if "INSERT" in rights:
                with pytest.raises(ProgrammingError, match="violates row-level security"):
                    insert(web, table, other)


# What of another org a row must not name.
REFERS = {
    "runs": ("definition",),
    "live_runs": ("definition", "run"),
    "schedule": ("definition",),
    "skips": ("definition",),
    "deadlines": ("definition",),
    "run_ends": ("definition", "run"),
    "checkpoints": ("run",),
    "waits": ("run",),
    "steps": ("run",),
    "spends": ("definition", "run"),
}


@pytest.mark.parametrize("name", REFERS)
def test_an_org_writes_no_row_of_anothers_definition_or_run(logins, owners, name: str):
    mine, other = owners
    table = tables.metadata.tables[name]
    with acting(logins["serve"], of(mine)) as web:
        for mixed in mixed_with(other, mine, name):
            with pytest.raises(ProgrammingError, match="violates row-level security"):
                insert(web, table, mixed)
        if name in ("skips", "run_ends", "deadlines"):
            # Its key has an id or a time of its own.
            insert(web, table, mine)
        else:
            # With nothing of another's in it, it is only there already.
            with pytest.raises(DBAPIError, match="duplicate key"):
                insert(web, table, mine)


@pytest.mark.parametrize("name", REFERS)
def test_without_the_check_an_org_would_write_such_a_row(logins, owners, name: str):
    mine, other = owners
    table = tables.metadata.tables[name]
    with acting(logins["owner"]) as owner:
        org = "NULLIF(current_setting('app.org', true), '')::uuid"
        owner.execute(text(f"ALTER POLICY one_org ON {name} WITH CHECK (org_id = {org})"))
        # As if that definition had no scheduled time yet, and no other row of that key.
        owner.execute(table.delete())
        owner.commit()

    with acting(logins["serve"], of(mine)) as web:
        for mixed in mixed_with(other, mine, name):
            nested = web.begin_nested()
            insert(web, table, mixed)
            assert count(web, name) == 1
            nested.rollback()


def mixed_with(other: Owner, mine: Owner, name: str) -> Iterator[Owner]:
    """An org's row of this table that names something of another's, for each such thing."""
    for thing in REFERS[name]:
        own = {"org": mine.org, "definition": mine.definition, "run": mine.run}
        yield Owner(**own | {thing: getattr(other, thing)})


def test_for_a_worker_and_an_owner_the_policies_are_planned_away(logins):
    """Each run that is fired or ends goes through these tables: nothing may be asked for each row."""
    for name in REFERS:
        for login, scope in (("worker", None), ("owner", None), ("serve", of(Owner()))):
            with acting(logins[login], scope) as connection:
                assert asks_each_row(connection, name) == (login == "serve"), (login, name)

    # The control: a worker's login inherits the web role, and with it what only restricts that role.
    with acting(logins["owner"]) as owner:
        condition = "EXISTS (SELECT 1 FROM definitions d WHERE d.id = definition_id)"
        owner.execute(
            text(f"CREATE POLICY p ON runs AS RESTRICTIVE FOR INSERT TO {roles.WEB} WITH CHECK ({condition})")
        )
        owner.commit()
    with acting(logins["worker"]) as worker:
        assert asks_each_row(worker, "runs")


def asks_each_row(connection: Connection, name: str) -> bool:
    """Whether an INSERT or a SELECT of a table has a condition that was not written in it."""
    defaults = f"INSERT INTO {name} SELECT (NULL::{name}).* FROM generate_series(1, 2)"
    plans = [
        "\n".join(connection.execute(text(f"EXPLAIN (VERBOSE) {statement}")).scalars())
        for statement in (defaults, f"SELECT count(*) FROM {name}")
    ]
    return any("SubPlan" in plan or "app.org" in plan for plan in plans)


def test_an_org_moves_no_row_to_another(logins, owners):
    mine, other = owners
    with acting(logins["serve"], of(mine)) as web:
        assert refused(web, f"UPDATE schedule SET org_id = '{other.org}'", "permission denied")
    # Also with the right to the column.
    with acting(logins["owner"]) as owner:
        owner.execute(text(f"GRANT UPDATE (org_id) ON schedule TO {roles.WEB}"))
        owner.commit()
    with acting(logins["serve"], of(mine)) as web:
        statement = "UPDATE schedule SET org_id = '{}'"
        assert web.execute(text(statement.format(mine.org))).rowcount == 1
        assert refused(web, statement.format(other.org), "violates row-level security")


@pytest.mark.parametrize(("role", "writes"), [(roles.WEB, WRITES), (roles.OPERATOR, OPERATOR_WRITES)])
def test_the_web_side_may_write_what_its_pages_write_and_no_more(logins, role: str, writes: dict):
    with acting(logins["owner"]) as connection:
        assert rights_of(connection, role) == {name: set(rights) for name, rights in writes.items()}
        for name in ("operators", "sessions", "login_transactions"):
            for right in ("SELECT", "INSERT", "UPDATE", "DELETE"):
                may = connection.execute(
                    text("SELECT has_table_privilege(:role, :name, :right)"),
                    {"role": role, "name": name, "right": right},
                ).scalar_one()
                is_ours = right == "SELECT" or (right in writes.get(name, ()))
                assert may == (role == roles.OPERATOR and is_ours), (name, right)


@pytest.mark.parametrize("scope", [roles.NOBODY, roles.ALL_ORGS])
def test_the_web_side_reads_no_secret_and_changes_no_schema(logins, scope: Scope):
    with acting(logins["serve"], scope) as web:
        for statement in (
            "SELECT sealed FROM credentials",
            "SELECT * FROM credentials",
            "CREATE TABLE intruders (id int)",
            "ALTER TABLE runs ADD COLUMN note text",
            "DROP POLICY one_org ON runs",
            "ALTER TABLE runs DISABLE ROW LEVEL SECURITY",
            "UPDATE alembic_version SET version_num = '0'",
            "UPDATE facts SET value = ''",
            "TRUNCATE runs",
        ):
            assert refused(web, statement), statement
        web.execute(text("SELECT client_id, state FROM credentials"))


def test_an_operator_sees_the_rows_of_all_orgs(logins):
    with acting(logins["serve"], roles.ALL_ORGS) as operator:
        for name in (*tables.metadata.tables, "run_view"):
            assert count(operator, name) == 2 if name != "facts" else count(operator, name) > 0, name


@pytest.mark.parametrize("login", ["worker", "web", "operator", "owner"])
def test_nobody_changes_or_deletes_an_audit_row(logins, owners, login: str):
    mine, _ = owners
    scope = {"web": of(mine), "operator": roles.ALL_ORGS}.get(login)
    with acting(logins["owner"]) as owner:
        before = owner.execute(select(tables.audit).order_by(tables.audit.c.id)).all()

    with acting(logins[{"web": "serve", "operator": "serve"}.get(login, login)], scope) as connection:
        why = "never changed or deleted" if login == "owner" else "permission denied"
        for statement in ("UPDATE audit SET actor = 'nobody'", "DELETE FROM audit", "TRUNCATE audit"):
            assert refused(connection, statement, why), statement
        at = database_now(connection)
        connection.execute(tables.audit.insert().values(row(tables.audit, mine, at) | {"id": new_id()}))

    with acting(logins["owner"]) as owner:
        assert owner.execute(select(tables.audit).order_by(tables.audit.c.id)).all() == before


def test_without_the_trigger_an_owner_would_change_the_audit(logins, owners):
    with acting(logins["owner"]) as owner:
        owner.execute(text("DROP TRIGGER audit_append_only ON audit"))

        assert owner.execute(text("UPDATE audit SET actor = 'nobody'")).rowcount == 2


class TestTheLoginOfServe:
    """It is a NOINHERIT member of two roles: by itself it reads nothing, and no other role can be reached."""

    def test_it_reads_nothing_by_itself(self, logins):
        with acting(logins["serve"]) as login:
            for name in (*tables.metadata.tables, "run_view", "alembic_version"):
                assert refused(login, f"SELECT count(*) FROM {name}"), name
            assert refused(login, "SELECT * FROM find_caller('a', 'b')", "permission denied for function")

    def test_no_other_role_can_be_reached_from_it(self, logins):
        others = [roles.WORKER, "postgres", login_of(logins["owner"]), login_of(logins["worker"])]
        for scope in (None, roles.NOBODY, roles.ALL_ORGS):
            with acting(logins["serve"], scope) as login:
                for role in others:
                    for statement in (f"SET ROLE {role}", f"SET SESSION AUTHORIZATION {role}"):
                        assert refused(login, statement, "permission denied to set"), (scope, statement)
                for back in ("RESET ROLE", "SET ROLE NONE"):
                    nested = login.begin_nested()
                    login.execute(text(back))
                    assert refused(login, "SELECT count(*) FROM runs"), (scope, back)
                    nested.rollback()

    def test_it_looks_up_a_caller_and_no_more(self, logins, owners):
        mine, _ = owners
        with acting(logins["owner"]) as owner:
            owner.execute(text("UPDATE credentials SET state = 'active'"))
            owner.execute(text("UPDATE orgs SET state = 'paused'"))
            owner.commit()
        with acting(logins["serve"], roles.NOBODY) as web:
            code, client = f"of {mine.org}", f"of {mine.org}"
            assert orgs.find_caller(web, code, client) == (mine.org, code, "paused", True)
            assert orgs.find_caller(web, code, "another") == (mine.org, code, "paused", False)
            assert orgs.find_caller(web, "nobody", client) is None
            assert count(web, "orgs") == count(web, "credentials") == 0

    def test_the_lookup_trusts_no_table_of_whoever_asks(self, logins):
        with acting(logins["serve"], roles.NOBODY) as web:
            web.execute(text("CREATE TEMP TABLE orgs (id uuid, code text, issuer text, state text)"))
            web.execute(
                text("INSERT INTO pg_temp.orgs VALUES (gen_random_uuid(), 'forged', 'main', 'active')")
            )
            web.execute(text("CREATE TEMP TABLE credentials (org_id uuid, client_id text, state text)"))

            assert orgs.find_caller(web, "forged", "any") is None

    def test_it_finds_the_schemas_version(self, logins):
        with opened(logins["serve"]) as database:
            schema.check_for_web(database)
            schema.check_as_login(database)

            with (
                database.autocommit() as connection,
                pytest.raises(ProgrammingError, match="permission denied"),
            ):
                schema.check(connection)

    def test_without_its_roles_it_serves_nobody(self, logins, postgres_server):
        login = login_of(logins["serve"])
        postgres_server.execute(f"REVOKE {roles.OPERATOR} FROM {login}")
        with opened(logins["serve"]) as database:
            with pytest.raises(RolesMissing, match=f"{login} may not act as {roles.OPERATOR}") as caught:
                schema.check_for_web(database)
            assert f"GRANT {roles.WEB}, {roles.OPERATOR} TO {login}" in caught.value.fix
            with (
                pytest.raises(RolesMissing, match=roles.OPERATOR),
                database.acting(roles.ALL_ORGS).transaction(),
            ):
                pass
            with database.acting(roles.NOBODY).transaction():
                pass

    def test_check_warns_of_what_else_it_has(self, logins, postgres_server):
        login = login_of(logins["serve"])
        assert said_of(logins["serve"]) == []

        postgres_server.execute(f"ALTER ROLE {login} INHERIT")
        postgres_server.execute(f"GRANT pg_read_all_stats TO {login}")

        inherits, others = said_of(logins["serve"])
        assert f"ALTER ROLE {login} NOINHERIT" in inherits
        assert "pg_read_all_stats" in others


class TestScopes:
    def test_the_rights_of_an_org_end_with_their_transaction(self, logins, owners):
        mine, _ = owners
        with opened(logins["worker"]) as database:
            as_org = database.acting(of(mine))
            for begin in (as_org.transaction, as_org.autocommit):
                with begin() as connection:
                    assert who_sees(connection) == (roles.WEB, mine.org, 1)

                with database.autocommit() as connection:
                    user, org, rows = who_sees(connection)
                    assert user != roles.WEB
                    assert (org or "", rows) == ("", 2)

    def test_every_way_into_a_scoped_database_takes_its_role(self, logins, owners):
        mine, _ = owners

        async def ask(database: Database) -> list[tuple[str, str | None, int]]:
            as_org = database.acting(of(mine))

            def in_its_own() -> tuple[str, str | None, int]:
                return within(as_org, who_sees)

            return [
                await as_org.call(who_sees),
                await as_org.call_autocommit(who_sees),
                await as_org.run(in_its_own),
                await as_org.with_deadline(1.0).call(who_sees),
            ]

        with opened(logins["worker"]) as database:
            assert asyncio.run(ask(database)) == [(roles.WEB, mine.org, 1)] * 4

    def test_a_login_without_the_roles_acts_for_nobody(self, logins, postgres_server):
        postgres_server.execute(f"REVOKE {roles.WEB}, {roles.OPERATOR} FROM {login_of(logins['worker'])}")
        with opened(logins["worker"]) as database:
            for scope in (roles.NOBODY, of(Owner()), roles.ALL_ORGS):
                with pytest.raises(RolesMissing, match=scope.role), database.acting(scope).transaction():
                    pass


class TestGrants:
    def test_an_owner_who_may_not_create_roles_migrates_all_the_same(self, postgres_server, postgres_url):
        login = f"owner_{new_id()[-12:]}"
        postgres_server.execute(f"CREATE ROLE {login} LOGIN")
        with psycopg.connect(postgres_url, autocommit=True) as superuser:
            superuser.execute(f"ALTER DATABASE {superuser.info.dbname} OWNER TO {login}")
        url = postgres_url.replace("postgres@", f"{login}@")

        schema.upgrade(url)
        schema.upgrade(url)

        with acting(url) as owner:
            assert count(owner, "runs") == 0

    def test_one_login_that_may_create_roles_acts_in_them(self, own_postgres):
        """On a server of its own: the roles of a server are there once for all its databases."""
        own_postgres.execute("CREATE ROLE owner LOGIN CREATEROLE")
        own_postgres.execute("CREATE DATABASE small OWNER owner")
        url = own_postgres.url("small").replace("postgres@", "owner@")

        schema.upgrade(url)

        with opened(url) as database:
            for scope in (roles.NOBODY, roles.ALL_ORGS):
                assert within(database.acting(scope), who_sees) == (scope.role, "", 0)
        (warning,) = said_of(url)
        assert "owns the tables" in warning

    def test_a_worker_of_the_release_before_gets_the_new_role_by_the_upgrade(self, own_postgres):
        for statement in (
            "CREATE ROLE owner LOGIN CREATEROLE",
            "CREATE ROLE worker LOGIN",
            "CREATE DATABASE older OWNER owner",
        ):
            own_postgres.execute(statement)
        owner, worker = (
            own_postgres.url("older").replace("postgres@", f"{name}@") for name in ("owner", "worker")
        )
        schema.upgrade(worker, owner)
        own_postgres.execute(f"GRANT {roles.WORKER} TO worker")
        assert "is not a member" in said_of(worker)[0]

        schema.upgrade(worker, owner)

        assert said_of(worker) == []

    def test_rights_that_a_release_before_gave_are_taken_back(self, logins):
        with acting(logins["owner"]) as owner:
            owner.execute(text(f"GRANT SELECT, INSERT, UPDATE, DELETE ON audit, credentials TO {roles.WEB}"))
            assert rights_of(owner, roles.WEB).keys() > WRITES.keys()

            roles.grant(owner)

            assert rights_of(owner, roles.WEB).keys() == WRITES.keys()

    def test_check_warns_of_a_superuser_an_owner_and_a_login_without_the_web_roles(
        self, logins, postgres, postgres_server
    ):
        assert said_of(logins["worker"]) == []
        (owned, *_) = said_of(logins["owner"])
        assert "owns the tables" in owned
        assert "superuser" in reading(postgres, roles.warnings)[0]
        postgres_server.execute(f"REVOKE {roles.OPERATOR} FROM {login_of(logins['worker'])}")
        (missing,) = said_of(logins["worker"])
        assert f"is not a member of {roles.OPERATOR}" in missing


def parted(connection: Connection) -> set[str]:
    """The tables on which row-level security is in force for everybody."""
    query = "SELECT relname FROM pg_class WHERE relrowsecurity AND relforcerowsecurity"
    return set(connection.execute(text(query)).scalars())


def unparted(connection: Connection) -> list[str]:
    """The tables of the database with an org's column whose rows anybody sees."""
    return [name for name, is_parted in connection.execute(text(ORG_COLUMNS)) if not is_parted]


@contextmanager
def acting(url: str, scope: Scope | None = None) -> Iterator[Connection]:
    """A transaction of a login, in a scope if one is given, rolled back at the end."""
    with opened(url) as database:
        scoped = database if scope is None else database.acting(scope)
        with scoped.transaction() as connection:
            yield connection
            if connection.in_transaction():
                connection.rollback()


def of(owner: Owner) -> Scope:
    return Scope.of_org(OrgId(owner.org))


def org_tables() -> list[Table]:
    return [tables.metadata.tables[name] for name in roles.ORG_DATA]


def written() -> list[tuple[Table, tuple[str, ...]]]:
    """The tables that the web side writes, with its rights."""
    return [(tables.metadata.tables[name], rights) for name, rights in WRITES.items()]


def has_update(rights: tuple[str, ...]) -> bool:
    return any(right.startswith("UPDATE") for right in rights)


def rights_of(connection: Connection, role: str) -> dict[str, set[str]]:
    """What a role may write, by table."""
    found: dict[str, set[str]] = {}
    for name, table in tables.metadata.tables.items():
        for right in ("INSERT", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"):
            if asked(connection, f"has_table_privilege('{role}', '{name}', '{right}')"):
                found.setdefault(name, set()).add(right)
        columns = sorted(
            column.name
            for column in table.c
            if asked(connection, f"has_column_privilege('{role}', '{name}', '{column.name}', 'UPDATE')")
        )
        if columns:
            found.setdefault(name, set()).add(f"UPDATE {' '.join(columns)}")
    return found


def asked(connection: Connection, question: str) -> bool:
    return bool(connection.execute(text(f"SELECT {question}")).scalar_one())


def count(connection: Connection, table: str) -> int:
    return connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()


def refused(connection: Connection, statement: str, why: str = "") -> bool:
    """Whether the server refuses it for a lack of rights, or for the reason given; it is undone."""
    nested = connection.begin_nested()
    try:
        connection.execute(text(statement))
    except DBAPIError as error:
        return why in str(error) if why else isinstance(error.orig, DENIED)
    else:
        return False
    finally:
        nested.rollback()


def insert(connection: Connection, table: Table, owner: Owner) -> None:
    """A row as it stands there already: policies are asked before indexes."""
    with connection.begin_nested():
        connection.execute(table.insert().values(row(table, owner, database_now(connection))))


def lockable(connection: Connection, table: Table, rights: tuple[str, ...]) -> int:
    """How many rows an UPDATE may reach: the policies of both are the same."""
    if not has_update(rights):
        assert refused(connection, f"SELECT 1 FROM {table.name} FOR UPDATE"), table.name
        return 0
    return len(connection.execute(select(*table.primary_key.columns).with_for_update()).all())


def deleted(connection: Connection, table: Table, rights: tuple[str, ...]) -> int:
    """How many rows a DELETE of all of them reaches, which is then taken back."""
    if "DELETE" not in rights:
        assert refused(connection, f"DELETE FROM {table.name}"), table.name
        return 0
    nested = connection.begin_nested()
    try:
        return connection.execute(table.delete()).rowcount
    finally:
        nested.rollback()


def who_sees(connection: Connection) -> tuple[str, str | None, int]:
    """The role, the org, and how many runs it sees."""
    query = "SELECT current_user, current_setting('app.org', true), count(*) FROM run_view"
    user, org, rows = connection.execute(text(query)).one()
    return user, org, rows


@contextmanager
def opened(url: str) -> Iterator[Database]:
    database = Database.open(url, clock=ManualClock())
    try:
        yield database
    finally:
        database.close()


def said_of(url: str) -> list[str]:
    with opened(url) as database, database.autocommit() as connection:
        return roles.warnings(connection)


def login_of(url: str) -> str:
    return url.split("//")[1].split("@")[0]


def test_a_worker_adopts_and_the_web_side_only_reads_the_installation(logins, clock: ManualClock):
    """A web role that could change the word or the key could open production's applications to a copy."""
    schema.upgrade(logins["owner"], then=lambda connection: installation.store_word(connection, "production"))
    database = Database.open(logins["worker"], clock=clock)

    adopted = adopt(database, "staging", "new", actor="ops", issuers=["main"])

    database.close()
    assert adopted["before"] == "production" and adopted["forgotten"] == 2
    for scope in (roles.NOBODY, roles.ALL_ORGS):
        with acting(logins["serve"], scope) as web:
            assert installation.read(web).word == "staging"
            with pytest.raises(ProgrammingError) as refused, web.begin_nested():
                installation.change_word(web, "production")
            assert isinstance(refused.value.orig, DENIED)
