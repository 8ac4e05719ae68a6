"""The console: a login, pages that escape all they show, and buttons that only our own pages can press."""

from __future__ import annotations

import html
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import update

from tests.fakes.rows import worker_row
from tests.fakes.stock import Stock
from tests.integration.console.conftest import BASE, OURS, TOKENS, Site, csrf_of, log_in, logged_in, make_run
from worker.features.console.pages import Console
from worker.features.console.pages.rendering import static_url
from worker.features.console.sessions import SESSION_COOKIE as COOKIE
from worker.features.hosts.operations import add_host
from worker.ids import new_id
from worker.store import pools, tables, workers


def fail(site: Site, run_id: str) -> None:
    """As if the run had failed, with words that would be markup."""
    with site.database.transaction() as connection:
        live, runs = tables.live_runs, tables.runs
        connection.execute(live.delete().where(live.c.id == run_id))
        ended = {"state": "failed", "reason": "error", "detail": "<script>", "attempt": 1}
        error = {"type": "ValueError", "message": "<img src=x>"}
        connection.execute(
            update(runs).where(runs.c.id == run_id).values(finished_at=site.clock.now(), error=error, **ended)
        )


async def test_a_good_token_opens_a_session_and_a_bad_one_says_so(staffed: Site):
    async with staffed.client() as client:
        refused = await log_in(client, "wrong")
        opened = await log_in(client, TOKENS["viewer"])
        page = await client.get("/")

    assert (refused.status_code, "the token is invalid" in refused.text) == (401, True)
    cookie = opened.headers["set-cookie"]
    assert cookie.startswith(COOKIE)
    assert "HttpOnly" in cookie
    assert "samesite=lax" in cookie.lower()
    assert TOKENS["viewer"] not in cookie
    assert (page.status_code, "operator:viewer (viewer)" in page.text) == (200, True)


async def test_pages_show_failures_with_their_reason_and_escape_what_they_show(staffed: Site):
    run = make_run(staffed, "org_a")
    fail(staffed, run)
    async with logged_in(staffed, TOKENS["operator"]) as client:
        pages = [await client.get(path) for path in ("/", "/orgs/org_a", f"/runs/{run}")]

    assert "error: &lt;script&gt;" in pages[0].text
    for page in pages[1:]:
        assert "ValueError: &lt;img" in page.text
    for page in pages:
        assert page.status_code == 200
        # Ours alone.
        scripts = [f'<script src="{static_url(name)}" defer>' for name in ("htmx.min.js", "console.js")]
        assert re.findall("<script[^>]*>", page.text) == scripts
        assert "<img" not in page.text
        assert "<b>org" not in page.text
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy


async def test_static_files_need_no_login_and_are_cached_by_their_hash(staffed: Site):
    current, other = await staffed.get(static_url("console.css")), await staffed.get("/static/console.css")

    assert (current.status_code, other.status_code) == (200, 200)
    assert "immutable" in current.headers["cache-control"]
    assert other.headers["cache-control"] == "no-cache"
    assert current.headers["content-type"] == "text/css; charset=utf-8"


async def test_an_unknown_parameter_names_the_known_ones_and_keeps_the_person_logged_in(staffed: Site):
    async with logged_in(staffed, TOKENS["operator"]) as client:
        page = await client.get("/orgs/org_a?stat=failed")
        near = await client.get("/orgs?stat=active")

    assert page.status_code == 400
    assert "no parameter stat" in page.text
    assert "It has: after" in page.text
    assert "Did you mean state? it has: q, state" in near.text
    assert "operator:operator" in page.text
    assert "Log out" in page.text


