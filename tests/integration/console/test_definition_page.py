"""The page of a definition: when it runs, where its values come from, its past; and its changes."""

from __future__ import annotations

import gzip
import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from tests.fakes.rows import reading
from tests.integration.console.conftest import OURS, TOKENS, Site, csrf_of, logged_in, on_either
from tests.integration.console.test_run_page import EVIL, dangers, ended
from worker.ids import ALL_ORGS
from worker.model.definitions.file import parse_file
from worker.operations.apply import apply
from worker.operations.definitions import edit_definition, pause_definition
from worker.store import tables
from worker.store.lists import BACKFILLS, RUNS
from worker.store.lists.read import definition, read

PAGE = "/orgs/org_a/definitions/digest"


def edit(site: Site, **keys: Any) -> None:
    edit_definition(site.database, "org_a", "digest", keys, actor="operator:kim")


def stored(site: Site) -> Any:
    return reading(site.database, definition, "org_a", "digest")


def words(html: str) -> str:
    """The text of a page without its markup."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


@on_either
async def test_the_page_says_when_it_runs_with_which_values_and_what_changed(staffed: Site):
    with staffed.database.transaction() as connection:
        connection.execute(
            update(tables.catalogue).where(tables.catalogue.c.name == "acme.digest").values(timeout="7m")
        )
    edit(staffed, schedule="30 2 * * *", timezone="Europe/Berlin")
    edit(staffed, params={"top": 5, "filter": {"lang": "de"}}, max_attempts=4)
    edit(staffed, params={"top": 7, "filter": {"lang": "de"}})
    ended(staffed)
    page = await staffed.get(PAGE, TOKENS["viewer"])

    assert page.status_code == 200
    text = words(page.text)
    assert "At 02:30 every day, Europe/Berlin time" in text
    assert re.search(r"\d 0[01]:30 \d{4}-\d\d-\d\d 02:30 \+0[12]:00 ", text)
    assert "timeout 7m its handler" in text
    assert "max_attempts 4 this definition" in text
    assert "misfire once default" in text
    assert "Revision 4 in force" in text
    assert "params.top before: 5 after: 7" in text
    assert "params.filter.lang" in text.partition("Revision 3")[2].partition("Revision 2")[0]
    assert "schedule before: 0 3 * * * after: 30 2 * * *" in text
    assert "Run lengths, oldest first: 1 run; median 30s" in page.text
    assert "<button" not in page.text.partition('id="main"')[2]


@pytest.mark.feature("calendars")
@on_either
async def test_the_page_says_what_its_calendar_skips_and_which_dates_came(staffed: Site):
    def dates(*days: int) -> str:
        return f'[[calendar]]\nname = "holidays"\ndates = {[f"2199-12-{day}" for day in days]}\n'

    apply(staffed.database, parse_file(dates(24, 25)), actor="operator:kim")
    edit(
        staffed,
        schedule="0 3 24-31 12 *",
        starts_at="2199-12-01T00:00:00Z",
        calendar="holidays",
        timezone="UTC",
    )
    apply(staffed.database, parse_file(dates(25, 26)), actor="operator:kim")

    text = words((await staffed.get(PAGE, TOKENS["viewer"])).text)

    assert "calendar holidays this definition" in text
    assert text.count("would be skipped: calendar holidays") == 2
    assert "2199-12-25 03:00 would be skipped: calendar holidays 2199-12-26" in text
    revision = text.partition("Revision 3")[2].partition("Revision 2")[0]
    assert re.search(r"calendar_dates before: \S*2199-12-24\S* after: \S*2199-12-26", revision)
    assert "2199-12-25" not in revision
    listed = words((await staffed.get("/definitions", TOKENS["viewer"])).text)
    assert "UTC, not on holidays" in listed
    async with staffed.client() as client:
        mine = {"authorization": f"Bearer {staffed.token('org_a')}"}
        shown = (await client.get("/api/v1/definitions/org_a/digest", headers=mine)).json()
    assert (shown["calendar"], shown["next_run_for"]) == ("holidays", "2199-12-24T03:00:00.000000Z")
    # Calendars are for all orgs: an org sees the name, and its own times.
    assert "2199-12-26" not in str(shown)


async def test_the_page_and_the_api_show_what_it_remembers_to_its_org_and_operators_change_it(staffed: Site):
    address = "/api/v1/definitions/org_a/digest/state"
    assert 'id="state"' not in (await staffed.get(PAGE, TOKENS["viewer"])).text
    async with staffed.client() as client:
        staff = {"authorization": f"Bearer {TOKENS['operator']}"}
        new = {"data": {"cursor": "<5>"}}
        put = await client.put(address, headers=staff, json=new)
        assert (put.status_code, put.json()["data"], put.json()["version"]) == (200, new["data"], 1)
        for body in ({}, {"data": [1]}, {"data": {"text": "x" * 70_000}}):
            assert (await client.put(address, headers=staff, json=body)).status_code in (400, 422)
        mine = {"authorization": f"Bearer {staffed.token('org_a')}"}
        other = {"authorization": f"Bearer {staffed.token('org_b')}"}
        shown = (await client.get(address, headers=mine)).json()
        assert (shown["data"], shown["updated_by"]) == ({"cursor": "<5>"}, "operator")
        assert (await client.get(address, headers=other)).status_code == 404
        assert (await client.put(address, headers=mine, json=new)).status_code == 403
        assert "&lt;5&gt;" in (await staffed.get(PAGE, staffed.token("org_a"))).text
        cleared = await client.delete(address, headers=staff)
        assert (cleared.status_code, cleared.json()["data"]) == (200, {})


async def test_the_page_of_handlers_says_which_have_state(staffed: Site):
    assert "with state between runs" not in words((await staffed.get("/handlers", TOKENS["viewer"])).text)
    with staffed.database.transaction() as connection:
        is_digest = tables.catalogue.c.name == "acme.digest"
        connection.execute(update(tables.catalogue).where(is_digest).values(state=True))

    page = words((await staffed.get("/handlers", TOKENS["viewer"])).text)

    assert page.count("with state between runs") == 1


async def test_clock_changes_and_what_will_be_skipped_are_noted(staffed: Site):
    staffed.clock.set(datetime(2030, 3, 30, tzinfo=UTC))
    edit(staffed, schedule="30 2 * * *", timezone="Europe/Berlin")
    assert "clocks go forward 1h here" in (await staffed.get(PAGE, TOKENS["viewer"])).text
    pause_definition(staffed.database, "org_a", "digest", actor="operator:kim", note="until Monday")
    page = words((await staffed.get(PAGE, TOKENS["viewer"])).text)

    assert "Paused by operator:kim" in page
    assert "until Monday" in page
    assert "not due: the definition is paused" in page


@on_either
async def test_an_operator_pauses_resumes_and_runs_it_now(staffed: Site):
    edit(staffed, params={"top": 5}, params_by_hand=["top"])
    async with logged_in(staffed, TOKENS["operator"]) as client:
        csrf = csrf_of(await client.get(PAGE))
        paused = await client.post(f"{PAGE}/pause", data={"csrf": csrf, "note": "moving"}, headers=OURS)
        assert (paused.status_code, paused.headers["location"]) == (303, PAGE)
        assert (stored(staffed)["state"], stored(staffed)["pause_note"]) == ("paused", "moving")
        page = await client.get(PAGE)
        assert f'action="{PAGE}/resume"' in page.text
        assert f'action="{PAGE}/pause"' not in page.text
        assert (await client.post(f"{PAGE}/resume", data={"csrf": csrf}, headers=OURS)).status_code == 303
        twice = await client.post(f"{PAGE}/resume", data={"csrf": csrf}, headers=OURS)
        assert (twice.status_code, "is not paused." in twice.text) == (409, True)

        form = {"csrf": csrf, "param.top": "9", "params": '{"lang": "de"}', "reason": "asked for"}
        ran = await client.post(f"{PAGE}/run", data=form, headers=OURS)
        assert ran.status_code == 303
        wrong = await client.post(f"{PAGE}/run", data=form | {"params": "[1]"}, headers=OURS)
        assert (wrong.status_code, "params must be a table in JSON" in wrong.text) == (422, True)

    assert staffed.last_change()[1:] == (
        "definition.run",
        {**staffed.last_change()[2], "reason": "asked for"},
    )
    with staffed.database.autocommit() as connection:
        [run] = read(connection, RUNS, "org_a")
        found = select(tables.runs.c.params).where(tables.runs.c.id == run["id"])
        assert connection.execute(found).scalar_one() == {"top": 9, "lang": "de"}


async def test_an_edit_shows_what_will_change_and_then_changes_it(staffed: Site):
    edit(staffed, timeout="5m", priority=3)
    async with logged_in(staffed, TOKENS["operator"]) as client:
        form = await client.get(f"{PAGE}/edit")
        fields = dict(re.findall(r'name="(key\.\w+)" value="([^"]*)"', form.text))
        assert (fields["key.schedule"], fields["key.timeout"], fields["key.memory"]) == (
            "0 3 * * *",
            "5m",
            "",
        )
        csrf = csrf_of(form)
        sent = {name: text for name, text in fields.items() if text} | {"csrf": csrf, "key.overlap": "allow"}
        sent |= {
            "key.enabled": "true",
            "key.timeout": "10m",
            "key.params": '{"top": 1}',
            "reason": "slow CRM",
        }
        del sent["key.priority"]

        shown = await client.post(f"{PAGE}/edit", data=sent, headers=OURS)
        assert shown.status_code == 200
        assert stored(staffed)["revision"] == 2
        section = words(shown.text).partition("What will change")[2].partition("Reason")[0]
        assert "timeout before: 5m after: 10m" in section
        assert "priority before: 3 the default again" in section
        assert "params.top after: 1" in section
        assert "schedule" not in section

        confirm = shown.text.partition("What will change")[2].partition("</form>")[0]
        hidden = dict(re.findall(r'name="([\w.]+)" value="([^"]*)"', confirm))
        hidden = {name: text.replace("&#34;", '"') for name, text in hidden.items()}
        done = await client.post(f"{PAGE}/edit", data=hidden | {"reason": "slow CRM"}, headers=OURS)
        assert done.status_code == 303
        late = await client.post(f"{PAGE}/edit", data=hidden | {"key.timeout": "1h"}, headers=OURS)
        assert (late.status_code, "somebody has changed it" in late.text) == (412, True)

    row = stored(staffed)
    assert row["spec"]["timeout"] == "10m"
    assert row["spec"]["params"] == {"top": 1}
    assert "priority" not in row["spec"]
    assert staffed.last_change()[2]["reason"] == "slow CRM"


@pytest.mark.parametrize(
    ("key", "text", "problem"),
    [
        ("schedule", "61 * * * *", "minute must be 0-59"),
        ("timeout", "soon", "is not a duration"),
        ("timezone", "Nowhere", "Nowhere"),
        ("max_attempts", "0", "0 is not between 1"),
        ("params", "[1]", "expected a table"),
    ],
)
async def test_an_invalid_value_is_refused_beside_its_field(staffed: Site, key: str, text: str, problem: str):
    async with logged_in(staffed, TOKENS["operator"]) as client:
        form = {"csrf": csrf_of(await client.get(f"{PAGE}/edit")), "key.handler": "acme.digest"}
        form |= {"key.schedule": "0 3 * * *", "key.overlap": "allow", f"key.{key}": text}
        answer = await client.post(f"{PAGE}/edit", data=form, headers=OURS)

    assert answer.status_code == 422
    beside = answer.text.partition(f'id="problem-{key}">')[2].partition("</p>")[0]
    assert problem in beside
    # What was typed is still there.
    assert text in answer.text
    assert stored(staffed)["revision"] == 1


@on_either
async def test_what_only_the_catalogue_knows_is_refused_beside_its_field_too(staffed: Site):
    async with logged_in(staffed, TOKENS["operator"]) as client:
        form = {"csrf": csrf_of(await client.get(f"{PAGE}/edit")), "confirmed": "1", "key.handler": "no.such"}
        answer = await client.post(f"{PAGE}/edit", data=form, headers=OURS)

    assert answer.status_code == 422
    assert "no.such" in answer.text.partition('id="problem-handler">')[2].partition("</p>")[0]


@on_either
async def test_a_backfill_shows_what_it_will_do_and_then_does_it(staffed: Site):
    async with logged_in(staffed, TOKENS["operator"]) as client:
        path = f"{PAGE}/backfill?from=2025-12-01T00:00&until=2025-12-11T00:00&limit=2"
        plan = await client.get(path)
        assert plan.status_code == 200
        text = words(plan.text)
        assert "10 runs of org_a/digest" in text
        assert "The first scheduled time is 2025-12-01 03:00 UTC , the last 2025-12-10 03:00 UTC" in text
        assert reading(staffed.database, read, BACKFILLS, ALL_ORGS) == []
        form = {"csrf": csrf_of(plan), "from": "2025-12-01T00:00", "until": "2025-12-11T00:00", "limit": "2"}
        done = await client.post(f"{PAGE}/backfill", data=form | {"reason": "lost days"}, headers=OURS)
        assert done.status_code == 303
        page = words((await client.get(PAGE)).text)
        assert "0 of 10" in page

        wrong = await client.get(f"{PAGE}/backfill?from=2025-12-01T00:00&until=2035-01-01T00:00")
        assert (wrong.status_code, "the future" in wrong.text) == (400, True)
        for query in ("from=x&until=y", "from=2025-12-01", "limit=1&from=2025-12-01&until=2025-12-02&x=1"):
            assert (await client.get(f"{PAGE}/backfill?{query}")).status_code == 400
    assert staffed.last_change()[2]["reason"] == "lost days"


async def test_an_org_sees_its_own_definition_without_the_operators(staffed: Site):
    pause_definition(staffed.database, "org_a", "digest", actor="operator:kim", note="they do not pay")
    edit(staffed, priority=4)
    token = staffed.token("org_a")
    async with logged_in(staffed, token) as client:
        page = await client.get(PAGE)
        assert page.status_code == 200
        for hidden in ("operator:kim", "they do not pay", f"{PAGE}/edit", f"{PAGE}/backfill"):
            assert hidden not in page.text
        assert f"{PAGE}/run" in page.text
        assert 'name="params"' not in page.text
        for verb in ("edit", "backfill"):
            assert (await client.get(f"{PAGE}/{verb}")).status_code == 403
        for path in ("", "/edit", "/backfill"):
            assert (await client.get(f"/orgs/org_b/definitions/digest{path}")).status_code == 404
    operator = await staffed.get(PAGE, TOKENS["viewer"])
    assert "operator:kim" in operator.text
    assert "they do not pay" in operator.text


async def test_hostile_texts_of_a_definition_stay_texts(staffed: Site):
    edit(staffed, params={EVIL: [EVIL]}, params_by_hand=[EVIL], audience=EVIL)
    edit(staffed, params={EVIL: EVIL})
    pause_definition(staffed.database, "org_a", "digest", actor=EVIL, note=EVIL)
    ended(staffed, error={"type": EVIL, "message": EVIL})
    async with logged_in(staffed, TOKENS["operator"]) as client:
        pages = [await client.get(f"{PAGE}{path}") for path in ("", "/edit", "/backfill")]
        pages.append(await client.get(f"{PAGE}/backfill?from=2025-12-01&until={EVIL}"))

    assert [page.status_code for page in pages] == [200, 200, 200, 400]
    for page in pages:
        assert dangers(page.text) == []
        assert "unsafe" not in page.headers["content-security-policy"]


@on_either
async def test_a_definition_with_a_thousand_revisions_stays_small_and_quick(staffed: Site):
    row = stored(staffed)
    with staffed.database.transaction() as connection:
        spec = {**row["spec"], "params": {f"key-{n}": "x" * 3000 for n in range(20)}}
        revisions = [
            {
                "definition_id": row["id"],
                "revision": n,
                "spec": {**spec, "priority": n, "params": {**spec["params"], "key-1": "y" * 3000 + str(n)}},
                "at": staffed.clock.now() - timedelta(hours=1001 - n),
                "by": "operator:kim",
            }
            for n in range(2, 1001)
        ]
        connection.execute(insert(tables.definition_revisions), revisions)
        connection.execute(
            update(tables.definitions).where(tables.definitions.c.id == row["id"]).values(revision=1000)
        )
    took = []
    for _ in range(3):
        start = time.process_time()
        page = await staffed.get(PAGE, TOKENS["viewer"])
        took.append(time.process_time() - start)
    older = await staffed.get(f"{PAGE}?before=12", TOKENS["viewer"])

    assert (page.status_code, older.status_code) == (200, 200)
    assert len(gzip.compress(page.content)) < 60_000
    # Processor time, with room for a slow machine; a page has 50 ms.
    assert min(took) < 0.25
    assert re.findall(r"<b>Revision (\d+)", page.text) == [str(n) for n in range(1000, 990, -1)]
    assert re.findall(r"<b>Revision (\d+)", older.text) == [str(n) for n in range(11, 1, -1)]
    for wrong in ("before=x", "before=99999999999", "after=1"):
        assert (await staffed.get(f"{PAGE}?{wrong}", TOKENS["viewer"])).status_code == 400
