"""Sessions and operators as rows: shared by processes, bounded, over at once, and closed to orgs."""

from __future__ import annotations

import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import ProgrammingError

from tests.integration.console.conftest import BASE, TOKENS, Site, csrf_of, log_in, on_either
from worker.errors import Conflict, NotFound, UsageError
from worker.features.console.callers import Caller
from worker.features.console.operators import add_operator, list_operators, remove_operator
from worker.features.console.sessions import LASTS, MAX_SESSIONS, SESSION_COOKIE, Sessions
from worker.ids import ALL_ORGS, OrgId
from worker.operations.orgs import set_org_state
from worker.store import orgs, roles, sign_in, tables
from worker.store.lists import AUDIT
from worker.store.lists.read import read

ADA = Caller("ada", "admin")
BEN = Caller("ben", "viewer")
RUNS = "/api/v1/runs"


def count(site: Site) -> int:
    with site.database.autocommit() as connection:
        return len(connection.execute(select(tables.sessions.c.key_sha256)).all())


async def test_a_caller_ends_its_own_oldest_session_and_no_other_callers(site: Site):
    sessions = Sessions(site.database, site.clock)
    theirs = await sessions.begin(BEN)
    mine = []
    for _ in range(MAX_SESSIONS + 3):
        site.clock.advance(1)
        mine.append(await sessions.begin(ADA))

    assert await sessions.find(theirs.key) == theirs
    assert [await sessions.find(one.key) for one in mine] == [None] * 3 + mine[3:]


async def test_two_clients_of_an_org_are_two_callers(site: Site):
    sessions = Sessions(site.database, site.clock)
    one = await sessions.begin(Caller("org_a", "viewer", org="org_a", kind="org", client_id="m2m-1"))
    for _ in range(MAX_SESSIONS + 1):
        await sessions.begin(Caller("org_a", "viewer", org="org_a", kind="org", client_id="m2m-2"))

    assert await sessions.find(one.key) == one


@on_either
async def test_sessions_that_are_over_are_removed_by_the_next_login(site: Site):
    sessions = Sessions(site.database, site.clock)
    mine = [await sessions.begin(ADA) for _ in range(6)]
    for _ in range(2):
        await sessions.end(mine[-1])
    began = site.clock.now()
    site.clock.advance(LASTS.total_seconds())

    assert await sessions.find((await sessions.begin(BEN)).key) is not None
    assert count(site) == 1
    # A session that is only expired would be open again.
    site.clock.set(began)
    assert [await sessions.find(session.key) for session in mine] == [None] * 6


async def test_a_row_has_neither_the_key_nor_a_token(staffed: Site):
    async with staffed.client() as client:
        await log_in(client, TOKENS["admin"])
        key = client.cookies[SESSION_COOKIE]
    with staffed.database.autocommit() as connection:
        [row] = connection.execute(select(tables.sessions)).all()

    assert sign_in.sha256(key) in repr(row)
    assert key not in repr(row)
    assert TOKENS["admin"] not in repr(row)


async def test_a_session_and_its_forms_hold_in_every_process(staffed: Site):
    """Two applications over one database, as two workers without sticky sessions."""
    async with staffed.client() as one, staffed.client() as other:
        page = await one.get("/")
        other.cookies = one.cookies
        form = {"token": TOKENS["operator"], "csrf": csrf_of(page)}
        answer = await other.post("/login", data=form, headers={"origin": BASE})
        assert answer.status_code == 303
        one.cookies = other.cookies
        page = await one.get("/")
        form = {"csrf": csrf_of(page)}
        assert (await other.post("/logout", data=form, headers={"origin": BASE})).status_code == 303
        one.cookies.set(SESSION_COOKIE, "x" * 43)

        assert (await one.get("/")).status_code == 401


