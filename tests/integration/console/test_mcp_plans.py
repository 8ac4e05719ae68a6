"""Plans: a client plans; its operator confirms in the console, once, within ten minutes; nobody else does."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, select

from tests.integration.console.conftest import (
    BASE,
    OPERATORS,
    TOKENS,
    Site,
    csrf_of,
    log_in,
    logged_in,
    make_run,
    on_either,
)
from tests.integration.console.test_mcp import call, everything, send
from tests.unit.console.test_quoting import data_of
from worker.errors import NotFound, UsageError
from worker.features.console.callers import Caller
from worker.features.console.operators import add_operator, make_client_token, remove_operator
from worker.features.console.sessions import SESSION_COOKIE, Sessions
from worker.operations.definitions import edit_definition
from worker.operations.plans import LASTS, MAX_OPEN
from worker.operations.runs import cancel, retry
from worker.store import orgs, tables

API = "/api/v1"
PAUSE = {"org": "org_a", "name": "digest", "note": "the CRM is down"}


class Ada:
    """An operator: her own token, and that of her MCP client."""

    def __init__(self, site: Site, name: str = "ada", role: str = "operator") -> None:
        self.site = site
        self.token = add_operator(site.database, name, role, taken=(), actor="tester")["token"]
        self.client = make_client_token(site.database, name, configured=(), actor="tester")["token"]

    async def plan(self, change: str, **arguments: Any) -> str:
        """The path of the page of a new plan."""
        is_error, texts = await call(self.site, self.client, f"plan_{change}", **arguments)
        assert not is_error, texts
        words, quoted = texts
        data_of(quoted)
        found = re.search(r"(http://127\.0\.0\.1:8470)(/plans/[0-9a-f-]{36})\Z", words)
        assert found is not None, words
        return found[2]

    async def confirm(self, path: str) -> int:
        """The status of pressing the button."""
        async with logged_in(self.site, self.token) as browser:
            return (await press(browser, path)).status_code


async def press(browser: httpx.AsyncClient, path: str, **headers: str) -> httpx.Response:
    """Send the form of the page of a plan, as a browser does; without the page, with that of another one."""
    page = await browser.get(path)
    page = page if page.status_code == 200 else await browser.get("/search")
    return await browser.post(path, data={"csrf": csrf_of(page)}, headers=headers or {"origin": BASE})


@pytest.fixture
def ada(site: Site) -> Ada:
    site.mcp_hosts = []
    site.operators = [*OPERATORS]
    return Ada(site)


def ended_run(site: Site, org: str = "org_a") -> str:
    run = make_run(site, org)
    cancel(site.database, run, actor="tester")
    return run


def retries(site: Site) -> list[str]:
    with site.database.autocommit() as connection:
        query = select(tables.runs.c.id).where(tables.runs.c.origin == "retry")
        return [str(run) for run in connection.execute(query).scalars()]


def is_paused(site: Site) -> bool:
    with site.database.autocommit() as connection:
        org_id = orgs.require(connection, "org_a")["id"]
        query = select(tables.definitions.c.paused_at).where(tables.definitions.c.org_id == org_id)
        return connection.execute(query).scalar_one() is not None


def audit_of(site: Site, actor: str) -> list[str]:
    with site.database.autocommit() as connection:
        query = select(tables.audit.c.action).where(tables.audit.c.actor == actor)
        return list(connection.execute(query.order_by(tables.audit.c.id)).scalars())


@on_either
async def test_a_plan_shows_what_a_retry_would_do_and_its_operator_makes_it(ada: Ada):
    site, run = ada.site, ended_run(ada.site)
    before = everything(site)

    is_error, texts = await call(site, ada.client, "plan_retry_run", run=run, reason="ticket 4711")

    assert not is_error and everything(site) == before
    shown = data_of(texts[1])
    assert (shown["before"]["id"], shown["before"]["state"]) == (run, "cancelled")
    assert (shown["after"]["retry_of"], shown["after"]["state"]) == (run, "waiting")
    path = texts[0].rpartition(BASE)[2]
    async with logged_in(site, ada.token) as browser:
        page = await browser.get(path)
        assert "ticket 4711" in page.text and run in page.text and "Confirm: retry a run" in page.text
        assert everything(site)["runs"] == before["runs"]
        answer = await press(browser, path)
    [new] = retries(site)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/runs/{new}")
    assert audit_of(site, "operator:ada") == ["plan.make", "run.retry", "plan.confirm"]
    assert site.last_change()[2] == {"change": "retry_run", "run": run, "reason": "ticket 4711"}


@on_either
async def test_a_plan_is_used_once_also_by_two_at_once(ada: Ada):
    path = await ada.plan("retry_run", run=ended_run(ada.site), again=True)
    async with logged_in(ada.site, ada.token) as one, logged_in(ada.site, ada.token) as other:
        both = await asyncio.gather(press(one, path), press(other, path))
        third = await press(one, path)

    assert sorted(answer.status_code for answer in both) == [303, 404]
    assert third.status_code == 404
    # The control: the retry itself may be repeated.
    assert len(retries(ada.site)) == 1
    retry(ada.site.database, await _only_retried(ada.site), actor="tester", again=True)
    assert len(retries(ada.site)) == 2


async def _only_retried(site: Site) -> str:
    with site.database.autocommit() as connection:
        query = select(tables.runs.c.retry_of).where(tables.runs.c.origin == "retry")
        return str(connection.execute(query).scalar_one())


@on_either
async def test_a_pause_and_an_answer(ada: Ada):
    site, run = ada.site, make_run(ada.site)
    assert await ada.confirm(await ada.plan("pause_definition", **PAUSE)) == 303
    assert is_paused(site)
    with site.database.transaction() as connection:
        org_id, at = orgs.require(connection, "org_a")["id"], site.database.now(connection)
        wait = {"run_id": run, "org_id": org_id, "name": "approval", "occurrence": 1, "kind": "answer"}
        ask = {"ask": {"total": 1200}, "options": [True, False], "opened_at": at}
        connection.execute(insert(tables.waits).values(**wait, **ask, pending_attempt=1))

    answer = {"run": run, "name": "approval"}
    is_error, texts = await call(site, ada.client, "plan_answer_run", **answer, data="maybe")
    assert is_error and data_of(texts[0])["error"]["code"] == "usage"
    path = await ada.plan("answer_run", **answer, data=True)
    assert await ada.confirm(path) == 303
    with site.database.autocommit() as connection:
        row = connection.execute(select(tables.waits.c.answer, tables.waits.c.answered_by)).one()
    assert tuple(row) == (True, "operator:ada")


async def test_it_expires_after_ten_minutes(ada: Ada):
    early = await ada.plan("pause_definition", **PAUSE)
    ada.site.clock.advance(1)
    late = await ada.plan("pause_definition", **PAUSE)
    ada.site.clock.advance(LASTS - timedelta(seconds=1))

    assert timedelta(minutes=10) == LASTS
    assert await ada.confirm(early) == 404
    assert not is_paused(ada.site)
    # The control: one second before its end the other one is used.
    assert await ada.confirm(late) == 303
    assert is_paused(ada.site)


async def test_only_the_operator_whose_client_planned_it_confirms(ada: Ada):
    site = ada.site
    other = Ada(site, "ben", "admin")
    path = await ada.plan("pause_definition", **PAUSE)

    assert await other.confirm(path) == 404
    sessions = Sessions(site.database, site.clock)
    site.login_basis = "rules"
    # A person and a link may have her name, and all rights.
    for caller in (
        Caller("ada", "admin", kind="link"),
        Caller("ada", "admin", kind="person", subject="ada", home="v", issuer="main", basis="rules"),
    ):
        opened = await sessions.begin(caller)
        async with site.client() as browser:
            browser.cookies.set(SESSION_COOKIE, opened.key)
            assert (await browser.get(path)).status_code == 404
            assert (await press(browser, path)).status_code == 404
    assert not is_paused(site)
    assert await ada.confirm(path) == 303


async def test_a_model_cannot_confirm_with_the_tokens_that_it_may_hold(ada: Ada):
    """It plans, and then asks for the page of the plan, the API and a session by itself."""
    site, run = ada.site, ended_run(ada.site)
    path = await ada.plan("retry_run", run=run)
    for method in ("GET", "POST"):
        async with site.client(ada.client) as client:
            assert (await client.request(method, path, headers={"origin": BASE})).status_code == 403
    for way in (f"/runs/{run}/retry", f"/runs/{run}", "/runs", "/definitions/org_a/digest/run"):
        assert (await site.post(API + way, ada.client, json={})).status_code in (403, 405)
        assert (await site.get(API + way, ada.client)).status_code == 403
    async with site.client() as browser:
        assert (await log_in(browser, ada.client)).status_code == 403
        assert not browser.cookies.get(SESSION_COOKIE)
    # Her own token opens the page, but only a session sends its form.
    assert (await site.get(path, ada.token)).status_code == 200
    assert (await site.post(path, ada.token, headers={"origin": BASE})).status_code == 401
    assert retries(site) == []
    # The controls: with her own token each of these ways is open.
    assert (await site.post(f"{API}/runs/{run}/retry", ada.token, json={})).status_code == 201
    assert await ada.confirm(await ada.plan("pause_definition", **PAUSE)) == 303


async def test_a_token_that_can_change_things_plans_none(ada: Ada):
    """With it, a model could make the change itself: a confirmation would protect nothing."""
    site = ada.site
    site.org_role = "operator"
    viewer = Ada(site, "vic", "viewer")
    for token in (TOKENS["admin"], ada.token, site.token("org_a"), viewer.client):
        is_error, texts = await call(site, token, "plan_pause_definition", **PAUSE)
        assert is_error and data_of(texts[0])["error"]["code"] == "denied"


async def test_another_sites_page_cannot_send_the_form(ada: Ada):
    path = await ada.plan("pause_definition", **PAUSE)
    async with logged_in(ada.site, ada.token) as browser:
        foreign = await press(browser, path, origin="http://evil.example")
        unnamed = await press(browser, path, **{"x-none": "1"})
        without = await browser.post(path, data={}, headers={"origin": BASE})

        assert [each.status_code for each in (foreign, unnamed, without)] == [403, 403, 403]
        assert not is_paused(ada.site)
        assert (await press(browser, path)).status_code == 303


@on_either
async def test_a_plan_whose_subject_has_changed_is_refused(ada: Ada):
    site, run = ada.site, ended_run(ada.site)
    paths = [
        await ada.plan("retry_run", run=run, again=True),
        await ada.plan("pause_definition", **PAUSE),
    ]
    edit_definition(site.database, "org_a", "digest", {"priority": 3}, actor="tester")
    before = everything(site)

    assert [await ada.confirm(path) for path in paths] == [409, 409]
    assert everything(site) == before
    # The control: a new plan shows the new revision.
    assert await ada.confirm(await ada.plan("retry_run", run=run, again=True)) == 303

    path = await ada.plan("retry_run", run=(other := ended_run(site)))
    retry(site.database, other, actor="tester")
    assert await ada.confirm(path) == 409
    assert len(retries(site)) == 2


async def test_a_plan_ends_with_the_token_that_made_it(ada: Ada):
    site = ada.site
    path = await ada.plan("pause_definition", **PAUSE)
    make_client_token(site.database, "ada", configured=(), actor="tester")
    assert await ada.confirm(path) == 404
    assert (await send(site, ada.client)).status_code == 401

    ben = Ada(site, "ben")
    path = await ben.plan("pause_definition", **PAUSE)
    make_client_token(site.database, "ben", configured=(), remove=True, actor="tester")
    assert await ben.confirm(path) == 404

    cat = Ada(site, "cat")
    path = await cat.plan("pause_definition", **PAUSE)
    row = remove_operator(site.database, "cat", configured=(), actor="tester")
    assert not any("sha256" in name for name in row)
    again = Ada(site, "cat")
    assert await again.confirm(path) == 404
    assert not is_paused(site)


async def test_an_operator_has_a_limited_number_of_open_plans(ada: Ada):
    ben = Ada(ada.site, "ben")
    first, theirs = await ada.plan("pause_definition", **PAUSE), await ben.plan("pause_definition", **PAUSE)
    for _ in range(MAX_OPEN):
        ada.site.clock.advance(1)
        newest = await ada.plan("pause_definition", **PAUSE)

    assert [await ada.confirm(first), await ben.confirm(theirs)] == [404, 303]
    with ada.site.database.autocommit() as connection:
        assert len(connection.execute(select(tables.plans.c.id)).all()) == MAX_OPEN
    # What the other plan has changed, this one would not change any more.
    assert await ada.confirm(newest) == 409


async def test_a_hostile_name_is_text_on_the_page_of_a_plan(ada: Ada):
    note = "<script>alert(1)</script>\"'& \u202eyas"
    path = await ada.plan("pause_definition", org="org_a", name="digest", note=note)
    async with logged_in(ada.site, ada.token) as browser:
        page = await browser.get(path)

    assert "<script>alert" not in page.text and "&lt;script&gt;alert" in page.text
    assert "\u202e" not in page.text


async def test_tokens_of_clients_belong_to_operators_of_the_database(site: Site):
    with pytest.raises(NotFound, match="no operator ada") as missing:
        make_client_token(site.database, "ada", configured=("ada",), actor="tester")
    assert "worker.toml" in missing.value.fix
    add_operator(site.database, "sue", "starter", taken=(), actor="tester")
    with pytest.raises(UsageError, match="starter"):
        make_client_token(site.database, "sue", configured=(), actor="tester")
