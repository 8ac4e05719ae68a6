"""What hosts declare, on the page of workers: admins approve it, others read it, orgs do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fakes.stock import Stock
from tests.integration.console.conftest import OURS, TOKENS, Site, csrf_of, logged_in, on_either
from tests.integration.operations.test_host_handlers import KEYED, RENDER, host_of
from worker.features.console.callers import Role
from worker.features.console.pages import inventory
from worker.ids import ALL_ORGS
from worker.operations.approvals import approve, list_approvals
from worker.store import tables
from worker.store.lists import AUDIT
from worker.store.lists.read import read

EVIL = "<script>pwned()</script>"


def declared(site: Site, name: str = "gpu.keyed") -> str:
    """A host of pool eu declares a handler with secrets and scopes; the digest of that."""
    host_of(Stock(site.database), "eu", replace(KEYED, name=name))
    [row] = list_approvals(site.database)
    return str(row["digest"])


def approvals_of(site: Site) -> list[tuple[str, str]]:
    with site.database.autocommit() as connection:
        rows = read(connection, AUDIT, ALL_ORGS)
    return [(row["actor"], row["subject"]) for row in rows if row["action"] == "pool.approve"]


async def test_an_admin_sees_what_is_declared_and_approves_it(staffed: Site):
    digest = declared(staffed)
    async with logged_in(staffed, TOKENS["admin"]) as client:
        page = await client.get("/workers")
        for shown in (">openai<", ">read:gpu<", f"pools approve eu gpu.keyed {digest}", "eu-host"):
            assert shown in page.text
        overview = await client.get("/")
        assert "1 declaration of hosts not approved" in overview.text
        form = {"csrf": csrf_of(page), "pool": "eu", "handler": "gpu.keyed", "digest": digest}
        answer = await client.post("/pools/approve", data=form, headers=OURS)
        after = await client.get("/workers")

    assert (answer.status_code, answer.headers["location"]) == (303, "/workers#approvals")
    assert "Approved by operator:admin" in after.text
    assert 'action="/pools/approve"' not in after.text
    assert approvals_of(staffed) == [("operator:admin", "eu gpu.keyed")]
    assert [row["approved"] for row in list_approvals(staffed.database)] == [True]


@on_either
async def test_what_is_not_declared_any_more_is_not_approved_and_the_page_says_what_is(staffed: Site):
    digest = declared(staffed)
    async with logged_in(staffed, TOKENS["admin"]) as client:
        csrf = csrf_of(await client.get("/workers"))
        for fields, status in (
            ({"pool": "eu", "handler": "gpu.keyed", "digest": "1-0"}, 409),
            ({"pool": "us", "handler": "gpu.keyed", "digest": digest}, 404),
            ({"pool": "eu", "handler": "gpu.other", "digest": digest}, 404),
            ({}, 404),
        ):
            answer = await client.post("/pools/approve", data={"csrf": csrf} | fields, headers=OURS)
            assert (answer.status_code, 'role="alert"' in answer.text) == (status, True), fields
            assert f"pools approve eu gpu.keyed {digest}" in answer.text

    assert approvals_of(staffed) == []


@pytest.mark.parametrize("role", ["viewer", "operator"])
async def test_others_see_it_and_cannot_approve_it(staffed: Site, role: Role):
    digest = declared(staffed)
    async with logged_in(staffed, TOKENS[role]) as client:
        page = await client.get("/workers")
        form = {"csrf": csrf_of(page), "pool": "eu", "handler": "gpu.keyed", "digest": digest}
        answer = await client.post("/pools/approve", data=form, headers=OURS)

    assert f"pools approve eu gpu.keyed {digest}" in page.text
    assert ('action="/pools/approve"' in page.text, "An administrator can approve it" in page.text) == (
        False,
        True,
    )
    assert (answer.status_code, approvals_of(staffed)) == (403, [])


async def test_a_form_of_another_site_approves_nothing(staffed: Site):
    """As every form: it needs the session's own token and a page of ours."""
    digest = declared(staffed)
    form = {"pool": "eu", "handler": "gpu.keyed", "digest": digest}
    async with logged_in(staffed, TOKENS["admin"]) as client:
        csrf = csrf_of(await client.get("/workers"))
        for fields, headers in (
            (form, OURS),
            (form | {"csrf": "guessed"}, OURS),
            (form | {"csrf": csrf}, {"origin": "https://evil.example"}),
        ):
            answer = await client.post("/pools/approve", data=fields, headers=headers)
            assert answer.status_code == 403
        assert approvals_of(staffed) == []
        # The control.
        assert (
            await client.post("/pools/approve", data=form | {"csrf": csrf}, headers=OURS)
        ).status_code == 303


