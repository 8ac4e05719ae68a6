"""Tabs by state with their counts, and filters as links: each is a search or a list with an address."""

from __future__ import annotations

import html
import re
from datetime import timedelta
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from sqlalchemy import insert, select, update

from tests.fakes.rows import attempt_row
from tests.integration.console.conftest import TOKENS, Site, logged_in, make_run, on_either
from tests.integration.console.test_pages import fail
from worker.ids import new_id
from worker.model.runs.outcome import Error, fingerprint
from worker.store import tables, workers

pytestmark = on_either
API = "/api/v1"


class Found:
    """The links of a page, by the text that a person reads."""

    def __init__(self, text: str) -> None:
        self.text = text

    def tabs(self, label: str) -> dict[str, tuple[str, bool]]:
        """By text with its count: the search or the address, and whether it is the one in force."""
        part = re.search(f'<nav [^>]*aria-label="{label}">(.*?)</nav>', self.text, re.DOTALL)
        assert part is not None, label
        links = re.findall(r'<a href="([^"]*)"([^>]*)>(.*?)</a>', part[1], re.DOTALL)
        return {plain(text): (asked(href), "aria-current" in more) for href, more, text in links}

    def in_force(self) -> dict[str, str]:
        """The filters in force, each with the search without it."""
        part = re.search(r'<ul class="in-force".*?</ul>', self.text, re.DOTALL)
        items = re.findall(r'<li><span>(.*?)</span><a href="([^"]*)"', part[0]) if part else []
        return {plain(text): asked(href) for text, href in items}

    def offers(self) -> dict[str, dict[str, str]]:
        """By key: the values on offer, each with the search that it leads to."""
        part = re.search(r'<details class="offers">.*?</details>', self.text, re.DOTALL)
        rows = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", part[0], re.DOTALL) if part else []
        return {
            key: {plain(text): asked(href) for href, text in re.findall(r'href="([^"]*)">(.*?)</a>', values)}
            for key, values in rows
        }


