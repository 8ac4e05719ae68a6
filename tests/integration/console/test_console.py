"""The console's search, and retrying or cancelling the runs of a search in bulk."""

from __future__ import annotations

import html
import re
from urllib.parse import quote

import httpx
from sqlalchemy import select, update

from tests.integration.console.conftest import OURS, TOKENS, Site, csrf_of, logged_in, make_run, on_either
from tests.integration.console.test_bulk import failed
from tests.integration.console.test_pages import fail
from worker.store import tables


def shown(text: str) -> set[str]:
    """The runs that a page links to."""
    return set(re.findall(r'href="/runs/([0-9a-f-]{36})"', text))


@on_either
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


@on_either
async def test_the_page_suggests_an_org_no_handler_of_another(site: Site):
    async with logged_in(site, site.token("org_a")) as client:
        other, unknown, own = [
            (await client.get("/search", params={"q": f"handler:{name}"})).text
            for name in ("acme.othe", "acme.other", "acme.digst")
        ]

    assert "acme.other" not in other
    assert [html.unescape(text).count("There is no handler") for text in (other, unknown, own)] == [1, 1, 1]
    assert "acme.digest" in own


@on_either
async def test_runs_of_a_search_are_retried_one_first_and_then_the_rest(staffed: Site):
    runs = [failed(staffed, "org_a") for _ in range(4)]
    failed(staffed, "org_b")
    async with logged_in(staffed, TOKENS["operator"]) as client:
        found = await client.get("/search", params={"q": "org:org_a state:failed"})
        page = await client.get(href_of(found, "Retry these runs…"))
        first = await send(client, page, reason="CRM is back", only="first", first="1")
        after_one = await client.get(first.headers["location"])
        tried = retries_of(staffed)
        part = await client.get((await send(client, after_one, only="", most="2")).headers["location"])
        in_part = retries_of(staffed)
        done = await client.get((await send(client, part, only="")).headers["location"])
        again = await send(client, page, reason="why", only="")

    assert shown(page.text) == set(runs)
    assert "Retry all that match" in page.text
    assert (tried, sorted(in_part)) == (runs[:1], sorted(runs[:3]))
    # The page after the canary shows its retry, and goes on after it, with the same reason.
    [made] = retried_as(staffed, runs[0])
    assert shown(after_one.text) == {made, *runs[1:]}
    assert "Retry the rest" in after_one.text
    assert 'hx-get="/retry?q=' in after_one.text
    assert "data-parts" not in done.text
    assert again.status_code == 303
    assert sorted(retries_of(staffed)) == sorted(runs)
    assert audited(staffed, "run.retry") == ["CRM is back"] * 4


@on_either
async def test_unfinished_runs_of_a_search_are_cancelled(staffed: Site):
    runs, kept = [make_run(staffed, "org_a") for _ in range(3)], make_run(staffed, "org_b")
    async with logged_in(staffed, TOKENS["operator"]) as client:
        found = await client.get("/search", params={"q": "org:org_a state:waiting"})
        page = await client.get(href_of(found, "Cancel these runs…"))
        first = await client.get(
            (await send(client, page, reason="stop", only="first", first="2")).headers["location"]
        )
        done = await client.get((await send(client, first, only="")).headers["location"])
        listed = await client.get("/search?q=state:waiting")

    assert shown(page.text) == set(runs)
    assert "<b>2</b>" in first.text
    assert "Cancel the rest" in first.text
    assert "<b>3</b>" in done.text
    assert shown(listed.text) == {kept}
    assert audited(staffed, "run.cancel") == ["stop"] * 3


async def test_runs_that_a_bulk_retry_leaves_are_named_with_the_reason(staffed: Site):
    run = failed(staffed, "org_a")
    with staffed.database.transaction() as connection:
        connection.execute(update(tables.orgs).where(tables.orgs.c.code == "org_a").values(state="suspended"))
    async with logged_in(staffed, TOKENS["operator"]) as client:
        page = await client.get("/retry?q=state:failed")
        left = await send(client, page, reason="why", only="")

    assert left.status_code == 200
    assert "org_a/digest: org org_a is suspended" in left.text
    assert shown(left.text) == {run}
    assert retries_of(staffed) == []


