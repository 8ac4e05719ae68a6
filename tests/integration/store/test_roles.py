"""Row-level security: the web role sees one org or nothing, the worker's role and the owner see all."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text

from tests.fakes.clock import ManualClock
from tests.fakes.stock import Stock
from worker.ids import new_id
from worker.runs.firing import LogLine
from worker.store import roles, schema, tables
from worker.store.database import Database
from worker.store.sql import statements

NOT_OF_ORGS = {"templates", "workers", "catalogue", "facts"}


@pytest.fixture
def logins(postgres_server, postgres_url: str) -> Iterator[dict[str, str]]:
    """URLs of an empty database by login: its owner, a worker, a web server; none a superuser."""
    names = {role: f"{role}_{new_id()[-12:]}" for role in ("owner", "worker", "web")}
    name = postgres_url.rpartition("/")[2]
    for role in names.values():
        postgres_server.execute(f"CREATE ROLE {role} LOGIN")
    postgres_server.execute(f"ALTER DATABASE {name} OWNER TO {names['owner']}")
    yield {role: postgres_url.replace("postgres@", f"{login}@") for role, login in names.items()}
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for role in names.values():
            connection.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(role)))
    postgres_server.execute(f"ALTER DATABASE {name} OWNER TO postgres")
    for role in names.values():
        postgres_server.execute(f"DROP ROLE {role}")


@pytest.fixture
def filled(logins: dict[str, str], postgres_server, clock: ManualClock) -> Iterator[tuple[Stock, str, str]]:
    """Two orgs with rows in every table, written by a worker's login."""
    schema.upgrade(logins["worker"], logins["owner"])
    for role, login in ((roles.WORKER, "worker"), (roles.WEB, "web"), (roles.WEB, "worker")):
        postgres_server.execute(f"GRANT {role} TO {login_of(logins[login])}")
    database = Database.open(logins["worker"], clock=clock)
    stock = Stock(database)
    orgs = [stock.org(), stock.org()]
    for org_id in orgs:
        fill(stock, org_id)
    stock.put(*(stock.run(org_id) for org_id in orgs))
    yield stock, *orgs
    database.close()


def test_every_table_with_org_data_is_among_those_that_are_parted(postgres: Database):
    with postgres.autocommit() as connection:
        forced = set(
            connection.execute(
                text("SELECT relname FROM pg_class WHERE relrowsecurity AND relforcerowsecurity")
            ).scalars()
        )

    assert forced == set(roles.ORG_DATA) == set(tables.metadata.tables) - NOT_OF_ORGS


@pytest.mark.usefixtures("filled")
def test_the_web_role_with_no_org_set_sees_no_row_of_any(logins):
    for table in (*roles.ORG_DATA, "run_view"):
        assert count(logins["worker"], table) > 0 or table == "backfills", table
        assert count(logins["web"], table) == 0, table


def test_a_transaction_for_an_org_sees_its_rows_and_writes_no_others(filled):
    stock, mine, other = filled

    with stock.database.as_org(mine) as connection:
        seen = set(connection.execute(text("SELECT org_id FROM run_view")).scalars())
        changed = connection.execute(text("UPDATE live_runs SET priority = 1")).rowcount
        specs = connection.execute(text("SELECT count(*) FROM definition_revisions")).scalar_one()
    assert (seen, changed, specs) == ({mine}, 1, 1)

    with pytest.raises(Exception, match="row-level security"), stock.database.as_org(mine) as connection:
        statements(connection).append_logs(
            connection, [LogLine(new_id(), 1, 1, other, stock.now(), "info", "log", "x")]
        )

    with stock.database.transaction() as connection:
        assert connection.execute(text("SELECT count(DISTINCT org_id) FROM runs")).scalar_one() == 2


def test_the_rights_end_with_their_transaction(filled):
    stock, mine, _ = filled

    with stock.database.as_org(mine):
        pass

    with stock.database.autocommit() as connection:
        role, org = connection.execute(text("SELECT current_user, current_setting('app.org', true)")).one()
    assert role != roles.WEB
    assert not org


def test_an_owner_who_may_not_create_roles_migrates_all_the_same(logins, postgres_server):
    schema.upgrade(logins["owner"])
    schema.upgrade(logins["owner"])

    assert count(logins["owner"], "runs") == 0


def test_check_warns_of_a_superuser_an_owner_and_a_login_without_the_web_role(filled, logins, postgres):
    assert said_of(logins["worker"]) == []
    (owned, *_) = said_of(logins["owner"])
    assert "owns the tables" in owned
    with postgres.autocommit() as connection:
        assert "superuser" in roles.warnings(connection)[0]


def fill(stock: Stock, org_id: str) -> None:
    """A run that has ended, with all that belongs to it, and what else an org has."""
    worker_id, definition_id = stock.worker(), stock.definition(org_id)
    stock.put(stock.run(org_id, definition_id))
    (first,) = stock.admit(worker_id)
    with stock.database.transaction() as connection:
        hot, now = statements(connection), stock.now()
        hot.save_checkpoint(
            connection, first.id, first.fencing_token, attempt=1, org_id=org_id, data_json='{"done":1}'
        )
        hot.append_logs(connection, [LogLine(first.id, 1, 1, org_id, now, "info", "log", "hello")])
        for table, values in {
            "audit": {"at": now, "actor": "a", "action": "b", "subject": "c"},
            "credentials": {"generation": 1, "client_id": "c", "created_at": now, "created_by": "a"},
            "skips": {
                "definition_id": definition_id,
                "revision": 1,
                "skipped_from": now,
                "skipped_until": now,
                "count": 1,
                "reason": "missed",
            },
        }.items():
            row = {"id": new_id(), "org_id": org_id} | values
            connection.execute(tables.metadata.tables[table].insert().values(**row))
        strike = {"cause": org_id, "struck_at": now}
        alert = {"id": org_id, "kind": "paused", "summary": "x", "fields": {}, "since": now, "count": 1}
        connection.execute(tables.alerts.insert().values(**strike | alert))
        connection.execute(
            tables.alert_strikes.insert().values(**strike, subject_id=definition_id, well=False)
        )
    stock.finish(worker_id, stock.ended(first))


def count(url: str, table: str) -> int:
    with psycopg.connect(url) as connection:
        (rows,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    return rows


def said_of(url: str) -> list[str]:
    database = Database.open(url, clock=ManualClock())
    with database.autocommit() as connection:
        said = roles.warnings(connection)
    database.close()
    return said


def login_of(url: str) -> str:
    return url.split("//")[1].split("@")[0]
