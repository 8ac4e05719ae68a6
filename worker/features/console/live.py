"""Live: the events of running runs and of lists, for the API and the console's pages (server-sent events).

All streams of a process share one read of the database a second. The stream of a run holds only its
place in the log; the newest lines of each watched run are kept once, encoded, in a window of
bounded size. A stream whose client is slower than that reads the lines that it missed by
itself, in pages. The stream of a list says how much of it is new; see `changes`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from worker.clock import Clock
from worker.errors import (
    AccessDenied,
    Busy,
    NotFound,
    TokenError,
    TooManyRequests,
    Unavailable,
    UsageError,
    WorkerError,
)
from worker.features.console.api.requests import log_place, query_of
from worker.features.console.callers import Caller, CallerDatabase, caller_of, check_started
from worker.features.console.changes import ChangedLists, ChangeWindow, ListFilter, news
from worker.ids import ALL_ORGS, OrgId, RunId
from worker.model.definitions.units import json_default
from worker.store.lists import live, runs
from worker.store.lists.rows import LogRow, Run
from worker.store.redaction import Row
from worker.store.tables import FINAL_STATES

# Seconds between two reads, between two checks of access, and between two comments of a quiet stream.
EVERY = 1.0
CHECK = 15.0
# Reads for each event of a list at most.
READS = 2
# Streams of a process and of one caller; fewer than the connections of a listener.
MAX_STREAMS = 400
MAX_STREAMS_OF_OPERATOR = 250
MAX_STREAMS_OF_ORG = 25
# Lines of one read for each run, and the window of a run, in lines and characters.
LINES = 200
WINDOW_LINES = 500
WINDOW_CHARACTERS = 256 * 1024
# Milliseconds after which a browser connects again.
AGAIN = 3_000

T = TypeVar("T")
Place = tuple[int, int]
# What differs in a line or a state between callers: operators see all, each org its view.
View = str | None
Check = Callable[[], Awaitable[Caller]]


@dataclass(slots=True, eq=False)
class WatchedRun:
    """One watched run: its newest row and lines, each encoded at most once for each view."""

    run: Row
    org_id: OrgId
    # The last line that was read, and the last one before the window.
    read_until: Place
    before: Place = field(init=False)
    streams: int = 0
    lines: deque[tuple[Place, Row, dict[View, bytes]]] = field(default_factory=deque)
    characters: int = 0
    states: dict[View, tuple[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = self.read_until

    def take(self, row: Row, lines: Sequence[Row]) -> None:
        """Take the run's row and its next lines; an end waits until its whole log was read."""
        for line in lines:
            self.read_until = (line["attempt"], line["seq"])
            self.lines.append((self.read_until, line, {}))
            self.characters += len(line["text"])
        while len(self.lines) > WINDOW_LINES or self.characters > WINDOW_CHARACTERS:
            self.before, dropped, _ = self.lines.popleft()
            self.characters -= len(dropped["text"])
        if row != self.run and not (row["state"] in FINAL_STATES and len(lines) >= LINES):
            self.run, self.states = row, {}

    def after(self, place: Place, caller: Caller) -> list[tuple[Place, bytes]] | None:
        """The lines after a place, encoded for this caller; None if the window begins later."""
        if place < self.before:
            return None
        found = []
        for at, line, encoded in reversed(self.lines):
            if at <= place:
                break
            if caller.org not in encoded:
                encoded[caller.org] = _data(caller.sees(LogRow, line))
            found.append((at, encoded[caller.org]))
        return found[::-1]

    def state_of(self, caller: Caller) -> tuple[str, bytes]:
        """The run for this caller, and a digest of it."""
        if caller.org not in self.states:
            row = {name: value for name, value in caller.sees(Run, self.run).items() if name != "progress"}
            data = _data(row)
            self.states[caller.org] = hashlib.sha256(data).hexdigest()[:12], data
        return self.states[caller.org]

    @property
    def ended(self) -> bool:
        return self.run["state"] in FINAL_STATES


@dataclass(slots=True, eq=False)
class OpenAccess:
    """The access of one caller with one token or session: checked once for all of its streams."""

    checked_at: float
    streams: int = 0
    is_over: bool = False