async def test_a_bulk_change_needs_a_reason_a_role_and_runs_in_the_right_state(staffed: Site):
    fail(staffed, make_run(staffed, "org_a"))
    waiting = make_run(staffed, "org_b")
    wrong: tuple[dict[str, str], ...] = (
        {"reason": " "},
        {"reason": "x" * 501},
        {"q": ""},
        {"q": "state:running"},
        {"only": "first", "first": "0"},
        {"only": "first", "first": "1000"},
        {"most": "5000"},
        {"after": "nowhere"},
        {"began": "yesterday"},
    )
    async with logged_in(staffed, TOKENS["operator"]) as client:
        page = await client.get("/retry?q=state:failed")
        bad = [await send(client, page, **{"reason": "why", "only": ""} | change) for change in wrong]
        cancel = await client.get("/cancel?q=state:failed")
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        pages = [await client.get("/retry?q=state:failed"), await client.get("/cancel?q=state:waiting")]
        csrf = csrf_of(pages[0])
        refused = [
            await client.post(path, data={"q": "org_b", "reason": "why", "csrf": csrf}, headers=OURS)
            for path in ("/retry", "/cancel")
        ]

    assert [answer.status_code for answer in bad] == [400] * len(wrong)
    assert cancel.status_code == 400
    assert "cannot be cancelled" in cancel.text
    assert shown(pages[1].text) == {waiting}
    assert [answer.status_code for answer in refused] == [403, 403]
    assert not any("data-parts" in page.text for page in pages)
    assert retries_of(staffed) == []


async def test_an_org_changes_only_its_own_runs_in_bulk(site: Site):
    own, other = make_run(site, "org_a"), make_run(site, "org_b")
    fail(site, own)
    fail(site, other)
    waiting, kept = make_run(site, "org_a"), make_run(site, "org_b")
    async with logged_in(site, site.token("org_a")) as client:
        retry = await send(client, await client.get("/retry?q=state:failed"), reason="why", only="")
        cancel = await send(client, await client.get("/cancel?q=state:waiting"), reason="why", only="")
        done = await client.get(cancel.headers["location"])

    assert (retry.status_code, cancel.status_code) == (303, 303)
    assert retries_of(site) == [own]
    assert waiting in shown(done.text)
    assert not {other, kept} & shown(done.text)
    with site.database.autocommit() as connection:
        assert kept in connection.execute(select(tables.live_runs.c.id)).scalars().all()


@on_either
async def test_orgs_are_narrowed_to_the_broken_ones_and_by_name(staffed: Site):
    with staffed.database.transaction() as connection:
        org = connection.execute(select(tables.orgs.c.id).where(tables.orgs.c.code == "org_b")).scalar_one()
        rejected = update(tables.credentials).where(tables.credentials.c.org_id == org)
        connection.execute(rejected.values(last_error="invalid_client"))
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        broken, named = await client.get("/orgs?broken=true"), await client.get("/orgs?q=org_c")
        page = await client.get("/orgs/org_b")
        wrong = [
            await client.get(path)
            for path in ("/orgs?broken=yes", "/orgs?q=state:failed", "/orgs?state=x", "/orgs?late=1")
        ]

    assert set(re.findall(r'href="/orgs/([^"]+)"', broken.text)) == {"org_b"}
    assert set(re.findall(r'href="/orgs/([^"]+)"', named.text)) == {"org_c"}
    assert "Its credential is rejected by the issuer (invalid_client)" in page.text
    assert [answer.status_code for answer in wrong] == [400] * 4


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


def href_of(page: httpx.Response, text: str) -> str:
    """Where the link with this text leads."""
    found = re.search(f'href="([^"]+)">{text}<', page.text)
    assert found is not None, page.text
    return html.unescape(found[1])


async def send(client: httpx.AsyncClient, page: httpx.Response, **changes: str) -> httpx.Response:
    """Send the form of a bulk change as a page shows it, with these changes of its fields."""
    [form] = re.findall(r'<form class="stacked".*?</form>', page.text, re.DOTALL)
    fields = dict(re.findall(r'<input[^>]* name="(\w+)" [^>]*value="([^"]*)"', form))
    action = re.search(r'action="([^"]+)"', form)
    assert action is not None
    given = {name: html.unescape(value) for name, value in fields.items()} | changes
    return await client.post(action[1], data=given, headers=OURS)


def retried_as(site: Site, run: str) -> list[str]:
    with site.database.autocommit() as connection:
        found = connection.execute(select(tables.runs.c.id).where(tables.runs.c.retry_of == run))
        return list(found.scalars())


def retries_of(site: Site) -> list[str]:
    runs = tables.runs
    with site.database.autocommit() as connection:
        found = connection.execute(runs.select().where(runs.c.retry_of.is_not(None))).mappings()
        return [row["retry_of"] for row in found]


def audited(site: Site, action: str) -> list[str]:
    audit = tables.audit
    with site.database.autocommit() as connection:
        found = connection.execute(audit.select().where(audit.c.action == action)).mappings()
        return [row["detail"]["reason"] for row in found]