async def test_a_login_opens_a_new_session_whatever_cookie_the_browser_has(staffed: Site):
    """Session fixation: a key that somebody else has put into the browser never becomes a session."""
    async with staffed.client() as client:
        client.cookies.set(SESSION_COOKIE, "planted")
        page = await client.get("/")
        client.cookies.set(SESSION_COOKIE, "planted")
        form = {"token": TOKENS["admin"], "csrf": csrf_of(page)}
        answer = await client.post("/login", data=form, headers={"origin": BASE})

        assert answer.status_code == 303
        assert "planted" not in answer.headers["set-cookie"]
        fixed = await client.get("/", headers={"cookie": f"{SESSION_COOKIE}=planted"})
        assert fixed.status_code == 401


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
async def test_no_org_reads_or_writes_who_is_logged_in(site: Site):
    await Sessions(site.database, site.clock).begin(ADA)
    with site.database.autocommit() as connection:
        org_id = OrgId(orgs.require(connection, "org_a")["id"])
    for scope in (roles.NOBODY, roles.Scope.of_org(org_id)):
        for name in ("sessions", "login_transactions", "operators"):
            for statement in (f"SELECT * FROM {name}", f"DELETE FROM {name}"):
                with (
                    pytest.raises(ProgrammingError) as refused,
                    site.database.acting(scope).transaction() as connection,
                ):
                    connection.execute(text(statement))
                assert isinstance(refused.value.orig, psycopg.errors.InsufficientPrivilege)
    # The control: the role that keeps sessions can, and it cannot make operators.
    with site.database.acting(roles.ALL_ORGS).transaction() as connection:
        assert connection.execute(text("SELECT count(*) FROM sessions")).scalar_one() == 1
    with (
        pytest.raises(ProgrammingError, match="permission denied"),
        site.database.acting(roles.ALL_ORGS).transaction() as connection,
    ):
        connection.execute(text("DELETE FROM operators"))


class TestStoredOperators:
    def add(self, site: Site, name: str = "grace", role: str = "operator") -> str:
        taken = [operator.name for operator in site.operators]
        return str(add_operator(site.database, name, role, taken=taken, actor="tester")["token"])

    @on_either
    async def test_one_is_let_in_at_once_with_its_role_and_out_at_once(self, site: Site):
        token = self.add(site)
        async with site.client(token) as api, site.client() as browser:
            assert (await api.get(RUNS)).status_code == 200
            assert (await api.get("/api/v1/credentials")).status_code == 403
            assert (await log_in(browser, token)).status_code == 303
            assert "operator:grace" in (await browser.get("/")).text

            remove_operator(site.database, "grace", configured=(), actor="tester")

            assert (await api.get(RUNS)).status_code == 401
            assert (await browser.get("/")).status_code == 401

    @on_either
    async def test_the_row_has_the_hash_and_the_audit_says_who(self, site: Site):
        token = self.add(site)
        with site.database.autocommit() as connection:
            [row] = connection.execute(select(tables.operators)).all()
            [entry] = [one for one in read(connection, AUDIT, ALL_ORGS) if one["action"] == "operator.add"]

        assert token not in repr(row)
        assert sign_in.sha256(token) in repr(row)
        assert (entry["actor"], entry["subject"], entry["detail"]) == (
            "tester",
            "grace",
            {"role": "operator"},
        )
        [listed] = list_operators(site.database)
        assert set(listed) == {"id", "name", "role", "created_at", "created_by"}

    async def test_the_first_one_opens_the_port_to_other_machines_within_two_seconds(self, site: Site):
        token = site.token("org_a")
        async with site.client(token, address="198.51.100.1") as elsewhere:
            assert (await elsewhere.get(RUNS)).status_code == 403
            self.add(site)
            site.clock.advance(2)

            assert (await elsewhere.get(RUNS)).status_code == 200

    async def test_a_name_of_the_file_or_of_another_is_refused(self, staffed: Site):
        self.add(staffed)
        with pytest.raises(Conflict, match="already"):
            self.add(staffed)
        with pytest.raises(Conflict, match=r"worker\.toml"):
            self.add(staffed, "admin")
        for name, role in (("a:b", "viewer"), ("", "viewer"), ("ok", "root"), ("ok", "member")):
            with pytest.raises(UsageError):
                self.add(staffed, name, role)
        with pytest.raises(NotFound) as missing:
            remove_operator(staffed.database, "admin", configured=["admin"], actor="tester")
        assert "worker.toml" in missing.value.fix

    async def test_a_session_has_the_role_that_its_operator_has_now(self, staffed: Site):
        async with staffed.client() as browser:
            await log_in(browser, TOKENS["admin"])
            assert "(admin)" in (await browser.get("/")).text
            cookies = browser.cookies
        staffed.operators = [one for one in staffed.operators if one.name != "admin"]
        async with staffed.client() as browser:
            browser.cookies = cookies
            assert (await browser.get("/")).status_code == 401


async def test_suspending_an_org_removes_its_peoples_sessions(site: Site):
    sessions = Sessions(site.database, site.clock)
    person = Caller("Pat", "member", org="org_a", kind="person", subject="kp_1", home="org_a", issuer="main")
    mine = await sessions.begin(person)
    theirs = await sessions.begin(
        Caller("Bo", "member", org="org_b", kind="person", subject="kp_2", home="org_b")
    )

    set_org_state(site.database, "org_a", "suspended", actor="tester")

    assert await sessions.find(mine.key) is None
    assert await sessions.find(theirs.key) == theirs