class EventStream(Response):
    """Server-sent events until the source or the client ends; the source is closed in any case."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        # Proxies must not collect the events.
        self.init_headers({"x-accel-buffering": "no"})
        self._source = source
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not sending.done():
                sending.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
        if not sending.cancelled() and (error := sending.exception()) is not None:
            raise error

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._source):
            # First: what is refused is answered as an error.
            body = await anext(self._source)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": body, "more_body": True})
            async for body in self._source:
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Live:
    """The streams of one process. `draining` says whether the process stops: then all streams end."""

    def __init__(
        self, database: CallerDatabase, clock: Clock, draining: Callable[[], bool] = lambda: False
    ) -> None:
        self._database = database
        self._clock = clock
        self._draining = draining
        self._watched: dict[RunId, WatchedRun] = {}
        self._lists = ChangedLists()
        self._of_caller: dict[str, int] = {}
        # By the caller and a digest of what it sent to prove who it is.
        self._accesses: dict[tuple[Caller, bytes], OpenAccess] = {}
        self._streams = 0
        self._reading: asyncio.Task[None] | None = None
        self._turn = asyncio.Event()
        # The turn of lists, which have less to say.
        self._beat = asyncio.Event()

    async def events(self, request: Request) -> Response:
        """The stream of a run, after the log line in `after` or the event in Last-Event-ID.

        Raises:
            NotFound: the caller has no such run.
            TooManyRequests: the caller, or this process, has too many streams.
            Busy: the process stops.
        """
        caller = caller_of(request)
        given = query_of(request, ("after",), "a stream")
        begin = log_place(given.get("after", "0.0")), ""
        place, digest = _last(request.headers.get("last-event-id", "")) or begin

        def work(connection: Connection) -> WatchedRun:
            check_started(connection, caller, request.path_params["run"])
            return WatchedRun(*live.watched(connection, caller.scope(), request.path_params["run"]))

        watched = await self._admitted(caller, work)
        reader = caller.reader_of(watched.run["org"], watched.org_id)
        if watched.ended and digest == watched.state_of(reader)[0]:
            # The client has seen the end. A browser connects again unless it gets a 204.
            return Response(status_code=204)
        return self._response(request, caller, self._events_of_run(reader, watched, place, digest))

    async def list_events(
        self, request: Request, place: str, filter_of: Callable[[Connection], ListFilter]
    ) -> Response:
        """The stream of a list, which says how much of it is new since the place.

        Raises:
            UsageError: the place is not a number.
            TooManyRequests, Busy: as `events`; and what `filter_of` raises.
        """
        caller = caller_of(request)
        if not (place.isascii() and place.isdecimal() and len(place) < 18):
            raise UsageError("after is not a place of a list", fix="open the page again")
        found = await self._admitted(caller, filter_of)
        return self._response(request, caller, self._events_of_list(found, int(place)))

    async def _admitted(self, caller: Caller, work: Callable[[Connection], T]) -> T:
        """What the caller wants to watch, read in its own role, if there is room for one more stream."""
        if self._draining():
            raise Busy("this process is stopping", fix="connect again in a moment")
        self._check_room(caller)
        return await self._database.read(caller, work)

    def _response(self, request: Request, caller: Caller, source: AsyncGenerator[bytes, None]) -> Response:
        if request.method == "HEAD":
            return Response(media_type=EventStream.media_type)
        # A stream does not count as a request that is being answered.
        request.scope.get("release", lambda: None)()
        check: Check | None = request.scope.get("authenticate")
        sent = [request.headers.getlist(name) for name in ("authorization", "cookie")]
        proof = caller, hashlib.sha256(json.dumps(sent).encode()).digest()
        return EventStream(self._stream(proof, source, check))

    def _check_room(self, caller: Caller) -> None:
        most = MAX_STREAMS_OF_OPERATOR if caller.org is None else MAX_STREAMS_OF_ORG
        if self._streams >= MAX_STREAMS or self._of_caller.get(caller.key, 0) >= most:
            raise TooManyRequests(f"{caller.actor} has too many event streams", retry_after=CHECK)

    async def _stream(
        self, proof: tuple[Caller, bytes], source: AsyncGenerator[bytes, None], check: Check | None
    ) -> AsyncGenerator[bytes, None]:
        """What the source has at each turn, until it ends, or the caller's access or the process does."""
        caller = proof[0]
        self._check_room(caller)
        with self._counted(caller), self._checked(proof) as access:
            async with contextlib.aclosing(source):
                yield f"retry: {AGAIN}\n\n".encode()
                spoken_at = self._clock.monotonic()
                async for sent in source:
                    now = self._clock.monotonic()
                    if sent or now - spoken_at >= CHECK:
                        spoken_at = now
                        yield sent or b": \n\n"
                    if self._draining():
                        return
                    if check is not None and now - access.checked_at >= CHECK:
                        access.checked_at = now
                        access.is_over = not await _still(check, caller)
                    if access.is_over:
                        return

    async def _events_of_run(
        self, caller: Caller, found: WatchedRun, place: Place, digest: str
    ) -> AsyncGenerator[bytes, None]:
        """The events of a run, from a place in its log and the state with this digest."""
        with self._following(found) as watched:
            progress: Any = None
            while True:
                turn = self._turn
                while (lines := watched.after(place, caller)) is None:
                    missed = await self._missed(caller, watched, place)
                    place = missed[-1][0] if missed else watched.before
                    if missed:
                        yield b"".join(_event("log", _id(at, digest), data) for at, data in missed)
                # From here to the next `yield` nothing is awaited: lines and state belong together.
                ended = watched.ended
                sent = b"".join(_event("log", _id(at, digest), data) for at, data in lines)
                place = lines[-1][0] if lines else place
                if (given := watched.run["progress"]) != progress and given is not None:
                    progress = given
                    told = {"attempt": watched.run["attempt"], "progress": given}
                    sent += _event("progress", _id(place, digest), _data(told))
                state, data = watched.state_of(caller)
                # The state last: a client that sees the end has seen the whole log.
                if state != digest:
                    digest = state
                    sent += _event("state", _id(place, digest), data)
                yield sent
                if ended:
                    return
                await turn.wait()

    async def _events_of_list(self, which: ListFilter, place: live.Moment) -> AsyncGenerator[bytes, None]:
        """How much of a list is new since the place, at each change of that number."""
        with self._lists.watching(which, place) as watched:
            told = news(0, False)
            while True:
                # Also before the first event: so there is at most one at each beat.
                await self._beat.wait()
                sent = b""
                if (data := self._lists.news(watched, place)) not in (None, told):
                    told = data
                    # The place stays, so that a client that connects again gets the number as of its page.
                    sent = _event("news", str(place), data)
                yield sent

    @contextlib.contextmanager
    def _counted(self, caller: Caller) -> Iterator[None]:
        """Count a stream as long as the block lasts."""
        self._streams += 1
        self._of_caller[caller.key] = self._of_caller.get(caller.key, 0) + 1
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_forever(), name="live")
        try:
            yield
        finally:
            self._streams -= 1
            self._of_caller[caller.key] -= 1
            if not self._of_caller[caller.key]:
                del self._of_caller[caller.key]
            if not self._streams:
                self._reading.cancel()
                self._reading = None

    @contextlib.contextmanager
    def _checked(self, proof: tuple[Caller, bytes]) -> Iterator[OpenAccess]:
        """The access that a stream shares as long as the block lasts."""
        access = self._accesses.setdefault(proof, OpenAccess(self._clock.monotonic()))
        access.streams += 1
        try:
            yield access
        finally:
            access.streams -= 1
            if not access.streams:
                self._accesses.pop(proof, None)

    @contextlib.contextmanager
    def _following(self, found: WatchedRun) -> Iterator[WatchedRun]:
        """Watch a run, with all others who do, as long as the block lasts."""
        run_id = found.run["id"]
        watched = self._watched.setdefault(run_id, found)
        watched.streams += 1
        try:
            yield watched
        finally:
            watched.streams -= 1
            if not watched.streams:
                self._watched.pop(run_id, None)

    async def _missed(self, caller: Caller, watched: WatchedRun, place: Place) -> list[tuple[Place, bytes]]:
        """A page of lines after a place that are not in the window."""
        run_id = watched.run["id"]

        def work(connection: Connection) -> list[tuple[Place, bytes]]:
            lines = runs.lines(connection, caller.scope(), run_id, after=place, limit=WINDOW_LINES)
            return [((line["attempt"], line["seq"]), _data(caller.sees(LogRow, line))) for line in lines]

        return await self._database.read(caller, work)

    async def _read_forever(self) -> None:
        """Read once a second as long as there are streams."""
        for count in itertools.count(1):
            await self._clock.sleep(EVERY)
            places = {id_: (one.org_id, one.read_until) for id_, one in self._watched.items()}
            window = self._lists.window()
            since = None if window is None else window.next_since()
            try:
                rows, lines, changes = await self._database.watch(_read, places, since, window)
            except Unavailable:
                # The streams stay, and the next read may succeed.
                rows, lines, changes = [], [], None
            new: dict[RunId, list[Row]] = {}
            for line in lines:
                new.setdefault(line.pop("run_id"), []).append(line)
            for row in rows:
                if (watched := self._watched.get(row["id"])) is not None:
                    watched.take(row, new.get(row["id"], []))
            if window is not None and since is not None and changes is not None:
                self._lists.take(window, since, changes)
            turn, self._turn = self._turn, asyncio.Event()
            turn.set()
            if count % READS == 0:
                beat, self._beat = self._beat, asyncio.Event()
                beat.set()


