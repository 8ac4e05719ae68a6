"""Connections: each phase of a request has a deadline, and whoever waits longest makes room for others."""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from tests.fakes.clock import settle
from worker.kit.web.clients import Addresses
from worker.kit.web.connections import ClientDeadlines, Connection, Connections
from worker.kit.web.responses import ErrorMiddleware, read_body

DEADLINES = ClientDeadlines(headers=5, body=10, idle=75)
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n"


class Timer:
    """A call that is due; the loop's own timer hides it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.fire = call

    def cancel(self) -> None:
        self.fire = lambda: None


class ManualLoop:
    """The running loop, but for its timers: they fire when a test lets time pass."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._now = 0.0
        self._numbers = itertools.count()
        self._timers: list[tuple[float, int, Timer]] = []

    def create_task(self, *given: Any, **named: Any) -> Any:
        return self._loop.create_task(*given, **named)

    def call_later(self, seconds: float, call: Callable[..., object], *given: Any) -> Timer:
        timer = Timer(functools.partial(call, *given))
        heapq.heappush(self._timers, (self._now + seconds, next(self._numbers), timer))
        return timer

    async def pass_time(self, seconds: float) -> None:
        until = self._now + seconds
        while self._timers and self._timers[0][0] <= until:
            self._now, _, timer = heapq.heappop(self._timers)
            timer.fire()
            await settle()
        self._now = until
        await settle()


class Wire(asyncio.Transport):
    """The client's end of a connection: what it was sent, and whether it was closed."""

    def __init__(self, address: str) -> None:
        super().__init__({"peername": (address, 40_000), "sockname": ("127.0.0.1", 8470)})
        self.sent = b""
        self.closed = False
        self.reading = True
        self.protocol: asyncio.Protocol | None = None

    def write(self, data: Any) -> None:
        self.sent += data

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            if self.protocol is not None:
                asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return 0


class Listener:
    """Opens connections to an application, without a socket; `plain` is uvicorn as it comes."""

    def __init__(self, app: ASGIApp, *, plain: bool = False, **limits: Any) -> None:
        self.loop: Any = ManualLoop()
        self.connections = Connections(**limits)
        self._plain = plain
        self._state = ServerState()
        self._config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, timeout_keep_alive=75)

    def open(self, address: str = "192.0.2.1") -> Wire:
        given = (self._config, self._state, {}, self.loop)
        wire = Wire(address)
        made = (
            H11Protocol(*given)
            if self._plain
            else Connection(*given, connections=self.connections, deadlines=DEADLINES)
        )
        wire.protocol = made
        made.connection_made(wire)
        return wire

    async def send(self, wire: Wire, data: bytes) -> None:
        assert wire.protocol is not None
        wire.protocol.data_received(data)
        await settle()


def status_of(wire: Wire) -> list[int]:
    """The status of every response that was sent."""
    return [int(part[:3]) for part in wire.sent.split(b"HTTP/1.1 ")[1:]]


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers at once, whatever of the body has come."""
    await Response("ok")(scope, receive, send)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers when all of the body is there."""
    await Response(await read_body(Request(scope, receive)))(scope, receive, send)


async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
    """Serves for ever."""
    await asyncio.Event().wait()


def once(ready: asyncio.Event, then: ASGIApp) -> ASGIApp:
    """Serves as `then`, once it is ready."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await ready.wait()
        await then(scope, receive, send)

    return app


async def trickle(listener: Listener, wire: Wire, data: bytes, seconds: int) -> None:
    """Send a byte a second, for so long or until the connection is closed."""
    for at in range(seconds):
        if wire.closed:
            return
        await listener.send(wire, data[at : at + 1])
        await listener.loop.pass_time(1)


# ---- deadlines


async def test_a_connection_that_asks_nothing_is_closed_after_5_s():
    listener = Listener(answer)
    wire = listener.open()

    await listener.loop.pass_time(4.9)
    assert not wire.closed
    await listener.loop.pass_time(0.2)

    assert (wire.closed, wire.sent, len(listener.connections)) == (True, b"", 0)


@pytest.mark.parametrize("plain", [True, False], ids=["control", "deadline"])
async def test_headers_that_trickle_in_end_after_5_s_with_408(plain: bool):
    """The control, uvicorn's own protocol, still waits an hour later."""
    listener = Listener(answer, plain=plain)
    wire = listener.open()

    await trickle(listener, wire, GET[:20], 5)
    await listener.loop.pass_time(0)
    closed = wire.closed
    await listener.loop.pass_time(3600)

    assert (closed, wire.closed) == (not plain, not plain)
    assert status_of(wire) == ([] if plain else [408])


