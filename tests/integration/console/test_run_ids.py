"""Runs by short ids, in the API and the console; an org's own only."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from sqlalchemy import select

from tests.fakes.stock import Stock
from tests.integration.console.conftest import OURS, TOKENS, Site, csrf_of, logged_in, on_either
from worker.clock import to_text
from worker.features.console.pages.rendering import page
from worker.ids import RunId, short_id
from worker.store import tables

API = "/api/v1/runs"
TIME = "01a22a45-2bd0"
MINE = f"{TIME}-7000-8000-00000001c8fb"
ALIKE = f"{TIME}-7000-8000-00000002c8fb"
# Another org's run with the same time and the same tail.
THEIRS = f"{TIME}-7000-8000-00000003c8fb"
SHORT = short_id(MINE)


def make(site: Site, *ids: str, org: str = "org_a") -> None:
    stock = Stock(site.database)
    with site.database.autocommit() as connection:
        orgs, definitions = tables.orgs.c, tables.definitions.c
        found = select(orgs.id, definitions.id).join_from(tables.orgs, tables.definitions)
        [(org_id, definition)] = connection.execute(found.where(orgs.code == org))
    stock.put(*(stock.run(org_id, definition, id=RunId(id_)) for id_ in ids))


@pytest.fixture
def alone(staffed: Site) -> Site:
    """Org A has one run of this time, and org B one with the same time and tail."""
    make(staffed, MINE)
    make(staffed, THEIRS, org="org_b")
    return staffed


@on_either
@pytest.mark.parametrize("given", [SHORT, f"{TIME}..c8fb", TIME.upper(), "01a22a45...FB", MINE.upper()])
async def test_an_org_finds_its_run_and_never_learns_of_another_orgs(alone: Site, given: str):
    token = alone.token("org_a")

    for part in ("", "/attempts", "/logs", "/why"):
        assert (await alone.get(f"{API}/{quote(given)}{part}", token)).status_code == 200, part
    assert (await alone.get(f"{API}/{quote(given)}", token)).json()["id"] == MINE
    for theirs in (f"{TIME}…3c8fb", THEIRS[:-4], short_id(THEIRS, 8)):
        answer = await alone.get(f"{API}/{quote(theirs)}", token)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert "candidates" not in answer.json()
    # The control: an operator sees that it is not alone.
    if given != MINE.upper():
        assert (await alone.get(f"{API}/{quote(given)}", TOKENS["viewer"])).json()["code"] == "ambiguous"


@on_either
async def test_what_fits_several_runs_names_them(alone: Site):
    make(alone, ALIKE)
    path = f"{API}/{quote(SHORT)}"

    def of(answer):
        assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
        problem = answer.json()
        assert problem["error"].keys() == {"code", "message", "fix"}
        assert (problem["code"], problem["detail"]) == ("ambiguous", f"several runs fit {SHORT}")
        return [(row["id"], row["org"], row["definition"]) for row in problem["candidates"]]

    mine = [(ALIKE, "org_a", "digest"), (MINE, "org_a", "digest")]
    answer = await alone.get(path, TOKENS["operator"])
    assert of(answer) == [(THEIRS, "org_b", "digest"), *mine]
    row = Stock(alone.database).stored(THEIRS)
    assert answer.json()["candidates"][0]["scheduled_for"] == to_text(row["scheduled_for"])
    assert of(await alone.get(path, alone.token("org_a"))) == mine
    for ask in ("/events", "/logs", "/why"):
        assert of(await alone.get(path + ask, alone.token("org_a"))) == mine
    assert of(await alone.post(f"{path}/cancel", alone.token("org_a"))) == mine
    assert of(await alone.post(f"{path}/retry", alone.token("org_a"))) == mine


@on_either
async def test_a_change_takes_a_short_id(alone: Site):
    done = await alone.post(f"{API}/{quote(SHORT)}/cancel", alone.token("org_a"))
    again = await alone.post(f"{API}/{quote(SHORT)}/retry", alone.token("org_a"))
    listed = await alone.get(f"{API}?after={quote(short_id(again.json()['id']))}", alone.token("org_a"))

    assert (done.status_code, done.json()["id"], done.json()["state"]) == (200, MINE, "cancelled")
    assert (again.status_code, again.json()["retry_of"]) == (201, MINE)
    assert [row["id"] for row in listed.json()] == [MINE]
    assert Stock(alone.database).stored(THEIRS)["state"] is None


@on_either
async def test_the_page_of_a_short_id_is_that_of_the_whole_one(alone: Site):
    async with logged_in(alone, alone.token("org_a")) as client:

        async def there(path: str) -> str:
            answer = await client.get(path)
            assert answer.status_code == 303
            return str(answer.headers["location"])

        for given in (SHORT, f"{TIME}..fb", "01A22A45", MINE.replace("-", "")):
            assert await there(f"/runs/{quote(given)}") == f"/runs/{MINE}"
        assert await there(f"/runs/{quote(SHORT)}?a=%2Fb&c") == f"/runs/{MINE}?a=%2Fb&c"
        assert await there(f"/runs/{quote(SHORT)}/log?before=1.5") == f"/runs/{MINE}/log?before=1.5"
        assert (await client.get(f"/runs/{MINE}")).status_code == 200
        assert (await client.get(f"/runs/{MINE}/log")).status_code == 200
        for theirs in (f"{TIME}…3c8fb", THEIRS, THEIRS.upper()):
            assert (await client.get(f"/runs/{quote(theirs)}", follow_redirects=True)).status_code == 404

        form = {"csrf": csrf_of(await client.get(f"/runs/{MINE}"))}
        done = await client.post(f"/runs/{quote(SHORT)}/cancel", data=form, headers=OURS)
        assert await there(done.headers["location"]) == f"/runs/{MINE}"


async def test_a_page_lists_the_runs_that_fit(alone: Site):
    make(alone, ALIKE)
    async with logged_in(alone, TOKENS["viewer"]) as client:
        every = await client.get(f"/runs/{quote(SHORT)}")
    async with logged_in(alone, alone.token("org_a")) as client:
        own = await client.get(f"/runs/{quote(SHORT)}")

    assert (every.status_code, own.status_code) == (400, 400)
    assert runs_on(every.text) == [
        (THEIRS, f"{TIME}…3c8fb"),
        (ALIKE, f"{TIME}…2c8fb"),
        (MINE, f"{TIME}…1c8fb"),
    ]
    assert "digest of org_b, scheduled for" in every.text
    assert runs_on(own.text) == [(ALIKE, f"{TIME}…2c8fb"), (MINE, f"{TIME}…1c8fb")]
    assert "org_b" not in own.text


@on_either
async def test_a_search_leads_to_the_run_or_lists_those_that_fit(alone: Site):
    async with logged_in(alone, alone.token("org_a")) as own, logged_in(alone, TOKENS["viewer"]) as every:
        for text in (SHORT, f"{TIME}..FB", MINE.upper(), "01a22a45"):
            found = await own.get(f"/search?q={quote(text)}")
            assert (found.status_code, found.headers["location"]) == (303, f"/runs/{MINE}")
        listed = await every.get(f"/search?q={quote(SHORT)}")
        with_state = await own.get(f"/search?q={quote(SHORT)}+state%3Awaiting")
        nothing = await own.get(f"/search?q={quote(f'{TIME}…3c8fb')}")

    assert listed.status_code == 200
    assert runs_on(listed.text) == [(THEIRS, f"{TIME}…3c8fb"), (MINE, f"{TIME}…1c8fb")]
    assert runs_on(with_state.text) == [(MINE, SHORT)]
    assert (nothing.status_code, THEIRS in nothing.text) == (200, False)


def runs_on(text: str) -> list[tuple[str, str]]:
    """The ids of the runs that a page links, and how it shows them; each has the whole id as its title."""
    found = re.findall(r'<a href="/runs/([^"]+)" title="([^"]+)">(?:run )?<code>([^<]+)</code></a>', text)
    assert all(id_ == title for id_, title, _ in found)
    return [(id_, shown) for id_, _, shown in found]


async def test_the_ids_of_a_page_differ(alone: Site):
    make(alone, ALIKE, f"{TIME}-7000-8000-00000004aaaa")
    async with logged_in(alone, TOKENS["viewer"]) as client:
        pages = [(await client.get(path)).text for path in ("/search", "/orgs/org_a")]

    shown = [dict(runs_on(text)) for text in pages]
    assert shown[0] == {
        MINE: f"{TIME}…1c8fb",
        ALIKE: f"{TIME}…2c8fb",
        THEIRS: f"{TIME}…3c8fb",
        f"{TIME}-7000-8000-00000004aaaa": f"{TIME}…aaaa",
    }
    assert all(len(set(ids.values())) == len(ids) for ids in shown)


def test_a_text_with_the_mark_of_an_id_stays_a_text():
    """What a page shows is data: a hostile text may have the mark that the page's own ids have."""
    hostile = f"\ue000{MINE}<script>\ue000x"
    shown = page("error.html", 400, title=hostile, message=hostile, fix="", code=400, candidates=(), ways=())

    text = bytes(shown.body).decode()
    assert "<script>\ue000" not in text
    assert f"{SHORT}&lt;script&gt;\ue000x" in text
