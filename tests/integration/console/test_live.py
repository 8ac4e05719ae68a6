"""Event streams: their order, resuming, who may watch, when they end, and their bounds."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from sqlalchemy import insert, update

import worker.features.console.live as live
from tests.integration.console.conftest import TOKENS, Site, log_in, make_run, on_either
from worker.kit.web.health import Health
from worker.operations.orgs import set_org_state
from worker.operations.runs import cancel
from worker.store import orgs, tables

API = "/api/v1"


class Reader:
    """A client of one stream, which reads as fast as it can."""

    def __init__(self, site: Site, app: Any, path: str, token: str, *headers: tuple[str, str]) -> None:
        self.site = site
        self.status = 0
        self.body = b""
        self.left = asyncio.Event()
        given = [("authorization", f"Bearer {token}"), ("accept-encoding", "gzip"), *headers]
        path, _, query = path.partition("?")
        scope = {
            "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "root_path": "",
            "query_string": query.encode(), "headers": [(n.encode(), v.encode()) for n, v in given],
            "client": ("127.0.0.1", 40000), "server": ("127.0.0.1", 8470), "scheme": "http",
            "http_version": "1.1",
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))
        self._asked = False

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])
        self.body += message.get("body", b"")

    @property
    def events(self) -> list[tuple[str, str, Any]]:
        """The events so far: name, id, data."""
        found = []
        for part in self.body.decode().split("\n\n")[:-1]:
            fields = dict(line.split(": ", 1) for line in part.split("\n") if not line.startswith(":"))
            if "event" in fields:
                found.append((fields["event"], fields["id"], json.loads(fields["data"])))
        return found

    @property
    def told(self) -> list[Any]:
        """The events in short: the state, the text of a line, the progress."""
        short = {"state": "state", "log": "text", "progress": "progress", "news": "new"}
        return [data[short[name]] for name, _, data in self.events]

    async def until(self, count: int) -> list[Any]:
        """Let seconds pass until there are so many events."""
        async with asyncio.timeout(20):
            while len(self.events) < count and not self.task.done():
                self.site.clock.advance(live.EVERY)
                await asyncio.sleep(0.01)
        return self.told

    async def end(self) -> list[Any]:
        """Let seconds pass until the server ends the stream."""
        async with asyncio.timeout(20):
            while not self.task.done():
                self.site.clock.advance(live.EVERY)
                await asyncio.sleep(0.01)
        await self.task
        return self.told


def app_of(site: Site) -> Any:
    return site.client()._transport.app  # type: ignore[attr-defined]


def log(site: Site, run: str, *texts: str, first: int = 1, org: str = "org_a") -> None:
    with site.database.transaction() as connection:
        line = {
            "run_id": run, "org_id": orgs.require(connection, org)["id"], "attempt": 1, "level": "info",
            "source": "log", "at": site.database.now(connection),
        }  # fmt: skip
        rows = [line | {"seq": first + number, "text": text} for number, text in enumerate(texts)]
        connection.execute(insert(tables.run_logs), rows)


def progress(site: Site, run: str, value: Any) -> None:
    with site.database.transaction() as connection:
        connection.execute(
            update(tables.live_runs).where(tables.live_runs.c.id == run).values(progress=value)
        )


@on_either
async def test_a_stream_follows_a_run_to_its_end_and_resumes_where_it_stopped(staffed: Site):
    run, app = make_run(staffed), app_of(staffed)
    log(staffed, run, "one", "two")
    reader = Reader(staffed, app, f"{API}/runs/{run}/events", TOKENS["viewer"])
    assert await reader.until(3) == ["one", "two", "waiting"]
    assert reader.headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-encoding" not in reader.headers
    progress(staffed, run, {"done": 1})
    assert await reader.until(4) == ["one", "two", "waiting", {"done": 1}]
    reader.left.set()
    await reader.task

    last = reader.events[-1][1]
    log(staffed, run, "three", first=3)
    cancel(staffed.database, run, actor="tester")
    again = Reader(staffed, app, f"{API}/runs/{run}/events", TOKENS["viewer"], ("last-event-id", last))

    assert await again.end() == ["three", {"done": 1}, "cancelled"]
    after = Reader(
        staffed, app, f"{API}/runs/{run}/events", TOKENS["viewer"], ("last-event-id", again.events[-1][1])
    )
    await after.end()
    assert (after.status, after.body) == (204, b"")


async def test_an_end_waits_for_the_whole_log(staffed: Site, monkeypatch: pytest.MonkeyPatch):
    """Also if the log grows faster than one read takes lines, and the window is small."""
    monkeypatch.setattr(live, "LINES", 3)
    monkeypatch.setattr(live, "WINDOW_LINES", 2)
    run, app = make_run(staffed), app_of(staffed)
    reader = Reader(staffed, app, f"{API}/runs/{run}/events", TOKENS["viewer"])
    assert await reader.until(1) == ["waiting"]
    texts = [f"line {number}" for number in range(11)]
    log(staffed, run, *texts)
    cancel(staffed.database, run, actor="tester")

    assert await reader.end() == ["waiting", *texts, "cancelled"]


@on_either
async def test_all_streams_share_one_read_a_second(staffed: Site, monkeypatch: pytest.MonkeyPatch):
    read = live.live.read
    begun: list[int] = []
    ended: list[int] = []

    def counted(connection: Any, places: live.live.Places, most: int) -> Any:
        begun.append(len(places))
        found = read(connection, places, most)
        ended.append(len(places))
        return found

    monkeypatch.setattr(live.live, "read", counted)
    app, runs = app_of(staffed), [make_run(staffed, org) for org in ("org_a", "org_b")]
    readers = [
        Reader(staffed, app, f"{API}/runs/{run}/events", TOKENS["viewer"]) for run in runs for _ in range(20)
    ]
    for reader in readers:
        await reader.until(1)
    async with asyncio.timeout(20):
        # A read that began before the last stream may still be under way.
        while 2 not in ended:
            staffed.clock.advance(live.EVERY)
            await asyncio.sleep(0.01)
    before = len(ended)
    log(staffed, runs[0], "hello")
    for reader in readers[:20]:
        assert await reader.until(2) == ["waiting", "hello"]
    assert {reader.body.count(b"event: ") for reader in readers[20:]} == {1}
    assert set(ended[before:]) == {2}
    # One for each second that passed, whatever the number of streams.
    assert len(ended[before:]) < 20
    for reader in readers:
        reader.left.set()
        await reader.task
    # No stream, no read.
    async with asyncio.timeout(20):
        while len(ended) < len(begun):
            staffed.clock.advance(live.EVERY)
            await asyncio.sleep(0.01)
    before = len(begun)
    staffed.clock.advance(10)
    await asyncio.sleep(0.05)
    assert begun[before:] == []


@on_either
async def test_an_org_watches_its_runs_only_and_sees_what_its_lists_show(staffed: Site):
    app, token = app_of(staffed), staffed.token("org_a")
    theirs = Reader(staffed, app, f"{API}/runs/{make_run(staffed, 'org_b')}/events", token)
    await theirs.end()
    assert theirs.status == 404

    run = make_run(staffed)
    log(staffed, run, "read /etc/passwd")
    mine = Reader(staffed, app, f"{API}/runs/{run}/events", token)
    both = Reader(staffed, app, f"{API}/runs/{run}/events", TOKENS["viewer"])
    assert await mine.until(2) == ["read <path>", "waiting"]
    assert await both.until(2) == ["read /etc/passwd", "waiting"]
    log(staffed, run, "wrote /etc/passwd", first=2)
    assert (await mine.until(3))[2] == "wrote <path>"
    assert (await both.until(3))[2] == "wrote /etc/passwd"
    for reader in (mine, both):
        reader.left.set()
        await reader.task


async def test_a_stream_ends_when_its_caller_loses_access(staffed: Site):
    app, run = app_of(staffed), make_run(staffed)
    org = Reader(staffed, app, f"{API}/runs/{run}/events", staffed.token("org_a"))
    operator = Reader(staffed, app, f"{API}/runs/{run}/events", TOKENS["viewer"])
    await org.until(1)
    await operator.until(1)
    set_org_state(staffed.database, "org_a", "suspended", actor="tester")

    told = await org.end()

    assert told[0] == "waiting"
    assert await operator.end() == ["waiting", "cancelled"]


async def test_a_stream_ends_within_seconds_of_losing_access_without_an_end_of_the_run(staffed: Site):
    app, run = app_of(staffed), make_run(staffed)
    token = staffed.token("org_a", exp=int(staffed.clock.now().timestamp()) + 60)
    reader = Reader(staffed, app, f"{API}/runs/{run}/events", token)
    await reader.until(1)
    began = staffed.clock.monotonic()

    assert await reader.end() == ["waiting"]

    # The token's leeway included.
    assert staffed.clock.monotonic() - began < 60 + 60 + 2 * live.CHECK


async def test_streams_are_bounded_by_caller_and_process(staffed: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "MAX_STREAMS_OF_ORG", 1)
    monkeypatch.setattr(live, "MAX_STREAMS", 2)
    app, path = app_of(staffed), f"{API}/runs/{make_run(staffed)}/events"
    first = Reader(staffed, app, path, staffed.token("org_a"))
    await first.until(1)
    second = Reader(staffed, app, path, staffed.token("org_a"))
    await second.end()
    assert second.status == 429
    assert b"retry-after" in second.headers
    third = Reader(staffed, app, path, TOKENS["viewer"])
    await third.until(1)
    fourth = Reader(staffed, app, path, TOKENS["admin"])
    await fourth.end()
    assert fourth.status == 429
    first.left.set()
    await first.task
    fifth = Reader(staffed, app, path, staffed.token("org_a"))
    assert await fifth.until(1) == ["waiting"]
    for reader in (third, fifth):
        reader.left.set()
        await reader.task


async def test_a_drain_ends_streams_and_takes_no_new_one(staffed: Site, monkeypatch: pytest.MonkeyPatch):
    health: list[str] = []
    monkeypatch.setattr(Health, "draining", lambda self: bool(health))
    app, path = app_of(staffed), f"{API}/runs/{make_run(staffed)}/events"
    reader = Reader(staffed, app, path, TOKENS["viewer"])
    await reader.until(1)
    health.append("stopping")

    assert await reader.end() == ["waiting"]
    late = Reader(staffed, app, path, TOKENS["viewer"])
    await late.end()
    assert late.status == 503


async def test_a_page_watches_with_its_session_which_never_opens_the_api(staffed: Site):
    run = make_run(staffed)
    cancel(staffed.database, run, actor="tester")
    async with staffed.client() as client:
        await log_in(client, TOKENS["viewer"])

        page = await client.get(f"/runs/{run}/live")
        api = await client.get(f"{API}/runs/{run}/events")

    assert page.headers["content-type"].startswith("text/event-stream")
    assert '"cancelled"' in page.text
    assert api.status_code == 401