@pytest.mark.parametrize("plain", [True, False], ids=["control", "deadline"])
async def test_a_body_that_trickles_in_ends_after_10_s_with_408(plain: bool, emitted):
    ended: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await ErrorMiddleware(echo, lambda *given: None)(scope, receive, send)
        ended.append("app")

    listener = Listener(app, plain=plain)
    wire = listener.open()

    await listener.send(wire, POST)
    await trickle(listener, wire, b"123456789", 9)
    assert not wire.closed
    await listener.loop.pass_time(3600)

    assert wire.closed is not plain
    assert status_of(wire) == ([] if plain else [408])
    assert ended == ([] if plain else ["app"])
    # A client's fault is not reported as one of the application's.
    assert [one.event.name for one in emitted if one.event.name == "web.failed"] == []


async def test_a_408_is_an_error_like_any_other_with_the_same_headers():
    listener = Listener(echo)
    wire = listener.open()

    await listener.send(wire, POST)
    await listener.loop.pass_time(10)

    head, _, body = wire.sent.partition(b"\r\n\r\n")
    assert b'"code": "timeout"' in body
    assert b"connection: close" in head
    assert b"x-content-type-options: nosniff" in head


@pytest.mark.parametrize("plain", [True, False], ids=["control", "deadline"])
async def test_a_body_that_goes_on_after_its_response_ends_too(plain: bool):
    """As after an early 401: uvicorn takes its timer back at every byte that comes."""
    listener = Listener(answer, plain=plain)
    wire = listener.open()

    await listener.send(wire, POST.replace(b"10", b"9999"))
    assert status_of(wire) == [200]
    await trickle(listener, wire, b"x" * 300, 300)

    assert wire.closed is not plain
    assert status_of(wire) == [200]


@pytest.mark.parametrize("plain", [True, False], ids=["control", "deadline"])
async def test_a_connection_whose_body_ended_after_its_response_is_idle(plain: bool):
    listener = Listener(answer, plain=plain)
    wire = listener.open()

    await listener.send(wire, POST)
    await listener.send(wire, b"1234567890")
    await listener.loop.pass_time(74)
    assert not wire.closed
    await listener.loop.pass_time(3600)

    assert wire.closed is not plain


async def test_an_idle_connection_lasts_75_s_and_each_request_begins_them_again():
    listener = Listener(answer)
    wire = listener.open()

    for count in range(1, 4):
        await listener.send(wire, GET)
        await listener.loop.pass_time(74)
        assert (wire.closed, status_of(wire)) == (False, [200] * count)
    await listener.loop.pass_time(2)

    assert wire.closed


async def test_the_headers_of_a_later_request_have_5_s_from_their_first_byte():
    listener = Listener(answer)
    wire = listener.open()

    await listener.send(wire, GET)
    await listener.loop.pass_time(60)
    await listener.send(wire, GET[:5])
    await listener.loop.pass_time(4.9)
    assert not wire.closed
    await listener.loop.pass_time(0.2)

    assert (wire.closed, status_of(wire)) == (True, [200, 408])


async def test_headers_that_were_sent_along_with_a_request_have_5_s_from_its_response():
    listener = Listener(answer)
    wire = listener.open()

    await listener.send(wire, GET + GET[:5])
    await listener.loop.pass_time(5)

    assert (wire.closed, status_of(wire)) == (True, [200, 408])


async def test_each_body_has_a_deadline_of_its_own():
    listener = Listener(answer)
    wire = listener.open()

    await listener.send(wire, POST)
    await listener.loop.pass_time(9)
    # The end of the first body and the head of the next in one piece.
    await listener.send(wire, b"1234567890" + POST)
    await listener.loop.pass_time(9)
    assert not wire.closed
    await listener.loop.pass_time(1)

    assert wire.closed


async def test_a_response_takes_as_long_as_it_takes():
    ready = asyncio.Event()
    listener = Listener(once(ready, answer))
    wire = listener.open()

    await listener.send(wire, GET)
    await listener.loop.pass_time(3600)
    assert not wire.closed
    ready.set()
    await settle()

    assert status_of(wire) == [200]


