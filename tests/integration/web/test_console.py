"""The console's search, and retrying the runs of a search in bulk."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from sqlalchemy import select, update

from tests.integration.web.conftest import BASE, TOKENS, Site, csrf_of
from tests.integration.web.test_pages import OURS, fail, logged_in, make_run
from worker.store import tables

pytestmark = pytest.mark.anyio
EITHER = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)


def shown(text: str) -> set[str]:
    """The runs that a page links to."""
    return set(re.findall(r'href="/runs/([0-9a-f-]{36})"', text))


@EITHER
async def test_one_search_finds_an_orgs_failed_runs(staffed: Site):
    failed, waiting, other = (
        make_run(staffed, "org_a"),
        make_run(staffed, "org_a"),
        make_run(staffed, "org_b"),
    )
    fail(staffed, failed)
    fail(staffed, other)
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        every = await client.get("/search")
        of_org = await client.get("/search?q=org_a")
        narrowed = await client.get("/search", params={"q": "org:org_a state:failed since:2020-01-01"})

    assert shown(every.text) == {failed, waiting, other}
    assert shown(of_org.text) == {failed, waiting}
    assert 'href="/orgs/org_a"' in of_org.text
    assert shown(narrowed.text) == {failed}
    assert 'value="org:org_a state:failed since:2020-01-01"' in narrowed.text


async def test_a_run_id_leads_to_the_run(staffed: Site):
    run = make_run(staffed, "org_a")
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        known = await client.get(f"/search?q={run}")
        unknown = await client.get(f"/search?q={run[:-4]}0000")

    assert (known.status_code, known.headers["location"]) == (303, f"/runs/{run}")
    assert (unknown.status_code, "No run fits" in unknown.text) == (200, True)


async def test_an_unknown_key_suggests_the_nearest_and_keeps_the_text(staffed: Site):
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        wrong = await client.get("/search?q=stat:failed")
        near = await client.get("/search?q=orh_a")

    assert wrong.status_code == 400
    assert "Did you mean state?" in wrong.text
    assert 'value="stat:failed"' in wrong.text
    assert near.status_code == 200
    assert 'href="/search?q=org_a"' in near.text


async def test_a_search_goes_on_by_key(staffed: Site):
    runs = {make_run(staffed, "org_a") for _ in range(30)}
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        first = await client.get("/search?q=org_a")
        more = re.search(r'rel="next" href="([^"]+)"', first.text)
        assert more is not None
        second = await client.get(more[1].replace("&amp;", "&"))

    assert shown(first.text) | shown(second.text) == runs
    assert not shown(first.text) & shown(second.text)


async def test_an_org_finds_its_own_runs_only(site: Site):
    own, other = make_run(site, "org_a"), make_run(site, "org_b")
    async with logged_in(site, site.token("org_a")) as client:
        pages = [
            await client.get("/search", params={"q": text}) for text in ("", "org_b", "org:org_b", other)
        ]

    assert shown(pages[0].text) == {own}
    assert [shown(page.text) for page in pages[1:]] == [set()] * 3
    assert all(page.status_code == 200 for page in pages)


@EITHER
async def test_runs_of_a_search_are_retried_one_first_and_then_the_rest(staffed: Site):
    runs = [make_run(staffed, "org_a") for _ in range(3)]
    kept = make_run(staffed, "org_b")
    for run in (*runs, kept):
        fail(staffed, run)
    form = {"q": "org:org_a state:failed", "reason": "CRM is back", "after": ""}
    async with logged_in(staffed, TOKENS["operator"]) as client:
        page = await client.get("/retry", params={"q": form["q"]})
        csrf = {"csrf": csrf_of(page)}
        first = await client.post("/retry", data=form | csrf | {"only": "first"}, headers=OURS)
        after_one = await client.get(first.headers["location"])
        rest = await client.post("/retry", data=form | csrf | {"only": ""}, headers=OURS)
        done = await client.get(rest.headers["location"])
        again = await client.post("/retry", data=form | csrf | {"only": ""}, headers=OURS)

    assert shown(page.text) == set(runs)
    assert (first.status_code, rest.status_code, again.status_code) == (303, 303, 303)
    assert "Retry all 2 below" in after_one.text
    assert "Retry all" not in done.text
    made = retries_of(staffed)
    assert sorted(made) == sorted(runs)
    assert kept not in made
    reasons = audited(staffed)
    assert reasons == ["CRM is back"] * 3


async def test_a_bulk_retry_needs_a_reason_a_role_and_runs_that_can_be_retried(staffed: Site):
    fail(staffed, make_run(staffed, "org_a"))
    form = {"q": "state:failed", "reason": "why", "only": ""}
    async with logged_in(staffed, TOKENS["operator"]) as client:
        csrf = csrf_of(await client.get("/retry?q=state:failed"))
        bad = [
            await client.post("/retry", data=form | {"csrf": csrf} | change, headers=OURS)
            for change in ({"reason": " "}, {"q": ""}, {"q": "state:running"})
        ]
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        page = await client.get("/retry?q=state:failed")
        refused = await client.post("/retry", data=form | {"csrf": csrf_of(page)}, headers=OURS)

    assert [answer.status_code for answer in bad] == [400, 400, 400]
    assert (refused.status_code, "Retry all" in page.text) == (403, False)
    assert retries_of(staffed) == []


@pytest.mark.parametrize("role", ["operator"])
async def test_an_org_retries_only_its_own_runs_in_bulk(site: Site, role: str):
    own, other = make_run(site, "org_a"), make_run(site, "org_b")
    fail(site, own)
    fail(site, other)
    async with logged_in(site, site.token("org_a")) as client:
        csrf = csrf_of(await client.get("/search"))
        form = {"csrf": csrf, "q": "state:failed", "reason": "why", "only": ""}
        answer = await client.post("/retry", data=form, headers={"origin": BASE})

    assert answer.status_code == 303
    assert retries_of(site) == [own]


@EITHER
async def test_orgs_are_narrowed_to_the_broken_ones_and_by_name(staffed: Site):
    with staffed.database.transaction() as connection:
        org = connection.execute(select(tables.orgs.c.id).where(tables.orgs.c.code == "org_b")).scalar_one()
        rejected = update(tables.credentials).where(tables.credentials.c.org_id == org)
        connection.execute(rejected.values(last_error="invalid_client"))
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        broken, named = await client.get("/orgs?broken=true"), await client.get("/orgs?q=org_c")
        page = await client.get("/orgs/org_b")
        wrong = [
            await client.get(path) for path in ("/orgs?broken=yes", "/orgs?q=state:failed", "/orgs?state=x")
        ]

    assert set(re.findall(r'href="/orgs/([^"]+)"', broken.text)) == {"org_b"}
    assert set(re.findall(r'href="/orgs/([^"]+)"', named.text)) == {"org_c"}
    assert "Its credential is rejected by the issuer (invalid_client)" in page.text
    assert [answer.status_code for answer in wrong] == [400, 400, 400]


async def test_hostile_searches_are_shown_as_text(staffed: Site):
    evil = (
        '"><script>alert(1)</script>',
        "{{ 7 * 7 }}",
        "' OR 1=1 --",
        "%00",
        "a" * 600,
        "org:<b>x</b>",
        "\u202e",
    )
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        for text in evil:
            page = await client.get(f"/search?q={quote(text)}")
            assert page.status_code in (200, 400), text
            assert "<script>alert" not in page.text
            assert "<b>x" not in page.text
            assert ">49<" not in page.text


def retries_of(site: Site) -> list[str]:
    runs = tables.runs
    with site.database.autocommit() as connection:
        found = connection.execute(runs.select().where(runs.c.retry_of.is_not(None))).mappings()
        return [row["retry_of"] for row in found]


def audited(site: Site) -> list[str]:
    audit = tables.audit
    with site.database.autocommit() as connection:
        found = connection.execute(audit.select().where(audit.c.action == "run.retry")).mappings()
        return [row["detail"]["reason"] for row in found]
