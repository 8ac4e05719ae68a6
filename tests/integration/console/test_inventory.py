"""The lists of what is installed, stored and changed: in words, without a word of what an org may not see."""

from __future__ import annotations

import html
import re
from datetime import date, timedelta
from typing import Any

from sqlalchemy import select, update

from tests.integration.console.conftest import TOKENS, Site, logged_in, make_run, on_either
from worker.ids import new_id
from worker.operations.definitions import edit_definition, pause_definition
from worker.operations.runs import cancel, retry
from worker.store import orgs, tables
from worker.store.lists.grid import STATES, Grid

EVIL = "<script>alert(1)</script>"


def end(site: Site, run: str, state: str, **values: Any) -> None:
    """As if the run had ended so."""
    with site.database.transaction() as connection:
        connection.execute(tables.live_runs.delete().where(tables.live_runs.c.id == run))
        ended = {"state": state, "finished_at": site.database.now(connection), "attempt": 1, **values}
        connection.execute(update(tables.runs).where(tables.runs.c.id == run).values(**ended))


def rows_of(page: str) -> list[str]:
    """The rows of the table of a page, newest first, as text without tags."""
    rows = re.findall("<tr>(.*?)</tr>", page.partition("<tbody>")[2], re.DOTALL)
    return [" ".join(html.unescape(re.sub("<[^>]+>", " ", row)).split()) for row in rows]


@on_either
async def test_the_audit_reads_as_sentences_with_the_json_behind_a_disclosure(staffed: Site):
    database = staffed.database
    run = make_run(staffed)
    cancel(database, run, actor="operator:ada", reason="not <now>")
    again = retry(database, run, actor="person:kp_1@org_a")["id"]
    changes = {"schedule": "every 1h", "timeout": "90m"}
    edit_definition(database, "org_a", "digest", changes, actor="operator:ada", reason="too rare")
    pause_definition(database, "org_a", "digest", actor="worker", note=EVIL)
    async with logged_in(staffed, TOKENS["admin"]) as client:
        page = (await client.get("/audit")).text
    newest = rows_of(page)[:4]

    assert "worker org_a Paused the definition digest note: <script>alert(1)</script> JSON" in newest[0]
    assert "ada operator org_a Changed the definition digest" in newest[1]
    for part in (
        "reason: too rare",
        "schedule: at 03:00 every day → every hour",
        "timeout: 1 hour 30 minutes",
    ):
        assert part in newest[1]
    assert '"before": "0 3 * * *"' in newest[1]
    assert "kp_1 of org_a org_a Retried as the run" in newest[2]
    assert f'href="/runs/{again}"' in page
    assert "reason: not <now>" in newest[3]
    assert 'href="/orgs/org_a/definitions/digest"' in page
    assert 'title="operator:ada"' in page
    assert EVIL not in page


@on_either
async def test_an_org_reads_its_audit_without_the_values_and_words_of_operators(staffed: Site):
    database = staffed.database
    edit_definition(database, "org_a", "digest", {"timeout": "77m"}, actor="mallory", reason="secret words")
    pause_definition(database, "org_b", "digest", actor="person:kp_2@org_b", note="of another org")
    async with logged_in(staffed, staffed.token("org_a")) as client:
        theirs = (await client.get("/audit")).text
    async with logged_in(staffed, TOKENS["admin"]) as client:
        ours = (await client.get("/audit")).text

    assert "operator Changed the definition digest" in rows_of(theirs)[0]
    for hidden in ("77m", "1 hour", "mallory", "secret words", "kp_2", "org_b"):
        assert hidden not in theirs.partition("<main")[2], hidden
    # The control: an operator reads them.
    for shown in ("1 hour 17 minutes", "mallory", "secret words", "kp_2"):
        assert shown in ours


@on_either
async def test_handlers_and_templates_say_what_they_do_in_words(staffed: Site):
    with staffed.database.transaction() as connection:
        said = {"description": f"Digest what is new {EVIL}."}
        connection.execute(update(tables.catalogue).values(**said))
        connection.execute(
            update(tables.templates).values(selector={"tags": ["pro", EVIL], "issuer": "main"})
        )
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        handlers = (await client.get("/handlers")).text
        templates = (await client.get("/templates")).text
    async with logged_in(staffed, staffed.token("org_a")) as client:
        theirs = (await client.get("/handlers")).text
        api = (await client.get("/api/v1/handlers", headers={"authorization": ""})).status_code

    assert f"<p>{html.escape(said['description'])}</p>" in handlers
    assert handlers.count("Digest what is new") == 2
    assert theirs.count("Digest what is new") == 1
    assert api == 401
    shown = html.unescape(templates)
    assert f"orgs with the tags {EVIL} and pro of the issuer main" in shown
    assert "at the start of every hour" in shown
    assert EVIL not in handlers + templates + theirs
    assert "{&#34;tags" not in templates


@on_either
async def test_a_cell_of_the_grid_says_how_many_of_each_and_the_legend_has_every_sign(staffed: Site):
    for state, count in (("failed", 2), ("refused", 1), ("succeeded", 101), ("cancelled", 1), ("skipped", 1)):
        for _ in range(count):
            end(staffed, make_run(staffed), state)
    make_run(staffed)
    with staffed.database.autocommit() as connection:
        # PostgreSQL has a clock of its own.
        staffed.clock.set(staffed.database.now(connection))
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        page = (await client.get("/orgs/org_a")).text
    [(title, cell)] = re.findall(r'<a class="day failed"[^>]*title="([^"]*)">(.*?)</a>', page)

    said = "2 failed, 1 refused, 1 unfinished, 1 cancelled, 1 skipped, 101 succeeded on "
    assert title.startswith(said)
    assert f'<span class="hidden-text">{said}' in cell
    assert '<span aria-hidden="true">✕<small>2</small></span>' in cell
    legend = page.partition('<ul class="key">')[2].partition("</ul>")[0]
    assert set(re.findall('class="day ([a-z]+)"', legend)) == {*STATES, "none"}