@pytest.mark.parametrize("head", [GET, POST + b"1234567890"], ids=["get", "post"])
async def test_an_event_stream_has_no_deadline(head: bytes):
    events: asyncio.Queue[bytes] = asyncio.Queue()

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        async def forever() -> Any:
            while True:
                yield await events.get()

        await StreamingResponse(forever(), media_type="text/event-stream")(scope, receive, send)

    listener = Listener(stream)
    wire = listener.open()
    await listener.send(wire, head)

    for count in range(1, 4):
        await listener.loop.pass_time(3600)
        events.put_nowait(b"data: %d\n\n" % count)
        await settle()
        assert wire.sent.count(b"data: ") == count
    assert not wire.closed
    wire.close()
    await settle()


async def test_a_body_that_the_application_has_not_taken_is_not_the_clients_fault():
    go_on = asyncio.Event()
    listener = Listener(once(go_on, echo))
    wire = listener.open()
    await listener.send(wire, POST.replace(b"10", b"100000") + b"x" * 70_000)
    assert not wire.reading

    await listener.loop.pass_time(15)
    assert not wire.closed
    go_on.set()
    await settle()
    await listener.send(wire, b"x" * 30_000)

    assert status_of(wire) == [200]


@pytest.mark.parametrize("plain", [True, False], ids=["control", "closed"])
async def test_an_invalid_body_after_a_response_closes_the_connection_quietly(plain: bool):
    """uvicorn raises into the loop, which logs a traceback for each."""
    listener = Listener(answer, plain=plain)
    wire = listener.open()
    await listener.send(wire, POST.replace(b"content-length: 10", b"transfer-encoding: chunked"))

    raised = False
    try:
        await listener.send(wire, b"no chunk\r\n")
    except Exception:
        raised = True

    assert (raised, wire.closed) == (plain, not plain)


# What a client may send next, sound or not, in pieces of any size.
PIECES = (
    GET,
    POST,
    POST.replace(b"content-length: 10", b"transfer-encoding: chunked"),
    POST.replace(b"10", b"100000"),
    GET.replace(b"host: x", b"host: x\r\nconnection: close"),
    GET.replace(b"host: x", b"host: x\r\nconnection: upgrade\r\nupgrade: websocket"),
    POST.replace(b"host: x", b"host: x\r\nexpect: 100-continue"),
    b"GET / HTTP/1.0\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"1234567890",
    b"5\r\n12345\r\n",
    b"0\r\n\r\n",
    b"\r\n",
    b"\x00\xff",
    b"x" * 70_000,
)
pieces = st.sampled_from(PIECES).flatmap(
    lambda piece: st.integers(1, len(piece)).map(lambda size: piece[:size]) | st.just(piece)
)
steps = st.lists(pieces | st.floats(0.0, 9.0), max_size=12)


@pytest.mark.parametrize("app", [answer, echo], ids=["answers-at-once", "reads-the-body"])
@given(steps=steps)
@settings(max_examples=150, deadline=None)
def test_whatever_a_client_sends_nothing_is_raised_and_the_connection_ends(app: ASGIApp, steps: list[Any]):
    async def sent() -> None:
        listener = Listener(ErrorMiddleware(app), most=2)
        wire = listener.open()
        for step in steps:
            if isinstance(step, float):
                await listener.loop.pass_time(step)
            elif not wire.closed and wire.reading:
                await listener.send(wire, step)
        # Then it sends nothing more: the longest deadline is that of an idle connection.
        await listener.loop.pass_time(DEADLINES.idle)
        assert wire.closed
        assert len(listener.connections) == 0
        # A closed connection that still counted as waiting would be chosen to make room.
        later = [listener.open() for _ in range(3)]
        assert [one.closed for one in later] == [True, False, False]

    asyncio.run(sent())


async def test_what_strangers_send_is_not_logged(caplog):
    listener = Listener(answer)

    await listener.send(listener.open(), b"no HTTP\r\n\r\n")
    await listener.send(listener.open(), PIECES[5])

    assert caplog.records == []


async def test_a_closed_connection_is_counted_by_its_reason(emitted):
    listener = Listener(answer)
    listener.open()
    await listener.loop.pass_time(5)

    [closed] = [one for one in emitted if one.event.name == "web.connection_closed"]
    assert closed.fields == {"reason": "headers"}