async def test_the_overview_pages_escape_what_they_show(staffed: Site):
    """With markup in every text that a handler, an operator or a plug-in can choose."""
    evil = "<script>alert(1)</script>"
    for run in (make_run(staffed, "org_a"), make_run(staffed, "org_b")):
        fail(staffed, run)
    with staffed.database.transaction() as connection:
        at = staffed.database.now(connection)
        connection.execute(
            update(tables.orgs).values(name=evil, tags=[evil], state_note=evil, state="paused")
        )
        paused = {"paused_at": at, "paused_by": evil, "pause_note": evil}
        connection.execute(update(tables.definitions).values(**paused))
        connection.execute(update(tables.credentials).values(last_error=evil, client_id=evil))
        schema = {
            "type": "object",
            "properties": {evil: {"type": evil, "description": evil, "default": evil}},
        }
        evils = {"params_schema": schema, "settings_schema": schema, "description": evil}
        connection.execute(update(tables.catalogue).values(**evils))
        connection.execute(
            update(tables.catalogue).where(tables.catalogue.c.name == "acme.other").values(error=evil)
        )
    paths = (
        "/",
        "/orgs",
        "/orgs/org_a",
        "/definitions",
        "/templates",
        "/handlers",
        "/credentials",
        "/workers",
    )
    async with logged_in(staffed, TOKENS["admin"]) as client:
        for path in (*paths, "/failures", "/failures?state=" + quote(evil), "/" + quote(evil)):
            page = await client.get(path)
            assert "<script>" not in page.text, path
            assert "operator:admin" in page.text, path
            assert page.status_code in (200, 400, 404), path


async def test_a_day_of_the_grid_leads_to_its_runs_in_any_zone(staffed: Site):
    fail(staffed, make_run(staffed, "org_a"))
    async with logged_in(staffed, TOKENS["admin"]) as client:
        client.cookies.set("orgworker_zone", "Pacific/Kiritimati")
        page = await client.get("/orgs/org_a")
        [href] = re.findall('class="day failed" href="([^"]*)', page.text)
        found = await client.get(html.unescape(href))

    assert "state%3Afailed+since%3A" in href
    assert (found.status_code, found.text.count('class="chip failed"')) == (200, 1)


async def test_the_page_of_workers_shows_hosts_by_pool_and_what_waits_for_each(staffed: Site):
    run = make_run(staffed, "org_a")
    with staffed.database.transaction() as connection:
        for table in (tables.live_runs, tables.runs):
            connection.execute(update(table).where(table.c.id == run).values(pool="eu-gpu"))
        pools.store_rules(connection, {"eu": {"region": "<eu>"}}, by="here")
    host = add_host(staffed.database, "gpu-1", "us", actor="tester")
    stock = Stock(staffed.database)
    incarnation = stock.worker(pools=["us"])
    stock.change(tables.workers, incarnation, host_id=host["id"])
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        page = (await client.get("/workers")).text
        of_run = (await client.get(f"/runs/{run}")).text
        found = await client.get("/search?q=state%3Awaiting+pool%3Aeu-gpu")

    rows = {
        name: row for row in page.split("<tr>") for name in re.findall(r"<code>([a-z-]+)</code>", row)[:1]
    }
    assert "<strong>gpu-1</strong> on here" in page
    assert "not served" in rows["eu-gpu"]
    assert "not served" not in rows["us"]
    assert "region = &lt;eu&gt;" in rows["eu"]
    assert "<dt>Pool</dt><dd><code>eu-gpu</code></dd>" in of_run
    assert run in found.text


async def test_a_crash_is_on_the_pages_of_workers_and_of_the_morning_and_a_stop_is_not(staffed: Site):
    stock = Stock(staffed.database)
    dead, stopped, silent, me = (stock.worker() for _ in range(4))
    stock.running(dead)
    stock.change(tables.workers, dead, host="<app1>")
    stock.change(tables.workers, silent, host_id=new_id(), outcome="crashed", ended_at=stock.now())
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        before = (await client.get("/")).text
        with staffed.database.transaction() as connection:
            workers.unregister(connection, stopped)
            workers.recover(connection, max_recoveries=3, by=me, others_than=me)
        page, morning = (await client.get("/workers")).text, (await client.get("/")).text

    rows = {
        one: row
        for row in page.split("<tr>")
        for one in (dead, stopped, silent, me)
        if f">{one[-12:]}</code></span><details" in row
    }
    for one, state in ((dead, "crashed"), (stopped, "stopped"), (silent, "silent"), (me, "up")):
        assert f'class="chip {state}"' in rows[one], state
    assert f', 1 run recovered by <code class="small muted">{me[-12:]}</code>' in rows[dead]
    assert "recovered" not in rows[stopped]
    # The control: the page before anybody had noticed.
    assert "crashed" not in before
    assert "1 worker crashed" in morning
    assert "&lt;app1&gt; crashed " in morning
    assert f" UTC, 1 run recovered by {me}." in morning
    assert "1 worker went silent" in morning