def _read(
    connection: Connection, places: live.Places, since: live.Moment | None, window: ChangeWindow | None
) -> tuple[list[Run], list[dict[str, Any]], live.Changes | None]:
    """The watched runs and their next lines; and what happened since then, if somebody looks at a list."""
    rows, lines = live.read(connection, places, LINES) if places else ([], [])
    if since is None or window is None:
        return rows, lines, None
    return rows, lines, live.changes(connection, ALL_ORGS, since, window)


async def _still(check: Check, caller: Caller) -> bool:
    """Whether the caller of a stream still has the access that it began with."""
    try:
        now = await check()
    except (AccessDenied, TokenError, NotFound):
        return False
    except WorkerError:
        # No verdict, such as while the database is away.
        return True
    return (now.org_id, now.role) == (caller.org_id, caller.role)


def _last(text: str) -> tuple[Place, str] | None:
    """The place and the digest in an event's id."""
    parts = text.split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isalnum() for part in parts[:2]):
        return None
    with contextlib.suppress(NotFound):
        return log_place(".".join(parts[:2])), parts[2][:12]
    return None


def _id(place: Place, digest: str) -> str:
    return f"{place[0]}.{place[1]}.{digest}"


def _event(name: str, id_: str, data: bytes) -> bytes:
    return b"event: %b\nid: %b\ndata: %b\n\n" % (name.encode(), id_.encode(), data)


def _data(value: Mapping[str, Any]) -> bytes:
    # JSON has no line breaks outside of its strings, where they are escaped.
    return json.dumps(value, default=json_default).encode()