# ---- room


async def asked(listener: Listener, wire: Wire) -> bool:
    """Whether a connection is answered."""
    await listener.send(wire, GET)
    return 200 in status_of(wire)


async def test_at_the_limit_who_waits_longest_makes_room():
    listener = Listener(answer, most=3)
    wires = [listener.open() for _ in range(3)]
    # The first has been served since, so the second waits longest.
    assert await asked(listener, wires[0])

    newcomer = listener.open()

    assert [wire.closed for wire in wires] == [False, True, False]
    assert await asked(listener, newcomer)
    assert len(listener.connections) == 3


async def test_idle_slow_headers_and_slow_bodies_all_make_room():
    listener = Listener(echo, most=3)
    slow = [listener.open() for _ in range(3)]
    await listener.send(slow[0], GET[:9])
    await listener.send(slow[1], POST + b"123")
    await asked(listener, slow[2])

    others = [listener.open() for _ in range(3)]

    assert all(wire.closed for wire in slow)
    assert all([await asked(listener, wire) for wire in others])


async def test_a_client_that_does_not_take_its_response_makes_room():
    started = asyncio.Event()

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        started.set()
        await stuck(scope, receive, send)

    listener = Listener(served, most=1)
    wire = listener.open()
    await listener.send(wire, GET)
    assert started.is_set()
    assert wire.protocol is not None
    wire.protocol.pause_writing()

    newcomer = listener.open()

    assert (wire.closed, newcomer.closed) == (True, False)


async def test_who_is_being_served_is_never_closed_and_health_is_answered_beside_them():
    done = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/livez":
            await done.wait()
        await answer(scope, receive, send)

    listener = Listener(app, most=5)
    served = [listener.open() for _ in range(3)]
    for wire in served:
        await listener.send(wire, GET)

    # Idle ones fill the rest, and make room there for each other.
    idle = [listener.open() for _ in range(20)]
    probe = listener.open()
    await listener.send(probe, GET.replace(b"/ ", b"/livez ", 1))
    assert status_of(probe) == [200]
    assert sum(not wire.closed for wire in idle) == 1
    assert len(listener.connections) == 5
    done.set()
    await settle()

    assert [status_of(wire) for wire in served] == [[200]] * 3


async def test_where_all_are_being_served_a_newcomer_is_closed():
    listener = Listener(stuck, most=3)
    served = [listener.open() for _ in range(3)]
    for wire in served:
        await listener.send(wire, GET)

    assert listener.open().closed
    assert not any(wire.closed for wire in served)
    served[0].close()
    await settle()
    assert not listener.open().closed


async def test_an_address_at_its_limit_makes_room_among_its_own_only():
    listener = Listener(answer, per_address=2)
    other = listener.open("192.0.2.9")
    wires = [listener.open("192.0.2.1") for _ in range(4)]

    assert [wire.closed for wire in wires] == [True, True, False, False]
    assert not other.closed
    wires[2].close()
    await settle()
    assert not listener.open("192.0.2.1").closed
    assert not wires[3].closed


async def test_an_address_has_no_limit_where_it_is_off_or_the_address_is_trusted():
    off = Listener(answer, per_address=0)
    trusted = Listener(answer, per_address=2, addresses=Addresses(["192.0.2.0/31"]))

    for listener in (off, trusted):
        wires = [listener.open("192.0.2.1") for _ in range(20)]
        assert not any(wire.closed for wire in wires)


async def test_an_address_whose_connections_are_all_being_served_gets_no_more():
    listener = Listener(stuck, per_address=1)
    await listener.send(listener.open("192.0.2.1"), GET)

    assert listener.open("192.0.2.1").closed
    assert not listener.open("192.0.2.2").closed


async def test_the_addresses_of_one_ipv6_network_share_its_limit():
    listener = Listener(answer, per_address=1)
    other = listener.open("2001:db8:1:3::1")
    first = listener.open("2001:db8:1:2::1")

    assert not listener.open("2001:db8:1:2:ffff::9").closed
    assert (first.closed, other.closed) == (True, False)


async def test_when_the_server_ends_nothing_stays_open():
    listener = Listener(answer)
    wires = [listener.open() for _ in range(3)]

    listener.connections.close()

    assert all(wire.closed for wire in wires)
    assert len(listener.connections) == 0