async def test_an_error_page_says_where_to_go_instead_of_commands(staffed: Site):
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        lost = [await client.get(path) for path in ("/runs/x", "/orgs/nobody", "/nothing", "/audit")]

    assert [page.status_code for page in lost] == [404, 404, 404, 403]
    for page in lost:
        assert re.search(r"`|<code>|worker\.toml", page.text) is None
        assert "Where to go" in page.text
        assert "Log out" in page.text
    assert 'href="/failures"' in lost[0].text


async def test_nothing_needs_attention_where_all_is_well(staffed: Site):
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        idle = await client.get("/")
        with staffed.database.transaction() as connection:
            now = staffed.database.now(connection)
            connection.execute(worker_row(now, lease_until=now + timedelta(minutes=1)))
        well = await client.get("/")
        fail(staffed, make_run(staffed, "org_a"))
        worse = await client.get("/")

    assert "No worker is running" in idle.text
    assert "Nothing needs attention" in well.text
    assert "Nothing needs attention" not in worse.text
    assert "1 run failed in org_a" in worse.text
    assert re.search(r'href="/search\?q=state%3Afailed[^"]*reason%3Aerror', worse.text)


async def test_times_are_shown_in_the_viewers_zone(staffed: Site):
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        before = await client.get("/orgs")
        csrf = csrf_of(before)
        form = {"csrf": csrf, "zone": "Asia/Tokyo", "back": "/orgs"}
        chosen = await client.post("/zone", data=form, headers=OURS)
        page = await client.get("/orgs")
        wrong = await client.post("/zone", data=form | {"zone": "Nowhere/Land"}, headers=OURS)
        away = await client.post("/zone", data=form | {"back": "//evil.example"}, headers=OURS)

    assert (chosen.status_code, chosen.headers["location"]) == (303, "/orgs")
    for shown, zone in ((before.text, ZoneInfo("UTC")), (page.text, ZoneInfo("Asia/Tokyo"))):
        at, title, text = re.findall(r'<time datetime="([^"]+)" title="([^"]+)">([^<]+)</time>', shown)[0]
        instant = datetime.fromisoformat(at)
        assert text == f"{instant.astimezone(zone):%Y-%m-%d %H:%M}"
        assert title == f"{instant.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        assert f"Times are in {zone.key}." in shown
    assert (wrong.status_code, "Unknown time zone" in wrong.text) == (400, True)
    assert away.headers["location"] == "/"


@pytest.mark.parametrize(
    ("form", "headers"),
    [
        ({}, OURS),
        ({"csrf": "guessed"}, OURS),
        ({"csrf": "theirs"}, {}),
        ({"csrf": "theirs"}, OURS | {"sec-fetch-site": "cross-site"}),
        ({"csrf": "theirs"}, {"sec-fetch-site": "same-site"}),
        ({"csrf": "theirs"}, {"sec-fetch-site": "none"}),
        ({"csrf": ""}, {"origin": BASE}),
        ({"csrf": "theirs"}, {"origin": "https://evil.example"}),
        ({"csrf": "theirs"}, {"origin": "null"}),
    ],
)
async def test_a_form_of_another_page_does_nothing(staffed: Site, form: dict, headers: dict):
    run = make_run(staffed, "org_a")
    async with logged_in(staffed, TOKENS["operator"]) as client:
        if form.get("csrf") == "theirs":
            form = {"csrf": csrf_of(await client.get("/"))}
        answer = await client.post(f"/runs/{run}/cancel", data=form, headers=headers)

        assert answer.status_code == 403
        assert "waiting" in (await client.get(f"/runs/{run}")).text


async def test_each_page_has_another_csrf_token_and_each_is_taken(staffed: Site):
    """The length of a compressed page, which may show what an attacker wrote, would reveal one that stays."""
    async with staffed.client() as client:
        await log_in(client, TOKENS["operator"])
        tokens = [csrf_of(await client.get("/orgs")) for _ in range(2)]
        assert tokens[0] != tokens[1]
        for token in tokens:
            zone = {"csrf": token, "zone": "Asia/Tokyo", "back": "/orgs"}
            assert (await client.post("/zone", data=zone, headers=OURS)).status_code == 303
            mixed = zone | {"csrf": tokens[1][:16] + tokens[0][16:]}
            assert (await client.post("/zone", data=mixed, headers=OURS)).status_code == 403