def test_a_cell_has_a_number_from_two_on_and_at_most_two_digits():
    day, other = date(2030, 1, 1), date(2030, 1, 2)
    cells = {("a", day): {"succeeded": 1}, ("b", day): {"succeeded": 99}, ("c", day): {"succeeded": 1440}}
    cells |= {("d", day): {"skipped": 7, "succeeded": 2}, ("e", day): {"skipped": 7}}
    made = Grid([day], cells, uncounted={("e", day)})

    assert [made.number(each, day) for each in "abcde"] == ["", "99", "99+", "7", ""]
    assert [made.said(each, day) for each in "cde"] == [
        "1,440 succeeded",
        "7 skipped, 2 succeeded",
        "some skipped",
    ]
    assert (made.said("a", other), made.number("a", other)) == ("", "")


@on_either
async def test_the_claims_of_a_run_say_which_properties_are_hidden(staffed: Site):
    run = make_run(staffed)
    end(staffed, run, "failed", reason="error")
    at = staffed.clock.now()
    with staffed.database.transaction() as connection:
        org_id = connection.execute(select(tables.runs.c.org_id)).scalar_one()
        claims = {"org_code": "org_a", "properties": {"plan": "str", EVIL: "bool"}, "digests": {"key": "k9"}}
        attempt = {"run_id": run, "attempt": 1, "org_id": org_id, "worker_id": run, "fencing_token": 1}
        attempt |= {"handler": "acme.digest", "started_at": at, "ended_at": at, "outcome": "failed"}
        connection.execute(tables.attempts.insert().values(**attempt, claims=claims))
    async with logged_in(staffed, staffed.token("org_a")) as client:
        pages = [(await client.get(path)).text for path in (f"/runs/{run}", "/orgs/org_a")]

    for page in pages:
        shown = html.unescape(page)
        assert '"plan": "text, hidden"' in shown
        assert f'"{EVIL}": "true or false, hidden"' in shown
        assert '"str"' not in shown
        assert "k9" not in page
        assert EVIL not in page


def spend(site: Site, org: str, meter: str, used: int, limit: int, *, ago: int = 0) -> None:
    """A budget of a month, what is used of it, and what was spent so many days ago."""
    with site.database.transaction() as connection:
        at = site.database.now(connection)
        org_id = orgs.require(connection, org)["id"]
        budget = {"id": new_id(), "target": new_id(), "org_id": org_id, "meter": meter, "per": "month"}
        budget |= {"limit": limit, "at_limit": "wait", "warn_at": 0.8, "created_at": at, "updated_at": at}
        connection.execute(tables.budgets.insert().values(**budget, updated_by="ann"))
        start = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        counter = {"org_id": org_id, "meter": meter, "per": "month", "starts_at": start, "used": used}
        connection.execute(tables.meters.insert().values(**counter))
        day = {"day": (at - timedelta(days=ago)).date(), "org_id": org_id, "meter": meter, "used": used}
        connection.execute(tables.meter_days.insert().values(**day, definition_id=new_id()))


@on_either
async def test_usage_lists_who_is_nearest_to_a_limit_and_charts_the_days_of_one_org(staffed: Site):
    spend(staffed, "org_a", "calls", 600, 1023, ago=3)
    spend(staffed, "org_b", "calls", 990, 1000)
    spend(staffed, "org_c", "letters", 5, 4)
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        page = (await client.get("/usage")).text
        one = (await client.get("/usage?org=org_a")).text
    async with logged_in(staffed, staffed.token("org_a")) as client:
        theirs = (await client.get("/usage")).text

    first = page.partition("Nearest to their limits")[2].partition("</section>")[0]
    shares = [re.search(r"(org_\w) (\w+) per month ([\d,]+) ([\d,]+) (\d+) %", row) for row in rows_of(first)]
    assert [found and found.groups() for found in shares] == [
        ("org_c", "letters", "5", "4", "125"),
        ("org_b", "calls", "990", "1,000", "99"),
        ("org_a", "calls", "600", "1,023", "58"),
    ]
    assert first.count("used up") == 1
    assert '<progress value="4" max="4"' in first
    assert "Nearest" not in one
    for shown in (one, theirs):
        assert shown.count("<figure") == 1
        assert "calls by day (UTC): 600 in all" in shown
        assert "letters" not in shown
    # An org sees neither budgets nor what others spend.
    assert "org_b" not in theirs
    assert "1,023" not in theirs


@on_either
async def test_failures_name_orgs_as_links(staffed: Site):
    for org in ("org_a", "org_b", "org_c"):
        end(staffed, make_run(staffed, org), "failed", reason="error", detail=EVIL)
    with staffed.database.autocommit() as connection:
        staffed.clock.set(staffed.database.now(connection))
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        page = (await client.get("/failures")).text

    links = (f'<a href="/orgs/{org}">{org}</a>' for org in ("org_a", "org_b", "org_c"))
    assert f"<dt>Without a retry in</dt><dd>{', '.join(links)}</dd>" in page
    assert EVIL not in page