def plain(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", text)).strip()


def asked(href: str) -> str:
    """The text of a search's address, or the query of a list's."""
    parts = urlsplit(html.unescape(href))
    return parse_qs(parts.query).get("q", [""])[0] if parts.path == "/search" else parts.query


async def found(site: Site, text: str, token: str = TOKENS["viewer"]) -> Found:
    page = await site.get(f"/search?q={quote(text)}", token)
    assert page.status_code == 200, page.text
    return Found(page.text)


def end_hours(site: Site, org: str, **by_state: int) -> None:
    """As if so many runs had ended in this hour, and as many 24 hours ago, which is too long."""
    hour = site.clock.now().replace(minute=0, second=0, microsecond=0)
    with site.database.transaction() as connection:
        org_id = connection.execute(select(tables.orgs.c.id).where(tables.orgs.c.code == org)).scalar_one()
        for state, runs in by_state.items():
            for at in (hour, hour - timedelta(hours=24)):
                row = {"hour": at, "org_id": org_id, "state": state, "runs": runs}
                connection.execute(insert(tables.rollup_hours).values(**row))


async def test_a_tab_replaces_the_state_and_keeps_the_rest(staffed: Site):
    page = await found(staffed, 'org_a state:failed,refused cause:"CRM answers"')
    on_tab = await found(staffed, "org:org_a state:waiting")

    states = ("waiting", "running", "failed", "refused", "succeeded", "cancelled", "skipped")
    assert page.tabs("Runs by state") == {
        "All": ('org_a cause:"CRM answers"', False),
        **{state.capitalize(): (f'org_a state:{state} cause:"CRM answers"', False) for state in states},
    }
    assert page.in_force() == {
        "org_a": 'state:failed,refused cause:"CRM answers"',
        "state: failed,refused": 'org_a cause:"CRM answers"',
        "cause: CRM answers": "org_a state:failed,refused",
    }
    # A single state is the tab itself.
    assert [text for text, (_, current) in on_tab.tabs("Runs by state").items() if current] == ["Waiting 0"]
    assert on_tab.in_force() == {"org: org_a": "state:waiting"}
    every = (await found(staffed, "")).tabs("Runs by state")
    assert every["All"] == ("", True)


async def test_counts_are_of_all_orgs_or_of_the_one_in_the_search_or_left_out(staffed: Site):
    for org in ("org_a", "org_a", "org_b"):
        make_run(staffed, org)
    end_hours(staffed, "org_a", failed=3, succeeded=12_345)
    end_hours(staffed, "org_b", failed=4, skipped=1)

    def of(page: Found) -> list[str]:
        return list(page.tabs("Runs by state"))

    rest = ["Cancelled 0", "Skipped 0"]
    assert of(await found(staffed, "org:org_a state:failed")) == [
        *("All", "Waiting 2", "Running 0", "Failed 3", "Refused 0", "Succeeded 12,345"),
        *rest,
    ]
    assert of(await found(staffed, "")) == [
        *("All", "Waiting 3", "Running 0", "Failed 7", "Refused 0", "Succeeded 12,345", "Cancelled 0"),
        "Skipped 1",
    ]
    none = ["All", "Waiting", "Running", "Failed", "Refused", "Succeeded", "Cancelled", "Skipped"]
    for text in ("org_a", "handler:acme.digest", "org:org_a since:1h", "org:org_a definition:digest"):
        assert of(await found(staffed, text)) == none, text
    # An org has its own, and none of an org that it does not see.
    staffed_org = staffed.token("org_a")
    own = of(await found(staffed, "", staffed_org))
    assert own[1:6] == ["Waiting 2", "Running 0", "Failed 3", "Refused 0", "Succeeded 12,345"]
    other = of(await found(staffed, "org:org_b", staffed_org))
    assert other == of(await found(staffed, "org:org_nobody", staffed_org))
    assert other[3] == "Failed 0"


async def test_values_of_rows_are_filters_until_they_are_in_force(staffed: Site):
    run = make_run(staffed, "org_a")
    fail(staffed, run)
    with staffed.database.transaction() as connection:
        org_id = connection.execute(select(tables.runs.c.org_id)).scalar_one()
        cause = fingerprint(Error("ValueError", "<img src=x>"))
        connection.execute(attempt_row(run, org_id, staffed.clock.now(), error_cause=cause))
    every = await found(staffed, "state:failed")
    of_org = await found(staffed, "state:failed org:org_a")
    of_definition = await found(staffed, "definition:digest")

    for key, value in (("org", "org_a"), ("definition", "digest")):
        text = quote(f"state:failed {key}:{value}", safe="").replace("%20", "+")
        assert f'<a href="/search?q={text}" title="Only runs of {value}">{value}</a>' in every.text
    assert '<a href="/orgs/org_a">org_a</a>' in of_org.text
    assert '<a href="/orgs/org_a/definitions/digest">digest</a>' in of_definition.text
    offers = every.offers()
    assert offers["Handler"] == {"acme.digest": "state:failed handler:acme.digest"}
    assert offers["Reason"] == {"error": "state:failed reason:error"}
    # One pool that all runs have is no choice; a revision means something for one definition.
    assert not {"Pool", "Revision"} & offers.keys()
    assert of_definition.offers()["Revision"] == {"1": "definition:digest revision:1"}
    [text] = offers["Cause"].values()
    assert f'href="/runs/{run}"' in (await found(staffed, text)).text


@pytest.mark.parametrize(
    ("text", "current"),
    [
        ("since:1h", "Last hour"),
        ("org:org_a since:today", "Today"),
        ("until:today since:yesterday", "Yesterday"),
        ("since:7d state:failed", "7 days"),
        ("since:2h", None),
    ],
)
async def test_times_are_links_of_which_one_is_in_force(staffed: Site, text: str, current: str | None):
    times = (await found(staffed, text)).tabs("When they were made")

    assert list(times) == ["Last hour", "Today", "Yesterday", "7 days"]
    assert [name for name, (_, is_current) in times.items() if is_current] == ([current] if current else [])
    assert {"since:yesterday", "until:today"} <= set(times["Yesterday"][0].split())
    for other, _ in times.values():
        assert (await staffed.get(f"/search?q={quote(other)}", TOKENS["viewer"])).status_code == 200


async def test_an_org_has_no_filter_by_worker(staffed: Site):
    """It does not see which worker ran its runs, also not by a search. The control is an operator."""
    run, worker = make_run(staffed, "org_a"), new_id()
    with staffed.database.transaction() as connection:
        lease = timedelta(minutes=1)
        identity = {"host": "build-7", "pid": 1, "version": "1.0"}
        workers.register(connection, worker, lease=lease, handlers=[], capacity={}, **identity)
        of_run = update(tables.runs).where(tables.runs.c.id == run)
        connection.execute(of_run.values(worker_id=worker))
    fail(staffed, run)
    org, operator = staffed.token("org_a"), TOKENS["viewer"]

    for text in ("worker:build-7", f"worker:{worker}", f"worker:{worker[-12:]}"):
        for path in (f"/search?q={text}", f"{API}/runs?q={text}", f"/orgs?q={text}"):
            assert (await staffed.get(path, org)).status_code == 400, path
        assert f'href="/runs/{run}"' in (await found(staffed, text)).text
        assert [row["id"] for row in (await staffed.get(f"{API}/runs?q={text}", operator)).json()] == [run]
    many = {"q": "worker:build-7", "dry_run": True}
    assert (await staffed.post(f"{API}/runs:retry", org, json=many)).status_code == 400
    async with logged_in(staffed, org) as client:
        assert (await client.get("/retry?q=worker:build-7")).status_code == 400
    page = await found(staffed, "", org)
    assert "Worker" not in page.offers()
    assert "worker:" not in page.text
    assert (await found(staffed, "")).offers()["Worker"] == {worker[-12:]: f"worker:{worker[-12:]}"}


async def test_definitions_have_tabs_by_state_with_counts(staffed: Site):
    run = make_run(staffed, "org_b")
    fail(staffed, run)
    with staffed.database.transaction() as connection:
        connection.execute(update(tables.orgs).values(state="active"))
    async with logged_in(staffed, TOKENS["operator"]) as client:
        every = Found((await client.get("/definitions")).text)
        broken = Found((await client.get("/definitions?state=broken&org=org_b")).text)
        named = Found((await client.get("/definitions?definition=digest&state=broken")).text)
        active = Found((await client.get("/definitions?state=active")).text)
    own = Found((await staffed.get("/definitions", staffed.token("org_a"))).text)

    label = "Definitions by state"
    assert every.tabs(label) == {
        "All 3": ("", True),
        "Broken 1": ("state=broken", False),
        **{
            f"{state} 0": (f"state={state.lower()}", False)
            for state in ("Overdue", "Late", "Delayed", "Paused", "Disabled", "Closed")
        },
    }
    assert list(broken.tabs(label))[:2] == ["All 1", "Broken 1"]
    assert broken.tabs(label)["Late 0"] == ("org=org_b&state=late", False)
    assert set(re.findall(r'href="/orgs/(\w+)/definitions', broken.text)) == {"org_b"}
    assert named.tabs(label)["Broken"] == ("definition=digest&state=broken", True)
    # A state without a tab is one while it is asked for.
    assert active.tabs(label)["Active"] == ("state=active", True)
    assert list(own.tabs(label))[:2] == ["All 1", "Broken 0"]


async def test_orgs_have_tabs_by_state_with_counts(staffed: Site):
    fail(staffed, make_run(staffed, "org_b"))
    with staffed.database.transaction() as connection:
        connection.execute(update(tables.orgs).where(tables.orgs.c.code == "org_c").values(state="paused"))
    async with logged_in(staffed, TOKENS["viewer"]) as client:
        every = Found((await client.get("/orgs")).text)
        broken = Found((await client.get("/orgs?broken=true")).text)
        named = Found((await client.get("/orgs?state=paused&q=org_c")).text)
    own = Found((await staffed.get("/orgs", staffed.token("org_a"))).text)

    label = "Orgs by state"
    assert every.tabs(label) == {
        "All 3": ("", True),
        "Broken 1": ("broken=true", False),
        "Late 0": ("late=true", False),
        "Active 2": ("state=active", False),
        "Paused 1": ("state=paused", False),
        "Suspended 0": ("state=suspended", False),
        "Removed 0": ("state=removed", False),
    }
    assert broken.tabs(label)["Broken 1"][1]
    assert named.tabs(label)["Paused"] == ("q=org_c&state=paused", True)
    assert list(own.tabs(label))[:4] == ["All 1", "Broken 0", "Late 0", "Active 1"]