async def test_a_login_sent_by_another_page_is_refused(staffed: Site):
    async with staffed.client() as client:
        answer = await log_in(client, TOKENS["admin"], origin="https://evil.example")

    assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)


@pytest.mark.parametrize("csrf", [None, "", "guessed"])
async def test_a_login_needs_the_token_of_the_form_in_this_browser(staffed: Site, csrf: str | None):
    """Else another page could log its visitor in as somebody else."""
    async with staffed.client() as attacker, staffed.client() as victim:
        form = {"token": TOKENS["admin"], "csrf": csrf_of(await attacker.get("/")) if csrf is None else csrf}
        await victim.get("/")
        answer = await victim.post("/login", data=form, headers=OURS)
        without_cookie = await staffed.client().post("/login", data=form, headers=OURS)

    assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
    assert (without_cookie.status_code, "set-cookie" in without_cookie.headers) == (403, False)


async def test_two_open_login_forms_both_work(staffed: Site):
    async with staffed.client() as client:
        first = await client.get("/")
        await client.get("/runs/x")
        form = {"token": TOKENS["viewer"], "csrf": csrf_of(first)}

        assert (await client.post("/login", data=form, headers=OURS)).status_code == 303


async def test_a_form_without_an_origin_is_taken_where_the_browser_says_that_it_is_ours(staffed: Site):
    run = make_run(staffed, "org_a")
    async with logged_in(staffed, TOKENS["operator"]) as client:
        form = {"csrf": csrf_of(await client.get("/"))}
        headers = {"sec-fetch-site": "same-origin"}
        answer = await client.post(f"/runs/{run}/cancel", data=form, headers=headers)

    assert answer.status_code == 303


async def test_every_unsafe_route_refuses_what_no_page_of_ours_sent(staffed: Site):
    """From the router, so that a new route without the check fails here."""
    nothing: Any = None
    routes = [
        route
        for route in Console(nothing, nothing, nothing, nothing, nothing).routes()
        if set(route.methods or ()) - {"GET", "HEAD", "OPTIONS"}
    ]
    assert len(routes) >= 5
    run = make_run(staffed, "org_a")
    async with logged_in(staffed, TOKENS["operator"]) as client:
        csrf = csrf_of(await client.get("/"))
        for route in routes:
            names = {"name": "digest", "code": "x", "plan": "x", "rollout": "x", "verb": "halt"}
            path = route.path.format(run=run, org="org_a", **names)
            for form, headers in (
                ({}, OURS),
                ({"csrf": csrf}, {}),
                ({"csrf": csrf}, {"origin": "https://evil.example"}),
            ):
                answer = await client.post(path, data=form | {"token": TOKENS["admin"]}, headers=headers)
                assert answer.status_code == 403, (path, form, headers)
        assert (await client.get(f"/runs/{run}")).status_code == 200