async def test_an_org_sees_neither_page_nor_declaration(staffed: Site):
    digest = declared(staffed)
    async with logged_in(staffed, staffed.token("org_a")) as client:
        page = await client.get("/workers")
        form = {"csrf": csrf_of(await client.get("/definitions")), "pool": "eu", "handler": "gpu.keyed"}
        answer = await client.post("/pools/approve", data=form | {"digest": digest}, headers=OURS)
        handlers = await client.get("/handlers")

    assert (page.status_code, answer.status_code, approvals_of(staffed)) == (403, 403, [])
    assert not any(digest in text or "gpu.keyed" in text for text in (page.text, answer.text, handlers.text))


async def test_text_that_a_host_chose_runs_nowhere(staffed: Site):
    evil = replace(KEYED, name=f"gpu.{EVIL}", distribution=EVIL, version=EVIL, scopes=(EVIL,))
    host_of(Stock(staffed.database), "eu", evil)
    async with logged_in(staffed, TOKENS["admin"]) as client:
        pages = [(await client.get(path)).text for path in ("/workers", "/handlers", "/")]

    assert [EVIL in page for page in pages] == [False, False, False]
    assert all("&lt;script&gt;pwned()" in page for page in pages)


async def test_no_pool_hides_what_another_declares_and_the_page_stays_small(
    staffed: Site, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inventory, "APPROVALS", 3)
    stock = Stock(staffed.database)
    host_of(stock, "aaa", *(replace(KEYED, name=f"gpu.{number:03}") for number in range(9)))
    host_of(stock, "eu", KEYED, replace(KEYED, name="gpu.long", scopes=("s" * 200,) * 20))
    many = tuple(f"scope-{number}-{'s' * 90}" for number in range(40))
    host_of(stock, "us", replace(KEYED, name="gpu.long", scopes=many))
    async with logged_in(staffed, TOKENS["admin"]) as client:
        page = (await client.get("/workers")).text

    assert page.count("in pool <code>aaa</code></h3>") == 3
    assert "6 more of pool <code>aaa</code>" in page
    assert "<code>gpu.keyed</code> in pool <code>eu</code></h3>" in page
    # What cannot be read here is not approved here.
    assert (many[0] in page, "too long to show here" in page) == (False, True)
    assert 'value="gpu.long"' not in page.partition("in pool <code>us</code>")[2]


@on_either
async def test_an_orgs_run_is_checked_by_what_hosts_of_its_pool_declare(staffed: Site):
    """Its role reads that, and not what was approved."""
    host_of(Stock(staffed.database), "eu", replace(RENDER, name="acme.hosted", timeout="9h"))
    with staffed.database.transaction() as connection:
        spec = {"handler": "acme.hosted", "schedule": "@daily", "pool": "eu", "params_by_hand": ["frames"]}
        connection.execute(tables.definition_revisions.update().values(spec=spec))
    base = "/orgs/org_a/definitions/digest"
    async with logged_in(staffed, staffed.token("org_a")) as client:
        handlers = await client.get("/handlers")
        form = {"csrf": csrf_of(await client.get(base))}
        wrong = await client.post(f"{base}/run", data=form | {"params": '{"frames": "x"}'}, headers=OURS)
        run = await client.post(f"{base}/run", data=form | {"params": '{"frames": 3}'}, headers=OURS)

    assert (handlers.status_code, "acme.hosted" in handlers.text) == (200, True)
    assert (wrong.status_code, run.status_code) == (422, 303), wrong.text


@on_either
@pytest.mark.parametrize("approved", [False, True])
async def test_what_is_in_force_is_what_hosts_may_and_not_what_they_declare(staffed: Site, approved: bool):
    host_of(Stock(staffed.database), "eu", replace(RENDER, name="acme.hosted", timeout="9h"))
    with staffed.database.transaction() as connection:
        spec = {"handler": "acme.hosted", "schedule": "@daily", "pool": "eu"}
        connection.execute(tables.definition_revisions.update().values(spec=spec))
    if approved:
        [row] = list_approvals(staffed.database)
        approve(staffed.database, "eu", "acme.hosted", row["digest"], actor="ana")
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        page = await client.get("/orgs/org_a/definitions/digest")

    assert (page.status_code, ">9h<" in page.text) == (200, approved)
