"""Streams of lists: how much of a page is new, who learns of what, and when the streams end."""

from __future__ import annotations

import asyncio
import html
import re
from datetime import timedelta
from typing import Any

import pytest

from tests.integration.console.conftest import TOKENS, Site, asking, log_in, logged_in, make_run, on_either
from tests.integration.console.test_live import API, Reader, app_of
from worker.features.console import live, live_lists
from worker.features.console.callers import Caller
from worker.ids import WorkerId, new_id
from worker.kit.web.health import Health
from worker.operations.orgs import set_org_state
from worker.operations.runs import cancel
from worker.store import workers

PAGES = {
    "/": "/live/overview",
    "/search": "/live/runs",
    "/search?q=state%3Acancelled": "/live/runs",
    "/orgs/org_a": "/live/orgs/org_a",
    "/orgs/org_a/definitions/digest": "/live/orgs/org_a/definitions/digest",
    "/workers": "/live/workers",
}
VIEWER = TOKENS["viewer"]
NOTHING = {"new": 0, "more": False}


class Reads:
    """The reads for all lists: each returns how many changes it has found."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site = site
        self.done: list[int] = []
        read = live.live.changes

        def counted(*given: Any) -> Any:
            found = read(*given)
            self.done.append(len(found.found))
            return found

        monkeypatch.setattr(live.live, "changes", counted)

    async def more(self, count: int = 5) -> None:
        """Let time pass for so many reads, and for what follows from them."""
        wanted = len(self.done) + count
        async with asyncio.timeout(20):
            while len(self.done) < wanted:
                self.site.clock.advance(live.EVERY)
                await asyncio.sleep(0.01)


@pytest.fixture
def reads(staffed: Site, monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(staffed, monkeypatch)


async def stream_of(site: Site, page: str, token: str = VIEWER) -> str:
    """The address of the stream of a page that was made a moment ago."""
    site.clock.advance(0.1)
    shown = await site.get(page, token)
    found = re.search(r'data-stream="([^"]+)"', shown.text)
    assert found is not None, (page, shown.status_code)
    site.clock.advance(0.1)
    return html.unescape(found[1])


async def watching(site: Site, page: str, token: str = VIEWER, app: Any = None) -> Reader:
    return Reader(site, app or app_of(site), await stream_of(site, page, token), token)


async def leave(*readers: Reader) -> None:
    for reader in readers:
        reader.left.set()
        await reader.task


@on_either
@pytest.mark.parametrize("page", [page for page in PAGES if page != "/workers"])
async def test_a_page_learns_of_a_run_that_ends_and_of_one_that_is_made(
    staffed: Site, reads: Reads, page: str
):
    run = make_run(staffed)
    address = await stream_of(staffed, page)
    assert address.partition("?")[0] == PAGES[page]
    reader = Reader(staffed, app_of(staffed), address, VIEWER)
    await reads.more()
    assert reader.told == []
    cancel(staffed.database, run, actor="tester")
    assert await reader.until(1) == [1]
    make_run(staffed)
    await reads.more()

    # It has not ended.
    assert reader.told == ([1] if "cancelled" in page else [1, 2])
    assert reader.events[-1][2] == {"new": reader.told[-1], "more": False}
    await leave(reader)


@on_either
async def test_the_page_of_workers_learns_of_a_worker_that_starts_and_of_nothing_else(
    staffed: Site, reads: Reads
):
    reader = await watching(staffed, "/workers")
    make_run(staffed)
    await reads.more()
    assert reader.told == []
    with staffed.database.transaction() as connection:
        workers.register(
            connection,
            WorkerId(new_id()),
            lease=timedelta(hours=1),
            handlers=(),
            capacity={},
            host="here",
            pid=1,
            version="1",
        )

    assert await reader.until(1) == [1]
    await leave(reader)


@on_either
async def test_an_org_learns_of_its_own_runs_only(staffed: Site, reads: Reads):
    app, mine = app_of(staffed), staffed.token("org_a")
    theirs = make_run(staffed, "org_b")
    runs = await stream_of(staffed, "/search", mine)
    addresses = [runs, await stream_of(staffed, "/orgs/org_a", mine)]
    addresses += [f"{runs}&q=org%3Aorg_b", f"{runs}&q=org%3Aorg", f"{runs}&q=definition%3Adigest"]
    readers = [Reader(staffed, app, address, mine) for address in addresses]
    # The control: operators are told.
    operator = await watching(staffed, "/search", VIEWER, app)
    cancel(staffed.database, theirs, actor="tester")
    make_run(staffed, "org_b")
    assert await operator.until(1) == [2]
    await reads.more()
    assert [reader.events for reader in readers] == [[]] * len(readers)
    assert {reader.status for reader in readers} == {200}

    make_run(staffed, "org_a")
    await reads.more()
    assert [reader.told for reader in readers] == [[1], [1], [], [1], [1]]
    assert operator.told == [2, 3]
    await leave(operator, *readers)

    place = runs.partition("?")[2]
    for path, status in (
        ("/live/orgs/org_b", 404),
        ("/live/orgs/org_b/definitions/digest", 404),
        ("/live/overview", 403),
        ("/live/workers", 403),
    ):
        refused = Reader(staffed, app, f"{path}?{place}", mine)
        await refused.task
        assert refused.status == status, path


async def test_without_its_scope_an_org_would_learn_of_others(
    staffed: Site, reads: Reads, monkeypatch: pytest.MonkeyPatch
):
    """The control of the test above."""
    monkeypatch.setattr(live_lists, "_orgs", lambda *_: None)
    reader = await watching(staffed, "/search", staffed.token("org_a"))
    make_run(staffed, "org_b")

    assert await reader.until(1) == [1]
    await leave(reader)


async def test_a_search_that_the_rows_do_not_answer_says_that_there_may_be_more(staffed: Site, reads: Reads):
    reader = await watching(staffed, "/search?q=cause%3Adisk+definition%3Adigest")
    other = await watching(staffed, "/search?q=cause%3Adisk+definition%3Aother")
    make_run(staffed)

    assert await reader.until(1) == [0]
    assert reader.events[0][2] == NOTHING | {"more": True}
    await reads.more()
    assert other.told == []
    await leave(reader, other)


@on_either
async def test_a_client_that_connects_again_misses_nothing_and_counts_nothing_twice(
    staffed: Site, reads: Reads
):
    app, address = app_of(staffed), await stream_of(staffed, "/search")
    reader = Reader(staffed, app, address, VIEWER)
    make_run(staffed)
    assert await reader.until(1) == [1]
    await leave(reader)
    make_run(staffed)
    staffed.clock.advance(60)

    again = Reader(staffed, app, address, VIEWER, ("last-event-id", reader.events[-1][1]))
    # And another worker, whose streams begin with this one.
    other = Reader(staffed, app_of(staffed), address, VIEWER)

    assert await again.until(1) == [2]
    assert await other.until(1) == [2]
    await leave(again, other)


@on_either
async def test_all_lists_share_one_read_a_second_and_say_little(staffed: Site, reads: Reads):
    app = app_of(staffed)
    readers = [await watching(staffed, page, VIEWER, app) for page in PAGES for _ in range(5)]
    readers.append(Reader(staffed, app, f"{API}/runs/{make_run(staffed)}/events", VIEWER))
    await reads.more(2)
    before, began = len(reads.done), staffed.clock.monotonic()
    for _ in range(6):
        make_run(staffed)
        await reads.more(1)
    passed = staffed.clock.monotonic() - began

    assert len(reads.done) - before <= passed / live.EVERY
    events = [len(reader.events) for reader in readers[:-1]]
    assert max(events) <= passed / (live.READS * live.EVERY) + 2
    assert max(events) > 1
    # Each was found once, whatever the number of streams.
    assert sum(reads.done[before:]) <= 7
    await leave(*readers)
    # No stream, no read.
    await asyncio.sleep(0.05)
    before = len(reads.done)
    staffed.clock.advance(10)
    await asyncio.sleep(0.05)
    assert reads.done[before:] == []


async def test_streams_of_lists_count_as_those_of_runs(staffed: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "MAX_STREAMS_OF_ORG", 1)
    app, mine = app_of(staffed), staffed.token("org_a")
    first = Reader(staffed, app, f"{API}/runs/{make_run(staffed)}/events", mine)
    await first.until(1)
    address = await stream_of(staffed, "/search", mine)
    second = Reader(staffed, app, address, mine)
    await second.task

    assert second.status == 429
    assert b"retry-after" in second.headers
    async with asking(app, mine) as client:
        # What the page asks to learn why, since an event source does not tell.
        assert (await client.head(address)).status_code == 429
    await leave(first)
    third = Reader(staffed, app, address, mine)
    make_run(staffed)
    assert await third.until(1) == [1]
    await leave(third)


async def test_streams_of_lists_end_with_the_access_of_their_caller(
    staffed: Site, reads: Reads, monkeypatch: pytest.MonkeyPatch
):
    """Which is checked once for all streams with one token."""
    checked: list[str] = []
    still = live._still

    async def counted(check: live.Check, caller: Caller) -> bool:
        checked.append(caller.key)
        return await still(check, caller)

    monkeypatch.setattr(live, "_still", counted)
    app, mine = app_of(staffed), staffed.token("org_a")
    tabs = [await watching(staffed, "/search", mine, app) for _ in range(5)]
    other = await watching(staffed, "/search", staffed.token("org_a", sub="another"), app)
    operator = await watching(staffed, "/search", VIEWER, app)
    began = staffed.clock.monotonic()
    await reads.more(3 * round(live.CHECK))
    passed = staffed.clock.monotonic() - began
    assert 2 * 3 <= len(checked) <= 3 * (passed / live.CHECK + 1)
    set_org_state(staffed.database, "org_a", "suspended", actor="tester")
    began = staffed.clock.monotonic()
    for reader in (*tabs, other):
        await reader.end()

    assert staffed.clock.monotonic() - began < 2 * live.CHECK
    assert not operator.task.done()
    await leave(operator)


async def test_a_drain_ends_streams_of_lists_and_takes_no_new_one(
    staffed: Site, reads: Reads, monkeypatch: pytest.MonkeyPatch
):
    health: list[str] = []
    monkeypatch.setattr(Health, "draining", lambda self: bool(health))
    app = app_of(staffed)
    reader = await watching(staffed, "/", VIEWER, app)
    await reads.more(2)
    health.append("stopping")

    await reader.end()
    late = await watching(staffed, "/", VIEWER, app)
    await late.task
    assert late.status == 503


async def test_a_page_watches_with_its_session(staffed: Site):
    address = await stream_of(staffed, "/")
    async with staffed.client() as client:
        assert (await client.head(address)).status_code == 401
        await log_in(client, VIEWER)

        answer = await client.head(address)

    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")


@pytest.mark.parametrize("query", ["", "after=", "after=x", "after=-1", f"after={'9' * 18}", "after=1&of=x"])
async def test_a_place_is_a_number(staffed: Site, query: str):
    reader = Reader(staffed, app_of(staffed), f"/live/overview?{query}", VIEWER)
    await reader.task

    assert reader.status == 400


async def test_only_the_newest_page_of_a_list_has_a_stream(staffed: Site):
    run = make_run(staffed)
    async with logged_in(staffed, VIEWER) as client:
        for page in ("/search", "/orgs/org_a"):
            newest, older = await client.get(page), await client.get(f"{page}?after={run}")

            assert 'data-stream="' in newest.text, page
            assert 'data-stream="' not in older.text, page
            # Without the script it is a link.
            assert re.search(rf'<a class="button" href="{page}">Refresh</a>', newest.text), page