class TestBehindHttps:
    """Where browsers reach it over https, by `web.public_url`."""

    @pytest.fixture
    def public(self, staffed: Site) -> Site:
        staffed.public_url = "https://Jobs.acme.com:443/"
        return staffed

    async def test_cookies_are_of_this_host_alone_and_secure(self, public: Site):
        async with public.client(base="https://jobs.acme.com") as client:
            page = await client.get("/")
            answer = await log_in(client, TOKENS["operator"], origin="https://jobs.acme.com")
            assert answer.status_code == 303
            assert (await client.get("/")).status_code == 200
            csrf = csrf_of(await client.get("/"))
            out = await client.post(
                "/logout", data={"csrf": csrf}, headers={"origin": "https://jobs.acme.com"}
            )

        for one in (page, answer, out):
            for cookie in one.headers.get_list("set-cookie"):
                name, _, attributes = cookie.lower().partition(";")
                assert name.startswith("__host-orgworker_")
                assert {"secure", "httponly", "path=/", "samesite=lax"} <= set(attributes.split("; ")) | {
                    part.strip() for part in attributes.split(";")
                }
                assert "domain" not in attributes
        assert COOKIE in answer.headers["set-cookie"]

    async def test_a_cookie_without_the_prefix_opens_nothing(self, public: Site):
        """Such a cookie may have been set by a page of another host of the same domain."""
        async with public.client(base="https://jobs.acme.com") as client:
            await log_in(client, TOKENS["operator"], origin="https://jobs.acme.com")
            key = client.cookies[f"__Host-{COOKIE}"]
            client.cookies.clear()

            assert (await client.get("/", headers={"cookie": f"{COOKIE}={key}"})).status_code == 401
            assert (await client.get("/", headers={"cookie": f"__Host-{COOKIE}={key}"})).status_code == 200

    @pytest.mark.parametrize(
        "origin", ["http://jobs.acme.com", "https://jobs.acme.com:8443", "https://jobs.acme.com.evil.example"]
    )
    async def test_the_origin_is_compared_with_its_scheme_and_port(self, public: Site, origin: str):
        async with public.client(base="https://jobs.acme.com") as client:
            answer = await log_in(client, TOKENS["operator"], origin=origin)

        assert answer.status_code == 403

    async def test_without_a_public_url_a_trusted_proxy_says_that_it_is_https(self, staffed: Site):
        staffed.trusted_proxies = ("127.0.0.1/32",)
        async with staffed.client(base="https://jobs.acme.com") as client:
            client.headers["x-forwarded-proto"] = "https"
            answer = await log_in(client, TOKENS["viewer"])
            assert answer.headers["set-cookie"].startswith(f"__Host-{COOKIE}")
        staffed.trusted_proxies = ()
        async with staffed.client() as client:
            client.headers["x-forwarded-proto"] = "https"
            answer = await log_in(client, TOKENS["viewer"])
            assert answer.headers["set-cookie"].startswith(COOKIE)


async def test_an_operator_retries_a_failed_run_and_cancels_the_new_one(staffed: Site):
    run = make_run(staffed, "org_a")
    fail(staffed, run)
    async with logged_in(staffed, TOKENS["operator"]) as client:
        csrf = csrf_of(await client.get(f"/runs/{run}"))
        retried = await client.post(f"/runs/{run}/retry", data={"csrf": csrf}, headers=OURS)
        new = retried.headers["location"]
        page = await client.get(new)
        assert f"{new}/cancel" in page.text
        cancelled = await client.post(f"{new}/cancel", data={"csrf": csrf_of(page)}, headers=OURS)

        assert (retried.status_code, cancelled.status_code) == (303, 303)
        assert "Cancelled: it was cancelled on request." in (await client.get(new)).text


async def test_a_session_ends_with_its_token_by_time_or_by_logout(site: Site):
    app = site.apps["org_a"]
    app.lifetime = 600
    async with logged_in(site, site.token("org_a")) as client:
        site.clock.advance(599)
        page = await client.get("/orgs/org_a")
        assert page.status_code == 200
        site.clock.advance(2)
        assert (await client.get("/orgs/org_a")).status_code == 401

    async with logged_in(site, site.token("org_a")) as client:
        page = await client.get("/orgs/org_a")
        key = client.cookies[COOKIE]
        await client.post("/logout", data={"csrf": csrf_of(page)}, headers=OURS)
        answer = await client.get("/orgs/org_a", headers={"cookie": f"{COOKIE}={key}"})
        assert answer.status_code == 401


async def test_orgs_and_runs_have_further_pages(staffed: Site):
    with staffed.database.transaction() as connection:
        [org] = connection.execute(tables.orgs.select().where(tables.orgs.c.code == "org_a")).mappings()
        for number in range(30):
            row = dict(org) | {"id": f"01900000-0000-7000-8000-{number:012}", "code": f"org-{number:02}"}
            connection.execute(tables.orgs.insert().values(row))
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        first = await client.get("/orgs")
        more = re.search(r'href="(/orgs\?after=[^"]+)"', first.text)
        assert more is not None
        second = await client.get(more[1])

    listed = [set(re.findall(r'href="/orgs/([^"]+)"', page.text)) for page in (first, second)]
    assert len(listed[0] | listed[1]) == 33
    assert not listed[0] & listed[1]
